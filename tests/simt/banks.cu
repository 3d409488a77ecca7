// Lines of shared memory whose matrices meet banks twice, and such as do not; copies that are waited for in groups, and too early.
#include "conv_patch.cuh"

#include "buffers.h"

// One warp. x: 32 lines of 32 elements, of which it stores halves; y: piece `lane / 8` of each eight lines, as lanes get it.
template <bool SWIZZLED>
DEVICE void lines(const Buffers& p) {
    const uint32_t lane = threadIdx.x;
    const auto place = [&](uint32_t element) { return shared_at(SWIZZLED ? swizzled<64>(2 * element) : 2 * element); };
    for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t first = (lane + 32 * i) * 8;
        const float* x = p.x + first;
        store_operand(place(first), {floats_to_f16x2(x[0], x[1]), floats_to_f16x2(x[2], x[3]), floats_to_f16x2(x[4], x[5]),
                                     floats_to_f16x2(x[6], x[7])});
    }
    sync_threads();
    uint32_t d[4];
    load_matrices(d, place(lane * 32 + lane / 8 * 8));
    for (int i = 0; i < 4; ++i) {
        p.y[64 * i + 2 * lane] = f16_to_float(static_cast<uint16_t>(d[i]));
        p.y[64 * i + 2 * lane + 1] = f16_to_float(static_cast<uint16_t>(d[i] >> 16));
    }
}

KERNEL(lines_swizzled_f32, Buffers, 32) { lines<true>(p); }
KERNEL(lines_straight_f32, Buffers, 32) { lines<false>(p); }

// One warp copies every second line of 64 bytes: of the other half of the banks nothing.
KERNEL(copies_of_every_second_line_f32, Buffers, 32) {
    float* shared = shared_memory<float>();
    const uint32_t lane = threadIdx.x, at = lane / 4 * 32 + lane % 4 * 4;
    if (lane < 28) copy_async(shared + at, p.x + at, true);
    copies_done();
    for (int i = 0; i < 4; ++i) p.y[at + i] = lane < 28 ? shared[at + i] : 0.0f;
}

// 64 threads, four rounds of 256 elements, copied two rounds ahead to one of three places.
template <int PENDING>
DEVICE void ring(const Buffers& p) {
    float* places = shared_memory<float>();
    const int rounds = int(p.n / 256), i = int(threadIdx.x) * 4;
    const auto ask = [&](int r) {
        if (r < rounds) copy_async(places + r % 3 * 256 + i, p.x + r * 256 + i, true);
        copies_commit();
    };
    ask(0);
    ask(1);
    for (int r = 0; r < rounds; ++r) {
        copies_pending<PENDING>();
        sync_threads();
        ask(r + 2);
        for (int e = 0; e < 4; ++e) p.y[r * 256 + i + e] = places[r % 3 * 256 + (i + e + 37) % 256];
    }
}

KERNEL(ring_right_f32, Buffers, 64) { ring<1>(p); }
KERNEL(ring_waits_for_too_little_f32, Buffers, 64) { ring<2>(p); }
