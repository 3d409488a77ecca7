// What follows a tile's product: the sum of its splits, what is added to it, its rounding and its statistics.
//
// Blocks whose results belong together count their arrivals; the last to arrive works on what all have left in
// scratch, in an order that does not depend on the arrivals, and sets the counter back to zero.
#pragma once

#include "conv_params.cuh"
#include "last_block.cuh"
#include "moments.cuh"

// Row tiles whose statistics the last of them combines; the last of these groups combines the groups.
constexpr uint32_t MOMENT_GROUP = 32;

// A block's shared memory, once its product is done.
template <class Tile>
struct ConvFinish {
    // Two words of a warp's first store meet no other's bank.
    static constexpr int PITCH = Tile::COLUMNS + 8;
    float values[Tile::ROWS * PITCH];
    Moments moments[Tile::THREADS];
};

// An element of a tensor of 32 bits, or of 16 where the operand type has them.
template <class Operand>
DEVICE float conv_load(const void* from, int64_t at, int half) {
    if constexpr (Operand::HALVES) {
        if (half) return Operand::decode(static_cast<const uint16_t*>(from)[at]);
    }
    return static_cast<const float*>(from)[at];
}

// Stores an element; what was stored, as later readers will see it.
template <class Operand>
DEVICE float conv_store(void* to, int64_t at, int half, float v) {
    if constexpr (Operand::HALVES) {
        if (half) {
            const uint16_t coded = Operand::encode(v);
            static_cast<uint16_t*>(to)[at] = coded;
            return Operand::decode(coded);
        }
    }
    static_cast<float*>(to)[at] = v;
    return v;
}

// The moments of a column from those of parts of it, `count` records [count, COLUMNS], in the threads below COLUMNS.
template <class Tile>
DEVICE Moments conv_combine(ConvFinish<Tile>& shared, Moments mine) {
    const int thread = int(threadIdx.x);
    shared.moments[thread] = mine;
    sync_threads();
    if (thread < Tile::COLUMNS) {
        for (int other = thread + Tile::COLUMNS; other < Tile::THREADS; other += Tile::COLUMNS) {
            mine.add(shared.moments[other]);
        }
    }
    return mine;
}
template <class Tile>
DEVICE Moments conv_combine(ConvFinish<Tile>& shared, const Moments* parts, uint32_t count) {
    const uint32_t thread = threadIdx.x, column = thread % Tile::COLUMNS;
    Moments mine = {};
    for (uint32_t i = thread / Tile::COLUMNS; i < count; i += Tile::THREADS / Tile::COLUMNS) {
        mine.add(parts[i * Tile::COLUMNS + column]);
    }
    return conv_combine<Tile>(shared, mine);
}

// Mean and variance of the columns of `out`, found by the last block of each column tile of a branch.
template <class Tile>
DEVICE void conv_statistics(const ConvProduct& p, const ConvPlace& place, ConvFinish<Tile>& shared) {
    const int thread = int(threadIdx.x), line = thread / Tile::COLUMNS, column = thread % Tile::COLUMNS;
    constexpr int LINES = Tile::THREADS / Tile::COLUMNS;
    const uint32_t row_tiles = p.row_tiles, groups = (row_tiles + MOMENT_GROUP - 1) / MOMENT_GROUP;
    const uint32_t group = place.row_tile / MOMENT_GROUP, first = group * MOMENT_GROUP;
    const uint32_t in_group = row_tiles - first < MOMENT_GROUP ? row_tiles - first : MOMENT_GROUP;
    const uint32_t columns = place.branch * uint32_t(p.column_tiles) + place.column_tile;
    Moments* tile_sums = p.tile_sums + int64_t(columns) * row_tiles * Tile::COLUMNS;
    Moments* group_sums = p.group_sums + int64_t(columns) * groups * Tile::COLUMNS;
    uint32_t* group_arrivals = p.arrivals + uint32_t(p.branches) * row_tiles * uint32_t(p.column_tiles);
    uint32_t* column_arrivals = group_arrivals + uint32_t(p.branches) * uint32_t(p.column_tiles) * groups;

    sync_threads();
    const int left = p.rows - int(place.row_tile) * Tile::ROWS, rows = left < Tile::ROWS ? left : Tile::ROWS;
    const float* values = shared.values + line * ConvFinish<Tile>::PITCH + column;
    Moments mine = moments_of((rows - line + LINES - 1) / LINES,
                              [&](int i) { return values[i * LINES * ConvFinish<Tile>::PITCH]; });
    mine = conv_combine<Tile>(shared, mine);
    if (line == 0) tile_sums[place.row_tile * Tile::COLUMNS + column] = mine;

    if (!last_to_arrive(group_arrivals + columns * groups + group, in_group)) return;
    mine = conv_combine<Tile>(shared, tile_sums + first * Tile::COLUMNS, in_group);
    if (line == 0) group_sums[group * Tile::COLUMNS + column] = mine;

    if (!last_to_arrive(column_arrivals + columns, groups)) return;
    mine = conv_combine<Tile>(shared, group_sums, groups);
    const uint32_t at = place.column_tile * Tile::COLUMNS + column;
    if (line == 0 && at < uint32_t(p.columns)) {
        p.mean[int64_t(place.branch) * p.columns + at] = mine.mean + mine.rest;
        p.var[int64_t(place.branch) * p.columns + at] = mine.squares / mine.n;
    }
}

// All threads take part, behind a barrier: shared memory gets another meaning.
template <class Operand, class Tile, bool STATISTICS>
DEVICE void conv_finish(const ConvProduct& p, const ConvPlace& place, Tile& product) {
    auto& shared = *shared_memory<ConvFinish<Tile>>();
    constexpr int ELEMENTS = Tile::ROWS * Tile::COLUMNS;
    const int thread = int(threadIdx.x);
    if (p.splits > 1) {
        const uint32_t tile = place.tile(p);
        float* partial = p.partial + int64_t(tile) * p.splits * ELEMENTS + thread;
        product.each([&](int i, int, int, float v) {
            partial[int64_t(place.split) * ELEMENTS + i * Tile::THREADS] = v;
        });
        if (!last_to_arrive(p.arrivals + tile, p.splits)) return;
        product.clear();
        for (int split = 0; split < p.splits; ++split) {
            product.each([&](int i, int, int, float& v) { v += partial[i * Tile::THREADS]; });
            partial += ELEMENTS;
        }
    }
    product.each([&](int, int r, int c, float v) { shared.values[r * ConvFinish<Tile>::PITCH + c] = v; });
    sync_threads();
    const int64_t out = place.branch * p.out_branch, start = place.branch * p.start_branch;
    for (int i = thread; i < ELEMENTS; i += Tile::THREADS) {
        const int r = i / Tile::COLUMNS, c = i % Tile::COLUMNS;
        const uint32_t row = place.row_tile * Tile::ROWS + r, column = place.column_tile * Tile::COLUMNS + c;
        if (row >= uint32_t(p.rows) || column >= uint32_t(p.columns)) continue;
        const uint32_t at = row * uint32_t(p.columns) + column;
        float& v = shared.values[r * ConvFinish<Tile>::PITCH + c];
        if (p.start) v += conv_load<Operand>(p.start, start + at, p.start_half);
        v = conv_store<Operand>(p.out, out + at, p.out_half, v);
    }
    if constexpr (STATISTICS) {
        if (p.mean) conv_statistics<Tile>(p, place, shared);
    }
}
