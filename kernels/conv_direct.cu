// 2-D convolutions of 16-bit operands on tensor cores, for numbers of channels that are multiples of 8: the kernels of
// `conv.cu` on patches whose halo stays in shared memory. Forms, operands and blocks: `conv_params.cuh`; patches:
// `conv_patch.cuh`.
//
// What a tap reads comes in stages. Its weights have one of STAGES places in shared memory and are asked for STAGES - 1 taps ahead:
// those of 16 bits by copies that are waited for when their turn comes, others, which are rounded, through registers. Of halos
// there are two, that of the slice and the next, of which each tap asks for a piece. Nine taps are at least 1,152 clocks of products
// (144 for each warp, 8 clocks each on sm_80, times the blocks beside it), a load from memory takes 479: a third place would wait for
// nothing. The same holds for a weight gradient's patches. There is one barrier per tap.

// Twelve warps hide each other's loads.
#define KERNEL_BLOCKS 3
#include "conv_direct_wgrad.cuh"
#include "conv_patch.cuh"

constexpr int STAGES = 3;  // places for the weights of taps

// The weights of one tap and slice: [WIDTH, SLICE] in fprop, [SLICE, WIDTH] in dgrad.
template <Form FORM, class Operand, int WIDTH>
struct Weights {
    static constexpr int LINE = 2 * (FORM == Form::FPROP ? SLICE : WIDTH);  // bytes
    static constexpr int BYTES = 2 * WIDTH * SLICE;  // of a place for them
    static constexpr int HELD = WIDTH * SLICE / 8 / DIRECT_THREADS;  // parts, of eight elements for each thread
    static_assert(HELD <= SLICE / 16);
    Source from;
    uint32_t at[HELD];  // of tap (0, 0), or NO_ROW

    // Turns to the weights of a slice; a tap's begin `filter` elements later.
    DEVICE void begin(const ConvProduct& p, const Source& w, uint32_t column, uint32_t slice) {
        from = w;
        for (int i = 0; i < HELD; ++i) {
            const uint32_t number = threadIdx.x + i * DIRECT_THREADS;
            const uint32_t line = number / (LINE / 16), along = number % (LINE / 16) * 8;
            const uint32_t k = FORM == Form::FPROP ? column + line : slice + line;
            const uint32_t c = FORM == Form::FPROP ? slice + along : column + along;
            const bool there = c < channels(p) && k < uint32_t(FORM == Form::FPROP ? p.columns : p.image_channels);
            at[i] = there ? k * uint32_t(p.filter) + c : NO_ROW;
        }
    }
    // C
    static DEVICE uint32_t channels(const ConvProduct& p) {
        return uint32_t(FORM == Form::FPROP ? p.image_channels : p.columns);
    }
    // Part `i` of HELD: its place in one of all, as it is copied there, and as it is loaded and stored.
    static DEVICE uint16_t* place(uint32_t to, int i) {
        static_assert(DIRECT_THREADS * 16 % (8 * LINE) == 0);
        return shared_at(to + swizzled<LINE>(threadIdx.x * 16) + i * DIRECT_THREADS * 16);
    }
    DEVICE void copy(uint32_t filter, uint32_t to, int i) const {
        const bool there = at[i] != NO_ROW;
        copy_async(place(to, i), from.place(at[i] + filter, there), there);
    }
    DEVICE Chunk load(uint32_t filter, int i) const {
        return at[i] != NO_ROW ? from.load<Operand>(at[i] + filter) : Chunk{};
    }
    static DEVICE void store(uint32_t to, int i, const Chunk& wide) {
        store_operand(place(to, i), chunk_round<Operand>(wide, false, true));
    }
    // This lane's row of the first matrices, swizzled.
    static DEVICE uint32_t row(uint32_t lane) {
        const uint32_t line = FORM == Form::FPROP ? lane / 16 * 8 + lane % 8 : lane / 8 % 2 * 8 + lane % 8;
        return swizzled<LINE>(line * LINE + (FORM == Form::FPROP ? lane / 8 % 2 : lane / 16) * 16);
    }
};

