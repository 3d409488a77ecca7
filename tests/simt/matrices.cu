// Matrices from shared memory, and copies to it; right, and read too early or from where no row begins.
#include "platform.cuh"

#include "buffers.h"

// x: four matrices [8, 8]; y: what the lanes of a warp get, ordered as [matrix, lane / 4, 2·(lane % 4) + half of the word].
template <bool TRANSPOSED>
DEVICE void matrices(const Buffers& p, int shift) {
    uint16_t* shared = shared_memory<uint16_t>();
    shared[threadIdx.x] = float_to_f16(p.x[threadIdx.x]);
    sync_threads();
    const int lane = threadIdx.x % 32;
    uint32_t d[4];
    if constexpr (TRANSPOSED) {
        load_matrices_transposed(d, shared + 8 * lane + shift);
    } else {
        load_matrices(d, shared + 8 * lane + shift);
    }
    if (threadIdx.x >= 32) return;
    for (int i = 0; i < 4; ++i) {
        p.y[64 * i + 2 * lane] = f16_to_float(static_cast<uint16_t>(d[i]));
        p.y[64 * i + 2 * lane + 1] = f16_to_float(static_cast<uint16_t>(d[i] >> 16));
    }
}

KERNEL(matrices_right_f32, Buffers, 256) { matrices<false>(p, 0); }
KERNEL(matrices_transposed_f32, Buffers, 256) { matrices<true>(p, 0); }
KERNEL(matrices_unaligned_f32, Buffers, 256) { matrices<false>(p, 4); }

// The first 64 threads copy four elements each, every third zeros; all read what others copied.
DEVICE void copies(const Buffers& p, bool waits) {
    float* shared = shared_memory<float>();
    const int i = threadIdx.x;
    if (i < 64) copy_async(shared + 4 * i, p.x + 4 * i, i % 3 != 0);
    if (waits) copies_done();
    sync_threads();
    p.y[i] = shared[(i + 37) % 256];
}

KERNEL(copies_right_f32, Buffers, 256) { copies(p, true); }
KERNEL(copies_read_too_early_f32, Buffers, 256) { copies(p, false); }
