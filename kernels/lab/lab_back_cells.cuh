// Patches of four cells of 8 × 8 pixels in shared memory, of the backward's versions with products of warpgroups: see
// `v6_wgmma.cu`.
#pragma once

#include "lab_back.cuh"

constexpr int CELL_THREADS = 256, CELL_SLICE = 32, CELL_PARTS = CELL_SLICE / 8;
constexpr uint32_t GRANULE_BYTES = 16;  // eight channels of a pixel
constexpr int CELL_PATCH = 256;         // pixels

// A pixel of what is loaded: counted from its first, and the granule of its first channels in a slot.
struct alignas(8) CellPlace {
    uint16_t image, down, across, granule;
};

// Pixels of a patch's images in shared memory: so many lines and columns of each, beginning so many above and left of
// the patch. Line by line, for each eight channels the line's pixels.
struct CellArea {
    uint32_t height, width;
    int32_t border;
    uint32_t pitch, pixels;  // granules from a part to the next; pixels of all images

    DEVICE CellArea(const LabBackParams& p, int32_t height, int32_t width, int32_t border)
        : height(uint32_t(height)), width(uint32_t(width)), border(border), pitch(uint32_t(p.patch_width) + 2),
          pixels(uint32_t(p.patch_images * height * width)) {}
    DEVICE uint32_t line() const { return CELL_PARTS * pitch; }
    DEVICE uint32_t bytes() const { return pixels / width * line() * GRANULE_BYTES; }
    DEVICE uint32_t places() const { return (pixels + 1) / 2 * 2; }
    DEVICE void describe(CellPlace* places) const {
        ROLLED
        for (uint32_t at = threadIdx.x; at < pixels; at += CELL_THREADS) {
            const uint32_t lines = at / width, image = lines / height, across = at - lines * width;
            places[at] = {uint16_t(image), uint16_t(lines - image * height), uint16_t(across), uint16_t(lines * line() + across)};
        }
    }
};

// Pixel `i` of a patch: of cell i / 64.
DEVICE LabPixel cell_pixel(const LabBackParams& p, int32_t i) {
    const int32_t across = p.patch_width / 8, down = p.patch_height / 8, cells = i / 64 / across;
    return {cells / down, cells % down * 8 + i % 64 / 8, i / 64 % across * 8 + i % 8};
}

// What is loaded of a patch: granules of PARTS times eight channels, from channel `slice` on of `channels`.
struct CellSource {
    const uint16_t *from, *with;  // dy and y, or x and nothing
    int32_t slice, channels;
};

// Loads the pixels at `places`, each PARTS granules `pitch` apart, into `slot`: δ of dy and y, or h of x; a thread
// FLIGHT granules at a time.
template <bool DELTA, int PARTS, int FLIGHT, class Factors>
DEVICE void cell_fill(const LabBackParams& p, const LabPatch& of, const CellPlace* places, uint32_t pixels, int32_t border, uint32_t pitch,
                      const CellSource& source, const Factors* factors, unsigned char* slot) {
    constexpr uint32_t ABREAST = CELL_THREADS / PARTS;
    const uint32_t thread = thread_again(), part = thread % PARTS, own = thread / PARTS;
    const uint32_t channel = uint32_t(source.slice) + part * 8;
    // Of channels that there are not nothing is read.
    const int32_t images = channel < uint32_t(source.channels) ? p.images : 0;
    factors += (images > 0 ? channel : 0) / 4;
    slot += part * pitch * GRANULE_BYTES;
    ROLLED
    for (uint32_t at = own; at - own < pixels; at += FLIGHT * ABREAST) {
        uint4 eights[FLIGHT], others[FLIGHT];
        bool there[FLIGHT];
        uint32_t granules[FLIGHT] = {};
        for (int i = 0; i < FLIGHT; ++i) {
            const uint32_t pixel = at + i * ABREAST;
            const CellPlace place = places[pixel < pixels ? pixel : 0];
            granules[i] = place.granule;
            const int32_t n = of.image + place.image, h = of.down + place.down - border, w = of.across + place.across - border;
            there[i] = pixel < pixels && n < images && uint32_t(h) < uint32_t(p.height) && uint32_t(w) < uint32_t(p.width);
            const uint32_t row = (uint32_t(n) * uint32_t(p.height) + uint32_t(h)) * uint32_t(p.width) + uint32_t(w);
            const uint32_t from = row * uint32_t(source.channels) + channel;
            eights[i] = there[i] ? *reinterpret_cast<const uint4*>(source.from + from) : uint4{};
            if constexpr (DELTA) others[i] = there[i] ? *reinterpret_cast<const uint4*>(source.with + from) : uint4{};
        }
        if constexpr (DELTA) {
            lab_make_deltas(eights, others, there, factors);
        } else {
            lab_make_norms(eights, there, factors);
        }
        for (int i = 0; i < FLIGHT; ++i) {
            if (at + i * ABREAST < pixels) store_operand(slot + granules[i] * GRANULE_BYTES, eights[i]);
        }
    }
}