// Adds the products of channels 16·k to 16·k + 15 of a slice and tap. `image` and `weights`: where this lane's rows of matrices are,
// of the first channels, and of the first columns.
template <Form FORM, class Operand, int WIDTH>
DEVICE void direct_add(DirectTile<Operand, WIDTH>& tile, const uint32_t image[2], uint32_t weights, int k) {
    constexpr int LINE = Weights<FORM, Operand, WIDTH>::LINE;
    uint32_t a[2][4];
    for (int m = 0; m < 2; ++m) load_matrices(a[m], shared_at(image[m] ^ 32 * k));
    for (int n = 0; n < WIDTH / 16; ++n) {
        uint32_t b[4];
        if constexpr (FORM == Form::FPROP) {
            load_matrices(b, shared_at((weights ^ 32 * k) + n * 16 * LINE));
        } else {
            load_matrices_transposed(b, shared_at((weights ^ 32 * n) + k * 16 * LINE));
        }
        for (int m = 0; m < 2; ++m) {
            Operand::mma(tile.d[m][2 * n], a[m], b);
            Operand::mma(tile.d[m][2 * n + 1], a[m], b + 2);
        }
    }
}

// What an iteration reads: a slice of channels of a branch of a term.
template <Form FORM, class Operand, bool PAIRS>
struct Slice {
    Prologue<Operand, IMAGE_PAIR<FORM>, PAIRS> image;
    Source matrix;
    uint32_t first;  // channel
};

template <Form FORM, class Operand, bool PAIRS>
DEVICE Slice<FORM, Operand, PAIRS> slice_of(const ConvProduct& p, uint32_t branch, uint32_t iteration) {
    const ConvStep step = conv_step(p, branch, iteration);
    const bool second = FORM == Form::FPROP && step.second;
    const ConvTerm& term = second ? p.terms[1] : p.terms[0];
    const Made made = PAIRS && p.image.at && !second         ? Made::PAIR
                      : FORM == Form::FPROP && term.norm != 0 ? Made::NORM
                                                              : Made::PLAIN;
    const Source image = {term.image, step.branch * term.image_branch, term.image_half};
    return {{image, step.branch, made},
            {term.matrix, step.branch * term.matrix_branch, term.matrix_half}, step.inner_tile * SLICE};
}

