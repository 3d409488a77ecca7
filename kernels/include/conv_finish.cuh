// What follows a tile's product: the sum of its splits, what is added to it, its rounding, and what is found of its columns.
//
// Blocks whose results belong together count their arrivals; the last to arrive works on what all have left in
// scratch, in an order that does not depend on the arrivals, and sets the counter back to zero.
#pragma once

#include "conv_sums.cuh"

// Adds what is to be added to elements of the result and stores them; with `keep`, leaves them as they are stored.
template <class Operand, class Tile>
DEVICE void conv_put(const ConvProduct& p, const ConvPlace& place, uint32_t element, float* values, bool keep) {
    const int64_t out = place.branch * p.out_branch + element, start = place.branch * p.start_branch + element;
    if constexpr (Tile::RUN == 1) {
        if (p.start) *values += conv_load<Operand>(p.start, start, p.start_half);
        *values = conv_store<Operand>(p.out, out, p.out_half, *values);
    } else {
        static_assert(Tile::RUN == 8);
        float v[8];
        eight_of(v, values);
        if (p.start) {
            float added[8];
            chunk_decode<Operand>(added, chunk_load<Operand>(p.start, start, p.start_half), p.start_half);
            for (int i = 0; i < 8; ++i) v[i] += added[i];
        }
        if (p.out_half) {
            const uint4 coded = chunk_encode<Operand>(v);
            *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + out) = coded;
            if (keep) chunk_decode<Operand>(v, {coded, {}}, 1);
        } else {
            eight_to(static_cast<float*>(p.out) + out, v);
        }
        if (keep) eight_to(values, v);
    }
}

// The first part of what follows a tile's product: it lies in shared memory. All threads take part, behind a barrier: `shared` gets another
// meaning. `row_of` says where in the result a row of the tile lies, NO_ROW: nowhere.
template <class Tile, class RowOf>
DEVICE void conv_stage_sum(ConvFinish<Tile>& shared, Tile& product, RowOf row_of) {
    for (int r = int(thread_again()); r < Tile::ROWS; r += Tile::THREADS) shared.rows[r] = row_of(r);
    product.each([&](int, int r, int c, float v) { shared.values[r * ConvFinish<Tile>::PITCH + c] = v; });
}

// The same of what may be the product of one of several splits; then the first word of shared memory is overwritten as well. False, the same
// in all threads: another split's block goes on with the sum, and nothing is in shared memory.
template <class Tile, class RowOf>
DEVICE bool conv_stage(ConvFinish<Tile>& shared, const ConvProduct& p, const ConvPlace& place, Tile& product, RowOf row_of) {
    constexpr int ELEMENTS = Tile::ROWS * Tile::COLUMNS;
    const int thread = int(thread_again());
    if (p.splits > 1) {
        const uint32_t tile = place.tile(p);
        float* partial = p.partial + int64_t(tile) * p.splits * ELEMENTS + thread;
        product.each([&](int i, int, int, float v) {
            partial[int64_t(place.split) * ELEMENTS + i * Tile::THREADS] = v;
        });
        if (!last_to_arrive(p.arrivals + tile, p.splits)) return false;
        product.clear();
        for (int split = 0; split < p.splits; ++split) {
            product.each([&](int i, int, int, float& v) { v += partial[i * Tile::THREADS]; });
            partial += ELEMENTS;
        }
    }
    conv_stage_sum<Tile>(shared, product, row_of);
    return true;
}

// The second part. All threads take part; `column_of` is `row_of` of runs of columns. If anything is to be found, the first word of shared
// memory gets another meaning.
template <class Operand, class Tile, Form FORM, class ColumnOf>
DEVICE void conv_finish_staged(ConvFinish<Tile>& shared, const ConvProduct& p, const ConvPlace& place, ColumnOf column_of) {
    constexpr int ELEMENTS = Tile::ROWS * Tile::COLUMNS;
    sync_threads();
    const bool statistics = FORM == Form::FPROP && p.mean, sums = FORM != Form::WGRAD && p.sums.next;
    for (int i = int(thread_again()) * Tile::RUN; i < ELEMENTS; i += Tile::THREADS * Tile::RUN) {
        const int r = i / Tile::COLUMNS, c = i % Tile::COLUMNS;
        const uint32_t row = shared.rows[r], column = column_of(c);
        if (row == NO_ROW || column >= uint32_t(p.columns)) continue;
        const uint32_t at = row * uint32_t(p.columns) + column;
        conv_put<Operand, Tile>(p, place, at, shared.values + r * ConvFinish<Tile>::PITCH + c, statistics || sums);
    }
    if constexpr (FORM == Form::FPROP) {
        if (statistics) conv_statistics<Tile>(p, place, shared);
    }
    if constexpr (FORM != Form::WGRAD) {
        if (sums) conv_sums<Operand, Tile, FORM == Form::FPROP>(p, place, shared, column_of);
    }
}

// Both parts.
template <class Operand, class Tile, Form FORM, class RowOf, class ColumnOf>
DEVICE void conv_finish(ConvFinish<Tile>& shared, const ConvProduct& p, const ConvPlace& place, Tile& product, RowOf row_of,
                        ColumnOf column_of) {
    if (conv_stage<Tile>(shared, p, place, product, row_of)) {
        conv_finish_staged<Operand, Tile, FORM>(shared, p, place, column_of);
    }
}

// The same at the beginning of shared memory.
template <class Operand, class Tile, Form FORM, class RowOf, class ColumnOf>
DEVICE void conv_finish(const ConvProduct& p, const ConvPlace& place, Tile& product, RowOf row_of, ColumnOf column_of) {
    conv_finish<Operand, Tile, FORM>(*shared_memory<ConvFinish<Tile>>(), p, place, product, row_of, column_of);
}
