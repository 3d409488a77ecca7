// 2-D convolutions of 16-bit operands on tensor cores, for numbers of channels that are multiples of 8: the kernels of
// `conv.cu` on patches whose halo stays in shared memory. Forms, operands and blocks: `conv_params.cuh`; patches:
// `conv_patch.cuh`.
//
// Loads for the next step begin before a step's products and end behind them; what they bring goes to the other of two
// places in shared memory, so that there is one barrier per step.
// Twelve warps hide each other's loads.
#define KERNEL_BLOCKS 3
#include "conv_patch.cuh"

// ---- fprop and dgrad: 128 pixels by COLUMNS channels ----

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
        *reinterpret_cast<uint4*>(to + line * PITCH + along) =
            chunk_round<Operand>(held, half, at[i] != NO_ROW, nullptr);
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
    Source image, matrix;
    int64_t branch;
    uint32_t first;  // channel
    bool norm;
};

template <Form FORM>
DEVICE Slice slice_of(const ConvProduct& p, uint32_t branch, uint32_t iteration) {
    const ConvStep step = conv_step(p, branch, iteration);
    const ConvTerm& term = FORM == Form::FPROP && step.second ? p.terms[1] : p.terms[0];
    return {{term.image, step.branch * term.image_branch, term.image_half},
            {term.matrix, step.branch * term.matrix_branch, term.matrix_half},
            step.branch, step.inner_tile * SLICE, FORM == Form::FPROP && term.norm != 0};
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

template <Form FORM, class Operand, int WIDTH>
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
        const Slice slice = slice_of<FORM>(p, place.branch, first + i);
        if (slice.norm) tables.describe_norm(p, slice.branch, slice.first, i);
    }
    sync_threads();

    Matrix matrix = {};
    Halo halo;
    halo.begin(p);
    const uint32_t slot_elements = halo.pixels * PIXEL;
    const auto load = [&](const Halo& from, const Slice& slice, bool& inside) {
        uint32_t offset;
        inside = from.inside(p, patch, int32_t(slice.first) + channel, offset);
        return inside ? chunk_load<Operand>(slice.image.at, slice.image.branch + offset, slice.image.half) : Chunk{};
    };
    const auto store = [&](const Slice& slice, uint32_t slot, const Chunk& chunk, bool inside) {
        const BnScaleShift* norm = slice.norm ? tables.norm[slot] + channel : nullptr;
        halo.put(halos + slot * slot_elements, chunk_round<Operand>(chunk, slice.image.half, inside, norm));
        halo.next(p);
    };
    // Begins to copy a whole halo if nothing is to be done to it.
    const auto copy = [&](const Slice& slice, uint32_t slot) {
        if (slice.norm || !slice.image.half) return;
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
            Chunk chunks[IN_FLIGHT];
            bool inside[IN_FLIGHT];
            for (int i = 0; i < IN_FLIGHT; ++i) {
                chunks[i] = load(ahead, slice, inside[i]);
                ahead.next(p);
            }
            for (int i = 0; i < IN_FLIGHT; ++i) store(slice, slot, chunks[i], inside[i]);
        }
    };
    Slice next = {};
    if (count > 0) {
        next = slice_of<FORM>(p, place.branch, first);
        copy(next, 0);
        matrix.begin(p, next.matrix, column, next.first);
        for (int part = 0; part < Matrix::HELD; ++part) {
            matrix.load(p, Tap{0, 0}.filter_pixel<FORM>(p, patch), part);
            matrix.store(weights, part);
        }
        load_rest(next, 0);
        copies_done();
    }
    sync_threads();

    // This lane's rows of matrices.
    const uint16_t* image_rows[2];
    for (int m = 0; m < 2; ++m) image_rows[m] = halos + tables.places[32 * warp + 16 * m + lane % 16] + lane / 16 * 8;
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
        if (more) next = slice_of<FORM>(p, place.branch, first + i + 1);
        if (i + 2 < count) {
            // Its slot served this iteration's halo, which is loaded.
            const Slice after = slice_of<FORM>(p, place.branch, first + i + 2);
            if (after.norm) tables.describe_norm(p, after.branch, after.first, slot);
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
            bool inside = false;
            Chunk chunk = {};
            if (loads) chunk = load(halo, next, inside);
            for (int k = 0; k < SLICE / 16; ++k) {
                const bool part = k < Matrix::HELD && (!last || more);
                if (part) matrix.load(p, filter_pixel, k);
                const uint16_t* rows[2] = {image_rows[0] + offset + 16 * k, image_rows[1] + offset + 16 * k};
                const uint16_t* row = weights + weight_slot * Matrix::ELEMENTS + weight_row + k * WEIGHT_STEP;
                direct_add<FORM, Operand, WIDTH>(tile, rows, row);
                if (part) matrix.store(weights + (1 - weight_slot) * Matrix::ELEMENTS, k);
            }
            if (loads) store(next, 1 - slot, chunk, inside);
            if (last && more) {
                while (halo.more()) {
                    chunk = load(halo, next, inside);
                    store(next, 1 - slot, chunk, inside);
                }
                copies_done();
            }
            weight_slot = 1 - weight_slot;
            sync_threads();
        }
    }
    const auto row = [&](int r) { return row_of(p, patch, pixel_of(p, r)); };
    const auto column_of = [&](int c) { return column + c; };
    conv_finish<Operand, DirectTile<Operand, WIDTH>, FORM == Form::FPROP>(p, place, tile, row, column_of);
}

