// Patches for products of warpgroups: four cells of 8 × 8 pixels, and a halo in which wgmma finds every tap of a cell as a matrix.
//
// The 64 lines of a product are a cell: its eight lines of eight pixels are the eight matrices of an operand. The halo holds, line
// by line, for each eight of a slice's channels the line's pixels, 16 bytes each. So pixels that are neighbours in a cell are rows
// of a matrix; the matrices of a cell are as many bytes apart as its lines are; a matrix of the next eight channels is one part of a line
// further on; and another tap is another address. With a stride the columns are sorted by their remainder, and neighbours
// in a cell are neighbours again. The same halo serves the gradient of the weights, whose lines are channels and
// whose inner dimension is the pixels, as a transposed operand: there lines are the 32 channels of a tap and, since that is where a
// line's parts go on, those of the taps below it.
#pragma once

#include "conv_patch.cuh"

constexpr int GROUP_THREADS = 256;  // two warpgroups
constexpr int CELLS = 4;            // of a patch, two for each warpgroup
constexpr int CELL_PIXELS = 64;
constexpr int GRANULE = 16;  // bytes: eight elements, what descriptors and copies count in
constexpr int PARTS = SLICE / 8;  // granules of a pixel
// Chunks that a thread loads at a time, of weights, of a halo and of dy: two blocks of these share the registers of a multiprocessor.
constexpr int CELL_FLIGHT = 2, HALO_FLIGHT = 3;
template <int WIDTH, bool PAIRS>
constexpr int DY_FLIGHT = WIDTH == 32 && PAIRS ? 2 : 4;

// How the blocks of one product use their shared memory, in bytes from its beginning. The tables come first.
//
// Where a block goes on to another patch, what follows a product lies where its last halo was and in the room between both slots: the other
// slot has the next patch's first halo by then. Else there is nothing any more that it could spoil.
struct CellTiling {
    int32_t places;      // `HaloPixel`s
    int32_t halos;       // two slots
    int32_t halo_step;   // from the first to the second
    int32_t halo_pitch;  // granules from one part of a line of the halo to the next
    // Of the matrix: slots of the weights of a slice, or dy of two patches.
    int32_t matrices;
    int32_t matrix_bytes;
    int32_t finish;       // `ConvFinish`, if the first slot is free for it
    int32_t finish_step;  // and how much further on if the second is
    int32_t run;          // patches that a block works on one after the other
    int32_t keeps;        // the weights: they have a slot for each iteration, and two at least where the phase may change
};
static_assert(sizeof(CellTiling) == 40);

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

// Where the parts of a halo lie in its slot.
struct CellHalo {
    static constexpr int ABREAST = GROUP_THREADS / PARTS;  // pixels that the threads load at a time, each thread eight channels of one
    uint32_t of_image;             // pixels of each image: ABREAST at least, since it has a cell
    uint32_t pitch, step, sorted;  // granules of a part; pixels from one of a cell to the next; columns of a remainder

    DEVICE CellHalo(const ConvProduct& p, const CellTiling& tiling, int32_t pixel_step)
        : CellHalo(p, tiling.halo_pitch, pixel_step) {}
    DEVICE CellHalo(const ConvProduct& p, int32_t part_pitch, int32_t pixel_step) {
        of_image = uint32_t(p.halo_height) * uint32_t(p.halo_width);
        pitch = uint32_t(part_pitch);
        step = uint32_t(pixel_step);
        sorted = (uint32_t(p.halo_width) + step - 1) / step;
    }
    // Granules from the first part of a line of a slot to the same of the next line.
    DEVICE uint32_t line() const { return PARTS * pitch; }
    // Where a line has column `at`.
    DEVICE uint32_t column(uint32_t at) const { return step == 1 ? at : at % step * sorted + at / step; }
    // The granule of the first pixel of a cell with tap (0, 0).
    DEVICE uint32_t cell(const ConvProduct& p, int number) const {
        const Pixel first = cell_pixel(p, number * CELL_PIXELS);
        if (first.image < 0) return 0;
        return (uint32_t(first.image * p.halo_height) + uint32_t(first.down) * step) * line() + uint32_t(first.across);
    }
    // Granules from a tap (0, 0) to another.
    DEVICE uint32_t tap(uint32_t down, uint32_t across) const { return down * line() + column(across); }
};

