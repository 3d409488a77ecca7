// Backward, version 0: a thread for each output, products in f32 on the ordinary units. What the others must agree with.
//
// Neighbouring threads have neighbouring input channels: they all make the same δ, each for itself.
#include "lab_back.cuh"

// Of an element of dy and y, rounded as the others do.
DEVICE float delta_at(const LabBackParams& p, int64_t at, const LabDeltas& of, int i) {
    const float v = lab_delta(f16_to_float(p.dy[at]), f16_to_float(p.y[at]), of, i);
    return f16_to_float(float_to_f16(v));
}

DEVICE void dgrad_of_thread(const LabBackParams& p, uint32_t block) {
    const uint32_t i = block * 256 + threadIdx.x, c = i % uint32_t(p.channels), row = i / uint32_t(p.channels);
    const int32_t across = int32_t(row % uint32_t(p.width)), line = int32_t(row / uint32_t(p.width));
    const int32_t down = line % p.height, image = line / p.height;
    if (image >= p.branches * p.images) return;
    float sum = 0.0f;
    ROLLED
    for (int32_t tap = 0; tap < 9; ++tap) {
        const int32_t r = tap / 3, s = tap - 3 * r, h = down + 1 - r, w = across + 1 - s;
        if (uint32_t(h) >= uint32_t(p.height) || uint32_t(w) >= uint32_t(p.width)) continue;
        const int64_t from = (int64_t(image * p.height + h) * p.width + w) * p.filters;
        const uint16_t* weights = p.w + uint32_t(tap) * uint32_t(p.channels) + c;
        ROLLED
        for (int32_t k = 0; k < p.filters; k += 4) {
            const LabDeltas of = p.deltas[k / 4];
            for (int32_t i = 0; i < 4; ++i) {
                sum = fmaf(delta_at(p, from + k + i, of, i), f16_to_float(weights[uint32_t((k + i) * 9 * p.channels)]), sum);
            }
        }
    }
    p.dx[i] = float_to_f16(sum);
}

// Sums of sums, so that a million terms lose no more than hundreds.
DEVICE void wgrad_of_thread(const LabBackParams& p, uint32_t block) {
    const uint32_t i = block * 256 + threadIdx.x, c = i % uint32_t(p.channels), of_tap = i / uint32_t(p.channels);
    const int32_t tap = int32_t(of_tap % 9), k = int32_t(of_tap / 9 % uint32_t(p.filters));
    const int32_t branch = int32_t(of_tap / 9 / uint32_t(p.filters));
    if (branch >= p.branches) return;
    const int32_t r = tap / 3 - 1, s = tap % 3 - 1;
    const float scale = p.norms[c / 4].scale[c % 4], shift = p.norms[c / 4].shift[c % 4];
    // Its own is the first.
    const LabDeltas& all = p.deltas[k / 4];
    const LabDeltas of = {{all.scale[k % 4]}, {all.shift[k % 4]}, {all.slope[k % 4]}, {all.rest[k % 4]}};
    float sum = 0.0f;
    ROLLED
    for (int32_t image = branch * p.images; image < (branch + 1) * p.images; ++image) {
        float of_image = 0.0f;
        ROLLED
        for (int32_t down = r < 0 ? 1 : 0; down < p.height - (r > 0 ? 1 : 0); ++down) {
            float of_line = 0.0f;
            ROLLED
            for (int32_t across = s < 0 ? 1 : 0; across < p.width - (s > 0 ? 1 : 0); ++across) {
                const int64_t row = int64_t(image * p.height + down) * p.width + across;
                const float x = f16_to_float(p.x[(row + r * p.width + s) * p.channels + c]);
                const float h = lab_norm(x, scale, shift);
                of_line = fmaf(delta_at(p, row * p.filters + k, of, 0), f16_to_float(float_to_f16(h)), of_line);
            }
            of_image += of_line;
        }
        sum += of_image;
    }
    p.dw[i] = sum;
}

KERNEL(lab_back0_f32, LabBackParams, 256) {
    uint32_t block;
    if (lab_is_wgrad(p, block)) {
        wgrad_of_thread(p, block);
    } else {
        dgrad_of_thread(p, block);
    }
}
