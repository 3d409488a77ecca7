// Patches: the pixels of a tile of a direct convolution, and the part of the image that their taps reach, the halo.
//
// A direct kernel loads the halo of 32 channels into shared memory once, with batch norm and rounding, and takes the
// operands of all taps from there: tap (u, v) of a pixel is a fixed step away from its tap (0, 0). In dgrad with a stride
// the pixels fall into stride² phases, each with taps of its own; a patch has pixels of one phase.
#pragma once

#include "conv_finish.cuh"
#include "conv_prologue.cuh"
#include "tile_product.cuh"

constexpr int PATCH = 128;        // pixels, some of which the result may not have
constexpr int PIXEL = 2 * SLICE;  // bytes of a pixel in shared memory
constexpr int DIRECT_THREADS = 128;
constexpr int CHUNKS = SLICE / 8;  // of eight channels, of a pixel
constexpr int IN_FLIGHT = 4;  // chunks that a thread loads at a time where it has nothing else to do
constexpr int ABREAST = DIRECT_THREADS / CHUNKS;  // pixels that the threads load at a time

// Byte `at` of the block's shared memory, in lines of LINE bytes, lies at `swizzled(at)`: in its line, but pieces of 16 bytes change
// places in it with the number of the 128 bytes where they are. The same piece of eight neighbouring lines, a matrix as it is
// loaded, then meets no bank twice, nor do the pieces that eight neighbouring threads store. Of every second line, the pixels of a
// stride of 2, it meets each bank twice: a line of 64 bytes has half of the banks.
//
// Lines lie in areas that begin at multiples of eight lines. Where `at` goes on by as much, or piece i of a line becomes piece
// i ^ j, so does what is made of it.
template <int LINE>
DEVICE uint32_t swizzled(uint32_t at) {
    static_assert(LINE == 64 || LINE == 128);
    return at ^ (at >> 3 & (LINE - 16));
}
DEVICE uint16_t* shared_at(uint32_t at) { return reinterpret_cast<uint16_t*>(shared_memory<unsigned char>() + at); }

struct Patch {
    int32_t taps_down, taps_across;
    int32_t image;                   // the first
    int32_t down, across;            // its first pixel in the grid of its phase
    int32_t grid_height, grid_width;
    int32_t first_down, first_across;  // where that grid's first pixel lies in the result
    int32_t grid_step;                 // from a pixel of the grid to the next
    int32_t phase_down, phase_across;  // the filter's first pixel of those that the phase has
    int32_t halo_down, halo_across;    // the halo's first pixel in the image
    int32_t halo_step;                 // pixels of the image from one of the halo to the next
    int32_t pixel_step;                // pixels of the halo from one of the patch to the next
};

// Filter pixels in steps of the stride from `phase` on.
DEVICE int32_t taps_from(int32_t phase, int32_t filter, int32_t stride) {
    return phase < filter ? (filter - phase + stride - 1) / stride : 0;
}

// Patch number `number`: neighbours in an image run fastest, phases slowest.
template <Form FORM>
DEVICE Patch patch_of(const ConvProduct& p, uint32_t number) {
    Patch patch;
    patch.across = int32_t(number % p.patches_across) * p.patch_width;
    number /= p.patches_across;
    patch.down = int32_t(number % p.patches_down) * p.patch_height;
    number /= p.patches_down;
    const uint32_t groups = uint32_t(p.images + p.patch_images - 1) / p.patch_images;
    patch.image = int32_t(number % groups) * p.patch_images;
    if constexpr (FORM == Form::DGRAD) {
        const int32_t phase = int32_t(number / groups), stride = p.stride;
        patch.phase_down = phase / stride;
        patch.phase_across = phase - patch.phase_down * stride;
        patch.taps_down = taps_from(patch.phase_down, p.kernel_height, stride);
        patch.taps_across = taps_from(patch.phase_across, p.kernel_width, stride);
        patch.first_down = (patch.phase_down + (stride - 1) * p.pad) % stride;
        patch.first_across = (patch.phase_across + (stride - 1) * p.pad) % stride;
        patch.grid_height = taps_from(patch.first_down, p.grid_height, stride);
        patch.grid_width = taps_from(patch.first_across, p.grid_width, stride);
        patch.grid_step = stride;
        patch.halo_down = (patch.first_down + p.pad) / stride + patch.down - (patch.taps_down - 1);
        patch.halo_across = (patch.first_across + p.pad) / stride + patch.across - (patch.taps_across - 1);
        patch.halo_step = patch.pixel_step = 1;
    } else {
        // A single tap leaves out what lies between the pixels.
        const bool single = p.kernel_height == 1 && p.kernel_width == 1;
        patch.taps_down = p.kernel_height;
        patch.taps_across = p.kernel_width;
        patch.phase_down = patch.phase_across = patch.first_down = patch.first_across = 0;
        patch.grid_height = p.grid_height;
        patch.grid_width = p.grid_width;
        patch.grid_step = 1;
        patch.halo_down = patch.down * p.stride - p.pad;
        patch.halo_across = patch.across * p.stride - p.pad;
        patch.halo_step = single ? p.stride : 1;
        patch.pixel_step = single ? 1 : p.stride;
    }
    return patch;
}

