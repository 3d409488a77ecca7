// The gradient of the weights from patches: 32 output channels by 9 taps of 32 input channels. See `conv_direct.cu`.
#pragma once

#include "conv_patch.cuh"

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
        const uint32_t thread = again(threadIdx.x);
        const int lane = int(thread % 32), row = lane / 4, column = int(thread / 32) * 8 + lane % 4 * 2;
        for (int t = 0; t < MOST_TAPS; ++t) {
            for (int m = 0; m < 2; ++m) {
                for (int i = 0; i < 4; ++i) {
                    f((2 * t + m) * 4 + i, row + 16 * m + 8 * (i / 2), column + SLICE * t + i % 2, d[t][m][i]);
                }
            }
        }
    }
};

template <class Operand, bool PAIRS>
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
    constexpr uint32_t SLOTS = sizeof(DirectTables);
    const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
    const int32_t channel = int32_t(threadIdx.x % CHUNKS) * 8;

    const Made x_made = PAIRS && p.image.at ? Made::PAIR : term.norm ? Made::NORM : Made::PLAIN;
    const Made dy_made = PAIRS && p.matrix.at ? Made::PAIR : Made::PLAIN;

    const auto step_of = [&](uint32_t i) { return conv_step(p, place.branch, first + i); };
    const auto describe = [&](uint32_t i, uint32_t slot) {
        const int64_t branch = step_of(i).branch;
        tables.describe_image<Form::WGRAD, PAIRS>(p, x_made, branch, c, slot);
        if constexpr (PAIRS) tables.describe_matrix(p, branch, k, slot);
    };
    tables.describe_places(p, patch_of<Form::WGRAD>(p, 0).pixel_step);
    tables.describe_pixels(p);
    for (uint32_t i = 0; i < 2 && i < count; ++i) describe(i, i);
    sync_threads();

    // What an iteration reads: the pixels of dy, then the halo of x.
    constexpr uint32_t HALOS = SLOTS + PATCH * PIXEL;
    Halo halo;
    halo.begin(p);
    const uint32_t slot_bytes = PATCH * PIXEL + halo.bytes();
    Patch patch = {};
    Prologue<Operand, Pair::TANGENT, PAIRS> x = {};
    Prologue<Operand, Pair::DELTA, PAIRS> dy = {};
    uint32_t dy_at = 0;
    const auto begin = [&](uint32_t i) {
        const ConvStep step = step_of(i);
        patch = patch_of<Form::WGRAD>(p, step.inner_tile);
        x = {{term.image, step.branch * term.image_branch, term.image_half}, step.branch, x_made};
        dy = {{term.matrix, step.branch * term.matrix_branch, term.matrix_half}, step.branch, dy_made};
        halo.begin(p);
        dy_at = threadIdx.x / CHUNKS;
    };
    const auto load_x = [&](const Halo& from, uint32_t slot) {
        uint32_t offset;
        const bool inside = from.inside(p, patch, c + channel, offset);
        uint16_t* place = from.place(HALOS + slot * slot_bytes);
        return x.load(p.image, false, offset, inside, tables.image[slot], channel, place);
    };
    const auto store_x = [&](uint32_t slot, const auto& loaded) {
        const uint32_t to = HALOS + slot * slot_bytes;
        halo.put(to, x.round(p.image, false, loaded, tables.image[slot], channel, halo.place(to)));
        halo.next(p);
    };
    const auto dy_inside = [&](uint32_t at, uint32_t& offset) {
        const uint32_t row = row_of(p, patch, tables.pixel(int(at)));
        offset = row * uint32_t(p.rows) + uint32_t(k + channel);
        return row != NO_ROW && k + channel < p.rows;
    };
    // Whether this block stores delta: one of those that read the same does. Of a delta that is the same in all branches the first.
    const auto keeps = [&] {
        return PAIRS && p.matrix.kept && place.column_tile == 0 && (p.matrix.kept_branch != 0 || dy.branch == 0);
    };
    const auto dy_place = [&](uint32_t at, uint32_t slot) {
        return shared_at(swizzled<PIXEL>(SLOTS + slot * slot_bytes + at * PIXEL + 2 * channel));
    };
    const auto load_dy = [&](uint32_t at, uint32_t slot) {
        uint32_t offset;
        const bool inside = dy_inside(at, offset);
        return dy.load(p.matrix, keeps(), offset, inside, tables.wgrad.matrix[slot], channel, dy_place(at, slot));
    };
    const auto store_dy = [&](uint32_t slot, const auto& loaded) {
        uint16_t* to = dy_place(dy_at, slot);
        const uint4 coded = dy.round(p.matrix, keeps(), loaded, tables.wgrad.matrix[slot], channel, to);
        store_operand(to, coded);
        if (keeps() && p.matrix.kept_half) {
            uint32_t offset;
            uint16_t* kept = static_cast<uint16_t*>(p.matrix.kept) + dy.branch * p.matrix.kept_branch;
            if (dy_inside(dy_at, offset)) *reinterpret_cast<uint4*>(kept + offset) = coded;
        }
        dy_at += ABREAST;
    };
    // Begins to copy what needs nothing done to it.
    const auto copy = [&](uint32_t slot) {
        const uint32_t to = HALOS + slot * slot_bytes;
        uint32_t offset;
        if (x.plain()) {
            for (; halo.more(); halo.next(p)) {
                const bool inside = halo.inside(p, patch, c + channel, offset);
                halo.copy(to, x.of.place(offset, inside), inside);
            }
        }
        if (dy.plain()) {
            for (; dy_at < PATCH; dy_at += ABREAST) {
                const bool inside = dy_inside(dy_at, offset);
                copy_async(dy_place(dy_at, slot), dy.of.place(offset, inside), inside);
            }
        }
    };
    const auto load_rest = [&](uint32_t slot) {
        while (halo.more()) {
            decltype(load_x(halo, slot)) loaded[IN_FLIGHT];
            Halo ahead = halo;
            UNROLLED
            for (int i = 0; i < IN_FLIGHT; ++i) {
                loaded[i] = load_x(ahead, slot);
                ahead.next(p);
            }
            UNROLLED
            for (int i = 0; i < IN_FLIGHT; ++i) store_x(slot, loaded[i]);
        }
        static_assert(PATCH % (ABREAST * IN_FLIGHT) == 0);
        while (dy_at + (IN_FLIGHT - 1) * ABREAST < PATCH) {
            decltype(load_dy(dy_at, slot)) loaded[IN_FLIGHT];
            UNROLLED
            for (int i = 0; i < IN_FLIGHT; ++i) loaded[i] = load_dy(dy_at + i * ABREAST, slot);
            UNROLLED
            for (int i = 0; i < IN_FLIGHT; ++i) store_dy(slot, loaded[i]);
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
        tap_offsets[pair] = uint32_t(r * p.halo_width + s) * PIXEL + warp * 16;
    }
    const uint32_t dy_row = swizzled<PIXEL>((lane / 16 * 8 + lane % 8) * PIXEL + lane / 8 % 2 * 16);
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
        if (i + 2 < count) describe(i + 2, slot);
        const uint32_t slot_at = slot * slot_bytes;
        for (int pixel = 0; pixel < PATCH; pixel += 16) {
            const bool loads_x = more && halo.more(), loads_dy = more && dy_at < PATCH;
            decltype(load_x(halo, slot)) of_x = {};
            decltype(load_dy(dy_at, slot)) of_dy = {};
            if (loads_x) of_x = load_x(halo, 1 - slot);
            if (loads_dy) of_dy = load_dy(dy_at, 1 - slot);
            const uint32_t x_row = HALOS + slot_at + tables.places[pixel + lane % 16];
            uint32_t a[2][4];
            for (int m = 0; m < 2; ++m) load_matrices_transposed(a[m], shared_at((SLOTS + slot_at + dy_row + pixel * PIXEL) ^ m * 32));
            for (int pair = 0; pair < (MOST_TAPS + 1) / 2; ++pair) {
                if (2 * pair >= taps) continue;
                uint32_t b[4];
                load_matrices_transposed(b, shared_at(swizzled<PIXEL>(x_row + tap_offsets[pair])));
                for (int m = 0; m < 2; ++m) {
                    Operand::mma(tile.d[2 * pair][m], a[m], b);
                    if (2 * pair + 1 < MOST_TAPS) Operand::mma(tile.d[2 * pair + 1][m], a[m], b + 2);
                }
            }
            if (loads_x) store_x(1 - slot, of_x);
            if (loads_dy) store_dy(1 - slot, of_dy);
        }
        if (more) {
            while (halo.more()) store_x(1 - slot, load_x(halo, 1 - slot));
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
    conv_finish<Operand, WgradTile<Operand>, Form::WGRAD>(p, conv_place(p, again(block)), tile, row, column_of);
}
