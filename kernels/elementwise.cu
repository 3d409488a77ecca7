// Elementwise operations: ReLU and its mask, linear combinations of tensors, filling.
//
// A block works through neighbouring elements of one branch of a result, four at a time per thread: one load of 16 or 8 bytes where
// the address allows it. Operands that are shared by the branches have a stride of 0 between them. All operands lie in memory as the
// end of a kernel's name says, but those of linear combinations, of which the 16-bit variants take each operand either way.

#include "quads.cuh"

struct ReluParams {
    const void* x;  // [len]
    void* y;        // [len]
    int64_t len;    // all branches
};
static_assert(sizeof(ReluParams) == 24);

struct MaskParams {
    const void* x;             // [M or 1, len]
    const void* reference;     // [M or 1, len]
    void* y;                   // [branches, len]
    int64_t len;               // of one branch
    int64_t x_branch;          // len, or 0 where shared
    int64_t reference_branch;  // len, or 0 where shared
    int32_t branches;          // of the result
    int32_t summed;            // branches that a shared result sums over, else 1
};
static_assert(sizeof(MaskParams) == 56);

struct FillParams {
    const float* value;  // [1]
    void* y;             // [len]
    int64_t len;         // all branches
};
static_assert(sizeof(FillParams) == 24);

// One operand of a linear combination.
struct LinCombTerm {
    const void* x;   // [M or 1, len]
    int64_t branch;  // len, or 0 where shared
    int32_t summed;  // branches that count in each element of the result: M for a sum over the branches, else 1
    int32_t half;    // whether x takes 16 bits
};
static_assert(sizeof(LinCombTerm) == 24);

