// Both gradients of a 3 × 3 convolution with stride 1 and padding 1 from one tile of δ, for at most 32 channels on either side, where
// a block's registers can hold the sums of the whole filter beside the tile of dx. See `conv_wgmma.cu`.
//
// A block works on a run of patches of x's grid, which is δ's as well: of one branch, or of all of them if both results are
// sums over the branches, branch by branch of each patch. In shared memory is the halo of δ that dgrad wants, made once, and
// the patch of x with one line more below it. With lines of both counted from the first of the patch,
//
//   dx(h, w)  += Σ δ(h + 2 − r, w + 2 − s) · w[r, s]         dw[r, s] += Σ δ(h + 2 − r, w + 2 − s) · x(h, w)
//
// where δ's halo begins one line and one column before x's patch. A product of the second kind has 64 lines, two neighbouring lines
// δ(h + 1 + a) of 32 channels, and 64 columns, two neighbouring lines x(h + b) of 32 channels; its inner dimension is the pixels of two
// lines of a cell. Line a with column b is a sum for the tap r = 1 − a + b: for 1 twice, of which one is left out. Of each tap a pair of
// pixels is met once: those with x(h + 1) by the patch of line h, and those with x's first line and δ before it, which is zero, by none.
//
// So the nine taps are three products of 32 clocks for each 16 pixels, where pairs of taps with one line of the other operand are six
// of 24. For a patch of 256 pixels: 72 · 24 clocks of dgrad and 48 · 32 of wgrad.
//
// Each warpgroup has the products of its two cells with all columns of taps: 96 registers of sums that live as long as the block,
// beside 32 of the patch's dx. So a multiprocessor has one block, and no other hides what it waits for. While the products of a turn, a patch
// of one branch, are under way, the block asks the second-level cache for what the next turn but one reads, finishes the patch before and
// loads the next turn to the other slot; each of these has all of its loads in flight at once. Between the last product of a turn and the first
// of the next are a barrier and, where the patch is done, 32 stores of each thread: tiles of two patches would take more registers than
// there are.
#pragma once

#include "conv_cells_tile.cuh"

constexpr int JOINT_TAPS = 9, JOINT_SIDE = 3;  // taps in all, and along each side

// How a block uses its shared memory, in bytes from its beginning. The tables come first.
struct JointTiling {
    int32_t delta_places, x_places;  // `HaloPixel`s
    int32_t slots;                   // two: the halo of δ, then
    int32_t x;                       // so much further on, the pixels of x
    int32_t step;                    // from the first slot to the second
    int32_t delta_pitch, x_pitch;    // granules from one part of a line to the next
    int32_t weights, weight_bytes;   // slots of the weights: of all segments,
    int32_t weight_slots;            // 1 if these have the same, or
    int32_t keeps;                   // 0: two, that are loaded anew for each segment of each patch
    int32_t finish;                  // `ConvFinish` of dx
    int32_t run;                     // patches that a block works on one after the other
    int32_t group;                   // runs whose sums the last of them adds up
};
static_assert(sizeof(JointTiling) == 56);

// `conv2d_wgmma_joint_*`
struct JointParams {
    ConvBackwardParams both;  // wgrad's splits are the runs
    uint32_t* arrivals;       // [M, groups of runs + 1], all zero; null with one run
    JointTiling tiling;
};
static_assert(sizeof(JointParams) == 1832);

struct JointTables : CellTables {
    FactorTable<SLICE> x[2];  // as `image`, which are δ's
    uint32_t x_cells[CELLS];  // as `cells`
    uint32_t unused[4];
};
static_assert(sizeof(JointTables) == 3152);

// A thread's part of dw, once those of the warpgroups are added up.
template <class Operand>
struct JointSums {
    static constexpr int ROWS = SLICE, COLUMNS = JOINT_TAPS * SLICE, THREADS = GROUP_THREADS, RUN = 8;
    static constexpr int EACH = ROWS * COLUMNS / THREADS;
    static_assert(EACH * THREADS == ROWS * COLUMNS);
    float d[EACH];

    DEVICE void clear() {
        for (int i = 0; i < EACH; ++i) d[i] = 0.0f;
    }

