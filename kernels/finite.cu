// Whether all elements of a list of tensors are finite: one number for the step.
#include "platform.cuh"

struct FinitePiece {
    const uint32_t* x;  // [len], bits of f32
    int64_t len;
};
static_assert(sizeof(FinitePiece) == 16);

struct FiniteParams {
    const FinitePiece* pieces;  // [blocks of the first launch]
    int32_t* partial;           // [pieces]: 1 where all elements are finite
    float* all;                 // [1]
    int64_t count;              // pieces
};
static_assert(sizeof(FiniteParams) == 32);

// Whether `mine` holds in every thread of a block of 256. All threads take part.
DEVICE bool everywhere(bool mine) {
    auto* found = shared_memory<int32_t>();
    if (threadIdx.x == 0) found[0] = 1;
    sync_threads();
    if (!mine) found[0] = 0;  // all who write, write the same
    sync_threads();
    return found[0] != 0;
}

// A block looks through one piece: infinities and NaNs have all bits of the exponent set.
KERNEL(all_finite_pieces_f32, FiniteParams, 256) {
    const FinitePiece piece = p.pieces[blockIdx.x];
    bool finite = true;
    for (int64_t i = threadIdx.x; i < piece.len; i += 256) finite = finite && (piece.x[i] & 0x7f800000u) != 0x7f800000u;
    finite = everywhere(finite);
    if (threadIdx.x == 0) p.partial[blockIdx.x] = finite;
}

KERNEL(all_finite_f32, FiniteParams, 256) {
    bool finite = true;
    for (int64_t i = threadIdx.x; i < p.count; i += 256) finite = finite && p.partial[i] != 0;
    finite = everywhere(finite);
    if (threadIdx.x == 0) *p.all = finite ? 1.0f : 0.0f;
}
