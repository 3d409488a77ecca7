// 2-D convolutions of 16-bit operands on tensor cores, for numbers of channels that are multiples of 8: the kernels of
// `conv.cu` on patches whose halo stays in shared memory. Forms, operands and blocks: `conv_params.cuh`; patches:
// `conv_patch.cuh`.
//
// Loads for the next step begin before a step's products and end behind them; what they bring goes to the other of two
// places in shared memory, so that there is one barrier per step.

// Twelve warps hide each other's loads.
#define KERNEL_BLOCKS 3
#include "conv_direct_wgrad.cuh"
#include "conv_patch.cuh"

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
        const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32 * 32 + lane / 4, column = lane % 4 * 2;
        for (int m = 0; m < 2; ++m) {
            for (int n = 0; n < WIDTH / 8; ++n) {
                for (int i = 0; i < 4; ++i) {
                    f((m * (WIDTH / 8) + n) * 4 + i, row + 16 * m + 8 * (i / 2), column + 8 * n + i % 2, d[m][n][i]);
                }
            }
        }
    }
};

// The weights of one tap and slice: [WIDTH, SLICE] in fprop, [SLICE, WIDTH] in dgrad.
template <Form FORM, class Operand, int WIDTH>
struct Weights {
    static constexpr int LINE = FORM == Form::FPROP ? SLICE : WIDTH, PITCH = LINE + 8;
    static constexpr int ELEMENTS = WIDTH * PIXEL;  // of a place for them
    static constexpr int HELD = WIDTH * SLICE / 8 / DIRECT_THREADS;  // parts, of eight elements for each thread
    static_assert(HELD <= SLICE / 16);
    static_assert(WIDTH * SLICE / LINE * PITCH <= ELEMENTS);
    Chunk held;
    const void* from;
    int64_t branch;
    uint32_t at[HELD];  // of tap (0, 0), or NO_ROW
    int32_t half;