    template <class F>
    DEVICE void each(F f) {
        const int thread = int(thread_again());
        for (int i = 0; i < EACH; ++i) {
            const int element = i * THREADS + thread;
            f(i, element / COLUMNS, element % COLUMNS, d[i]);
        }
    }
};

// δ is stored from the inside of its halo: of the pixels of an image each by one patch.
struct KeepInside {
    const ConvProduct& p;  // wgrad's
    uint16_t* kept;        // of the branch
    bool keeps;            // of a δ that is the same in all branches the first

    DEVICE KeepInside(const ConvProduct& p, uint32_t branch)
        : p(p), kept(static_cast<uint16_t*>(p.matrix.kept) + branch * p.matrix.kept_branch),
          keeps(p.matrix.kept && (p.matrix.kept_branch != 0 || branch == 0)) {}
    DEVICE bool any() const { return keeps; }
    DEVICE bool half() const { return p.matrix.kept_half; }
    DEVICE bool of(const HaloPixel& pixel) const {
        return keeps && uint32_t(pixel.down) - 1 < uint32_t(p.patch_height) && uint32_t(pixel.across) - 1 < uint32_t(p.patch_width);
    }
    // If it has 16 bits; wider ones are stored where they are made.
    DEVICE void store(uint32_t offset, const uint4& coded) const { *reinterpret_cast<uint4*>(kept + offset) = coded; }
};

// The sums of all runs of a branch, in the last block to arrive; false in the others. The last of a group of runs adds up the group's,
// and puts them in the place of its first, the last of these those of the groups: with a hundred runs one block alone would take as long
// for that as for all its patches.
template <class Operand>
DEVICE bool add_runs(const JointParams& params, const ConvPlace& place, JointSums<Operand>& product) {
    using Sums = JointSums<Operand>;
    constexpr int ELEMENTS = Sums::ROWS * Sums::COLUMNS;
    const uint32_t runs = uint32_t(params.both.wgrad.splits), of_group = uint32_t(params.tiling.group);
    const uint32_t groups = (runs + of_group - 1) / of_group, group = place.split / of_group, first = group * of_group;
    const uint32_t in_group = runs - first < of_group ? runs - first : of_group;
    float* partial = params.both.wgrad.partial + int64_t(place.branch) * runs * ELEMENTS + thread_again();
    uint32_t* arrivals = params.arrivals + place.branch * (groups + 1);
    const auto put = [&](uint32_t run) {
        product.each([&](int i, int, int, float v) { partial[int64_t(run) * ELEMENTS + i * Sums::THREADS] = v; });
    };
    const auto add = [&](uint32_t run, uint32_t step, uint32_t count) {
        product.clear();
        for (uint32_t i = 0; i < count; ++i, run += step) {
            const float* from = partial + int64_t(run) * ELEMENTS;
            product.each([&](int j, int, int, float& v) { v += from[j * Sums::THREADS]; });
        }
    };
    put(place.split);
    if (!last_to_arrive(arrivals + group, in_group)) return false;
    add(first, 1, in_group);
    if (groups == 1) return true;
    put(first);
    if (!last_to_arrive(arrivals + groups, groups)) return false;
    add(0, of_group, groups);
    return true;
}

// Lines of each image of a patch, counted from the image's first.
struct JointLines {
    int32_t down, across, height, width;

    // Asks for what the lines have of a tensor, by the lanes of a warp: for each image in one piece if a patch has whole lines.
    DEVICE void prefetch_from(const ConvProduct& p, const Patch& patch, const Source& tensor) const {
        const bool whole = p.patches_across == 1;
        const int32_t pieces = whole ? 1 : height, lines = whole ? height : 1;
        const int32_t first = whole || across < 0 ? 0 : across, size = tensor.half ? 2 : 4;
        const int32_t end = whole || across + width > p.image_width ? p.image_width : across + width;
        ROLLED
        for (int32_t i = int32_t(thread_again() % 32); i < pieces * p.patch_images; i += 32) {
            const int32_t of_patch = i / pieces, image = patch.image + of_patch, line = down + (i - of_patch * pieces);
            const int32_t top = line < 0 ? 0 : line, bottom = line + lines < p.image_height ? line + lines : p.image_height;
            if (image >= p.images || bottom <= top) continue;
            const int64_t at = ((int64_t(image) * p.image_height + top) * p.image_width + first) * p.image_channels;
            const int32_t pixels = whole ? (bottom - top) * p.image_width : end - first;
            prefetch(static_cast<const unsigned char*>(tensor.at) + at * size, uint32_t(pixels * p.image_channels * size));
        }
    }
};

