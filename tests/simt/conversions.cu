// Conversions of [n] bit patterns; results as bit patterns.
#include "platform.cuh"

#include "buffers.h"

template <class F>
DEVICE void each(const Buffers& p, F convert) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < p.n) reinterpret_cast<uint32_t*>(p.y)[i] = convert(p.x[i]);
}

DEVICE uint32_t bits_of(float v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    return bits;
}

KERNEL(to_f16_f32, Buffers, 256) {
    each(p, [](float v) { return static_cast<uint32_t>(float_to_f16(v)); });
}
KERNEL(to_bf16_f32, Buffers, 256) {
    each(p, [](float v) { return static_cast<uint32_t>(float_to_bf16(v)); });
}
KERNEL(to_tf32_f32, Buffers, 256) {
    each(p, [](float v) { return bits_of(round_tf32(v)); });
}
KERNEL(from_f16_u16, Buffers, 256) {
    each(p, [](float v) { return bits_of(f16_to_float(static_cast<uint16_t>(bits_of(v)))); });
}
KERNEL(from_bf16_u16, Buffers, 256) {
    each(p, [](float v) { return bits_of(bf16_to_float(static_cast<uint16_t>(bits_of(v)))); });
}
// An mma whose first row and column are a number and one: the tensor core's own reading of f16.
KERNEL(mma_reads_f16, Buffers, 32) {
    const uint32_t lane = threadIdx.x;
    const int64_t i = blockIdx.x;
    uint32_t a[4] = {}, b[2] = {};
    if (lane == 0) a[0] = bits_of(p.x[i]);
    if (lane == 0) b[0] = 0x3c00u;
    float d[4] = {};
    mma_m16n8k16_f16(d, a, b);
    if (lane == 0) p.y[i] = d[0];
}