// ---- wgrad: 32 output channels by 9 taps of 32 input channels ----

constexpr int MOST_TAPS = 9;

// A thread's part of the result. The four warps have 8 input channels each, with all taps.
template <class Operand>
struct WgradTile {
    static constexpr int ROWS = SLICE, COLUMNS = MOST_TAPS * SLICE, THREADS = DIRECT_THREADS, RUN = 8;
    float d[MOST_TAPS][2][4];

    DEVICE void clear() {
        for (int t = 0; t < MOST_TAPS; ++t) {
            for (int m = 0; m < 2; ++m) {
                for (int i = 0; i < 4; ++i) d[t][m][i] = 0.0f;
            }
        }
    }

    template <class F>
    DEVICE void each(F f) {
        const int lane = int(threadIdx.x) % 32, row = lane / 4, column = int(threadIdx.x) / 32 * 8 + lane % 4 * 2;
        for (int t = 0; t < MOST_TAPS; ++t) {
            for (int m = 0; m < 2; ++m) {
                for (int i = 0; i < 4; ++i) {
                    f((2 * t + m) * 4 + i, row + 16 * m + 8 * (i / 2), column + SLICE * t + i % 2, d[t][m][i]);
                }
            }
        }
    }
};

template <class Operand>
DEVICE void direct_wgrad(const ConvProduct& p, uint32_t block) {
    const ConvPlace place = conv_place(p, block);
    const uint64_t iterations = uint64_t(p.inner_tiles) * uint32_t(p.segments);
    const uint32_t first = uint32_t(iterations * place.split / p.splits);
    const uint32_t count = uint32_t(iterations * (place.split + 1) / p.splits) - first;
    const ConvTerm& term = p.terms[0];
    const int32_t k = int32_t(place.row_tile) * SLICE;
    const uint32_t slices = uint32_t(p.image_channels + SLICE - 1) / SLICE;
    const int32_t c = int32_t(place.column_tile % slices) * SLICE;
    const int32_t all_taps = p.kernel_height * p.kernel_width;
    const int32_t first_tap = int32_t(place.column_tile / slices) * MOST_TAPS;
    const int32_t taps = all_taps - first_tap < MOST_TAPS ? all_taps - first_tap : MOST_TAPS;

    auto& tables = *shared_memory<DirectTables>();
    uint16_t* slots = reinterpret_cast<uint16_t*>(&tables + 1);
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int32_t channel = int32_t(threadIdx.x) % CHUNKS * 8;

    const auto step_of = [&](uint32_t i) { return conv_step(p, place.branch, first + i); };
    tables.describe(p, patch_of<Form::WGRAD>(p, 0).pixel_step);
    for (uint32_t i = 0; i < 2 && i < count; ++i) {
        if (term.norm) tables.describe_norm(p, step_of(i).branch, c, i);
    }
    sync_threads();

    // What an iteration reads: the halo of x, then the pixels of dy.
    Halo halo;
    halo.begin(p);
    const uint32_t halo_elements = halo.pixels * PIXEL, slot_elements = halo_elements + PATCH * PIXEL;
    Patch patch = {};
    Source x = {}, dy = {};
    uint32_t dy_at = 0;
    const auto begin = [&](uint32_t i) {
        const ConvStep step = step_of(i);
        patch = patch_of<Form::WGRAD>(p, step.inner_tile);
        x = {term.image, step.branch * term.image_branch, term.image_half};
        dy = {term.matrix, step.branch * term.matrix_branch, term.matrix_half};
        halo.begin(p);
        dy_at = threadIdx.x / CHUNKS;
    };
    const auto load_x = [&](const Halo& from, bool& inside) {
        uint32_t offset;
        inside = from.inside(p, patch, c + channel, offset);
        return inside ? chunk_load<Operand>(x.at, x.branch + offset, x.half) : Chunk{};
    };
    const auto store_x = [&](uint32_t slot, const Chunk& chunk, bool inside) {
        const BnScaleShift* norm = term.norm ? tables.norm[slot] + channel : nullptr;
        halo.put(slots + slot * slot_elements, chunk_round<Operand>(chunk, x.half, inside, norm));
        halo.next(p);
    };
    const auto dy_inside = [&](uint32_t at, uint32_t& offset) {
        const uint32_t row = row_of(p, patch, tables.pixel(int(at)));
        offset = row * uint32_t(p.rows) + uint32_t(k + channel);
        return row != NO_ROW && k + channel < p.rows;
    };
    const auto load_dy = [&](uint32_t at, bool& inside) {
        uint32_t offset;
        inside = dy_inside(at, offset);
        return inside ? chunk_load<Operand>(dy.at, dy.branch + offset, dy.half) : Chunk{};
    };
    const auto store_dy = [&](uint32_t slot, const Chunk& chunk, bool inside) {
        uint16_t* to = slots + slot * slot_elements + halo_elements + dy_at * PIXEL + channel;
        *reinterpret_cast<uint4*>(to) = chunk_round<Operand>(chunk, dy.half, inside, nullptr);
        dy_at += ABREAST;
    };
    // Begins to copy what needs nothing done to it.
    const auto copy = [&](uint32_t slot) {
        uint16_t* to = slots + slot * slot_elements;
        uint32_t offset;
        if (x.half && !term.norm) {
            for (; halo.more(); halo.next(p)) {
                const bool inside = halo.inside(p, patch, c + channel, offset);
                const uint16_t* image = static_cast<const uint16_t*>(x.at);
                halo.copy(to, inside ? image + x.branch + offset : image, inside);
            }
        }
        if (dy.half) {
            for (; dy_at < PATCH; dy_at += ABREAST) {
                const bool inside = dy_inside(dy_at, offset);
                const uint16_t* from = static_cast<const uint16_t*>(dy.at) + (inside ? dy.branch + offset : 0);
                copy_async(to + halo_elements + dy_at * PIXEL + channel, from, inside);
            }
        }
    };
    const auto load_rest = [&](uint32_t slot) {
        Chunk chunks[IN_FLIGHT];
        bool inside[IN_FLIGHT];
        while (halo.more()) {
            Halo ahead = halo;
            for (int i = 0; i < IN_FLIGHT; ++i) {
                chunks[i] = load_x(ahead, inside[i]);
                ahead.next(p);
            }
            for (int i = 0; i < IN_FLIGHT; ++i) store_x(slot, chunks[i], inside[i]);
        }
        static_assert(PATCH % (ABREAST * IN_FLIGHT) == 0);
        while (dy_at + (IN_FLIGHT - 1) * ABREAST < PATCH) {
            for (int i = 0; i < IN_FLIGHT; ++i) chunks[i] = load_dy(dy_at + i * ABREAST, inside[i]);
            for (int i = 0; i < IN_FLIGHT; ++i) store_dy(slot, chunks[i], inside[i]);
        }
    };
    if (count > 0) {
        begin(0);
        copy(0);
        load_rest(0);
        copies_done();
    }
    sync_threads();

    // Two taps share a load of matrices: this lane's, in each pair.
    uint32_t tap_offsets[(MOST_TAPS + 1) / 2];
    for (int pair = 0; pair < (MOST_TAPS + 1) / 2; ++pair) {
        const int32_t mine = 2 * pair + lane / 16, tap = first_tap + (mine < taps ? mine : taps - 1);
        const int32_t r = tap / p.kernel_width, s = tap - r * p.kernel_width;
        tap_offsets[pair] = uint32_t(r * p.halo_width + s) * PIXEL + warp * 8;
    }
    WgradTile<Operand> tile;
    tile.clear();
    for (uint32_t i = 0; i < count; ++i) {
        const uint32_t slot = i % 2;
        const bool more = i + 1 < count;
        if (more) {
            begin(i + 1);
            copy(1 - slot);
        }
        // Its slot served this iteration's halo, which is loaded.
        if (term.norm && i + 2 < count) tables.describe_norm(p, step_of(i + 2).branch, c, slot);
        const uint16_t* halo_slot = slots + slot * slot_elements;
        const uint16_t* dy_row = halo_slot + halo_elements + (lane / 16 * 8 + lane % 8) * PIXEL + lane / 8 % 2 * 8;
        for (int pixel = 0; pixel < PATCH; pixel += 16) {
            const bool loads_x = more && halo.more(), loads_dy = more && dy_at < PATCH;
            bool x_inside = false, dy_inside_ = false;
            Chunk x_chunk = {}, dy_chunk = {};
            if (loads_x) x_chunk = load_x(halo, x_inside);
            if (loads_dy) dy_chunk = load_dy(dy_at, dy_inside_);
            const uint16_t* x_row = halo_slot + tables.places[pixel + lane % 16];
            uint32_t a[2][4];
            for (int m = 0; m < 2; ++m) load_matrices_transposed(a[m], dy_row + pixel * PIXEL + m * 16);
            for (int pair = 0; pair < (MOST_TAPS + 1) / 2; ++pair) {
                if (2 * pair >= taps) continue;
                uint32_t b[4];
                load_matrices_transposed(b, x_row + tap_offsets[pair]);
                for (int m = 0; m < 2; ++m) {
                    Operand::mma(tile.d[2 * pair][m], a[m], b);
                    if (2 * pair + 1 < MOST_TAPS) Operand::mma(tile.d[2 * pair + 1][m], a[m], b + 2);
                }
            }
            if (loads_x) store_x(1 - slot, x_chunk, x_inside);
            if (loads_dy) store_dy(1 - slot, dy_chunk, dy_inside_);
        }
        if (more) {
            while (halo.more()) {
                bool inside;
                const Chunk chunk = load_x(halo, inside);
                store_x(1 - slot, chunk, inside);
            }
            copies_done();
        }
        sync_threads();
    }
    const auto row = [&](int r) { return k + r < p.rows ? uint32_t(k + r) : NO_ROW; };
    const auto column_of = [&](int at) {
        const int32_t tap = at / SLICE, in_slice = c + at % SLICE;
        const bool there = tap < taps && in_slice < p.image_channels;
        return there ? uint32_t((first_tap + tap) * p.image_channels + in_slice) : NO_ROW;
    };
    conv_finish<Operand, WgradTile<Operand>, false>(p, place, tile, row, column_of);
}