// What follows the products of a patch of dx, once shared memory has the sums and their rows: as `conv_finish_staged`, but all that a
// thread reads is under way before any is used. All threads take part, behind a barrier.
template <class Operand, class Tile>
DEVICE void finish_dx(ConvFinish<Tile>& shared, const ConvProduct& p, const ConvPlace& place) {
    constexpr int RUN = Tile::RUN, ABREAST = Tile::THREADS * RUN / Tile::COLUMNS, PARTS = Tile::ROWS / ABREAST;
    const int first = int(thread_again()) * RUN, c = first % Tile::COLUMNS, line = first / Tile::COLUMNS;
    const bool there = c < p.columns, sums = p.sums.next;
    Chunk start[PARTS] = {}, next[PARTS] = {};
    uint32_t at[PARTS];
    UNROLLED
    for (int i = 0; i < PARTS; ++i) {
        const uint32_t row = shared.rows[line + i * ABREAST];
        at[i] = there && row != NO_ROW ? row * uint32_t(p.columns) + uint32_t(c) : NO_ROW;
        if (at[i] == NO_ROW) continue;
        if (p.start) start[i] = chunk_load<Operand>(p.start, place.branch * p.start_branch + at[i], p.start_half);
        if (sums) next[i] = chunk_load<Operand>(p.sums.next, place.branch * p.sums.next_branch + at[i], p.sums.next_half);
    }
    ThreadSums<Operand, false, RUN> mine = {};
    if (there && sums) SumNorms<Tile>::template find<false>(p, place.branch, uint32_t(c), mine.norm, mine.mean);
    UNROLLED
    for (int i = 0; i < PARTS; ++i) {
        if (at[i] == NO_ROW) continue;
        float v[RUN], other[RUN];
        eight_of(v, shared.values + (line + i * ABREAST) * ConvFinish<Tile>::PITCH + c);
        if (p.start) {
            chunk_decode<Operand>(other, start[i], p.start_half);
            for (int j = 0; j < RUN; ++j) v[j] += other[j];
        }
        const int64_t out = place.branch * p.out_branch + at[i];
        if (p.out_half) {
            const uint4 coded = chunk_encode<Operand>(v);
            *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + out) = coded;
            // As later readers will see it.
            chunk_decode<Operand>(v, {coded, {}}, 1);
        } else {
            eight_to(static_cast<float*>(p.out) + out, v);
        }
        if (sums) {
            chunk_decode<Operand>(other, next[i], p.sums.next_half);
            mine.add(v, other);
        }
    }
    if (sums) conv_sums_of<Operand, Tile, false>(p, place, shared, mine);
}

// Pixels of δ and of x that a thread loads at a time, eight channels of up to three tensors each: those of a patch of 8 × 32, 340 and 288
// for 64 at a time, are all under way before the first is waited for. So are all weights that a thread loads.
constexpr int DELTA_FLIGHT = 6, X_FLIGHT = 5, WEIGHT_FLIGHT = 5;

