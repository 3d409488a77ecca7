// What the versions of the backward have in common: the problem, what δ and h are made of, and the sums of dw.
//
// The problem is that of `lab.cuh` with batch norm and ReLU before and behind it, backwards: of dy, the cotangent of
// `relu(bn(y))`, and y, the convolution's output, comes δ, that of y; of δ come dx, the cotangent of h = `relu(bn(x))`,
// and dw, for each branch of images one:
//
//   dx(h, w) = Σ δ(h + 1 - r, w + 1 - s) · w[r, s]        dw[r, s] = Σ δ(h, w) · h(h + r - 1, w + s - 1)
#pragma once

#include "lab.cuh"
#include "last_block.cuh"

// The factors of four channels: δ = g r (m dy − db/n − x̂ dg/n) is affine in dy, where the batch norm of y is positive,
// and in y.
struct alignas(16) LabDeltas {
    float scale[4], shift[4], slope[4], rest[4];
};
// Of h.
struct alignas(16) LabNorms {
    float scale[4], shift[4];
};

struct LabBackParams {
    const uint16_t* dy;        // [M, N, H, W, K] f16
    const uint16_t* y;         // [M, N, H, W, K] f16
    const uint16_t* x;         // [M, N, H, W, C] f16
    const uint16_t* w;         // [K, 3, 3, C] f16
    const LabDeltas* deltas;   // [K / 4]
    const LabNorms* norms;     // [C / 4]
    uint16_t* dx;              // [M, N, H, W, C] f16
    float* dw;                 // [M, K, 3, 3, C]
    float* partial;            // [tiles of dw, splits, elements of a tile]
    uint32_t* arrivals;        // [tiles of dw], zeros
    int32_t images, height, width;  // N, H, W
    int32_t channels, filters;      // C and K, multiples of 8
    int32_t branches;               // M
    // Patches as in `LabParams`, those of a branch, and those of a run.
    int32_t patch_images, patch_height, patch_width;
    int32_t patches, run;
    int32_t splits;        // of the patches of a branch in wgrad
    int32_t wgrad_blocks;  // where blocks have roles
    int32_t unused;
};
static_assert(sizeof(LabBackParams) == 136);

DEVICE float lab_delta(float dy, float y, const LabDeltas& of, int i) {
    const float passes = fmaf(y, of.scale[i], of.shift[i]) > 0.0f ? dy : 0.0f;
    return fmaf(of.slope[i], y, fmaf(of.scale[i], passes, of.rest[i]));
}

// The elements of a branch, of so many channels, that lie before it.
DEVICE int64_t lab_before(const LabBackParams& p, uint32_t branch, int32_t channels) {
    return int64_t(branch) * p.images * p.height * p.width * channels;
}

// The first patch of a part of wgrad's.
DEVICE int32_t lab_part(const LabBackParams& p, uint32_t split) {
    return int32_t(uint32_t(p.patches) * split / uint32_t(p.splits));
}

// A patch, the same for all threads.
DEVICE LabPatch lab_patch_of_block(const LabBackParams& p, int32_t number) {
    const LabPatch patch = lab_patch(p, uint32_t(number));
    return {uniform(patch.image), uniform(patch.down), uniform(patch.across)};
}

