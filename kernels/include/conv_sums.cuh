// What is found of the columns of a result, as it is stored: the statistics that a batch norm wants next, or the sums that the
// derivatives of one begin with. The formulas of the sums are those of `src/ops/fused.rs`.
//
// A block makes a record of each of its columns. Blocks count their arrivals: the last of a group of row tiles combines the group's
// records, the last of the groups theirs, in an order that does not depend on the arrivals.
#pragma once

#include "conv_elements.cuh"
#include "conv_params.cuh"
#include "last_block.cuh"
#include "moments.cuh"

// Row tiles whose records the last of them combines; the last of these groups combines the groups.
constexpr uint32_t RECORD_GROUP = 32;
// Bytes of the largest record.
constexpr int RECORD = 16;
// A row of a tile, or a column, that the result does not have.
constexpr uint32_t NO_ROW = 0xffffffffu;

// A block's shared memory, once its product is done.
template <class Tile>
struct ConvFinish {
    // Two words of a warp's first store meet no other's bank.
    static constexpr int PITCH = Tile::COLUMNS + 8;
    // Threads that have a column, each every LINES-th row of it.
    static constexpr int LINES = Tile::THREADS / Tile::COLUMNS;
    alignas(16) float values[Tile::ROWS * PITCH];
    alignas(16) unsigned char records[Tile::THREADS * RECORD];
    uint32_t rows[Tile::ROWS];  // of the result
};

// The record of a column from those of its threads, in the threads below COLUMNS.
template <class Tile, class Record>
DEVICE Record combine_records(ConvFinish<Tile>& shared, Record mine) {
    static_assert(sizeof(Record) <= RECORD && alignof(Record) <= 16);
    const int thread = int(thread_again());
    Record* records = reinterpret_cast<Record*>(shared.records);
    records[thread] = mine;
    sync_threads();
    if (thread < Tile::COLUMNS) {
        for (int other = thread + Tile::COLUMNS; other < Tile::THREADS; other += Tile::COLUMNS) mine.add(records[other]);
    }
    return mine;
}

// The same from the records `parts` [count, COLUMNS].
template <class Tile, class Record>
DEVICE Record combine_records(ConvFinish<Tile>& shared, const Record* parts, uint32_t count) {
    const uint32_t thread = thread_again(), column = thread % Tile::COLUMNS;
    Record mine = {};
    for (uint32_t i = thread / Tile::COLUMNS; i < count; i += ConvFinish<Tile>::LINES) {
        mine.add(parts[i * Tile::COLUMNS + column]);
    }
    return combine_records<Tile>(shared, mine);
}

// From the records of a block's threads to those of all rows: calls `finish(column, record)` for every column of the result, in the last
// block of each column tile of a branch. All threads take part.
template <class Tile, class Record, class Finish>
DEVICE void reduce_records(const ConvProduct& p, const ConvPlace& place, ConvFinish<Tile>& shared, Record mine,
                           Finish finish) {
    const int thread = int(thread_again()), line = thread / Tile::COLUMNS, column = thread % Tile::COLUMNS;
    const uint32_t row_tiles = p.row_tiles, groups = (row_tiles + RECORD_GROUP - 1) / RECORD_GROUP;
    const uint32_t group = place.row_tile / RECORD_GROUP, first = group * RECORD_GROUP;
    const uint32_t in_group = row_tiles - first < RECORD_GROUP ? row_tiles - first : RECORD_GROUP;
    const uint32_t columns = place.branch * uint32_t(p.column_tiles) + place.column_tile;
    Record* of_tiles = static_cast<Record*>(p.tile_sums) + int64_t(columns) * row_tiles * Tile::COLUMNS;
    Record* of_groups = static_cast<Record*>(p.group_sums) + int64_t(columns) * groups * Tile::COLUMNS;
    uint32_t* group_arrivals = p.arrivals + uint32_t(p.branches) * row_tiles * uint32_t(p.column_tiles);
    uint32_t* column_arrivals = group_arrivals + uint32_t(p.branches) * uint32_t(p.column_tiles) * groups;

    mine = combine_records<Tile>(shared, mine);
    if (line == 0) of_tiles[place.row_tile * Tile::COLUMNS + column] = mine;

    if (!last_to_arrive(group_arrivals + columns * groups + group, in_group)) return;
    mine = combine_records<Tile>(shared, of_tiles + first * Tile::COLUMNS, in_group);
    if (line == 0) of_groups[group * Tile::COLUMNS + column] = mine;

    if (!last_to_arrive(column_arrivals + columns, groups)) return;
    mine = combine_records<Tile>(shared, of_groups, groups);
    const uint32_t at = place.column_tile * Tile::COLUMNS + column;
    if (line == 0 && at < uint32_t(p.columns)) finish(at, mine);
}

