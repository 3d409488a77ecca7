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
constexpr int CELL_FLIGHT = 2;    // chunks that a thread loads at a time: two blocks of these share the registers of a multiprocessor

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

// Patch number `number`, the same for all threads.
template <Form FORM>
DEVICE Patch cell_patch(const ConvProduct& p, uint32_t number) {
    Patch patch = patch_of<FORM>(p, number);
    patch.taps_down = uniform(patch.taps_down);
    patch.taps_across = uniform(patch.taps_across);
    patch.image = uniform(patch.image);
    patch.halo_down = uniform(patch.halo_down);
    patch.halo_across = uniform(patch.halo_across);
    patch.phase_down = uniform(patch.phase_down);
    patch.phase_across = uniform(patch.phase_across);
    return patch;
}

// What an iteration reads, the same for all threads.
DEVICE ConvStep cell_step(const ConvProduct& p, uint32_t result_branch, uint32_t iteration) {
    ConvStep step = conv_step(p, result_branch, iteration);
    step.inner_tile = uniform(step.inner_tile);
    step.branch = uniform(step.branch);
    return step;
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

// A granule of a slot.
DEVICE uint16_t* operand_place(unsigned char* slot, uint32_t granule) {
    return reinterpret_cast<uint16_t*>(slot + granule * GRANULE);
}

// Chunks of a product that a thread loads at a time. Where both gradients have pairs, two blocks have registers for no more than one.
template <Form FORM, int WIDTH, bool PAIRS>
constexpr int FLIGHT_OF = FORM != Form::FPROP && PAIRS && WIDTH == 32 ? 1 : CELL_FLIGHT;

// Loads the halo of a slice of channels from `slice` on into a slot.
template <int FLIGHT, class Image>
DEVICE void load_halo(const ConvProduct& p, const Patch& patch, CellHalo halo, const Image& image, int32_t slice,
                      const FactorTable<SLICE>& factors, unsigned char* slot) {
    const int32_t part = int32_t(threadIdx.x) % PARTS * 8;
    uint32_t offset;
    if (image.plain()) {
        for (; halo.more(); halo.next(p)) {
            const bool inside = halo.inside(p, patch, slice + part, offset);
            if (halo.at >= halo.pixels) continue;
            copy_async(slot + halo.granule(p) * GRANULE, image.of.place(offset, inside), inside);
        }
        return;
    }
    ROLLED
    while (halo.more()) {
        typename Image::Loaded loaded[FLIGHT];
        uint32_t places[FLIGHT];
        UNROLLED
        for (int i = 0; i < FLIGHT; ++i) {
            const bool inside = halo.inside(p, patch, slice + part, offset);
            places[i] = halo.at < halo.pixels ? halo.granule(p) : NO_ROW;
            uint16_t* place = operand_place(slot, inside ? places[i] : 0);
            loaded[i] = image.load(p.image, false, offset, inside, factors, part, place);
            halo.next(p);
        }
        UNROLLED
        for (int i = 0; i < FLIGHT; ++i) {
            const bool there = places[i] != NO_ROW;
            const uint16_t* place = operand_place(slot, there ? places[i] : 0);
            const uint4 coded = image.round(p.image, false, loaded[i], factors, part, place);
            if (there) store_operand(slot + places[i] * GRANULE, coded);
        }
    }
}

// The beginning of a block's shared memory.
struct CellTables {
    FactorTable<SLICE> image[2];      // of the present iteration and the next
    FactorTable<SLICE> matrix[2][2];  // wgrad's, of two slices
    uint32_t cells[CELLS];            // `CellHalo::cell`
    uint32_t taps[12];                // of wgrad's pairs: `CellHalo::tap`

    // The factors of channels from `first` on in a branch, for what the image is made of.
    template <Form FORM, bool PAIRS>
    DEVICE void describe_image(const ConvProduct& p, Made made, int64_t branch, uint32_t first, uint32_t slot) {
        if (made == Made::PLAIN || threadIdx.x >= SLICE) return;
        uint32_t channel = first + threadIdx.x;
        if (channel >= uint32_t(p.image_channels)) channel = 0;
        if (made == Made::NORM) image[slot].put(int(threadIdx.x), p.norm.of(branch, channel));
        if constexpr (PAIRS) {
            if (made == Made::PAIR) {
                image[slot].put(int(threadIdx.x), pair_factors<IMAGE_PAIR<FORM>>(p.image, branch, channel));
            }
        }
    }
    // The same for wgrad's matrix, by other warps.
    template <int WIDTH>
    DEVICE void describe_matrix(const ConvProduct& p, int64_t branch, uint32_t first, uint32_t slot) {
        if (!p.matrix.at || threadIdx.x < SLICE || threadIdx.x >= SLICE + WIDTH) return;
        const int i = int(threadIdx.x) - SLICE;
        const uint32_t channel = first + uint32_t(i);
        matrix[slot][i / SLICE].put(i % SLICE, pair_factors<Pair::DELTA>(p.matrix, branch, channel < uint32_t(p.rows) ? channel : 0));
    }
};
static_assert(sizeof(CellTables) == 3136);