template <Form FORM, class Operand, int WIDTH, bool PAIRS>
DEVICE void direct(const ConvProduct& p, uint32_t block) {
    using Matrix = Weights<FORM, Operand, WIDTH>;
    const ConvPlace place = conv_place(p, block);
    const uint64_t iterations = uint64_t(p.inner_tiles) * uint32_t(p.segments);
    const uint32_t first = uint32_t(iterations * place.split / p.splits);
    uint32_t count = uint32_t(iterations * (place.split + 1) / p.splits) - first;
    const Patch patch = patch_of<FORM>(p, place.row_tile);
    const int32_t taps = patch.taps_down * patch.taps_across;
    if (taps == 0) count = 0;

    auto& tables = *shared_memory<DirectTables>();
    constexpr uint32_t WEIGHTS = sizeof(DirectTables), HALOS = WEIGHTS + STAGES * Matrix::BYTES;
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    const int32_t channel = int32_t(threadIdx.x % CHUNKS) * 8;
    const uint32_t column = place.column_tile * WIDTH;

    tables.describe_places(p, patch.pixel_step);
    tables.describe_taps<FORM>(p, patch, Matrix::channels(p));
    for (uint32_t i = 0; i < 2 && i < count; ++i) {
        const auto slice = slice_of<FORM, Operand, PAIRS>(p, place.branch, first + i);
        tables.describe_image<FORM, PAIRS>(p, slice.image.made, slice.image.branch, slice.first, i);
    }
    sync_threads();

    Halo halo;
    halo.begin(p);
    const uint32_t slot_bytes = halo.bytes();
    using Piece = Slice<FORM, Operand, PAIRS>;
    const auto load = [&](const Halo& from, const Piece& slice, uint32_t slot) {
        uint32_t offset;
        const bool inside = from.inside(p, patch, int32_t(slice.first) + channel, offset);
        uint16_t* place = from.place(HALOS + slot * slot_bytes);
        return slice.image.load(p.image, false, offset, inside, tables.image[slot], channel, place);
    };
    const auto store = [&](const Piece& slice, uint32_t slot, const auto& loaded) {
        const uint32_t to = HALOS + slot * slot_bytes;
        halo.put(to, slice.image.round(p.image, false, loaded, tables.image[slot], channel, halo.place(to)));
        halo.next(p);
    };
    // Begins to copy a piece of a halo to which nothing is to be done.
    const auto copy = [&](const Piece& slice, uint32_t slot) {
        uint32_t offset;
        const bool inside = halo.inside(p, patch, int32_t(slice.first) + channel, offset);
        halo.copy(HALOS + slot * slot_bytes, slice.image.of.place(offset, inside), inside);
        halo.next(p);
    };
    const auto load_rest = [&](const Piece& slice, uint32_t slot) {
        while (halo.more()) {
            Halo ahead = halo;
            decltype(load(halo, slice, slot)) loaded[IN_FLIGHT];
            UNROLLED
            for (int i = 0; i < IN_FLIGHT; ++i) {
                loaded[i] = load(ahead, slice, slot);
                ahead.next(p);
            }
            UNROLLED
            for (int i = 0; i < IN_FLIGHT; ++i) store(slice, slot, loaded[i]);
        }
    };
    // The weights that are asked for next: of a tap of a slice.
    Matrix matrix = {};
    uint32_t ahead = 0;
    int32_t tap_ahead = 0;
    const auto begin_weights = [&] {
        const auto slice = slice_of<FORM, Operand, PAIRS>(p, place.branch, first + ahead);
        matrix.begin(p, slice.matrix, column, slice.first);
    };
    const auto next_weights = [&] {
        if (++tap_ahead == taps) {
            tap_ahead = 0;
            if (++ahead < count) begin_weights();
        }
    };
    Piece next = {};
    if (count > 0) {
        next = slice_of<FORM, Operand, PAIRS>(p, place.branch, first);
        if (next.image.plain()) {
            while (halo.more()) copy(next, 0);
        }
        begin_weights();
        Chunk wide[STAGES - 1][Matrix::HELD];
        bool loads[STAGES - 1];
        UNROLLED
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            const bool there = ahead < count;
            loads[stage] = there && !matrix.from.half;
            const uint32_t filter = tables.taps.filter[tap_ahead];
            for (int i = 0; i < Matrix::HELD; ++i) {
                if (loads[stage]) {
                    wide[stage][i] = matrix.load(filter, i);
                } else if (there) {
                    matrix.copy(filter, WEIGHTS + stage * Matrix::BYTES, i);
                }
            }
            copies_commit();
            if (there) next_weights();
        }
        load_rest(next, 0);
        UNROLLED
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            for (int i = 0; i < Matrix::HELD; ++i) {
                if (loads[stage]) Matrix::store(WEIGHTS + stage * Matrix::BYTES, i, wide[stage][i]);
            }
        }
        copies_pending<STAGES - 2>();
    }
    // This lane's rows of matrices, and the next tap: read before the barrier, since what follows the product may write over the tables.
    uint32_t image_rows[2], tap_at = tables.taps.halo[0];
    for (int m = 0; m < 2; ++m) image_rows[m] = HALOS + tables.places[32 * warp + 16 * m + lane % 16] + lane / 16 * 16;
    sync_threads();

    // Where the tap's weights are, and where those of the tap before were, whose place is free.
    const uint32_t weight_row = kept(Matrix::row(uint32_t(lane)));
    uint32_t stage = WEIGHTS, free_stage = WEIGHTS + (STAGES - 1) * Matrix::BYTES;
    DirectTile<Operand, WIDTH> tile;
    tile.clear();
    for (uint32_t i = 0; i < count; ++i) {
        const uint32_t slot = i % 2;
        const bool more = i + 1 < count;
        if (more) next = slice_of<FORM, Operand, PAIRS>(p, place.branch, first + i + 1);
        if (i + 2 < count) {
            // Its slot served this iteration's halo, which is loaded.
            const auto after = slice_of<FORM, Operand, PAIRS>(p, place.branch, first + i + 2);
            tables.describe_image<FORM, PAIRS>(p, after.image.made, after.image.branch, after.first, slot);
        }
        halo.begin(p);
        if (!more) halo.pixels = 0;
        const bool copies = next.image.plain();
        for (int32_t t = 0; t < taps; ++t) {
            const uint32_t at = tap_at + slot * slot_bytes;
            const uint32_t rows[2] = {swizzled<PIXEL>(image_rows[0] + at), swizzled<PIXEL>(image_rows[1] + at)};
            const bool asks = ahead < count, loads_weights = asks && !matrix.from.half;
            const uint32_t filter = tables.taps.filter[tap_ahead];
            if (asks && matrix.from.half) {
                for (int part = 0; part < Matrix::HELD; ++part) matrix.copy(filter, free_stage, part);
            }
            // From the last tap whose copies are waited for before the next slice, all that is left.
            while (copies && halo.more()) {
                copy(next, 1 - slot);
                if (t + STAGES - 1 < taps) break;
            }
            copies_commit();
            const bool loads = !copies && halo.more();
            decltype(load(halo, next, slot)) loaded;
            if (loads) loaded = load(halo, next, 1 - slot);
            for (int k = 0; k < SLICE / 16; ++k) {
                const bool part = k < Matrix::HELD && loads_weights;
                Chunk wide;
                if (part) wide = matrix.load(filter, k);
                direct_add<FORM, Operand, WIDTH>(tile, rows, stage + weight_row, k);
                if (part) Matrix::store(free_stage, k, wide);
            }
            if (asks) next_weights();
            if (loads) store(next, 1 - slot, loaded);
            if (!copies && t + 1 == taps) {
                while (halo.more()) store(next, 1 - slot, load(halo, next, 1 - slot));
            }
            if (taps < STAGES - 1) {
                // The halo's copies are no older than a slice.
                copies_done();
            } else {
                copies_pending<STAGES - 2>();
            }
            tap_at = tables.taps.halo[t + 1 < taps ? t + 1 : 0];
            free_stage = stage;
            stage = stage + Matrix::BYTES == HALOS ? WEIGHTS : stage + Matrix::BYTES;
            sync_threads();
        }
    }
    // Made again: no register has kept them.
    const ConvPlace finished = conv_place(p, again(block));
    const auto row = [&](int r) { return row_of(p, patch_of<FORM>(p, finished.row_tile), pixel_of(p, r)); };
    const auto column_of = [&](int c) { return finished.column_tile * WIDTH + c; };
    conv_finish<Operand, DirectTile<Operand, WIDTH>, FORM>(p, finished, tile, row, column_of);
}

