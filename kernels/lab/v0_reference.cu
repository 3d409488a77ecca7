// Version 0: a thread for each output, products in f32 on the ordinary units. What the others must agree with.
//
// Neighbouring threads have neighbouring output channels of one pixel: they all read the same x, and each weights of
// its own, 9·C elements from its neighbour's.
#include "lab.cuh"

template <bool NORM>
DEVICE void conv(const LabParams& p) {
    const uint32_t i = blockIdx.x * 256 + threadIdx.x, k = i % uint32_t(p.filters), row = i / uint32_t(p.filters);
    const int32_t across = int32_t(row % uint32_t(p.width)), line = int32_t(row / uint32_t(p.width));
    const int32_t down = line % p.height, image = line / p.height;
    if (image >= p.images) return;
    float sum = 0.0f;
    for (int32_t tap = 0; tap < 9; ++tap) {
        const int32_t r = tap / 3, s = tap - 3 * r, h = down + r - 1, w = across + s - 1;
        if (uint32_t(h) >= uint32_t(p.height) || uint32_t(w) >= uint32_t(p.width)) continue;
        const uint16_t* x = p.x + uint32_t((image * p.height + h) * p.width + w) * uint32_t(p.channels);
        const uint16_t* weights = p.w + (k * 9 + uint32_t(tap)) * uint32_t(p.channels);
        for (int32_t c = 0; c < p.channels; ++c) {
            float v = f16_to_float(x[c]);
            if constexpr (NORM) v = f16_to_float(float_to_f16(lab_norm(v, p.scale[c], p.shift[c])));
            sum = fmaf(v, f16_to_float(weights[c]), sum);
        }
    }
    p.y[i] = float_to_f16(sum);
}

KERNEL(lab0_f32, LabParams, 256) { conv<false>(p); }
KERNEL(lab0_norm_f32, LabParams, 256) { conv<true>(p); }