// A pixel of an image's halo: counted from the halo's first in the image, and the granule of its first part in a slot.
struct alignas(8) HaloPixel {
    uint16_t down, across;
    uint32_t granule;
};

// Of the halo of each image of every patch, [of_image] behind the tables: they are found once, not for each patch and slice.
DEVICE void describe_halo(const ConvProduct& p, const CellHalo& halo, int32_t halo_step, HaloPixel* places) {
    ROLLED
    for (uint32_t at = thread_again(); at < halo.of_image; at += GROUP_THREADS) {
        const uint32_t down = at / uint32_t(p.halo_width), across = at - down * uint32_t(p.halo_width);
        places[at] = {uint16_t(down * uint32_t(halo_step)), uint16_t(across * uint32_t(halo_step)),
                      down * halo.line() + halo.column(across)};
    }
}

// A granule of a slot.
DEVICE uint16_t* operand_place(unsigned char* slot, uint32_t granule) {
    return reinterpret_cast<uint16_t*>(slot + granule * GRANULE);
}

// Whether a thread holds the factors of its channels in registers over a slice: where one block has all of a multiprocessor.
template <int WIDTH>
constexpr bool HELD_OF = WIDTH == 64;

// Nothing of what is loaded is stored.
struct KeepNone {
    DEVICE bool any() const { return false; }
    DEVICE bool half() const { return false; }
    DEVICE bool of(const HaloPixel&) const { return false; }
    DEVICE void store(uint32_t, const uint4&) const {}
};

// Loads the halo of a slice of channels from `slice` on into a slot, FLIGHT pixels of a thread at a time, and stores of what it makes
// of `pair` what `keep` wants.
template <bool HELD, int FLIGHT, class Image, class Keep>
DEVICE void load_halo(const ConvProduct& p, const ConvPair& pair, const Patch& patch, const CellHalo& halo, const HaloPixel* places,
                      const Image& image, int32_t slice, const FactorTable<SLICE>& factors, unsigned char* slot, const Keep& keep) {
    const uint32_t thread = thread_again(), part = thread % PARTS;
    const uint32_t channel = uint32_t(slice) + part * 8;
    const bool has = channel < uint32_t(p.image_channels);
    slot += part * halo.pitch * GRANULE;
    // The thread's next pixel, and whether there is one. A step goes no further than to the next image, which has a cell at least.
    uint32_t at = thread / PARTS;
    int32_t image_of = 0;
    const auto more = [&] { return image_of < p.patch_images; };
    // Of that pixel: whether the image has it, whether it is kept, its first element, and its granule.
    const auto inside = [&](bool& keeps, uint32_t& offset, uint32_t& granule) {
        const HaloPixel pixel = places[at];
        granule = pixel.granule + uint32_t(image_of) * uint32_t(p.halo_height) * halo.line();
        const int32_t n = patch.image + image_of;
        const uint32_t h = uint32_t(patch.halo_down + pixel.down), w = uint32_t(patch.halo_across + pixel.across);
        offset = ((uint32_t(n) * uint32_t(p.image_height) + h) * uint32_t(p.image_width) + w) * uint32_t(p.image_channels) + channel;
        const bool there = more() && has && n < p.images && h < uint32_t(p.image_height) && w < uint32_t(p.image_width);
        keeps = there && keep.of(pixel);
        return there;
    };
    const auto next = [&] {
        at += CellHalo::ABREAST;
        if (at >= halo.of_image) {
            at -= halo.of_image;
            ++image_of;
        }
    };
    bool keeps;
    if (image.plain()) {
        ROLLED
        for (; more(); next()) {
            uint32_t offset, granule;
            const bool there = inside(keeps, offset, granule);
            copy_async(operand_place(slot, granule), image.of.place(offset, there), there);
        }
        return;
    }
    if (!image.waits(pair, keep.any())) {
        ROLLED
        for (; more(); next()) {
            uint32_t offset, granule;
            const bool there = inside(keeps, offset, granule);
            uint16_t* place = operand_place(slot, granule);
            const auto loaded = image.load(pair, keeps, offset, there, factors, int(part * 8), place);
            const uint4 coded = image.round(pair, keeps, loaded, factors, int(part * 8), place);
            store_operand(place, coded);
            if (keeps && keep.half()) keep.store(offset, coded);
        }
        return;
    }
    const EightFactors<Image::PAIRED, HELD> eight = {factors, int(part * 8)};
    ROLLED
    while (more()) {
        typename Image::Waiting flight[FLIGHT];
        uint32_t granules[FLIGHT] = {}, kept_at[FLIGHT];
        bool stored[FLIGHT] = {};
        const auto place = [&](int i) { return operand_place(slot, granules[i]); };
        UNROLLED
        for (int i = 0; i < FLIGHT; ++i) {
            uint32_t offset;
            stored[i] = more();
            const bool there = inside(keeps, offset, granules[i]);
            kept_at[i] = keeps ? offset : NO_ROW;
            flight[i] = image.fetch(pair, offset, there, place(i));
            next();
        }
        image.round_all(pair, flight, eight, place);
        UNROLLED
        for (int i = 0; i < FLIGHT; ++i) {
            if (stored[i]) store_operand(place(i), flight[i].of);
            if (kept_at[i] != NO_ROW) keep.store(kept_at[i], flight[i].of);
        }
    }
}