    // Turns to the weights of a slice.
    DEVICE void begin(const ConvProduct& p, const Source& w, uint32_t column, uint32_t slice) {
        from = w.at;
        branch = w.branch;
        half = w.half;
        for (int i = 0; i < HELD; ++i) {
            const uint32_t number = threadIdx.x + i * DIRECT_THREADS;
            const uint32_t line = number / (LINE / 8), along = number % (LINE / 8) * 8;
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
    // Loads and stores part `i` of HELD.
    DEVICE void load(const ConvProduct& p, uint32_t filter_pixel, int i) {
        const int64_t element = branch + (at[i] + filter_pixel * channels(p));
        held = at[i] != NO_ROW ? chunk_load<Operand>(from, element, half) : Chunk{};
    }
    DEVICE void store(uint16_t* to, int i) const {
        const uint32_t number = threadIdx.x + i * DIRECT_THREADS;
        const uint32_t line = number / (LINE / 8), along = number % (LINE / 8) * 8;
        *reinterpret_cast<uint4*>(to + line * PITCH + along) = chunk_round<Operand>(held, half, at[i] != NO_ROW);
    }
};

// Adds the products of 16 channels of one tap. `image` and `weights` are this lane's rows of matrices.
template <Form FORM, class Operand, int WIDTH>
DEVICE void direct_add(DirectTile<Operand, WIDTH>& tile, const uint16_t* const image[2], const uint16_t* weights) {
    uint32_t a[2][4];
    for (int m = 0; m < 2; ++m) load_matrices(a[m], image[m]);
    for (int n = 0; n < WIDTH / 16; ++n) {
        uint32_t b[4];
        if constexpr (FORM == Form::FPROP) {
            load_matrices(b, weights + n * 16 * Weights<FORM, Operand, WIDTH>::PITCH);
        } else {
            load_matrices_transposed(b, weights + n * 16);
        }
        for (int m = 0; m < 2; ++m) {
            Operand::mma(tile.d[m][2 * n], a[m], b);
            Operand::mma(tile.d[m][2 * n + 1], a[m], b + 2);
        }
    }
}

// What an iteration reads: a slice of channels of a branch of a term.
struct Slice {
    Source image, with, matrix;
    int64_t branch;
    uint32_t first;  // channel
    Made made;
};

template <Form FORM, bool PAIRS>
DEVICE Slice slice_of(const ConvProduct& p, uint32_t branch, uint32_t iteration) {
    const ConvStep step = conv_step(p, branch, iteration);
    const bool second = FORM == Form::FPROP && step.second;
    const ConvTerm& term = second ? p.terms[1] : p.terms[0];
    Slice slice = {{term.image, step.branch * term.image_branch, term.image_half},
                   {},
                   {term.matrix, step.branch * term.matrix_branch, term.matrix_half},
                   step.branch, step.inner_tile * SLICE,
                   FORM == Form::FPROP && term.norm ? Made::NORM : Made::PLAIN};
    if constexpr (PAIRS) {
        slice.with = {p.image.at, step.branch * p.image.branch, p.image.half};
        if (p.image.at && !second) slice.made = Made::PAIR;
    }
    return slice;
}

// The present place in a walk over the taps of a patch.
struct Tap {
    int32_t down, across;

    DEVICE void next(const Patch& patch) {
        if (++across == patch.taps_across) {
            across = 0;
            ++down;
        }
    }
    template <Form FORM>
    DEVICE uint32_t filter_pixel(const ConvProduct& p, const Patch& patch) const {
        const int32_t step = FORM == Form::DGRAD ? p.stride : 1;
        return uint32_t((patch.phase_down + down * step) * p.kernel_width + patch.phase_across + across * step);
    }
    // Elements of the halo from tap (0, 0) of a pixel to this: in dgrad taps go up and left.
    template <Form FORM>
    DEVICE uint32_t offset(const ConvProduct& p, const Patch& patch) const {
        const int32_t h = FORM == Form::DGRAD ? patch.taps_down - 1 - down : down;
        const int32_t w = FORM == Form::DGRAD ? patch.taps_across - 1 - across : across;
        return uint32_t(h * p.halo_width + w) * PIXEL;
    }
};

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
    uint16_t* weights = reinterpret_cast<uint16_t*>(&tables + 1);
    uint16_t* halos = weights + 2 * Matrix::ELEMENTS;
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int32_t channel = int32_t(threadIdx.x) % CHUNKS * 8;
    const uint32_t column = place.column_tile * WIDTH;

    tables.describe(p, patch.pixel_step);
    for (uint32_t i = 0; i < 2 && i < count; ++i) {
        const Slice slice = slice_of<FORM, PAIRS>(p, place.branch, first + i);
        tables.describe_image<FORM, PAIRS>(p, slice.made, slice.branch, slice.first, i);
    }
    sync_threads();

    Matrix matrix = {};
    Halo halo;
    halo.begin(p);
    const uint32_t slot_elements = halo.pixels * PIXEL;
    const auto load = [&](const Halo& from, const Slice& slice) {
        uint32_t offset;
        const bool inside = from.inside(p, patch, int32_t(slice.first) + channel, offset);
        return load_pair<Operand, PAIRS>(slice.image, slice.with, slice.made, offset, inside);
    };
    const auto store = [&](const Slice& slice, uint32_t slot, const Loaded& loaded) {
        halo.put(halos + slot * slot_elements,
                 chunk_round<Operand, IMAGE_PAIR<FORM>, PAIRS>(loaded, slice.image.half, slice.with.half, slice.made,
                                                               tables.image[slot], channel));
        halo.next(p);
    };
    // Begins to copy a whole halo if nothing is to be done to it.
    const auto copy = [&](const Slice& slice, uint32_t slot) {
        if (slice.made != Made::PLAIN || !slice.image.half) return;
        for (; halo.more(); halo.next(p)) {
            uint32_t offset;
            const bool inside = halo.inside(p, patch, int32_t(slice.first) + channel, offset);
            const uint16_t* image = static_cast<const uint16_t*>(slice.image.at);
            halo.copy(halos + slot * slot_elements, inside ? image + slice.image.branch + offset : image, inside);
        }
    };
    const auto load_rest = [&](const Slice& slice, uint32_t slot) {
        while (halo.more()) {
            Halo ahead = halo;
            Loaded loaded[IN_FLIGHT];
            for (int i = 0; i < IN_FLIGHT; ++i) {
                loaded[i] = load(ahead, slice);
                ahead.next(p);
            }
            for (int i = 0; i < IN_FLIGHT; ++i) store(slice, slot, loaded[i]);
        }
    };
    Slice next = {};
    if (count > 0) {
        next = slice_of<FORM, PAIRS>(p, place.branch, first);
        copy(next, 0);
        matrix.begin(p, next.matrix, column, next.first);
        for (int part = 0; part < Matrix::HELD; ++part) {
            matrix.load(p, Tap{0, 0}.filter_pixel<FORM>(p, patch), part);
            matrix.store(weights, part);
        }
        load_rest(next, 0);
        copies_done();
    }
    // This lane's rows of matrices: read before the barrier, since what follows the product may write over the table.
    const uint16_t* image_rows[2];
    for (int m = 0; m < 2; ++m) image_rows[m] = halos + tables.places[32 * warp + 16 * m + lane % 16] + lane / 16 * 8;
    sync_threads();

    const uint32_t weight_row = FORM == Form::FPROP
                                    ? (lane / 16 * 8 + lane % 8) * Matrix::PITCH + lane / 8 % 2 * 8
                                    : (lane / 8 % 2 * 8 + lane % 8) * Matrix::PITCH + lane / 16 * 8;
    constexpr int WEIGHT_STEP = FORM == Form::FPROP ? 16 : 16 * Matrix::PITCH;
    uint32_t weight_slot = 0;
    DirectTile<Operand, WIDTH> tile;
    tile.clear();
    for (uint32_t i = 0; i < count; ++i) {
        const uint32_t slot = i % 2;
        const bool more = i + 1 < count;
        if (more) next = slice_of<FORM, PAIRS>(p, place.branch, first + i + 1);
        if (i + 2 < count) {
            // Its slot served this iteration's halo, which is loaded.
            const Slice after = slice_of<FORM, PAIRS>(p, place.branch, first + i + 2);
            tables.describe_image<FORM, PAIRS>(p, after.made, after.branch, after.first, slot);
        }
        halo.begin(p);
        if (more) copy(next, 1 - slot);
        Tap tap = {0, 0};
        for (int32_t t = 0; t < taps; ++t) {
            const uint32_t offset = tap.offset<FORM>(p, patch) + slot * slot_elements;
            tap.next(patch);
            const bool last = t + 1 == taps;
            if (last && more) {
                tap = {0, 0};
                matrix.begin(p, next.matrix, column, next.first);
            }
            const uint32_t filter_pixel = tap.filter_pixel<FORM>(p, patch);
            const bool loads = more && halo.more();
            Loaded loaded = {};
            if (loads) loaded = load(halo, next);
            for (int k = 0; k < SLICE / 16; ++k) {
                const bool part = k < Matrix::HELD && (!last || more);
                if (part) matrix.load(p, filter_pixel, k);
                const uint16_t* rows[2] = {image_rows[0] + offset + 16 * k, image_rows[1] + offset + 16 * k};
                const uint16_t* row = weights + weight_slot * Matrix::ELEMENTS + weight_row + k * WEIGHT_STEP;
                direct_add<FORM, Operand, WIDTH>(tile, rows, row);
                if (part) matrix.store(weights + (1 - weight_slot) * Matrix::ELEMENTS, k);
            }
            if (loads) store(next, 1 - slot, loaded);
            if (last && more) {
                while (halo.more()) store(next, 1 - slot, load(halo, next));
                copies_done();
            }
            weight_slot = 1 - weight_slot;
            sync_threads();
        }
    }
    const auto row = [&](int r) { return row_of(p, patch, pixel_of(p, r)); };
    const auto column_of = [&](int c) { return column + c; };
    conv_finish<Operand, DirectTile<Operand, WIDTH>, FORM>(p, place, tile, row, column_of);
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

KERNEL(conv2d_direct_fprop_32_f16, ConvParams, 128) { direct<Form::FPROP, F16, 32, false>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_64_f16, ConvParams, 128) { direct<Form::FPROP, F16, 64, false>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_32_bf16, ConvParams, 128) { direct<Form::FPROP, Bf16, 32, false>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_64_bf16, ConvParams, 128) { direct<Form::FPROP, Bf16, 64, false>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_pair_32_f16, ConvParams, 128) { direct<Form::FPROP, F16, 32, true>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_pair_64_f16, ConvParams, 128) { direct<Form::FPROP, F16, 64, true>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_pair_32_bf16, ConvParams, 128) { direct<Form::FPROP, Bf16, 32, true>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_pair_64_bf16, ConvParams, 128) { direct<Form::FPROP, Bf16, 64, true>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_backward_32_f16, ConvBackwardParams, 128) { direct_backward<F16, 32, false>(p); }
KERNEL(conv2d_direct_backward_64_f16, ConvBackwardParams, 128) { direct_backward<F16, 64, false>(p); }
KERNEL(conv2d_direct_backward_32_bf16, ConvBackwardParams, 128) { direct_backward<Bf16, 32, false>(p); }
KERNEL(conv2d_direct_backward_64_bf16, ConvBackwardParams, 128) { direct_backward<Bf16, 64, false>(p); }
KERNEL(conv2d_direct_backward_pair_32_f16, ConvBackwardParams, 128) { direct_backward<F16, 32, true>(p); }
KERNEL(conv2d_direct_backward_pair_64_f16, ConvBackwardParams, 128) { direct_backward<F16, 64, true>(p); }
KERNEL(conv2d_direct_backward_pair_32_bf16, ConvBackwardParams, 128) { direct_backward<Bf16, 32, true>(p); }
KERNEL(conv2d_direct_backward_pair_64_bf16, ConvBackwardParams, 128) { direct_backward<Bf16, 64, true>(p); }
