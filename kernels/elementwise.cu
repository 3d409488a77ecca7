// Elementwise operations: ReLU and its mask, linear combinations of tensors, filling.
//
// A block works through CHUNK neighbouring elements of one branch of a result, four at a time per thread: one load of
// 16 bytes where the address allows it. Operands that are shared by the branches have a stride of 0 between them.

#include "platform.cuh"

struct ReluParams {
    const float* x;  // [len]
    float* y;        // [len]
    int64_t len;     // all branches
};
static_assert(sizeof(ReluParams) == 24);

struct MaskParams {
    const float* x;            // [M or 1, len]
    const float* reference;    // [M or 1, len]
    float* y;                  // [branches, len]
    int64_t len;               // of one branch
    int64_t x_branch;          // len, or 0 where shared
    int64_t reference_branch;  // len, or 0 where shared
    int32_t branches;          // of the result
    int32_t summed;            // branches that a shared result sums over, else 1
};
static_assert(sizeof(MaskParams) == 56);

struct FillParams {
    const float* value;  // [1]
    float* y;            // [len]
    int64_t len;         // all branches
};
static_assert(sizeof(FillParams) == 24);

// One operand of a linear combination.
struct LinCombTerm {
    const float* x;  // [M or 1, len]
    int64_t branch;  // len, or 0 where shared
    int64_t summed;  // branches that count in each element of the result: M for a sum over the branches, else 1
};
static_assert(sizeof(LinCombTerm) == 24);

// One of the tensors that a launch computes.
struct LinCombSet {
    float* y;        // [branches, len]
    int64_t len;     // of one branch
    int32_t chunks;  // per branch
    int32_t padding;
};
static_assert(sizeof(LinCombSet) == 24);

// What one block does.
struct LinCombPiece {
    int32_t set;
    int32_t chunk;  // counted through all branches of the set
};
static_assert(sizeof(LinCombPiece) == 8);

struct LinCombParams {
    const LinCombSet* sets;      // [sets]
    const LinCombTerm* terms;    // [sets, terms]
    const LinCombPiece* pieces;  // [blocks]; null for a single set, whose chunk is the block
    const float* coefs;          // [terms]
    const float* guard;          // [1]; null: none
    int64_t count;               // terms of each set
};
static_assert(sizeof(LinCombParams) == 48);

constexpr int VECTORS = 2;                  // per thread
constexpr int64_t ROUND = 256 * 4;          // elements that a block of 256 threads takes at a time
constexpr int64_t CHUNK = VECTORS * ROUND;  // elements of a block

struct Four {
    float v[4];
};

DEVICE bool whole_vector(const float* x, int64_t at, int64_t len) {
    return at + 4 <= len && (reinterpret_cast<uintptr_t>(x + at) & 15) == 0;
}

// Elements at..at+4 of [len]; 0 behind the end.
DEVICE Four load(const float* x, int64_t at, int64_t len) {
    if (whole_vector(x, at, len)) {
        const float4 q = *reinterpret_cast<const float4*>(x + at);
        return {{q.x, q.y, q.z, q.w}};
    }
    Four f;
    for (int i = 0; i < 4; i++) f.v[i] = at + i < len ? x[at + i] : 0.0f;
    return f;
}

DEVICE void store(float* y, int64_t at, int64_t len, const Four& f) {
    if (whole_vector(y, at, len)) {
        *reinterpret_cast<float4*>(y + at) = float4{f.v[0], f.v[1], f.v[2], f.v[3]};
        return;
    }
    for (int i = 0; i < 4; i++) {
        if (at + i < len) y[at + i] = f.v[i];
    }
}

// First element of this thread's vector v in a chunk.
DEVICE int64_t element(int64_t chunk, int v) { return chunk * CHUNK + v * ROUND + threadIdx.x * 4; }

// max(x, 0). A NaN stays one, so that a broken network is seen and not hidden.
KERNEL(relu_f32, ReluParams, 256) {
    for (int v = 0; v < VECTORS; v++) {
        const int64_t at = element(blockIdx.x, v);
        Four f = load(p.x, at, p.len);
        for (int i = 0; i < 4; i++) f.v[i] = 0.0f > f.v[i] ? 0.0f : f.v[i];
        store(p.y, at, p.len, f);
    }
}

// x where reference > 0, else 0.
KERNEL(mask_f32, MaskParams, 256) {
    for (int64_t branch = blockIdx.y; branch < p.branches; branch += gridDim.y) {
        Four sum[VECTORS] = {};
        for (int64_t m = branch; m < branch + p.summed; m++) {
            for (int v = 0; v < VECTORS; v++) {
                const int64_t at = element(blockIdx.x, v);
                const Four x = load(p.x + m * p.x_branch, at, p.len);
                const Four r = load(p.reference + m * p.reference_branch, at, p.len);
                for (int i = 0; i < 4; i++) sum[v].v[i] += r.v[i] > 0.0f ? x.v[i] : 0.0f;
            }
        }
        for (int v = 0; v < VECTORS; v++) store(p.y + branch * p.len, element(blockIdx.x, v), p.len, sum[v]);
    }
}

// Σ_i c_i x_i, or x_0 where there is a guard and it is 0. An operand may lie where the result does: a thread writes only what it has read itself.
KERNEL(lin_comb_f32, LinCombParams, 256) {
    const LinCombPiece piece = p.pieces ? p.pieces[blockIdx.x] : LinCombPiece{0, static_cast<int32_t>(blockIdx.x)};
    const LinCombSet set = p.sets[piece.set];
    const int32_t branch = piece.chunk / set.chunks, chunk = piece.chunk % set.chunks;
    Four sum[VECTORS] = {};
    const bool held = p.guard != nullptr && *p.guard == 0.0f;
    for (int64_t t = 0; t < (held ? 1 : p.count); t++) {
        const LinCombTerm term = p.terms[piece.set * p.count + t];
        const float c = held ? 1.0f : p.coefs[t];
        for (int64_t m = branch; m < branch + term.summed; m++) {
            const float* x = term.x + m * term.branch;
            Four f[VECTORS];
            for (int v = 0; v < VECTORS; v++) f[v] = load(x, element(chunk, v), set.len);
            for (int v = 0; v < VECTORS; v++) {
                for (int i = 0; i < 4; i++) sum[v].v[i] = fmaf(c, f[v].v[i], sum[v].v[i]);
            }
        }
    }
    for (int v = 0; v < VECTORS; v++) store(set.y + branch * set.len, element(chunk, v), set.len, sum[v]);
}

KERNEL(fill_f32, FillParams, 256) {
    const float value = *p.value;
    for (int v = 0; v < VECTORS; v++) {
        store(p.y, element(blockIdx.x, v), p.len, Four{{value, value, value, value}});
    }
}
