// Network input from images of bytes: crop, flip, normalisation.

#include "platform.cuh"

struct AugmentParams {
    const uint8_t* pixels;  // [images, C, H, W]
    const float* table;     // [C, 256]: the normalised value of every byte
    const int32_t* crops;   // [k, 4]: image, row and column of the window's corner in the image, 1 to mirror
    float* out;             // [k, H, W, C]
    int32_t channels;
    int32_t height;
    int32_t width;
    int32_t samples;
};
static_assert(sizeof(AugmentParams) == 48, "as in images.rs");

// One thread per value of the result. Outside the image pixels are 0, before normalisation.
KERNEL(augment_u8_f32, AugmentParams, 256) {
    const int64_t plane = int64_t(p.height) * p.width;
    const int64_t image = plane * p.channels;
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= image * p.samples) return;
    const int32_t sample = int32_t(i / image);
    const int32_t at = int32_t(i % image);
    const int32_t c = at % p.channels;
    const int32_t x = (at / p.channels) % p.width;
    const int32_t y = at / p.channels / p.width;
    const int32_t* crop = p.crops + 4 * int64_t(sample);
    const int32_t row = y + crop[1];
    const int32_t column = (crop[3] != 0 ? p.width - 1 - x : x) + crop[2];
    uint8_t pixel = 0;
    if (row >= 0 && row < p.height && column >= 0 && column < p.width) {
        pixel = p.pixels[crop[0] * image + c * plane + int64_t(row) * p.width + column];
    }
    p.out[i] = p.table[c * 256 + pixel];
}
