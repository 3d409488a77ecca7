// The gradient of the weights by products of warpgroups: WIDTH output channels by taps of 32 input channels. See `conv_wgmma.cu`.
#pragma once

#include "conv_cells.cuh"

// A product has a column of taps, LINES of them one below the other, since there the parts of a line of the halo go on; a block has UNITS of
// those. The tile's columns are its taps, one column of taps after the other, with 32 input channels each.
//
// With 32 output channels two taps are the 64 lines of a product, and dy its columns: of an odd number of taps one is computed for nothing.
// With 64 dy is the lines, and three taps the columns: a filter of 3 × 3 is three products.
template <class Operand, int WIDTH>
struct TapsTile;

template <class Operand>
struct TapsTile<Operand, 32> {
    static constexpr int LINES = 2, UNITS = 6, OWN = UNITS / 2;  // OWN: of a warpgroup
    static constexpr int ROWS = 32, COLUMNS = UNITS * LINES * SLICE, THREADS = GROUP_THREADS, RUN = 8;
    float d[OWN][16];

    DEVICE void clear() {
        for (int unit = 0; unit < OWN; ++unit) {
            for (int i = 0; i < 16; ++i) d[unit][i] = 0.0f;
        }
    }
    DEVICE void settle() {
        for (int unit = 0; unit < OWN; ++unit) wgmma_settle(d[unit]);
    }
    // Adds the products of a patch; `x_of(cell, unit)` are granules to the unit's first tap of a cell, `dy` those to its cotangents. Rolled: the
    // addresses, all at once, would take more registers. Cells and taps that there are not cost time, but no branch: dy is zero there,
    // and columns lie nowhere.
    template <class XOf>
    DEVICE void add(uint64_t x, uint32_t line, XOf x_of, uint64_t dy_matrix, uint32_t dy) {
        const int first = int(thread_again() / 128) * OWN;
        ROLLED
        for (int cell = 0; cell < CELLS; ++cell) {
            uint32_t at[OWN];
            for (int unit = 0; unit < OWN; ++unit) at[unit] = x_of(cell, first + unit);
            ROLLED
            for (int lines = 0; lines < 8; lines += 2) {
                for (int unit = 0; unit < OWN; ++unit) {
                    Operand::template wgmma<true, true>(d[unit], wgmma_behind(x, at[unit] + lines * line), wgmma_behind(dy_matrix, dy));
                }
                dy += 16;
            }
        }
    }
    DEVICE void unite(float*) {}

    template <class F>
    DEVICE void each(F f) {
        const uint32_t thread = thread_again();
        const int lane = int(thread % 32), group = int(thread / 128);
        const int column = group * OWN * LINES * SLICE + int(thread % 128 / 32) * 16 + lane / 4, row = lane % 4 * 2;
        for (int unit = 0; unit < OWN; ++unit) {
            for (int i = 0; i < 16; ++i) {
                f(unit * 16 + i, row + i / 4 * 8 + i % 2, column + unit * LINES * SLICE + i % 4 / 2 * 8, d[unit][i]);
            }
        }
    }
};

// Each warpgroup has a unit of its own, and the middle one of half of the cells.
template <class Operand>
struct TapsTile<Operand, 64> {
    static constexpr int LINES = 3, UNITS = 3, COLUMN = LINES * SLICE, HALF = COLUMN / 4;  // HALF: registers of half a unit's columns
    static constexpr int ROWS = 64, COLUMNS = UNITS * COLUMN, THREADS = GROUP_THREADS, RUN = 8;
    float own[2 * HALF], middle[2 * HALF];  // `unite` leaves half of the middle unit's columns to each warpgroup, in the first HALF

