// Whether all elements of a list of tensors are finite: one number for the step.
#include "last_block.cuh"
#include "quads.cuh"

struct FinitePiece {
    const float* x;  // [len]
    int64_t len;     // at most ROUNDS * 1024
};
static_assert(sizeof(FinitePiece) == 16);

struct FiniteParams {
    const FinitePiece* pieces;  // [blocks]
    int32_t* partial;           // [blocks]: 1 where all elements are finite
    uint32_t* arrivals;         // [1]
    float* all;                 // [1]
};
static_assert(sizeof(FiniteParams) == 32);

constexpr int ROUNDS = 4;

// Whether `mine` holds in every thread of a block of 256. All threads take part.
DEVICE bool everywhere(bool mine) {
    auto* found = shared_memory<int32_t>();
    if (threadIdx.x == 0) found[0] = 1;
    sync_threads();
    if (!mine) found[0] = 0;  // all who write, write the same
    sync_threads();
    return found[0] != 0;
}

// False for infinities and for what is no number.
DEVICE bool is_finite(float v) { return fabsf(v) <= 0x1.fffffep127f; }

// A block looks through one piece; the last to arrive has the answer.
KERNEL(all_finite_f32, FiniteParams, 256) {
    const FinitePiece piece = p.pieces[blockIdx.x];
    float4 v[ROUNDS];
    UNROLLED
    for (int q = 0; q < ROUNDS; q++) v[q] = load<StoredF32>(piece.x, q * 1024 + threadIdx.x * 4, piece.len);
    bool finite = true;
    UNROLLED
    for (int q = 0; q < ROUNDS; q++) {
        finite &= is_finite(v[q].x) & is_finite(v[q].y) & is_finite(v[q].z) & is_finite(v[q].w);
    }
    finite = everywhere(finite);
    if (threadIdx.x == 0) p.partial[blockIdx.x] = finite;
    if (!last_to_arrive(p.arrivals, gridDim.x)) return;
    bool all = true;
    for (uint32_t i = threadIdx.x; i < gridDim.x; i += 256) all &= p.partial[i] != 0;
    all = everywhere(all);
    if (threadIdx.x == 0) *p.all = all ? 1.0f : 0.0f;
}