// Eight channels of N pixels, the same of all, that wait in registers: dy becomes δ, or x becomes h; what is not there
// becomes zero. Their factors are read once for all.
template <int N>
DEVICE void lab_make_deltas(uint4 (&dy)[N], const uint4 (&y)[N], const bool (&there)[N], const LabDeltas* factors) {
    for (int four = 0; four < 2; ++four) {
        const LabDeltas of = factors[four];
        for (int n = 0; n < N; ++n) {
            const uint32_t mask = there[n] ? 0xffffffffu : 0;
            for (int pair = 0; pair < 2; ++pair) {
                uint32_t& word = four == 0 ? (pair == 0 ? dy[n].x : dy[n].y) : (pair == 0 ? dy[n].z : dy[n].w);
                const uint32_t of_y = four == 0 ? (pair == 0 ? y[n].x : y[n].y) : (pair == 0 ? y[n].z : y[n].w);
                const float2 a = f16x2_to_floats(word), b = f16x2_to_floats(of_y);
                const int i = 2 * pair;
                word = floats_to_f16x2(lab_delta(a.x, b.x, of, i), lab_delta(a.y, b.y, of, i + 1)) & mask;
            }
        }
    }
}
template <int N>
DEVICE void lab_make_norms(uint4 (&x)[N], const bool (&there)[N], const LabNorms* factors) {
    for (int four = 0; four < 2; ++four) {
        const LabNorms of = factors[four];
        for (int n = 0; n < N; ++n) {
            const uint32_t mask = there[n] ? 0xffffffffu : 0;
            for (int pair = 0; pair < 2; ++pair) {
                uint32_t& word = four == 0 ? (pair == 0 ? x[n].x : x[n].y) : (pair == 0 ? x[n].z : x[n].w);
                const float2 v = f16x2_to_floats(word);
                const int i = 2 * pair;
                const float low = lab_norm(v.x, of.scale[i], of.shift[i]);
                word = floats_to_f16x2(low, lab_norm(v.y, of.scale[i + 1], of.shift[i + 1])) & mask;
            }
        }
    }
}

// The factors of all channels, to a block's shared memory: those of δ, then those of h.
template <int THREADS>
DEVICE void lab_load_deltas(const LabBackParams& p, LabDeltas* to) {
    ROLLED
    for (int32_t i = int32_t(threadIdx.x); i < p.filters; i += THREADS) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(p.deltas)[i];
    }
}
template <int THREADS>
DEVICE void lab_load_norms(const LabBackParams& p, LabNorms* to) {
    ROLLED
    for (int32_t i = int32_t(threadIdx.x); i < p.channels / 2; i += THREADS) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(p.norms)[i];
    }
}

// Whether a block is one of wgrad's, which lie evenly among those of dgrad, so that both are about the same part of δ;
// `block`: which of its role.
DEVICE bool lab_is_wgrad(const LabBackParams& p, uint32_t& block) {
    const uint32_t before = uint32_t(uint64_t(blockIdx.x) * uint32_t(p.wgrad_blocks) / gridDim.x);
    const uint32_t with = uint32_t(uint64_t(blockIdx.x + 1) * uint32_t(p.wgrad_blocks) / gridDim.x);
    block = with > before ? before : blockIdx.x - before;
    return with > before;
}

// Of a tile of dw the sum over its splits, of which `d` is one in the first so many threads of the block. True in the
// block that has it, which is the last to arrive. All threads take part, and the beginning of shared memory is
// overwritten.
template <int A, int B>
DEVICE bool lab_sum(const LabBackParams& p, uint32_t tile, uint32_t split, uint32_t threads, float (&d)[A][B]) {
    if (p.splits == 1) return true;
    const uint32_t thread = thread_again();
    float* partial = p.partial + int64_t(tile) * p.splits * (A * B * threads) + thread;
    if (thread < threads) {
        float* to = partial + int64_t(split) * (A * B * threads);
        UNROLLED
        for (int a = 0; a < A; ++a) {
            UNROLLED
            for (int b = 0; b < B; ++b) to[(a * B + b) * threads] = d[a][b];
        }
    }
    if (!last_to_arrive(p.arrivals + tile, uint32_t(p.splits))) return false;
    if (thread >= threads) return true;
    UNROLLED
    for (int a = 0; a < A; ++a) {
        UNROLLED
        for (int b = 0; b < B; ++b) d[a][b] = 0.0f;
    }
    ROLLED
    for (int32_t i = 0; i < p.splits; ++i) {
        UNROLLED
        for (int a = 0; a < A; ++a) {
            UNROLLED
            for (int b = 0; b < B; ++b) d[a][b] += partial[(a * B + b) * threads];
        }
        partial += A * B * threads;
    }
    return true;
}

// Two neighbouring elements of dw.
DEVICE void lab_store_pair(const LabBackParams& p, uint32_t branch, int32_t k, int32_t tap, int32_t c, float low, float high) {
    if (k >= p.filters || c >= p.channels) return;
    const int64_t at = ((int64_t(branch) * p.filters + k) * 9 + tap) * p.channels + c;
    *reinterpret_cast<float2*>(p.dw + at) = {low, high};
}