// Pixel `i` of every patch, counted from its first; `image` is negative for those beyond the patch.
struct Pixel {
    int32_t image, down, across;
};
DEVICE Pixel pixel_of(const ConvProduct& p, int i) {
    const int32_t line = i / p.patch_width, image = line / p.patch_height;
    if (image >= p.patch_images) return {-1, 0, 0};
    return {image, line - image * p.patch_height, i - line * p.patch_width};
}

// The same as one number; images and lines are below 256.
DEVICE uint32_t packed(const Pixel& pixel) {
    return pixel.image < 0 ? NO_ROW : uint32_t(pixel.image) << 16 | uint32_t(pixel.down) << 8 | uint32_t(pixel.across);
}
DEVICE Pixel unpacked(uint32_t pixel) {
    if (pixel == NO_ROW) return {-1, 0, 0};
    return {int32_t(pixel >> 16), int32_t(pixel >> 8 & 0xff), int32_t(pixel & 0xff)};
}

// The row of the result, or of dy in wgrad, that is a patch's pixel.
DEVICE uint32_t row_of(const ConvProduct& p, const Patch& patch, const Pixel& pixel) {
    const int32_t image = patch.image + pixel.image;
    const int32_t down = patch.down + pixel.down, across = patch.across + pixel.across;
    const bool inside = pixel.image >= 0 && image < p.images && down < patch.grid_height && across < patch.grid_width;
    if (!inside) return NO_ROW;
    const uint32_t line = uint32_t(image) * uint32_t(p.grid_height) + uint32_t(patch.first_down + down * patch.grid_step);
    return line * uint32_t(p.grid_width) + uint32_t(patch.first_across + across * patch.grid_step);
}

// Where the halo holds a patch's pixel with tap (0, 0), in bytes, before they are swizzled.
DEVICE uint32_t place_of(const ConvProduct& p, const Pixel& pixel, int32_t pixel_step) {
    if (pixel.image < 0) return 0;
    const int32_t line = pixel.image * p.halo_height + pixel.down * pixel_step;
    return uint32_t(line * p.halo_width + pixel.across * pixel_step) * PIXEL;
}

// What the threads load of the image, ABREAST pixels of the halo at a time, each thread eight channels of one.
struct Halo {
    int32_t image, down, across;  // the next pixel
    uint32_t at, pixels;          // its number, and how many there are

    DEVICE void begin(const ConvProduct& p) {
        at = threadIdx.x / CHUNKS;
        pixels = uint32_t(p.patch_images) * uint32_t(p.halo_height) * uint32_t(p.halo_width);
        image = down = 0;
        across = int32_t(at);
        settle(p);
    }
    DEVICE void settle(const ConvProduct& p) {
        while (across >= p.halo_width) {
            across -= p.halo_width;
            ++down;
        }
        while (down >= p.halo_height) {
            down -= p.halo_height;
            ++image;
        }
    }
    // Whether any thread of the block has a pixel left.
    DEVICE bool more() const { return at - threadIdx.x / CHUNKS < pixels; }
    DEVICE void next(const ConvProduct& p) {
        at += ABREAST;
        across += ABREAST;
        settle(p);
    }
    // Whether the image has the pixel, and channels from `channel` on.
    DEVICE bool inside(const ConvProduct& p, const Patch& patch, int32_t channel, uint32_t& offset) const {
        const int32_t n = patch.image + image;
        const int32_t h = patch.halo_down + down * patch.halo_step, w = patch.halo_across + across * patch.halo_step;
        offset = ((uint32_t(n) * uint32_t(p.image_height) + uint32_t(h)) * uint32_t(p.image_width) + uint32_t(w)) *
                     uint32_t(p.image_channels) + uint32_t(channel);
        return at < pixels && n < p.images && uint32_t(h) < uint32_t(p.image_height) &&
               uint32_t(w) < uint32_t(p.image_width) && channel < p.image_channels;
    }
    // `slot`: where in shared memory the halo begins; of so many bytes.
    DEVICE uint32_t bytes() const { return (pixels + 7) / 8 * (8 * PIXEL); }
    DEVICE void put(uint32_t slot, const uint4& coded) const {
        if (at < pixels) store_operand(place(slot), coded);
    }
    DEVICE void copy(uint32_t slot, const uint16_t* from, bool inside) const {
        if (at < pixels) copy_async(place(slot), from, inside);
    }
    DEVICE uint16_t* place(uint32_t slot) const {
        return shared_at(swizzled<PIXEL>(slot + at * PIXEL + threadIdx.x % CHUNKS * 16));
    }
};

