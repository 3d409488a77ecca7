// The gradient of the weights of few input channels: 32 output channels by 16 taps, or 64. See `conv_stem.cu`.
#pragma once

#include "conv_stem.cuh"

constexpr int STEM_GROUP = 8;               // taps of a product: its columns, all of one input channel
constexpr int STEM_WARPS = DIRECT_THREADS / 32;
constexpr int STEM_HELD = PATCH / ABREAST;  // chunks of dy that a thread loads of a patch
constexpr int STEM_FLIGHT = 2;              // pixels of x that a thread loads at a time

// A thread's part of the result: a block's 64 taps are divided among its warps, or they have 16 and each a part of the channels.
template <int TAPS>
struct StemTile {
    static constexpr bool SPLITS_PIXELS = TAPS == 2 * STEM_GROUP;
    static constexpr int ROWS = SLICE, COLUMNS = TAPS * STEM_CHANNELS, THREADS = DIRECT_THREADS, RUN = 1;
    static constexpr int PRODUCTS = ROWS * COLUMNS / (4 * THREADS);
    static_assert(SPLITS_PIXELS || TAPS == STEM_WARPS * 2 * STEM_GROUP);
    float d[PRODUCTS][4];

    DEVICE void clear() {
        for (int i = 0; i < PRODUCTS; ++i) {
            for (int e = 0; e < 4; ++e) d[i][e] = 0.0f;
        }
    }

    // Columns are taps of four channels.
    template <class F>
    DEVICE void each(F f) {
        const uint32_t thread = again(threadIdx.x);
        const int lane = int(thread % 32), warp = int(thread / 32);
        for (int i = 0; i < PRODUCTS; ++i) {
            // The products of all warps, or of one, in the order [2 of 16 rows, 2 groups, channels].
            const int product = SPLITS_PIXELS ? warp * PRODUCTS + i : i, first = SPLITS_PIXELS ? 0 : warp * 2 * STEM_GROUP;
            const int row = product / (2 * STEM_CHANNELS) * 16 + lane / 4;
            const int tap = first + product / STEM_CHANNELS % 2 * STEM_GROUP + lane % 4 * 2;
            for (int e = 0; e < 4; ++e) {
                f(4 * i + e, row + 8 * (e / 2), (tap + e % 2) * STEM_CHANNELS + product % STEM_CHANNELS, d[i][e]);
            }
        }
    }
};

// The sums of a warp, over all pixels of its patches or over a part of them.
struct StemSums {
    static constexpr int PRODUCTS = 2 * 2 * STEM_CHANNELS;
    float d[PRODUCTS][4];

    // Adds up those of the warps, in their order. All threads take part, behind a barrier: shared memory is overwritten, and free again
    // behind the next.
    DEVICE void into(StemTile<2 * STEM_GROUP>& tile) const {
        float4* sums = shared_memory<float4>();
        const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
        for (int i = 0; i < PRODUCTS; ++i) {
            sums[(warp * PRODUCTS + i) * 32 + lane] = {d[i][0], d[i][1], d[i][2], d[i][3]};
        }
        sync_threads();
        tile.clear();
        for (int other = 0; other < STEM_WARPS; ++other) {
            for (int i = 0; i < tile.PRODUCTS; ++i) {
                const float4 v = sums[(other * PRODUCTS + warp * tile.PRODUCTS + i) * 32 + lane];
                tile.d[i][0] += v.x, tile.d[i][1] += v.y, tile.d[i][2] += v.z, tile.d[i][3] += v.w;
            }
        }
        sync_threads();
    }
    DEVICE void into(StemTile<STEM_WARPS * 2 * STEM_GROUP>& tile) const {
        static_assert(tile.PRODUCTS == PRODUCTS);
        for (int i = 0; i < PRODUCTS; ++i) {
            for (int e = 0; e < 4; ++e) tile.d[i][e] = d[i][e];
        }
    }
};

// The beginning of a block's shared memory.
struct StemColumns {
    alignas(16) uint32_t places[PATCH];  // `stem_place_of`
    uint32_t pixels[PATCH];              // coordinates in the patch, or NO_ROW
    FactorTable<SLICE> matrix[2];        // of the present iteration and the next
};
static_assert(sizeof(StemColumns) == 2048);