template <class Operand, int WIDTH>
DEVICE void direct_backward(const ConvBackwardParams& p) {
    uint32_t block;
    if (is_wgrad_block(p, block)) {
        direct_wgrad<Operand>(p.wgrad, block);
    } else {
        direct<Form::DGRAD, Operand, WIDTH>(p.dgrad, block);
    }
}

KERNEL(conv2d_direct_fprop_32_f16, ConvParams, 128) { direct<Form::FPROP, F16, 32>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_64_f16, ConvParams, 128) { direct<Form::FPROP, F16, 64>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_32_bf16, ConvParams, 128) { direct<Form::FPROP, Bf16, 32>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_fprop_64_bf16, ConvParams, 128) { direct<Form::FPROP, Bf16, 64>(p.product, blockIdx.x); }
KERNEL(conv2d_direct_backward_32_f16, ConvBackwardParams, 128) { direct_backward<F16, 32>(p); }
KERNEL(conv2d_direct_backward_64_f16, ConvBackwardParams, 128) { direct_backward<F16, 64>(p); }
KERNEL(conv2d_direct_backward_32_bf16, ConvBackwardParams, 128) { direct_backward<Bf16, 32>(p); }
KERNEL(conv2d_direct_backward_64_bf16, ConvBackwardParams, 128) { direct_backward<Bf16, 64>(p); }