// A thread's part of the result. The four warps have 32 pixels each.
template <class Operand, int WIDTH>
struct DirectTile {
    static constexpr int ROWS = PATCH, COLUMNS = WIDTH, THREADS = DIRECT_THREADS, RUN = 8;
    float d[2][WIDTH / 8][4];

    DEVICE void clear() {
        for (int m = 0; m < 2; ++m) {
            for (int n = 0; n < WIDTH / 8; ++n) {
                for (int i = 0; i < 4; ++i) d[m][n][i] = 0.0f;
            }
        }
    }

    template <class F>
    DEVICE void each(F f) {
        const uint32_t thread = again(threadIdx.x);
        const int lane = int(thread % 32), row = int(thread / 32) * 32 + lane / 4, column = lane % 4 * 2;
        for (int m = 0; m < 2; ++m) {
            for (int n = 0; n < WIDTH / 8; ++n) {
                for (int i = 0; i < 4; ++i) {
                    f((m * (WIDTH / 8) + n) * 4 + i, row + 16 * m + 8 * (i / 2), column + 8 * n + i % 2, d[m][n][i]);
                }
            }
        }
    }
};

constexpr int MOST_PATCH_TAPS = DIRECT_THREADS;  // of fprop and dgrad

// The beginning of a block's shared memory.
struct DirectTables {
    uint32_t places[PATCH];       // `place_of`
    FactorTable<SLICE> image[2];  // of the present iteration and the next
    union {
        struct {
            uint32_t pixels[PATCH];        // coordinates in the patch, or NO_ROW
            FactorTable<SLICE> matrix[2];  // as `image`
        } wgrad;
        struct {
            uint32_t halo[MOST_PATCH_TAPS];    // bytes of the halo from tap (0, 0) of a pixel to this
            uint32_t filter[MOST_PATCH_TAPS];  // elements of a filter before the tap's
        } taps;
    };

    DEVICE void describe_places(const ConvProduct& p, int32_t pixel_step) {
        places[threadIdx.x] = place_of(p, pixel_of(p, int(threadIdx.x)), pixel_step);
    }
    // Packs images and lines of at most PATCH each.
    DEVICE void describe_pixels(const ConvProduct& p) {
        wgrad.pixels[threadIdx.x] = packed(pixel_of(p, int(threadIdx.x)));
    }
    // The taps of a patch; `channels`: C.
    template <Form FORM>
    DEVICE void describe_taps(const ConvProduct& p, const Patch& patch, uint32_t channels) {
        const int32_t tap = int32_t(threadIdx.x);
        if (tap >= patch.taps_down * patch.taps_across) return;
        const int32_t down = tap / patch.taps_across, across = tap - down * patch.taps_across;
        // In dgrad taps go up and left, in steps of the stride.
        const int32_t h = FORM == Form::DGRAD ? patch.taps_down - 1 - down : down;
        const int32_t w = FORM == Form::DGRAD ? patch.taps_across - 1 - across : across;
        const int32_t step = FORM == Form::DGRAD ? p.stride : 1;
        const int32_t r = patch.phase_down + down * step, s = patch.phase_across + across * step;
        taps.halo[tap] = uint32_t(h * p.halo_width + w) * PIXEL;
        taps.filter[tap] = uint32_t(r * p.kernel_width + s) * channels;
    }
    DEVICE Pixel pixel(int i) const { return unpacked(wgrad.pixels[i]); }
    // The factors of channels from `first` on in a branch, for what the image is made of.
    template <Form FORM, bool PAIRS>
    DEVICE void describe_image(const ConvProduct& p, Made made, int64_t branch, uint32_t first, uint32_t slot) {
        if (threadIdx.x < SLICE) put_image<FORM, PAIRS>(p, made, branch, first, image[slot], int(threadIdx.x));
    }
    // The same for wgrad's matrix, by another warp.
    DEVICE void describe_matrix(const ConvProduct& p, int64_t branch, uint32_t first, uint32_t slot) {
        if (threadIdx.x < SLICE || threadIdx.x >= 2 * SLICE) return;
        put_matrix(p, branch, first, wgrad.matrix[slot], int(threadIdx.x) - SLICE);
    }
};
static_assert(sizeof(DirectTables) == 3072);
