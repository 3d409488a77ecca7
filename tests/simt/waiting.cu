// Barriers and collectives, right and wrong.
#include "platform.cuh"

#include "buffers.h"

// y[i] = x[(i + 37) mod 256]: every thread reads what a thread of another warp wrote.
template <bool WAIT>
DEVICE void rotate(const Buffers& p) {
    float* s = shared_memory<float>();
    const uint32_t i = threadIdx.x;
    s[i] = p.x[i];
    if constexpr (WAIT) sync_threads();
    p.y[i] = s[(i + 37) % blockDim.x];
}
KERNEL(rotate_right_f32, Buffers, 256) { rotate<true>(p); }
KERNEL(rotate_unsynchronised_f32, Buffers, 256) { rotate<false>(p); }

// The same within a warp.
template <bool WAIT>
DEVICE void rotate_warp(const Buffers& p) {
    float* s = shared_memory<float>();
    const uint32_t i = threadIdx.x;
    s[i] = p.x[i];
    if constexpr (WAIT) sync_warp();
    p.y[i] = s[i / 32 * 32 + (i + 11) % 32];
}
KERNEL(rotate_warp_right_f32, Buffers, 256) { rotate_warp<true>(p); }
KERNEL(rotate_warp_unsynchronised_f32, Buffers, 256) { rotate_warp<false>(p); }

// Rounds that write what the round before still reads: the second barrier is the one that is easily forgotten.
template <bool SECOND>
DEVICE void rounds(const Buffers& p) {
    float* s = shared_memory<float>();
    const uint32_t i = threadIdx.x;
    float v = p.x[i];
    for (int round = 0; round < 4; ++round) {
        s[i] = v;
        sync_threads();
        v = 0.5f * v + s[(i + 37) % blockDim.x];
        if constexpr (SECOND) sync_threads();
    }
    p.y[i] = v;
}
KERNEL(rounds_right_f32, Buffers, 256) { rounds<true>(p); }
KERNEL(rounds_one_barrier_f32, Buffers, 256) { rounds<false>(p); }

// The sum of the block, by shuffles and shared memory.
KERNEL(sum_right_f32, Buffers, 256) {
    float* s = shared_memory<float>();
    float v = p.x[threadIdx.x];
    for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = v;
    sync_threads();
    float sum = 0.0f;
    for (uint32_t i = 0; i < blockDim.x / 32; ++i) sum += s[i];
    p.y[threadIdx.x] = sum;
}

// Shuffles of all three types in a row, so that fast lanes run ahead of slow ones as far as they can.
KERNEL(shuffle_types_f32, Buffers, 256) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t u = shuffle_xor(lane, 1);
    const int32_t i = shuffle_xor(-static_cast<int32_t>(u), 6);
    p.y[threadIdx.x] = shuffle_xor(static_cast<float>(i), 24);
}

KERNEL(barrier_divergent_f32, Buffers, 256) {
    if (threadIdx.x < 40) sync_threads();
    p.y[threadIdx.x] = 1.0f;
}
KERNEL(barrier_two_places_f32, Buffers, 256) {
    if (threadIdx.x < 64) {
        sync_threads();
    } else {
        sync_threads();
    }
    p.y[threadIdx.x] = 1.0f;
}
KERNEL(shuffle_divergent_f32, Buffers, 256) {
    float v = p.x[threadIdx.x];
    if (threadIdx.x % 32 < 16) v = shuffle_xor(v, 1);
    p.y[threadIdx.x] = v;
}
KERNEL(shuffle_against_barrier_f32, Buffers, 256) {
    float v = p.x[threadIdx.x];
    if (threadIdx.x % 32 < 16) v = shuffle_xor(v, 1);
    else sync_threads();
    p.y[threadIdx.x] = v;
}
KERNEL(warp_two_collectives_f32, Buffers, 256) {
    float v = p.x[threadIdx.x];
    if (threadIdx.x % 32 < 16) v = shuffle_xor(v, 1);
    else sync_warp();
    p.y[threadIdx.x] = v;
}