// Mean and variance of the columns of `out`, which lies in shared memory.
template <class Tile>
DEVICE void conv_statistics(const ConvProduct& p, const ConvPlace& place, ConvFinish<Tile>& shared) {
    constexpr int LINES = ConvFinish<Tile>::LINES, PITCH = ConvFinish<Tile>::PITCH;
    const int thread = int(thread_again()), line = thread / Tile::COLUMNS, column = thread % Tile::COLUMNS;
    sync_threads();
    const float* values = shared.values + line * PITCH + column;
    const Moments mine = moments_of(
        Tile::ROWS / LINES, [&](int i) { return values[i * LINES * PITCH]; },
        [&](int i) { return shared.rows[line + i * LINES] != NO_ROW; });
    reduce_records<Tile>(p, place, shared, mine, [&](uint32_t at, const Moments& moments) {
        p.mean[int64_t(place.branch) * p.columns + at] = moments.mean + moments.rest;
        p.var[int64_t(place.branch) * p.columns + at] = moments.squares / moments.n;
    });
}

// Of a column v of the result: backward: Σ m v (x−μ), Σ m v; tangent: Σ v (x−μ), Σ v.
struct SumRecord {
    float of[2];

    DEVICE void add(const SumRecord& other) {
        of[0] += other.of[0];
        of[1] += other.of[1];
    }
};
static_assert(sizeof(SumRecord) <= RECORD);

// RUN neighbours of a tensor as they lie in memory.
template <class Operand, int RUN>
struct SumOperand {
    Chunk chunk;

    DEVICE void load(const void* from, int64_t at, int half) { chunk = chunk_load<Operand>(from, at, half); }
    DEVICE void unpack(float (&v)[RUN], int half) const { chunk_decode<Operand>(v, chunk, half); }
};
template <class Operand>
struct SumOperand<Operand, 1> {
    float value;

    DEVICE void load(const void* from, int64_t at, int half) { value = conv_load<Operand>(from, at, half); }
    DEVICE void unpack(float (&v)[1], int) const { v[0] = value; }
};

// What the sums of columns from `column` on, which the result has all of, want of the batch norm: found of its tensors, unless a tile says
// where it has them.
template <class Tile>
struct SumNorms {
    template <bool TANGENT, int RUN>
    static DEVICE void find(const ConvProduct& p, int64_t branch, uint32_t column, BnScaleShift (&norm)[RUN], float (&mean)[RUN]) {
        const ConvNorm& of_next = p.sums.norm;
        for (int c = 0; c < RUN; ++c) {
            if (!TANGENT) norm[c] = of_next.of(branch, column + c);
            mean[c] = of_next.mean[branch * of_next.mean_branch + column + c];
        }
    }
};

// The sums of the present thread's columns, RUN neighbours, over its rows.
template <class Operand, bool TANGENT, int RUN>
struct ThreadSums {
    static constexpr int COUNT = 2;
    BnScaleShift norm[RUN];
    float mean[RUN];
    float of[COUNT][RUN];

    DEVICE void add(const float (&v)[RUN], const float (&x)[RUN]) {
        for (int c = 0; c < RUN; ++c) {
            const float counted = TANGENT || norm[c].passes(x[c]) ? v[c] : 0.0f;
            of[0][c] = fmaf(counted, x[c] - mean[c], of[0][c]);
            of[1][c] += counted;
        }
    }
    // The record of one of the block's columns, as `ConvFinish` divides them among threads, from what all threads have. All take part,
    // behind a barrier: the values in shared memory are overwritten.
    template <class Tile>
    DEVICE SumRecord record(ConvFinish<Tile>& shared) const {
        SumRecord mine = {};
        if constexpr (RUN == 1) {
            for (int i = 0; i < COUNT; ++i) mine.of[i] = of[i][0];
        } else {
            // [COUNT, threads of a column, COLUMNS]
            constexpr int PARTS = Tile::THREADS * RUN / Tile::COLUMNS, LINES = ConvFinish<Tile>::LINES;
            static_assert(COUNT * PARTS <= Tile::ROWS);
            const int thread = int(thread_again()), line = thread / Tile::COLUMNS, column = thread % Tile::COLUMNS;
            for (int i = 0; i < COUNT; ++i) eight_to(shared.values + (i * Tile::THREADS + thread) * RUN, of[i]);
            sync_threads();
            for (int i = 0; i < COUNT; ++i) {
                for (int part = line; part < PARTS; part += LINES) {
                    mine.of[i] += shared.values[(i * PARTS + part) * Tile::COLUMNS + column];
                }
            }
        }
        return mine;
    }
};

