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
// A row of a tile, or a column, that the result does not have.
constexpr uint32_t NO_ROW = 0xffffffffu;

// A block's shared memory, once its product is done.
template <class Tile>
struct ConvFinish {
    // Two words of a warp's first store meet no other's bank.
    static constexpr int PITCH = Tile::COLUMNS + 8;
    alignas(16) float values[Tile::ROWS * PITCH];
    Moments moments[Tile::THREADS];
    uint32_t rows[Tile::ROWS];  // of the result
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

// Eight neighbours: 16 bytes, or 32.
struct Chunk {
    uint4 low, high;
};

template <class Operand>
DEVICE Chunk chunk_load(const void* from, int64_t at, int half) {
    if (half) return {*reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + at), {}};
    const uint4* words = reinterpret_cast<const uint4*>(static_cast<const float*>(from) + at);
    return {words[0], words[1]};
}

template <class Operand>
DEVICE void chunk_decode(float (&v)[8], const Chunk& chunk, int half) {
    if (half) {
        const uint32_t words[4] = {chunk.low.x, chunk.low.y, chunk.low.z, chunk.low.w};
        for (int i = 0; i < 4; ++i) {
            const float2 pair = Operand::decode_pair(words[i]);
            v[2 * i] = pair.x;
            v[2 * i + 1] = pair.y;
        }
    } else {
        __builtin_memcpy(v, &chunk.low, 16);
        __builtin_memcpy(v + 4, &chunk.high, 16);
    }
}

template <class Operand>
DEVICE uint4 chunk_encode(const float (&v)[8]) {
    return {Operand::encode(v[0], v[1]), Operand::encode(v[2], v[3]), Operand::encode(v[4], v[5]),
            Operand::encode(v[6], v[7])};
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
    const float* values = shared.values + line * ConvFinish<Tile>::PITCH + column;
    Moments mine = moments_of(
        Tile::ROWS / LINES, [&](int i) { return values[i * LINES * ConvFinish<Tile>::PITCH]; },
        [&](int i) { return shared.rows[line + i * LINES] != NO_ROW; });
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

// Adds what is to be added to elements of the result and stores them; leaves them as they are stored.
template <class Operand, class Tile>
DEVICE void conv_put(const ConvProduct& p, const ConvPlace& place, uint32_t element, float* values) {
    const int64_t out = place.branch * p.out_branch + element, start = place.branch * p.start_branch + element;
    if constexpr (Tile::RUN == 1) {
        if (p.start) *values += conv_load<Operand>(p.start, start, p.start_half);
        *values = conv_store<Operand>(p.out, out, p.out_half, *values);
    } else {
        static_assert(Tile::RUN == 8);
        float4* quads = reinterpret_cast<float4*>(values);
        const float4 low = quads[0], high = quads[1];
        float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        if (p.start) {
            float added[8];
            chunk_decode<Operand>(added, chunk_load<Operand>(p.start, start, p.start_half), p.start_half);
            for (int i = 0; i < 8; ++i) v[i] += added[i];
        }
        if (p.out_half) {
            const uint4 coded = chunk_encode<Operand>(v);
            *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + out) = coded;
            if (p.mean) chunk_decode<Operand>(v, {coded, {}}, 1);
        } else {
            float* to = static_cast<float*>(p.out) + out;
            *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
            *reinterpret_cast<float4*>(to + 4) = {v[4], v[5], v[6], v[7]};
        }
        if (p.mean) {
            quads[0] = {v[0], v[1], v[2], v[3]};
            quads[1] = {v[4], v[5], v[6], v[7]};
        }
    }
}

// All threads take part, behind a barrier: shared memory gets another meaning. `row_of` and `column_of` say where in the
// result a row and a run of columns of the tile lie, NO_ROW: nowhere.
template <class Operand, class Tile, bool STATISTICS, class RowOf, class ColumnOf>
DEVICE void conv_finish(const ConvProduct& p, const ConvPlace& place, Tile& product, RowOf row_of, ColumnOf column_of) {
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
    for (int r = thread; r < Tile::ROWS; r += Tile::THREADS) shared.rows[r] = row_of(r);
    product.each([&](int, int r, int c, float v) { shared.values[r * ConvFinish<Tile>::PITCH + c] = v; });
    sync_threads();
    for (int i = thread * Tile::RUN; i < ELEMENTS; i += Tile::THREADS * Tile::RUN) {
        const int r = i / Tile::COLUMNS, c = i % Tile::COLUMNS;
        const uint32_t row = shared.rows[r], column = column_of(c);
        if (row == NO_ROW || column >= uint32_t(p.columns)) continue;
        const uint32_t at = row * uint32_t(p.columns) + column;
        conv_put<Operand, Tile>(p, place, at, shared.values + r * ConvFinish<Tile>::PITCH + c);
    }
    if constexpr (STATISTICS) {
        if (p.mean) conv_statistics<Tile>(p, place, shared);
    }
}