// One of the tensors that a launch computes.
struct LinCombSet {
    void* y;         // [branches, len]
    int64_t len;     // of one branch
    int32_t chunks;  // per branch
    int32_t half;    // whether y takes 16 bits
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

constexpr int64_t ROUND = 256 * 4;  // elements that a block of 256 threads takes at a time

// Quads of a thread: 32 bytes.
template <class T>
constexpr int QUADS = sizeof(typename T::Element) == 2 ? 4 : 2;

// First element of this thread's quad `q` in a chunk.
template <class T>
DEVICE int64_t element(int64_t chunk, int q) {
    return chunk * QUADS<T> * ROUND + q * ROUND + threadIdx.x * 4;
}

// Element `at` of branch `m`.
template <class T>
DEVICE const void* branch_of(const void* x, int64_t offset) {
    return static_cast<const typename T::Element*>(x) + offset;
}
template <class T>
DEVICE void* branch_of(void* x, int64_t offset) {
    return static_cast<typename T::Element*>(x) + offset;
}

// max(x, 0). A NaN stays one, so that a broken network is seen and not hidden.
DEVICE float positive(float v) { return 0.0f > v ? 0.0f : v; }

template <class T>
DEVICE void relu(const ReluParams& p) {
    for (int q = 0; q < QUADS<T>; q++) {
        const int64_t at = element<T>(blockIdx.x, q);
        const float4 v = T::unpack(load<T>(p.x, at, p.len));
        store<T>(p.y, at, p.len, float4{positive(v.x), positive(v.y), positive(v.z), positive(v.w)});
    }
}

KERNEL(relu_f32, ReluParams, 256) { relu<StoredF32>(p); }
KERNEL(relu_f16, ReluParams, 256) { relu<StoredF16>(p); }
KERNEL(relu_bf16, ReluParams, 256) { relu<StoredBf16>(p); }

// x where reference > 0, else 0.
template <class T>
DEVICE void mask(const MaskParams& p) {
    for (int64_t branch = blockIdx.y; branch < p.branches; branch += gridDim.y) {
        float4 sum[QUADS<T>] = {};
        for (int64_t m = branch; m < branch + p.summed; m++) {
            const void* of_branch = branch_of<T>(p.x, m * p.x_branch);
            const void* reference = branch_of<T>(p.reference, m * p.reference_branch);
            for (int q = 0; q < QUADS<T>; q++) {
                const int64_t at = element<T>(blockIdx.x, q);
                const float4 x = T::unpack(load<T>(of_branch, at, p.len));
                const float4 r = T::unpack(load<T>(reference, at, p.len));
                sum[q].x += r.x > 0.0f ? x.x : 0.0f;
                sum[q].y += r.y > 0.0f ? x.y : 0.0f;
                sum[q].z += r.z > 0.0f ? x.z : 0.0f;
                sum[q].w += r.w > 0.0f ? x.w : 0.0f;
            }
        }
        void* y = branch_of<T>(p.y, branch * p.len);
        for (int q = 0; q < QUADS<T>; q++) store<T>(y, element<T>(blockIdx.x, q), p.len, sum[q]);
    }
}

KERNEL(mask_f32, MaskParams, 256) { mask<StoredF32>(p); }
KERNEL(mask_f16, MaskParams, 256) { mask<StoredF16>(p); }
KERNEL(mask_bf16, MaskParams, 256) { mask<StoredBf16>(p); }

// Adds c·x to `sum`; x is stored as S.
template <class T, class S>
DEVICE void add_term(float4 (&sum)[QUADS<T>], float c, const void* x, int64_t offset, int32_t chunk, int64_t len) {
    const void* of_branch = branch_of<S>(x, offset);
    typename S::Quad quads[QUADS<T>];
    for (int q = 0; q < QUADS<T>; q++) quads[q] = load<S>(of_branch, element<T>(chunk, q), len);
    for (int q = 0; q < QUADS<T>; q++) {
        const float4 v = S::unpack(quads[q]);
        sum[q].x = fmaf(c, v.x, sum[q].x);
        sum[q].y = fmaf(c, v.y, sum[q].y);
        sum[q].z = fmaf(c, v.z, sum[q].z);
        sum[q].w = fmaf(c, v.w, sum[q].w);
    }
}

// Σ_i c_i x_i, or x_0 where there is a guard and it is 0. An operand may lie where the result does: a thread writes
// only what it has read itself.
template <class T>
DEVICE void lin_comb(const LinCombParams& p) {
    constexpr bool HALVES = sizeof(typename T::Element) == 2;
    const LinCombPiece piece = p.pieces ? p.pieces[blockIdx.x] : LinCombPiece{0, static_cast<int32_t>(blockIdx.x)};
    const LinCombSet set = p.sets[piece.set];
    const int32_t branch = piece.chunk / set.chunks, chunk = piece.chunk % set.chunks;
    float4 sum[QUADS<T>] = {};
    const bool held = p.guard != nullptr && *p.guard == 0.0f;
    for (int64_t t = 0; t < (held ? 1 : p.count); t++) {
        const LinCombTerm term = p.terms[piece.set * p.count + t];
        const float c = held ? 1.0f : p.coefs[t];
        for (int64_t m = branch; m < branch + term.summed; m++) {
            if (HALVES && term.half) {
                add_term<T, T>(sum, c, term.x, m * term.branch, chunk, set.len);
            } else {
                add_term<T, StoredF32>(sum, c, term.x, m * term.branch, chunk, set.len);
            }
        }
    }
    for (int q = 0; q < QUADS<T>; q++) {
        const int64_t at = element<T>(chunk, q);
        if (HALVES && set.half) {
            store<T>(branch_of<T>(set.y, branch * set.len), at, set.len, sum[q]);
        } else {
            store<StoredF32>(branch_of<StoredF32>(set.y, branch * set.len), at, set.len, sum[q]);
        }
    }
}

KERNEL(lin_comb_f32, LinCombParams, 256) { lin_comb<StoredF32>(p); }
KERNEL(lin_comb_f16, LinCombParams, 256) { lin_comb<StoredF16>(p); }
KERNEL(lin_comb_bf16, LinCombParams, 256) { lin_comb<StoredBf16>(p); }

template <class T>
DEVICE void fill(const FillParams& p) {
    const float value = *p.value;
    for (int q = 0; q < QUADS<T>; q++) {
        store<T>(p.y, element<T>(blockIdx.x, q), p.len, float4{value, value, value, value});
    }
}

KERNEL(fill_f32, FillParams, 256) { fill<StoredF32>(p); }
KERNEL(fill_f16, FillParams, 256) { fill<StoredF16>(p); }
KERNEL(fill_bf16, FillParams, 256) { fill<StoredBf16>(p); }