template <class Operand, bool PAIRS>
DEVICE void cells_joint(const JointParams& params) {
    using Weights = CellWeights<Form::DGRAD, Operand, SLICE>;
    using Tile = CellTile<Operand, SLICE, 2>;
    using Sums = JointSums<Operand>;
    const ConvProduct &d = params.both.dgrad, &w = params.both.wgrad;
    const JointTiling& tiling = params.tiling;
    const uint32_t segments = uint32_t(d.segments), patches = uint32_t(d.row_tiles);
    const uint32_t run = uniform(blockIdx.x % uint32_t(w.splits)), branch = uniform(blockIdx.x / uint32_t(w.splits));
    const uint32_t first_patch = uniform(run * uint32_t(tiling.run));
    const uint32_t left = patches - first_patch;
    const uint32_t turns = uniform((left < uint32_t(tiling.run) ? left : uint32_t(tiling.run)) * segments);

    auto& tables = *shared_memory<JointTables>();
    unsigned char* shared = shared_memory<unsigned char>();
    HaloPixel* delta_places = reinterpret_cast<HaloPixel*>(shared + tiling.delta_places);
    HaloPixel* x_places = reinterpret_cast<HaloPixel*>(shared + tiling.x_places);
    auto& finish = *reinterpret_cast<ConvFinish<Tile>*>(shared + tiling.finish);
    const CellHalo delta_halo(d, tiling.delta_pitch, 1), x_halo(w, tiling.x_pitch, 1);
    const uint32_t slots = shared_address(shared + tiling.slots);
    const uint64_t delta_rows = wgmma_matrix(slots, delta_halo.pitch * GRANULE, delta_halo.line() * GRANULE);
    const uint64_t delta_columns = wgmma_matrix(slots, delta_halo.line() * GRANULE, delta_halo.pitch * GRANULE);
    const uint64_t x_matrix = wgmma_matrix(slots + uint32_t(tiling.x), x_halo.line() * GRANULE, x_halo.pitch * GRANULE);
    const uint64_t weight_matrix = Weights::matrix(shared_address(shared + tiling.weights));

    const ConvTerm &to_x = d.terms[0], &to_w = w.terms[0];
    const Made delta_made = PAIRS && w.matrix.at ? Made::PAIR : Made::PLAIN;
    const Made x_made = PAIRS && w.image.at ? Made::PAIR : to_w.norm ? Made::NORM : Made::PLAIN;
    const auto describe = [&](uint32_t segment, uint32_t slot) {
        const uint32_t thread = thread_again();
        if (thread < SLICE) {
            put_image<Form::DGRAD, PAIRS>(d, delta_made, branch + segment, 0, tables.image[slot], int(thread));
        } else if (thread < 2 * SLICE) {
            put_image<Form::WGRAD, PAIRS>(w, x_made, branch + segment, 0, tables.x[slot], int(thread) - SLICE);
        }
    };
    const auto slot_of_weights = [&](uint32_t turn, uint32_t segment) {
        const uint32_t slot = !tiling.keeps ? turn % 2 : tiling.weight_slots == 1 ? 0 : segment;
        return slot * uint32_t(tiling.weight_bytes);
    };
    const auto fill = [&](uint32_t turn, uint32_t number, uint32_t segment) {
        const uint32_t of = branch + segment;
        unsigned char* slot = shared + tiling.slots + turn % 2 * tiling.step;
        const Patch patch = cell_patch<Form::DGRAD>(d, number);
        if (!tiling.keeps || turn < uint32_t(tiling.weight_slots)) {
            const Source matrix = {to_x.matrix, of * to_x.matrix_branch, to_x.matrix_half};
            Weights::template load<WEIGHT_FLIGHT>(d, patch, matrix, 0, 0, shared + tiling.weights + slot_of_weights(turn, segment));
        }
        const Prologue<Operand, Pair::DELTA, PAIRS> delta = {
            {to_x.image, of * to_x.image_branch, to_x.image_half}, of, delta_made};
        load_halo<false, DELTA_FLIGHT>(d, w.matrix, patch, delta_halo, delta_places, delta, 0, tables.image[turn % 2], slot,
                                       KeepInside(w, of));
        Patch of_x = patch;
        of_x.halo_down = patch.down;
        of_x.halo_across = patch.across;
        const Prologue<Operand, Pair::TANGENT, PAIRS> x = {{to_w.image, of * to_w.image_branch, to_w.image_half}, of, x_made};
        load_halo<false, X_FLIGHT>(w, w.image, of_x, x_halo, x_places, x, 0, tables.x[turn % 2], slot + tiling.x, KeepNone{});
        copies_done();
        fence_operands();
    };
    // Each warp has one of the tensors that a turn reads. What is found of dx is found with x.
    const auto ask = [&](uint32_t number, uint32_t segment) {
        const uint32_t warp = uniform(thread_again() / 32);
        const int64_t of = branch + segment;
        const Patch patch = cell_patch<Form::DGRAD>(d, number);
        const JointLines halo = {patch.halo_down, patch.halo_across, d.halo_height, d.halo_width};
        const JointLines pixels = {patch.down, patch.across, w.halo_height, w.halo_width};
        const ConvPair &delta = w.matrix, &x = w.image;
        if (warp == 0) halo.prefetch_from(d, patch, {to_x.image, of * to_x.image_branch, to_x.image_half});
        if (warp == 1) pixels.prefetch_from(w, patch, {to_w.image, of * to_w.image_branch, to_w.image_half});
        if (warp == 2 && d.start && segment == 0) pixels.prefetch_from(w, patch, {d.start, of * d.start_branch, d.start_half});
        if constexpr (PAIRS) {
            if (warp == 3 && delta.at) halo.prefetch_from(d, patch, {delta.at, of * delta.branch, delta.half});
            if (warp == 4 && delta.residual) {
                halo.prefetch_from(d, patch, {delta.residual, of * delta.residual_branch, delta.residual_half});
            }
            if (warp == 5 && x.at) pixels.prefetch_from(w, patch, {x.at, of * x.branch, x.half});
        }
    };
    tables.describe(d, delta_halo, {0, 0, run, branch});
    if (const uint32_t thread = thread_again(); thread < CELLS) tables.x_cells[thread] = x_halo.cell(w, int(thread));
    describe_halo(d, delta_halo, 1, delta_places);
    describe_halo(w, x_halo, 1, x_places);
    for (uint32_t i = 0; i < 2; ++i) describe(i % segments, i);
    sync_threads();
    if (turns > 1) ask(segments > 1 ? first_patch : first_patch + 1, segments > 1 ? 1 : 0);
    fill(0, first_patch, 0);
    sync_threads();

    // Products of the cells that there are: those beyond would be the first cell's, whose sums count.
    const uint32_t cells = uint32_t(d.patch_images * (d.patch_height / 8) * (d.patch_width / 8));
    Tile tile;
    tile.clear();
    float sums[JOINT_SIDE][SLICE];
    for (int s = 0; s < JOINT_SIDE; ++s) {
        for (int i = 0; i < SLICE; ++i) sums[s][i] = 0.0f;
    }
    const auto finish_patch = [&](uint32_t number) {
        finish_dx<Operand>(finish, d, {number, 0, 0, tables.place.branch});
        sync_threads();
    };
    uint32_t number = first_patch, segment = 0;
    ROLLED
    for (uint32_t turn = 0; turn < turns; ++turn) {
        {
            const uint32_t group = uniform(thread_again() / 128);
            const uint32_t slot = turn % 2 * uint32_t(tiling.step) / GRANULE;
            uint32_t weights = slot_of_weights(turn, segment) / GRANULE;
            for (int m = 0; m < 2; ++m) wgmma_settle(tile.d[m]);
            for (int s = 0; s < JOINT_SIDE; ++s) wgmma_settle(sums[s]);
            wgmma_fence();
            uint32_t cell[2];
            for (int m = 0; m < 2; ++m) cell[m] = uniform(slot + tables.cells[group * 2 + m]);
            // Taps go up and left.
            uint32_t tap = delta_halo.tap(JOINT_SIDE - 1, JOINT_SIDE - 1);
            UNROLLED
            for (int down = 0; down < JOINT_SIDE; ++down) {
                for (int across = 0; across < JOINT_SIDE; ++across) {
                    for (int k = 0; k < SLICE / 16; ++k) {
                        for (int m = 0; m < 2; ++m) {
                            Operand::template wgmma<false, true>(
                                tile.d[m], wgmma_behind(delta_rows, cell[m] + tap - across + k * 2 * delta_halo.pitch),
                                wgmma_behind(weight_matrix, weights + k * Weights::SECOND));
                        }
                    }
                    weights += Weights::TAP;
                }
                tap -= delta_halo.line();
            }
            const uint32_t last_cell = uniform(group * 2 + 2 < cells ? group * 2 + 2 : cells);
            ROLLED
            for (uint32_t of_group = group * 2; of_group < last_cell; ++of_group) {
                uint32_t delta_line = uniform(slot + tables.cells[of_group] + delta_halo.line());
                uint32_t x_line = uniform(slot + tables.x_cells[of_group]);
                UNROLLED
                for (int lines = 0; lines < 8; lines += 2) {
                    for (int s = 0; s < JOINT_SIDE; ++s) {
                        Operand::template wgmma<true, true>(
                            sums[s], wgmma_behind(delta_columns, delta_line + uint32_t(JOINT_SIDE - 1 - s)),
                            wgmma_behind(x_matrix, x_line));
                    }
                    delta_line += 2 * delta_halo.line();
                    x_line += 2 * x_halo.line();
                }
            }
            wgmma_commit();
        }
        const uint32_t next_segment = uniform(segment + 1 < segments ? segment + 1 : 0);
        const uint32_t next_number = uniform(next_segment == 0 ? number + 1 : number);
        if (turn + 2 < turns) {
            const uint32_t after = next_segment + 1 < segments ? next_segment + 1 : 0;
            ask(after == 0 ? next_number + 1 : next_number, after);
        }
        // What follows the products of the patch before.
        if (segment == 0 && turn > 0) finish_patch(number - 1);
        // Its slot served this turn's loads, which are done.
        if (segments > 2 && turn + 2 < turns) describe(next_segment + 1 < segments ? next_segment + 1 : 0, turn % 2);
        if (turn + 1 < turns) fill(turn + 1, next_number, next_segment);
        wgmma_wait();
        for (int m = 0; m < 2; ++m) wgmma_settle(tile.d[m]);
        for (int s = 0; s < JOINT_SIDE; ++s) wgmma_settle(sums[s]);
        if (next_segment == 0) {
            const uint32_t thread = thread_again();
            finish.rows[thread] = row_of(d, cell_patch<Form::DGRAD>(d, number), tables.pixel(int(thread)));
            tile.each([&](int, int r, int c, float v) { finish.values[r * ConvFinish<Tile>::PITCH + c] = v; });
            tile.clear();
        }
        number = next_number;
        segment = next_segment;
        sync_threads();
    }
    finish_patch(number - 1);

    // The sums of both warpgroups, where `conv_finish` puts a result.
    auto& of_weights = *reinterpret_cast<ConvFinish<Sums>*>(shared + tiling.slots);
    const auto each_sum = [&](auto f) {
        const int thread = int(thread_again()), lane = thread % 32, line = thread % 128 / 32 * 16 + lane / 4;
        UNROLLED
        for (int s = 0; s < JOINT_SIDE; ++s) {
            UNROLLED
            for (int i = 0; i < SLICE; ++i) {
                const int a = line / SLICE, b = i / 16, r = 1 - a + b;
                const int row = line % SLICE + i % 4 / 2 * 8, c = i % 16 / 4 * 8 + lane % 4 * 2 + i % 2;
                // One of the two that are for the same taps.
                if (a == 1 && b == 1) continue;
                f(of_weights.values[row * ConvFinish<Sums>::PITCH + (r * JOINT_SIDE + s) * SLICE + c], sums[s][i]);
            }
        }
    };
    if (thread_again() >= 128) each_sum([](float& to, float v) { to = v; });
    sync_threads();
    if (thread_again() < 128) each_sum([](float& to, float v) { to = v + to; });
    sync_threads();
    Sums tile_of_weights;
    tile_of_weights.each([&](int, int r, int c, float& v) { v = of_weights.values[r * ConvFinish<Sums>::PITCH + c]; });
    const auto row = [&](int r) { return r < w.rows ? uint32_t(r) : NO_ROW; };
    const auto column = [&](int at) {
        const int32_t c = at % SLICE;
        return c < w.image_channels ? uint32_t(at / SLICE * w.image_channels + c) : NO_ROW;
    };
    const ConvPlace place = {0, 0, tables.place.split, tables.place.branch};
    if (w.splits > 1 && !add_runs(params, place, tile_of_weights)) return;
    conv_stage_sum<Sums>(of_weights, tile_of_weights, row);
    conv_finish_staged<Operand, Sums, Form::WGRAD>(of_weights, w, place, column);
}