template <class Operand, int TAPS, bool PAIRS>
DEVICE void stem_wgrad(const ConvProduct& p, uint32_t block) {
    constexpr bool SPLITS_PIXELS = StemTile<TAPS>::SPLITS_PIXELS;
    const ConvPlace place = stem_block(p, block);
    const uint64_t iterations = uint64_t(p.inner_tiles) * uint32_t(p.segments);
    const uint32_t first = uint32_t(iterations * place.split / p.splits);
    const uint32_t count = uint32_t(iterations * (place.split + 1) / p.splits) - first;
    const ConvTerm& term = p.terms[0];
    const int32_t k = int32_t(place.row_tile) * SLICE, taps = p.kernel_height * p.kernel_width;
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    const int32_t channel = int32_t(threadIdx.x % CHUNKS) * 8;
    const int32_t first_tap = int32_t(place.column_tile) * TAPS + (SPLITS_PIXELS ? 0 : warp * 2 * STEM_GROUP);

    // What an iteration reads: the pixels of dy, then the halo of x. Behind both places for it, what the halo's pixels are.
    auto& tables = *shared_memory<StemColumns>();
    const int32_t pixel_step = patch_of<Form::WGRAD>(p, 0).pixel_step;
    const uint32_t pitch = stem_pitch<Form::WGRAD>(p, pixel_step), halo_pixels = stem_pixels(p);
    const uint32_t lines = uint32_t(p.patch_images) * uint32_t(p.halo_height);
    constexpr uint32_t SLOTS = sizeof(StemColumns), HALOS = SLOTS + PATCH * PIXEL, EIGHT = 8 * PIXEL;
    const uint32_t slot_bytes = PATCH * PIXEL + (lines * pitch * STEM_PIXEL + EIGHT - 1) / EIGHT * EIGHT;
    uint32_t* halo = reinterpret_cast<uint32_t*>(shared_memory<unsigned char>() + SLOTS + 2 * slot_bytes);

    const Made dy_made = PAIRS && p.matrix.at ? Made::PAIR : Made::PLAIN;
    const auto step_of = [&](uint32_t i) { return conv_step(p, place.branch, first + i); };
    const auto describe = [&](uint32_t i) {
        if (PAIRS && threadIdx.x < SLICE) put_matrix(p, step_of(i).branch, k, tables.matrix[i % 2], int(threadIdx.x));
    };
    const Pixel mine = pixel_of(p, int(threadIdx.x));
    tables.places[threadIdx.x] = stem_place_of(p, mine, pixel_step, pitch);
    tables.pixels[threadIdx.x] = packed(mine);
    for (uint32_t at = threadIdx.x; at < halo_pixels; at += DIRECT_THREADS) halo[at] = stem_pixel(p, at);
    for (uint32_t i = 0; i < 2 && i < count; ++i) describe(i);
    sync_threads();

    Patch patch = {};
    Source x = {};
    Prologue<Operand, Pair::DELTA, PAIRS> dy = {};
    const auto begin = [&](uint32_t i) {
        const ConvStep step = step_of(i);
        patch = patch_of<Form::WGRAD>(p, step.inner_tile);
        x = {term.image, step.branch * term.image_branch, term.image_half};
        dy = {{term.matrix, step.branch * term.matrix_branch, term.matrix_half}, step.branch, dy_made};
    };
    const auto load_x = [&](uint32_t at) {
        return at < halo_pixels ? stem_load<Operand>(p, patch, x, halo[at]) : float4{};
    };
    const auto store_x = [&](uint32_t at, uint32_t slot, const float4& v) {
        if (at < halo_pixels) stem_store<Operand>(HALOS + slot * slot_bytes + stem_place(p, halo[at], pitch), v);
    };
    const auto dy_inside = [&](uint32_t at, uint32_t& offset) {
        const uint32_t row = row_of(p, patch, unpacked(tables.pixels[at]));
        offset = row * uint32_t(p.rows) + uint32_t(k + channel);
        return row != NO_ROW && k + channel < p.rows;
    };
    // A block of those that read the same stores delta. Of a delta that is the same in all branches the first.
    const auto keeps = [&] {
        return PAIRS && p.matrix.kept && place.column_tile == 0 && (p.matrix.kept_branch != 0 || dy.branch == 0);
    };
    const auto dy_pixel = [](int i) { return threadIdx.x / CHUNKS + uint32_t(i) * ABREAST; };
    const auto dy_place = [&](int i, uint32_t slot) {
        return shared_at(swizzled<PIXEL>(SLOTS + slot * slot_bytes + dy_pixel(i) * PIXEL + 2 * channel));
    };
    const auto load_dy = [&](int i, uint32_t slot) {
        uint32_t offset;
        const bool inside = dy_inside(dy_pixel(i), offset);
        return dy.load(p.matrix, keeps(), offset, inside, tables.matrix[slot], channel, dy_place(i, slot));
    };
    const auto store_dy = [&](int i, uint32_t slot, const auto& loaded) {
        uint16_t* to = dy_place(i, slot);
        const uint4 coded = dy.round(p.matrix, keeps(), loaded, tables.matrix[slot], channel, to);
        store_operand(to, coded);
        if (keeps() && p.matrix.kept_half) {
            uint32_t offset;
            uint16_t* kept = static_cast<uint16_t*>(p.matrix.kept) + dy.branch * p.matrix.kept_branch;
            if (dy_inside(dy_pixel(i), offset)) *reinterpret_cast<uint4*>(kept + offset) = coded;
        }
    };
    // Begins to copy dy, if nothing is to be done to it.
    const auto copy_dy = [&](uint32_t slot) {
        for (int i = 0; dy.plain() && i < STEM_HELD; ++i) {
            uint32_t offset;
            const bool inside = dy_inside(dy_pixel(i), offset);
            copy_async(dy_place(i, slot), dy.of.place(offset, inside), inside);
        }
    };

    uint32_t offsets[2];
    for (int group = 0; group < 2; ++group) offsets[group] = stem_tap(p, first_tap + group * STEM_GROUP + lane / 4, pitch);
    const uint32_t dy_row = swizzled<PIXEL>((lane / 16 * 8 + lane % 8) * PIXEL + lane / 8 % 2 * 16);
    StemSums sums = {};
    // Iteration -1 only loads.
    for (uint32_t i = 0xffffffffu; i + 1 < count + 1; ++i) {
        const bool more = i + 1 < count, products = i != 0xffffffffu;
        const uint32_t slot = i % 2, next = 1 - slot;
        decltype(load_dy(0, 0)) of_dy[STEM_HELD] = {};
        float4 of_x[STEM_FLIGHT] = {};
        if (more) {
            begin(i + 1);
            copy_dy(next);
            UNROLLED
            for (int part = 0; part < STEM_HELD; ++part) {
                if (!dy.plain()) of_dy[part] = load_dy(part, next);
            }
            UNROLLED
            for (int part = 0; part < STEM_FLIGHT; ++part) of_x[part] = load_x(threadIdx.x + part * DIRECT_THREADS);
        }
        // Its slot served this iteration's delta, which is made.
        if (products && p.segments > 1 && i + 2 < count) describe(i + 2);
        constexpr int PIXELS = SPLITS_PIXELS ? PATCH / STEM_WARPS : PATCH;
        const int first_pixel = SPLITS_PIXELS ? warp * PIXELS : 0, end = products ? first_pixel + PIXELS : first_pixel;
        ROLLED
        for (int pixel = first_pixel; pixel < end; pixel += 16) {
            uint32_t a[2][4];
            for (int m = 0; m < 2; ++m) {
                load_matrices_transposed(a[m], shared_at((SLOTS + slot * slot_bytes + dy_row + pixel * PIXEL) ^ m * 32));
            }
            const uint32_t* places = tables.places + pixel + lane % 4 * 2;
            const uint2 low = *reinterpret_cast<const uint2*>(places), high = *reinterpret_cast<const uint2*>(places + 8);
            for (int group = 0; group < 2; ++group) {
                if (first_tap + group * STEM_GROUP >= taps) continue;
                const uint32_t at = HALOS + slot * slot_bytes + offsets[group];
                const uint2 of[4] = {stem_read(at + low.x), stem_read(at + low.y), stem_read(at + high.x), stem_read(at + high.y)};
                for (int c = 0; c < STEM_CHANNELS; ++c) {
                    if (c >= p.image_channels) continue;
                    // Of two pixels the same channel.
                    const auto both = [&](const uint2& a, const uint2& b) {
                        const uint32_t mine = c < 2 ? a.x : a.y, other = c < 2 ? b.x : b.y;
                        return c % 2 == 0 ? (mine & 0xffffu) | other << 16 : mine >> 16 | (other & 0xffff0000u);
                    };
                    const uint32_t b[2] = {both(of[0], of[1]), both(of[2], of[3])};
                    for (int m = 0; m < 2; ++m) Operand::mma(sums.d[(m * 2 + group) * STEM_CHANNELS + c], a[m], b);
                }
            }
        }
        if (more) {
            UNROLLED
            for (int part = 0; part < STEM_HELD; ++part) {
                if (!dy.plain()) store_dy(part, next, of_dy[part]);
            }
            UNROLLED
            for (int part = 0; part < STEM_FLIGHT; ++part) store_x(threadIdx.x + part * DIRECT_THREADS, next, of_x[part]);
            for (uint32_t at = threadIdx.x + STEM_FLIGHT * DIRECT_THREADS; at < halo_pixels; at += STEM_FLIGHT * DIRECT_THREADS) {
                UNROLLED
                for (int part = 0; part < STEM_FLIGHT; ++part) of_x[part] = load_x(at + part * DIRECT_THREADS);
                UNROLLED
                for (int part = 0; part < STEM_FLIGHT; ++part) store_x(at + part * DIRECT_THREADS, next, of_x[part]);
            }
            copies_done();
        }
        sync_threads();
    }
    StemTile<TAPS> tile;
    sums.into(tile);
    const ConvPlace finished = stem_block(p, again(block));
    const auto row = [&](int r) {
        const uint32_t of = finished.row_tile * SLICE + uint32_t(r);
        return of < uint32_t(p.rows) ? of : NO_ROW;
    };
    const auto column_of = [&](int at) {
        const int32_t tap = int32_t(finished.column_tile) * TAPS + at / STEM_CHANNELS, c = at % STEM_CHANNELS;
        const bool there = tap < p.kernel_height * p.kernel_width && c < p.image_channels;
        return there ? uint32_t(tap * p.image_channels + c) : NO_ROW;
    };
    conv_finish<Operand, StemTile<TAPS>, Form::WGRAD>(p, finished, tile, row, column_of);
}