template <class Operand, int WIDTH, bool PAIRS>
DEVICE void direct_backward(const ConvBackwardParams& p) {
    uint32_t block;
    if (is_wgrad_block(p, block)) {
        direct_wgrad<Operand, PAIRS>(p.wgrad, block);
    } else {
        direct<Form::DGRAD, Operand, WIDTH, PAIRS>(p.dgrad, block);
    }
}

KERNEL(conv2d_direct_fprop_64_f16, ConvParams, 128) { direct<Form::FPROP, F16, 64, false>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_64_bf16, ConvParams, 128) { direct<Form::FPROP, Bf16, 64, false>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_pair_64_f16, ConvParams, 128) { direct<Form::FPROP, F16, 64, true>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_pair_64_bf16, ConvParams, 128) { direct<Form::FPROP, Bf16, 64, true>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_backward_32_f16, ConvBackwardParams, 128) { direct_backward<F16, 32, false>(p); }
KERNEL(conv2d_direct_backward_64_f16, ConvBackwardParams, 128) { direct_backward<F16, 64, false>(p); }
KERNEL(conv2d_direct_backward_32_bf16, ConvBackwardParams, 128) { direct_backward<Bf16, 32, false>(p); }
KERNEL(conv2d_direct_backward_64_bf16, ConvBackwardParams, 128) { direct_backward<Bf16, 64, false>(p); }
KERNEL(conv2d_direct_backward_pair_32_f16, ConvBackwardParams, 128) { direct_backward<F16, 32, true>(p); }
KERNEL(conv2d_direct_backward_pair_64_f16, ConvBackwardParams, 128) { direct_backward<F16, 64, true>(p); }
KERNEL(conv2d_direct_backward_pair_32_bf16, ConvBackwardParams, 128) { direct_backward<Bf16, 32, true>(p); }
KERNEL(conv2d_direct_backward_pair_64_bf16, ConvBackwardParams, 128) { direct_backward<Bf16, 64, true>(p); }
KERNEL(conv2d_direct_fprop_pair_32_f16, ConvParams, 128) { direct<Form::FPROP, F16, 32, true>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_pair_32_bf16, ConvParams, 128) { direct<Form::FPROP, Bf16, 32, true>(p.product, blockIdx.x); }

// Where a tile has 32 columns and a block makes nothing else from one tensor, there are registers for a fourth.
#undef KERNEL_BLOCKS
#define KERNEL_BLOCKS 4
KERNEL(conv2d_direct_fprop_32_f16, ConvParams, 128) { direct<Form::FPROP, F16, 32, false>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_32_bf16, ConvParams, 128) { direct<Form::FPROP, Bf16, 32, false>(p.product, blockIdx.x); }
