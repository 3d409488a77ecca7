// Patches for products of warpgroups: four cells of 8 × 8 pixels, and a halo in which wgmma finds every tap of a cell as a matrix.
//
// The 64 lines of a product are a cell: its eight lines of eight pixels are the eight matrices of an operand. The halo holds, line
// by line, for each eight of a slice's channels the line's pixels, 16 bytes each. So pixels that are neighbours in a cell are rows
// of a matrix; the matrices of a cell are as many bytes apart as its lines are; a matrix of the next eight channels is one part of a line
// further on; and another tap is another address. With a stride the columns are sorted by their remainder, and neighbours
// in a cell are neighbours again. The same halo serves the gradient of the weights, whose lines are channels and
// whose inner dimension is the pixels, as a transposed operand: there 64 lines are the 32 channels of a tap and, since that is where a
// line's parts go on, the 32 of the tap below it.
#pragma once

#include "conv_patch.cuh"

constexpr int GROUP_THREADS = 256;  // two warpgroups
constexpr int CELLS = 4;            // of a patch, two for each warpgroup
constexpr int CELL_PIXELS = 64;
constexpr int GRANULE = 16;  // bytes: eight elements, what descriptors and copies count in
constexpr int PARTS = SLICE / 8;  // granules of a pixel

// How the blocks of one product use their shared memory, in bytes from its beginning. The tables come first.
struct CellTiling {
    int32_t halos;       // two slots
    int32_t halo_bytes;  // of a slot
    int32_t halo_pitch;  // granules from one part of a line of the halo to the next
    // Of the matrix: slots of the weights of a slice, or dy of two patches.
    int32_t matrices;
    int32_t matrix_bytes;
    int32_t matrix_slots;
    int32_t run;    // patches that a block works on one after the other
    int32_t keeps;  // the weights: they have a slot for each iteration, which nothing else is written over
};
static_assert(sizeof(CellTiling) == 32);

// `conv2d_wgmma_fprop_*`
struct CellParams {
    ConvProduct product;
    CellTiling tiling;
};

// `conv2d_wgmma_backward_*`
struct CellBackwardParams {
    ConvBackwardParams both;
    CellTiling dgrad, wgrad;
};

// Pixel `i` of every patch: of cell i / 64.
DEVICE Pixel cell_pixel(const ConvProduct& p, int i) {
    const int32_t across = p.patch_width / 8, down = p.patch_height / 8;
    const int32_t cell = i / CELL_PIXELS, line = cell / across, image = line / down;
    if (image >= p.patch_images) return {-1, 0, 0};
    return {image, (line - image * down) * 8 + i % CELL_PIXELS / 8, (cell - line * across) * 8 + i % 8};
}

DEVICE int32_t cells_of(const ConvProduct& p) { return p.patch_images * (p.patch_height / 8) * (p.patch_width / 8); }

// What the threads load of the image, and where its parts lie.
struct CellHalo : Halo {
    static constexpr int ABREAST = GROUP_THREADS / PARTS;
    uint32_t pitch, step, sorted;  // granules; pixels from one of a cell to the next; columns of a remainder

    DEVICE CellHalo(const ConvProduct& p, const CellTiling& tiling, int32_t pixel_step) {
        begin(p);
        pitch = uint32_t(tiling.halo_pitch);
        step = uint32_t(pixel_step);
        sorted = (uint32_t(p.halo_width) + step - 1) / step;
    }
    DEVICE void next(const ConvProduct& p) {
        at += ABREAST;
        across += ABREAST;
        settle(p);
    }
    // Granules from the first part of a line of a slot to the same of the next line.
    DEVICE uint32_t line() const { return PARTS * pitch; }
    // Where a line has column `at`.
    DEVICE uint32_t column(uint32_t at) const { return step == 1 ? at : at % step * sorted + at / step; }
    // The granule of the next pixel that is this thread's.
    DEVICE uint32_t granule(const ConvProduct& p) const {
        return uint32_t(image * p.halo_height + down) * line() + threadIdx.x % PARTS * pitch + column(uint32_t(across));
    }
    // That of the first pixel of a cell with tap (0, 0).
    DEVICE uint32_t cell(const ConvProduct& p, int number) const {
        const Pixel first = cell_pixel(p, number * CELL_PIXELS);
        if (first.image < 0) return 0;
        return (uint32_t(first.image * p.halo_height) + uint32_t(first.down) * step) * line() + uint32_t(first.across);
    }
    // Granules from a tap (0, 0) to another.
    DEVICE uint32_t tap(uint32_t down, uint32_t across) const { return down * line() + column(across); }
};

// Loads the halo of a slice of channels into a slot. `norm` is null, or that of the slice's channels.
template <class Operand>
DEVICE void load_halo(const ConvProduct& p, const Patch& patch, CellHalo halo, const Source& image, int32_t slice,
                      const BnScaleShift* norm, unsigned char* slot) {
    const int32_t part = int32_t(threadIdx.x) % PARTS * 8;
    uint32_t offset;
    if (image.half && !norm) {
        for (; halo.more(); halo.next(p)) {
            const bool inside = halo.inside(p, patch, slice + part, offset);
            const uint16_t* from = static_cast<const uint16_t*>(image.at);
            if (halo.at < halo.pixels) {
                copy_async(slot + halo.granule(p) * GRANULE, inside ? from + image.branch + offset : from, inside);
            }
        }
        return;
    }
    while (halo.more()) {
        CellHalo ahead = halo;
        Chunk chunks[IN_FLIGHT];
        bool inside[IN_FLIGHT];
        for (int i = 0; i < IN_FLIGHT; ++i) {
            inside[i] = ahead.inside(p, patch, slice + part, offset);
            chunks[i] = inside[i] ? chunk_load<Operand>(image.at, image.branch + offset, image.half) : Chunk{};
            ahead.next(p);
        }
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const uint4 coded = chunk_round<Operand>(chunks[i], image.half, inside[i], norm ? norm + part : nullptr);
            if (halo.at < halo.pixels) store_operand(slot + halo.granule(p) * GRANULE, coded);
            halo.next(p);
        }
    }
}

// The beginning of a block's shared memory.
struct CellTables {
    BnScaleShift norm[2][SLICE];  // of the present iteration and the next

    DEVICE void describe_norm(const ConvProduct& p, int64_t branch, uint32_t first, uint32_t slot) {
        if (threadIdx.x >= SLICE) return;
        const uint32_t channel = first + threadIdx.x;
        norm[slot][threadIdx.x] = p.norm.of(branch, channel < uint32_t(p.image_channels) ? channel : 0);
    }
};
static_assert(sizeof(CellTables) == 512);
