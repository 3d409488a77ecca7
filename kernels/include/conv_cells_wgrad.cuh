// The gradient of the weights by products of warpgroups: WIDTH output channels by six pairs of taps of 32 input channels. See
// `conv_wgmma.cu`.
#pragma once

#include "conv_cells.cuh"

constexpr int TAP_PAIRS = 6;           // of taps, one below the other, of a block
constexpr int OWN = TAP_PAIRS / 2;        // those of a warpgroup
constexpr int PAIR_LINES = 2 * SLICE;  // input channels of both taps: the lines of a product

// A thread's part of the result. Lines of the products are columns of the result, and their columns its rows.
template <class Operand, int WIDTH>
struct PairsTile {
    static constexpr int ROWS = WIDTH, COLUMNS = TAP_PAIRS * PAIR_LINES, THREADS = GROUP_THREADS, RUN = 8;
    float d[OWN][WIDTH / 2];

    DEVICE void clear() {
        for (int pair = 0; pair < OWN; ++pair) {
            for (int i = 0; i < WIDTH / 2; ++i) d[pair][i] = 0.0f;
        }
    }

    template <class F>
    DEVICE void each(F f) {
        const uint32_t thread = thread_again();
        const int lane = int(thread % 32), group = int(thread / 128);
        const int column = group * OWN * PAIR_LINES + int(thread % 128 / 32) * 16 + lane / 4, row = lane % 4 * 2;
        for (int pair = 0; pair < OWN; ++pair) {
            for (int i = 0; i < WIDTH / 2; ++i) {
                f(pair * (WIDTH / 2) + i, row + i / 4 * 8 + i % 2, column + pair * PAIR_LINES + i % 4 / 2 * 8, d[pair][i]);
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
    // Pairs are numbered along the filter's lines, from one pair of lines to the next.
    const int32_t pairs = (p.kernel_height + 1) / 2 * p.kernel_width;
    const int32_t first_pair = int32_t(place.column_tile / slices) * TAP_PAIRS;

    auto& tables = *shared_memory<CellPairs>();
    unsigned char* shared = shared_memory<unsigned char>();
    const Made x_made = PAIRS && p.image.at ? Made::PAIR : term.norm ? Made::NORM : Made::PLAIN;
    const Made dy_made = PAIRS && p.matrix.at ? Made::PAIR : Made::PLAIN;
    const auto step_of = [&](uint32_t i) { return cell_step(p, tables.place.branch, tables.first + i); };
    const CellHalo halo(p, tiling, patch_of<Form::WGRAD>(p, 0).pixel_step);
    static_assert(TAP_PAIRS <= sizeof(tables.taps) / 4);
    const auto describe = [&](uint32_t i) {
        const int64_t branch = step_of(i).branch;
        tables.describe_image<Form::WGRAD, PAIRS>(p, x_made, branch, tables.first_c, i % 2);
        if constexpr (PAIRS) tables.describe_matrix<WIDTH>(p, branch, tables.first_k, i % 2);
    };
    if (const uint32_t thread = thread_again(); thread < TAP_PAIRS) {
        const int32_t pair = first_pair + int32_t(thread), lines = pair / p.kernel_width;
        tables.taps[thread] = pair < pairs ? halo.tap(2 * uint32_t(lines), uint32_t(pair - lines * p.kernel_width)) : 0;
    }
    if (threadIdx.x == 0) {
        tables.first = first;
        tables.first_k = place.row_tile * WIDTH;
        tables.first_c = place.column_tile % slices * SLICE;
        tables.first_pair = uint32_t(first_pair);
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
    PairsTile<Operand, WIDTH> tile;
    tile.clear();
    for (uint32_t i = 0; i < count; ++i) {
        const uint32_t slot = i % 2;
        const uint32_t x = slot * uint32_t(tiling.halo_step) / GRANULE;
        uint32_t dy = slot * uint32_t(tiling.matrix_bytes) / GRANULE;
        for (int pair = 0; pair < OWN; ++pair) wgmma_settle(tile.d[pair]);
        wgmma_fence();
        // Rolled: its addresses, all at once, would take more registers. Cells and pairs that there are not cost time, but no
        // branch: dy is zero there, and columns lie nowhere.
        ROLLED
        for (int cell = 0; cell < CELLS; ++cell) {
            const uint32_t group = thread_again() / 128;
            uint32_t at[OWN];
            for (int pair = 0; pair < OWN; ++pair) {
                at[pair] = uniform(x + tables.cells[cell] + tables.taps[group * OWN + pair]);
            }
            ROLLED
            for (int lines = 0; lines < 8; lines += 2) {
                for (int pair = 0; pair < OWN; ++pair) {
                    Operand::template wgmma<true, true>(
                        tile.d[pair], wgmma_behind(x_matrix, at[pair] + lines * line),
                        wgmma_behind(dy_matrix, dy));
                }
                dy += 16;
            }
        }
        wgmma_commit();
        // Its slot served this iteration's halo, which is loaded.
        if (i + 2 < count) describe(i + 2);
        if (i + 1 < count) fill(i + 1);
        wgmma_wait();
        for (int pair = 0; pair < OWN; ++pair) wgmma_settle(tile.d[pair]);
        sync_threads();
    }
    const ConvPlace at_end = tables.place;
    const int32_t k = int32_t(tables.first_k), c = int32_t(tables.first_c), pair_at_end = int32_t(tables.first_pair);
    const auto row = [&](int r) { return k + r < p.rows ? uint32_t(k + r) : NO_ROW; };
    const auto column_of = [&](int at) {
        const int32_t pair = pair_at_end + at / PAIR_LINES, lines = pair / p.kernel_width;
        const int32_t r = 2 * lines + at % PAIR_LINES / SLICE, s = pair - lines * p.kernel_width, in_slice = c + at % SLICE;
        const bool there = r < p.kernel_height && in_slice < p.image_channels;
        return there ? uint32_t((r * p.kernel_width + s) * p.image_channels + in_slice) : NO_ROW;
    };
    using Finish = ConvFinish<PairsTile<Operand, WIDTH>>;
    conv_finish<Operand, PairsTile<Operand, WIDTH>, Form::WGRAD>(*reinterpret_cast<Finish*>(shared + tiling.finish), p, at_end, tile, row,
                                                                 column_of);
}
