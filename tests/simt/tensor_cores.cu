// y [16, 8] = y + x [16, K] · w [K, 8], all row-major, by one mma of one warp; right and with misplaced indices.
#include "platform.cuh"

#include "buffers.h"

struct F16 {
    static constexpr int DEPTH = 16;
    DEVICE static uint32_t code(float v) { return float_to_f16(v); }
    DEVICE static void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) { mma_m16n8k16_f16(d, a, b); }
};
struct Bf16 {
    static constexpr int DEPTH = 16;
    DEVICE static uint32_t code(float v) { return float_to_bf16(v); }
    DEVICE static void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) { mma_m16n8k16_bf16(d, a, b); }
};
struct Tf32 {
    static constexpr int DEPTH = 8;
    DEVICE static void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) { mma_m16n8k8_tf32(d, a, b); }
};

// The word of two neighbours along k, or of one tf32.
template <class T>
DEVICE uint32_t word(const float* from, int k, int stride) {
    if constexpr (T::DEPTH == 8) {
        const float v = round_tf32(from[k * stride]);
        uint32_t bits;
        __builtin_memcpy(&bits, &v, 4);
        return bits;
    } else {
        return T::code(from[2 * k * stride]) | T::code(from[(2 * k + 1) * stride]) << 16;
    }
}

enum class Fault { none, swap_a, swap_b, swap_d };

template <class T, Fault FAULT>
DEVICE void product(const Buffers& p) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t a[4], b[2];
    for (int r = 0; r < 4; ++r) {
        const int low = FAULT == Fault::swap_a ? r / 2 : r % 2, high = FAULT == Fault::swap_a ? r % 2 : r / 2;
        a[r] = word<T>(p.x + (g + 8 * low) * T::DEPTH, t + 4 * high, 1);
    }
    for (int r = 0; r < 2; ++r) b[r] = word<T>(p.w + g, t + 4 * (FAULT == Fault::swap_b ? 1 - r : r), 8);
    float d[4];
    for (int r = 0; r < 4; ++r) d[r] = p.y[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2];
    T::mma(d, a, b);
    for (int r = 0; r < 4; ++r) {
        const int row = FAULT == Fault::swap_d ? r % 2 : r / 2, column = FAULT == Fault::swap_d ? r / 2 : r % 2;
        p.y[(g + 8 * row) * 8 + 2 * t + column] = d[r];
    }
}

KERNEL(product_right_f16, Buffers, 32) { product<F16, Fault::none>(p); }
KERNEL(product_right_bf16, Buffers, 32) { product<Bf16, Fault::none>(p); }
KERNEL(product_right_tf32, Buffers, 32) { product<Tf32, Fault::none>(p); }
KERNEL(product_swapped_a_f16, Buffers, 32) { product<F16, Fault::swap_a>(p); }
KERNEL(product_swapped_b_bf16, Buffers, 32) { product<Bf16, Fault::swap_b>(p); }
KERNEL(product_swapped_d_tf32, Buffers, 32) { product<Tf32, Fault::swap_d>(p); }

// A chain of products with different data in each warp: y [warps, 128] += rounds of a·b, all lanes running ahead.
KERNEL(product_chain_f16, Buffers, 256) {
    const uint32_t v = float_to_f16(p.x[threadIdx.x / 32]);
    const uint32_t a[4] = {v | v << 16, v | v << 16, v | v << 16, v | v << 16};
    const uint32_t b[2] = {0x3c003c00u, 0x3c003c00u};
    float d[4] = {}, e[4] = {};
    for (int64_t i = 0; i < p.n; ++i) {
        mma_m16n8k16_f16(d, a, b);
        mma_m16n8k16_f16(e, a, b);
    }
    for (int r = 0; r < 4; ++r) p.y[4 * threadIdx.x + r] = r < 2 ? d[r] : e[r];
}