// The same of a product's image, of which nothing is stored.
template <bool HELD, class Image>
DEVICE void load_halo(const ConvProduct& p, const Patch& patch, const CellHalo& halo, const HaloPixel* places, const Image& image,
                      int32_t slice, const FactorTable<SLICE>& factors, unsigned char* slot) {
    load_halo<HELD, HALO_FLIGHT>(p, p.image, patch, halo, places, image, slice, factors, slot, KeepNone{});
}

// The beginning of a block's shared memory.
struct CellTables {
    uint32_t arrived[4];                   // `last_to_arrive`
    ConvPlace place;                       // the block's: there are no registers for what only the end needs
    FactorTable<SLICE> image[2];           // of the present iteration and the next
    uint32_t pixels[CELLS * CELL_PIXELS];  // `packed`
    uint32_t cells[CELLS];                 // `CellHalo::cell`

    // What is the same of all patches.
    DEVICE void describe(const ConvProduct& p, const CellHalo& halo, const ConvPlace& of_block) {
        const uint32_t thread = thread_again();
        if (thread == 0) place = of_block;
        pixels[thread] = packed(cell_pixel(p, int(thread)));
        if (thread < CELLS) cells[thread] = halo.cell(p, int(thread));
    }
    DEVICE Pixel pixel(int i) const { return unpacked(pixels[i]); }
    // The factors of channels from `first` on in a branch, for what the image is made of.
    template <Form FORM, bool PAIRS>
    DEVICE void describe_image(const ConvProduct& p, Made made, int64_t branch, uint32_t first, uint32_t slot) {
        const uint32_t thread = thread_again();
        if (thread < SLICE) put_image<FORM, PAIRS>(p, made, branch, first, image[slot], int(thread));
    }
};

// Of fprop and dgrad.
struct CellRows : CellTables {
    uint32_t rows[CELLS * CELL_PIXELS];  // of the result, that are the present patch's pixels

    DEVICE void describe_rows(const ConvProduct& p, const Patch& patch) {
        const uint32_t thread = thread_again();
        rows[thread] = row_of(p, patch, pixel(int(thread)));
    }
};
static_assert(sizeof(CellRows) == 3120);

// Of wgrad.
struct CellTaps : CellTables {
    FactorTable<SLICE> matrix[2][2];        // of two slices
    uint32_t taps[8];                              // of its columns of taps: `CellHalo::tap`
    uint32_t first, first_k, first_c, first_unit;  // of the block: iteration, channels, column of taps

    // As `describe_image`, of the matrix and by other warps.
    template <int WIDTH>
    DEVICE void describe_matrix(const ConvProduct& p, int64_t branch, uint32_t first, uint32_t slot) {
        const uint32_t i = thread_again() - SLICE;
        if (i >= WIDTH) return;
        put_matrix(p, branch, first + i / SLICE * SLICE, matrix[slot][i / SLICE], int(i % SLICE));
    }
};
static_assert(sizeof(CellTaps) == 4192);