    DEVICE void clear() {
        for (int i = 0; i < 2 * HALF; ++i) own[i] = middle[i] = 0.0f;
    }
    DEVICE void settle() {
        wgmma_settle(own);
        wgmma_settle(middle);
    }
    template <class XOf>
    DEVICE void add(uint64_t x, uint32_t line, XOf x_of, uint64_t dy_matrix, uint32_t dy) {
        const uint32_t group = uniform(thread_again() / 128);
        constexpr uint32_t OF_CELL = CELL_PIXELS, HALF_CELLS = CELLS / 2;
        ROLLED
        for (uint32_t i = 0; i < HALF_CELLS; ++i) {
            const uint32_t cell = group * HALF_CELLS + i;
            const uint32_t at = x_of(int(cell), int(2 * group)), at_middle = x_of(int(cell), 1);
            ROLLED
            for (uint32_t lines = 0; lines < 8; lines += 2) {
                const uint64_t lines_of_dy = wgmma_behind(dy_matrix, dy + cell * OF_CELL + lines * 8);
                Operand::template wgmma<true, true>(own, lines_of_dy, wgmma_behind(x, at + lines * line));
                Operand::template wgmma<true, true>(middle, lines_of_dy, wgmma_behind(x, at_middle + lines * line));
            }
        }
        ROLLED
        for (uint32_t i = 0; i < HALF_CELLS; ++i) {
            const uint32_t cell = (1 - group) * HALF_CELLS + i, at = x_of(int(cell), int(2 * group));
            ROLLED
            for (uint32_t lines = 0; lines < 8; lines += 2) {
                Operand::template wgmma<true, true>(own, wgmma_behind(dy_matrix, dy + cell * OF_CELL + lines * 8),
                                                    wgmma_behind(x, at + lines * line));
            }
        }
    }
    // Adds up what both warpgroups have of the middle unit, in one order. All threads take part; `shared` has UNITE_BYTES.
    static constexpr int UNITE_BYTES = GROUP_THREADS * HALF * 4;
    DEVICE void unite(float* shared) {
        const uint32_t thread = thread_again();
        const bool second = thread >= 128;
        for (int i = 0; i < HALF; ++i) shared[i * GROUP_THREADS + thread] = second ? middle[i] : middle[HALF + i];
        sync_threads();
        for (int i = 0; i < HALF; ++i) {
            const float other = shared[i * GROUP_THREADS + (thread ^ 128)];
            middle[i] = second ? other + middle[HALF + i] : middle[i] + other;
        }
        sync_threads();
    }

    template <class F>
    DEVICE void each(F f) {
        const uint32_t thread = thread_again();
        const int lane = int(thread % 32), group = int(thread / 128);
        const int row = int(thread % 128 / 32) * 16 + lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 3 * HALF; ++i) {
            const int of = i % (2 * HALF), to = column + of / 4 * 8 + of % 2;
            if (i < 2 * HALF) {
                f(i, row + of % 4 / 2 * 8, group * 2 * COLUMN + to, own[of]);
            } else {
                f(i, row + of % 4 / 2 * 8, COLUMN + group * (COLUMN / 2) + to, middle[of]);
            }
        }
    }
};