// The weights of a slice of 32 filters by WIDTH channels, tap by tap: for each eight channels the granules of all filters.
template <int WIDTH>
struct BackWeights {
    static constexpr int LINE = WIDTH / 8, PITCH = CELL_SLICE + (WIDTH == 64 ? 1 : 2), TAP = LINE * PITCH;

    static DEVICE uint64_t matrix(const unsigned char* at) {
        return wgmma_matrix(shared_address(at), 8 * GRANULE_BYTES, PITCH * GRANULE_BYTES);
    }
    static DEVICE void fill(const LabBackParams& p, int32_t slice, int32_t column, unsigned char* slot) {
        const int32_t thread = int32_t(thread_again()), along = thread % LINE, c = column + along * 8;
        ROLLED
        for (int32_t i = thread / LINE; i < 9 * CELL_SLICE; i += CELL_THREADS / LINE) {
            const int32_t tap = i / CELL_SLICE, k = slice + i % CELL_SLICE;
            const bool there = c < p.channels && k < p.filters;
            const uint16_t* from = there ? p.w + ((k * 9 + tap) * p.channels + c) : p.w;
            copy_async(slot + (tap * TAP + along * PITCH + i % CELL_SLICE) * GRANULE_BYTES, from, there);
        }
    }
};

// Where the pixels of a patch are in it: image, line and column, or NOWHERE.
DEVICE void cell_describe_pixels(const LabBackParams& p, uint32_t* pixels) {
    const LabPixel mine = cell_pixel(p, int32_t(threadIdx.x));
    pixels[threadIdx.x] = mine.image < p.patch_images ? uint32_t(mine.image << 16 | mine.down << 8 | mine.across) : NOWHERE;
}

// What two cells of a patch came to, packed, and its way to dx.
template <int WIDTH>
struct CellPacked {
    uint32_t of[2][2][WIDTH / 8];

    DEVICE void pack(const float (&d)[2][WIDTH / 2]) {
        for (int m = 0; m < 2; ++m) {
            for (int half = 0; half < 2; ++half) {
                for (int n = 0; n < WIDTH / 8; ++n) {
                    of[m][half][n] = floats_to_f16x2(d[m][4 * n + 2 * half], d[m][4 * n + 2 * half + 1]);
                }
            }
        }
    }
    DEVICE void store(const LabBackParams& p, uint16_t* dx, const LabPatch& patch, const uint32_t* pixels, int32_t column) const {
        const uint32_t own = thread_again();
        for (int m = 0; m < 2; ++m) {
            for (int half = 0; half < 2; ++half) {
                const uint32_t at = pixels[own / 128 * 128 + m * 64 + own / 32 % 4 * 16 + own % 32 / 4 + 8 * half];
                const LabPixel in_patch = {int32_t(at >> 16), int32_t(at >> 8 & 0xff), int32_t(at & 0xff)};
                const uint32_t row = at == NOWHERE ? NOWHERE : lab_row(p, patch, in_patch);
                if (row == NOWHERE) continue;
                for (int n = 0; n < WIDTH / 8; ++n) {
                    const uint32_t c = uint32_t(column) + 8 * n + own % 4 * 2;
                    uint32_t* to = reinterpret_cast<uint32_t*>(dx + row * uint32_t(p.channels) + c);
                    if (c < uint32_t(p.channels)) *to = of[m][half][n];
                }
            }
        }
    }
};

// The products of a slice of 32 channels of δ with all taps, for two cells whose first pixels' first taps are at `corners`.
template <int WIDTH>
DEVICE void cell_dgrad(float (&d)[2][WIDTH / 2], const CellArea& area, uint64_t halo, const uint32_t (&corners)[2], uint64_t weights) {
    for (uint32_t tap = 0; tap < 9; ++tap) {
        for (uint32_t k = 0; k < CELL_SLICE / 16; ++k) {
            const uint32_t step = (2 - tap / 3) * area.line() + 2 - tap % 3 + 2 * k * area.pitch;
            const uint64_t matrix = wgmma_behind(weights, tap * BackWeights<WIDTH>::TAP + 16 * k);
            for (int m = 0; m < 2; ++m) wgmma_f16<false, true>(d[m], wgmma_behind(halo, corners[m] + step), matrix);
        }
    }
}

// The granule of the first pixel of a cell, counted in an area from its first line on; 0 for cells that a patch of
// fewer has not.
DEVICE uint32_t cell_corner(const LabBackParams& p, const CellArea& area, uint32_t cell) {
    const LabPixel first = cell_pixel(p, int32_t(cell) * 64);
    if (first.image >= p.patch_images) return 0;
    return (uint32_t(first.image) * area.height + uint32_t(first.down)) * area.line() + uint32_t(first.across);
}
