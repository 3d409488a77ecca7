// What the versions have in common: the forward problem, and the patches into which all but the first two divide it.
//
// That is the convolution that a step does most: 3 × 3, stride 1, padding 1, f16 operands and result, f32 sums.
#pragma once

#include "platform.cuh"

struct LabParams {
    const uint16_t* x;   // [N, H, W, C] f16
    const uint16_t* w;   // [K, 3, 3, C] f16
    uint16_t* y;         // [N, H, W, K] f16
    const float* scale;  // [C] of the batch norm, for the versions that have one
    const float* shift;  // [C]
    int32_t images, height, width;  // N, H, W
    int32_t channels, filters;      // C and K, multiples of 8
    // A patch has pixels of neighbouring images, the same of each: 128 at most, and 288 with those around them.
    int32_t patch_images, patch_height, patch_width;
    int32_t patches, run;  // in all, and those that a block of version 5 works on
    int32_t unused;
};
static_assert(sizeof(LabParams) == 88);

constexpr uint32_t NOWHERE = 0xffffffffu;

// `relu(bn(x))`, which padding does not get: zeros stay zeros.
DEVICE float lab_norm(float x, float scale, float shift) {
    const float v = fmaf(x, scale, shift);
    return 0.0f > v ? 0.0f : v;
}

// Tiles of so many output channels. Blocks of one patch are neighbours.
template <class Params>
DEVICE uint32_t lab_tiles(const Params& p, uint32_t columns) { return (uint32_t(p.filters) + columns - 1) / columns; }

// The first pixel of a patch.
struct LabPatch {
    int32_t image, down, across;
};
template <class Params>
DEVICE LabPatch lab_patch(const Params& p, uint32_t number) {
    LabPatch patch;
    const uint32_t patches_across = uint32_t(p.width + p.patch_width - 1) / uint32_t(p.patch_width);
    const uint32_t patches_down = uint32_t(p.height + p.patch_height - 1) / uint32_t(p.patch_height);
    patch.across = int32_t(number % patches_across) * p.patch_width;
    number /= patches_across;
    patch.down = int32_t(number % patches_down) * p.patch_height;
    patch.image = int32_t(number / patches_down) * p.patch_images;
    return patch;
}

// Pixel `i` of every patch, counted from its first; beyond the patch `image` is `patch_images` or more.
struct LabPixel {
    int32_t image, down, across;
};
template <class Params>
DEVICE LabPixel lab_pixel(const Params& p, int32_t i) {
    const int32_t line = i / p.patch_width, image = line / p.patch_height;
    return {image, line - image * p.patch_height, i - line * p.patch_width};
}
// Its number among those of x and y; NOWHERE if they do not have it.
template <class Params>
DEVICE uint32_t lab_row(const Params& p, const LabPatch& patch, const LabPixel& pixel) {
    const int32_t n = patch.image + pixel.image, h = patch.down + pixel.down, w = patch.across + pixel.across;
    const bool there = pixel.image < p.patch_images && n < p.images && h < p.height && w < p.width;
    return there ? (uint32_t(n) * uint32_t(p.height) + uint32_t(h)) * uint32_t(p.width) + uint32_t(w) : NOWHERE;
}
// Where the halo holds its tap (0, 0): a number of pixels.
template <class Params>
DEVICE int32_t lab_place(const Params& p, const LabPixel& pixel) {
    if (pixel.image >= p.patch_images) return 0;
    return (pixel.image * (p.patch_height + 2) + pixel.down) * (p.patch_width + 2) + pixel.across;
}

// A walk over the pixels of a halo, those of the patch and one more on each side: the thread's first is its own number
// divided by 4, since four threads share a pixel; every step goes ABREAST further.
template <int ABREAST>
struct LabHalo {
    int32_t at, pixels;
    int32_t image, down, across;
    int32_t step_image, step_down, step_across;  // ABREAST as such coordinates

    template <class Params>
    DEVICE void begin(const Params& p) {
        const int32_t height = p.patch_height + 2, width = p.patch_width + 2;
        at = int32_t(threadIdx.x) / 4;
        pixels = p.patch_images * height * width;
        image = at / width / height;
        down = at / width % height;
        across = at % width;
        step_image = ABREAST / width / height;
        step_down = ABREAST / width % height;
        step_across = ABREAST % width;
    }
    // Whether any thread of the block has a pixel left.
    DEVICE bool more() const { return at - int32_t(threadIdx.x) / 4 < pixels; }
    template <class Params>
    DEVICE void next(const Params& p) {
        at += ABREAST;
        across += step_across;
        down += step_down;
        image += step_image;
        if (across >= p.patch_width + 2) {
            across -= p.patch_width + 2;
            ++down;
        }
        if (down >= p.patch_height + 2) {
            down -= p.patch_height + 2;
            ++image;
        }
    }
    // The element of x from `channel` on; NOWHERE if x does not have it.
    template <class Params>
    DEVICE uint32_t offset(const Params& p, const LabPatch& patch, int32_t channel) const {
        const int32_t n = patch.image + image, h = patch.down + down - 1, w = patch.across + across - 1;
        const bool there = at < pixels && n < p.images && uint32_t(h) < uint32_t(p.height) &&
                           uint32_t(w) < uint32_t(p.width) && channel < p.channels;
        const uint32_t row = (uint32_t(n) * uint32_t(p.height) + uint32_t(h)) * uint32_t(p.width) + uint32_t(w);
        return there ? row * uint32_t(p.channels) + uint32_t(channel) : NOWHERE;
    }
};