template <class Operand, int WIDTH, bool PAIRS>
DEVICE void cells_wgrad(const ConvProduct& p, const CellTiling& tiling, uint32_t block) {
    ConvPlace place = conv_place(p, block);
    place.split = uniform(place.split);
    place.branch = uniform(place.branch);
    place.column_tile = uniform(place.column_tile);
    place.row_tile = uniform(place.row_tile);
    const uint64_t iterations = uint64_t(p.inner_tiles) * uint32_t(p.segments);
    const uint32_t first = uniform(uint32_t(iterations * place.split / p.splits));
    const uint32_t count = uniform(uint32_t(iterations * (place.split + 1) / p.splits) - first);
    const ConvTerm& term = p.terms[0];
    // What only loads, products or the end need is in shared memory: there are no registers for it.
    const uint32_t slices = uint32_t(p.image_channels + SLICE - 1) / SLICE;
    using Tile = TapsTile<Operand, WIDTH>;
    // Columns of taps are numbered along the filter's lines, then LINES further down.
    const int32_t units = (p.kernel_height + Tile::LINES - 1) / Tile::LINES * p.kernel_width;
    const int32_t first_unit = int32_t(place.column_tile / slices) * Tile::UNITS;

    auto& tables = *shared_memory<CellTaps>();
    unsigned char* shared = shared_memory<unsigned char>();
    const Made x_made = PAIRS && p.image.at ? Made::PAIR : term.norm ? Made::NORM : Made::PLAIN;
    const Made dy_made = PAIRS && p.matrix.at ? Made::PAIR : Made::PLAIN;
    const auto step_of = [&](uint32_t i) { return cell_step(p, tables.place.branch, tables.first + i); };
    const CellHalo halo(p, tiling, patch_of<Form::WGRAD>(p, 0).pixel_step);
    static_assert(Tile::UNITS <= sizeof(tables.taps) / 4);
    const auto describe = [&](uint32_t i) {
        const int64_t branch = step_of(i).branch;
        tables.describe_image<Form::WGRAD, PAIRS>(p, x_made, branch, tables.first_c, i % 2);
        if constexpr (PAIRS) tables.describe_matrix<WIDTH>(p, branch, tables.first_k, i % 2);
    };
    if (const uint32_t thread = thread_again(); thread < Tile::UNITS) {
        const int32_t unit = first_unit + int32_t(thread), down = unit / p.kernel_width;
        tables.taps[thread] = unit < units ? halo.tap(Tile::LINES * uint32_t(down), uint32_t(unit - down * p.kernel_width)) : 0;
    }
    if (threadIdx.x == 0) {
        tables.first = first;
        tables.first_k = place.row_tile * WIDTH;
        tables.first_c = place.column_tile % slices * SLICE;
        tables.first_unit = uint32_t(first_unit);
    }
    tables.describe(p, halo, place);
    HaloPixel* places = reinterpret_cast<HaloPixel*>(shared + tiling.places);
    describe_halo(p, halo, patch_of<Form::WGRAD>(p, 0).halo_step, places);
    sync_threads();
    for (uint32_t i = 0; i < 2 && i < count; ++i) describe(i);
    sync_threads();

    // dy: for each eight output channels all pixels, a granule each. Stores of eight threads meet no bank twice.
    using Dy = Prologue<Operand, Pair::DELTA, PAIRS>;
    constexpr int DY_PARTS = WIDTH / 8, DY_PITCH = CELLS * CELL_PIXELS + (WIDTH == 64 ? 1 : 2);
    constexpr int DY_ABREAST = GROUP_THREADS / DY_PARTS, FLIGHT = DY_FLIGHT<WIDTH, PAIRS>;
    // A block of those that read the same stores delta. Of a delta that is the same in all branches the first.
    const auto load_dy = [&](const Patch& patch, const Dy& dy, uint32_t slot) {
        const bool keeps =
            PAIRS && p.matrix.kept && tables.place.column_tile == 0 && (p.matrix.kept_branch != 0 || dy.branch == 0);
        const int thread = int(thread_again()), part = thread % DY_PARTS, channel = int(tables.first_k) + part * 8;
        unsigned char* to = shared + tiling.matrices + slot * tiling.matrix_bytes + part * DY_PITCH * GRANULE;
        const auto inside = [&](int pixel, uint32_t& offset) {
            const uint32_t row = row_of(p, patch, tables.pixel(pixel));
            offset = row * uint32_t(p.rows) + uint32_t(channel);
            return row != NO_ROW && channel < p.rows;
        };
        uint32_t offset;
        int pixel = thread / DY_PARTS;
        if (dy.plain()) {
            for (; pixel < CELLS * CELL_PIXELS; pixel += DY_ABREAST) {
                const bool there = inside(pixel, offset);
                copy_async(to + pixel * GRANULE, dy.of.place(offset, there), there);
            }
            return;
        }
        const FactorTable<SLICE>& table = tables.matrix[slot][part / PARTS];
        const auto keep = [&](uint32_t offset, bool there, const uint4& coded) {
            uint16_t* kept = static_cast<uint16_t*>(p.matrix.kept) + dy.branch * p.matrix.kept_branch;
            if (keeps && p.matrix.kept_half && there) *reinterpret_cast<uint4*>(kept + offset) = coded;
        };
        if (!dy.waits(p.matrix, keeps)) {
            ROLLED
            for (; pixel < CELLS * CELL_PIXELS; pixel += DY_ABREAST) {
                const bool there = inside(pixel, offset);
                uint16_t* place = operand_place(to, uint32_t(pixel));
                const auto loaded = dy.load(p.matrix, keeps, offset, there, table, part % PARTS * 8, place);
                const uint4 coded = dy.round(p.matrix, keeps, loaded, table, part % PARTS * 8, place);
                store_operand(place, coded);
                keep(offset, there, coded);
            }
            return;
        }
        const EightFactors<PAIRS, HELD_OF<WIDTH>> factors = {table, part % PARTS * 8};
        ROLLED
        for (; pixel < CELLS * CELL_PIXELS; pixel += FLIGHT * DY_ABREAST) {
            static_assert(CELLS * CELL_PIXELS % (FLIGHT * DY_ABREAST) == 0);
            typename Dy::Waiting flight[FLIGHT];
            const auto place = [&](int i) { return operand_place(to, uint32_t(pixel + i * DY_ABREAST)); };
            UNROLLED
            for (int i = 0; i < FLIGHT; ++i) {
                const bool there = inside(pixel + i * DY_ABREAST, offset);
                flight[i] = dy.fetch(p.matrix, offset, there, place(i));
            }
            dy.round_all(p.matrix, flight, factors, place);
            UNROLLED
            for (int i = 0; i < FLIGHT; ++i) {
                store_operand(place(i), flight[i].of);
                // Where it is from is found again: few blocks need it.
                if (keeps && p.matrix.kept_half) {
                    const bool there = inside(pixel + i * DY_ABREAST, offset);
                    keep(offset, there, flight[i].of);
                }
            }
        }
    };
    const auto fill = [&](uint32_t i) {
        const ConvStep step = step_of(i);
        const uint32_t slot = i % 2;
        const Patch patch = cell_patch<Form::WGRAD>(p, step.inner_tile);
        const Prologue<Operand, Pair::TANGENT, PAIRS> x = {
            {term.image, step.branch * term.image_branch, term.image_half}, step.branch, x_made};
        const Dy dy = {{term.matrix, step.branch * term.matrix_branch, term.matrix_half}, step.branch, dy_made};
        load_halo<HELD_OF<WIDTH>>(p, patch, halo, places, x, int32_t(tables.first_c), tables.image[slot],
                                          shared + tiling.halos + slot * tiling.halo_step);
        load_dy(patch, dy, slot);
        copies_done();
        fence_operands();
    };
    if (count > 0) fill(0);
    sync_threads();

    const uint32_t line = halo.step * halo.line();
    const uint64_t x_matrix =
        wgmma_matrix(shared_address(shared + tiling.halos), line * GRANULE, uint32_t(tiling.halo_pitch) * GRANULE);
    const uint64_t dy_matrix =
        wgmma_matrix(shared_address(shared + tiling.matrices), 8 * GRANULE, DY_PITCH * GRANULE);
    Tile tile;
    tile.clear();
    for (uint32_t i = 0; i < count; ++i) {
        const uint32_t slot = i % 2, x = slot * uint32_t(tiling.halo_step) / GRANULE;
        const auto x_of = [&](int cell, int unit) { return uniform(x + tables.cells[cell] + tables.taps[unit]); };
        tile.settle();
        wgmma_fence();
        tile.add(x_matrix, line, x_of, dy_matrix, slot * uint32_t(tiling.matrix_bytes) / GRANULE);
        wgmma_commit();
        // Its slot served this iteration's halo, which is loaded.
        if (i + 2 < count) describe(i + 2);
        if (i + 1 < count) fill(i + 1);
        wgmma_wait();
        tile.settle();
        sync_threads();
    }
    using Finish = ConvFinish<Tile>;
    Finish& finish = *reinterpret_cast<Finish*>(shared + tiling.finish);
    tile.unite(finish.values);
    const ConvPlace at_end = tables.place;
    const int32_t k = int32_t(tables.first_k), c = int32_t(tables.first_c), unit_at_end = int32_t(tables.first_unit);
    const auto row = [&](int r) { return k + r < p.rows ? uint32_t(k + r) : NO_ROW; };
    const auto column_of = [&](int at) {
        const int32_t unit = unit_at_end + at / (Tile::LINES * SLICE), down = unit / p.kernel_width;
        const int32_t r = Tile::LINES * down + at % (Tile::LINES * SLICE) / SLICE, s = unit - down * p.kernel_width;
        const int32_t in_slice = c + at % SLICE;
        const bool there = r < p.kernel_height && in_slice < p.image_channels;
        return there ? uint32_t((r * p.kernel_width + s) * p.image_channels + in_slice) : NO_ROW;
    };
    conv_finish<Operand, Tile, Form::WGRAD>(finish, p, at_end, tile, row, column_of);
}