// What the sums are for, from those of the threads. All take part: the values in shared memory are overwritten.
template <class Operand, class Tile, bool TANGENT>
DEVICE void conv_sums_of(const ConvProduct& p, const ConvPlace& place, ConvFinish<Tile>& shared,
                         const ThreadSums<Operand, TANGENT, Tile::RUN>& mine) {
    const ConvSums& sums = p.sums;
    sync_threads();
    reduce_records<Tile>(p, place, shared, mine.record(shared), [&](uint32_t at, const SumRecord& record) {
        const float variance = sums.norm.var[place.branch * sums.norm.var_branch + at];
        const float with_x = record.of[0] / sqrtf(variance + sums.norm.epsilon), count = float(p.rows);
        const int64_t to = int64_t(place.branch) * p.columns + at;
        if constexpr (TANGENT) {
            sums.results[0][to] = record.of[1] / count;
            sums.results[1][to] = with_x / count;
        } else {
            sums.results[0][to] = with_x;
            sums.results[1][to] = record.of[1];
        }
    });
}

// Adds up the rows of a thread's columns from `column` on, AHEAD of them in flight at a time. `half`: `next` has 16 bits.
template <class Operand, class Tile, int AHEAD, class Sums>
DEVICE void sum_rows(const ConvProduct& p, const ConvPlace& place, ConvFinish<Tile>& shared, uint32_t column, int half, Sums& mine) {
    constexpr int RUN = Tile::RUN, ROWS_ABREAST = Tile::THREADS * RUN / Tile::COLUMNS, PARTS = Tile::ROWS / ROWS_ABREAST;
    static_assert(Tile::THREADS * RUN % Tile::COLUMNS == 0 && Tile::ROWS % (ROWS_ABREAST * AHEAD) == 0);
    const ConvSums& sums = p.sums;
    const int first = int(thread_again()) * RUN, c = first % Tile::COLUMNS;
    const bool there = column < uint32_t(p.columns);
    ROLLED
    for (int part = 0; part < PARTS; part += AHEAD) {
        SumOperand<Operand, RUN> next[AHEAD];
        bool has[AHEAD];
        UNROLLED
        for (int i = 0; i < AHEAD; ++i) {
            const uint32_t row = shared.rows[first / Tile::COLUMNS + (part + i) * ROWS_ABREAST];
            has[i] = there && row != NO_ROW;
            // Without a condition, for which registers would be kept over the loop.
            const uint32_t at = has[i] ? row * uint32_t(p.columns) + column : 0;
            next[i].load(sums.next, place.branch * sums.next_branch + at, half);
        }
        UNROLLED
        for (int i = 0; i < AHEAD; ++i) {
            if (!has[i]) continue;
            const float* values =
                shared.values + (first / Tile::COLUMNS + (part + i) * ROWS_ABREAST) * ConvFinish<Tile>::PITCH + c;
            float v[RUN], x[RUN];
            if constexpr (RUN == 1) {
                v[0] = *values;
            } else {
                eight_of(v, values);
            }
            next[i].unpack(x, half);
            mine.add(v, x);
        }
    }
}

// How many rows are in flight. More threads hide as much with fewer, and have fewer registers.
template <class Tile>
struct SumFlight {
    template <class Operand, class Sums>
    static DEVICE void add(const ConvProduct& p, const ConvPlace& place, ConvFinish<Tile>& shared, uint32_t column, Sums& mine) {
        sum_rows<Operand, Tile, (Tile::THREADS > 128 ? 1 : 4)>(p, place, shared, column, p.sums.next_half, mine);
    }
};

// The sums of the columns of the result. Each thread reads back the values that it stored itself.
template <class Operand, class Tile, bool TANGENT, class ColumnOf>
DEVICE void conv_sums(const ConvProduct& p, const ConvPlace& place, ConvFinish<Tile>& shared, ColumnOf column_of) {
    const uint32_t column = column_of(int(thread_again()) * Tile::RUN % Tile::COLUMNS);
    ThreadSums<Operand, TANGENT, Tile::RUN> mine = {};
    if (column < uint32_t(p.columns)) {
        SumNorms<Tile>::template find<TANGENT>(p, place.branch, column, mine.norm, mine.mean);
    }
    SumFlight<Tile>::template add<Operand>(p, place, shared, column, mine);
    conv_sums_of<Operand, Tile, TANGENT>(p, place, shared, mine);
}
