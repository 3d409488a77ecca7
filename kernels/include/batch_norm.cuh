// What the batch-norm kernels have in common: which elements a block works on, and sums over rows in a fixed order.
//
// Activations are [M, N, H, W, C]; a row is one pixel of one sample, and statistics are per channel of a branch. A block takes a
// tile of neighbouring channels and a chunk of rows; a thread four of the channels, so that it loads 16 bytes of f32 or 8 of
// halves, and every `lines`-th row of the chunk, so that a warp reads consecutive memory also where there are few channels.
#pragma once

#include "bn_relu.cuh"
#include "last_block.cuh"
#include "storage.cuh"

// Threads of a block.
constexpr int BN_THREADS = 256;

// An activation, in the storage type of the launch: 0 elements from one branch to the next where it is shared, or a result that is
// the sum over the branches.
struct BnActivation {
    void* at;
    int64_t branch;
};

// A value per channel; the branch as above.
struct BnVector {
    float* at;
    int64_t branch;
};

// What stands between the batch norm and its result, and how the backward operations know where it let something through.
enum BnMask : int32_t {
    BN_PLAIN,       // no ReLU
    BN_RESULT,      // the forward result is positive; forward operations: there is a ReLU
    BN_RECOMPUTED,  // the forward result, computed again, is positive
};

struct BnShape {
    int64_t rows;          // N·H·W
    int64_t total_branch;  // sums of all rows from one branch to the next; 0 where they are shared
    int32_t reduce_rows;   // of a chunk of the reduce kernel
    int32_t apply_rows;    // of a chunk of the apply kernel
    int32_t channels;      // C
    int32_t width;         // channels of a tile, a multiple of 4
    int32_t branches;      // that a block of the apply kernel works on, one after the other
    int32_t group;         // branches whose factors it keeps at a time
    float epsilon;         // added to the variance
    BnMask mask;
};
static_assert(sizeof(BnShape) == 48);

// The present thread's part of the block's work: rows `line, line + lines, …` of a chunk, below `end`, of up to four channels.
// Threads that are left over have no rows and point at channel 0, so that what they read exists.
struct BnTile {
    int64_t first;  // row of the branch that the chunk starts with
    int end, channels, lines, line, lane, channel;
    int count;      // of this thread's channels that exist
    bool whole;     // all four exist, in all threads that have rows
    bool active;

    // Whether there is row `i` of those that a thread has in flight from `row` on.
    DEVICE bool has(int row, int i) const { return row + i * lines < end; }
    DEVICE int64_t offset(int row, int i) const { return int64_t(row + i * lines) * channels; }
    // Whether this thread writes what the block finds out about its channels.
    DEVICE bool leads() const { return active && line == 0; }
};

DEVICE BnTile bn_tile(const BnShape& shape, int chunk_rows) {
    BnTile tile;
    const int thread = static_cast<int>(threadIdx.x), lanes = shape.width / 4;
    tile.first = int64_t(blockIdx.x) * chunk_rows;
    tile.channels = shape.channels;
    tile.lines = BN_THREADS / lanes;
    tile.lane = thread % lanes;
    tile.line = thread / lanes;
    tile.channel = static_cast<int>(blockIdx.y) * shape.width + 4 * tile.lane;
    tile.whole = shape.channels % 4 == 0;
    tile.active = tile.line < tile.lines && tile.channel < shape.channels;
    if (!tile.active) tile.channel = 0;
    const int count = shape.channels - tile.channel;
    tile.count = count < 4 ? count : 4;
    const int64_t left = tile.active ? shape.rows - tile.first : 0;
    tile.end = left < chunk_rows ? static_cast<int>(left) : chunk_rows;
    return tile;
}

// The thread's channels in branch `m` of a vector; 0 where there are none.
DEVICE void bn_vector(float (&to)[4], const BnVector& from, int64_t m, const BnTile& tile) {
    const float* at = from.at + m * from.branch + tile.channel;
    for (int c = 0; c < 4; ++c) to[c] = c < tile.count ? at[c] : 0.0f;
}

// The thread's first channel in the first row of the chunk in branch `m` of an activation.
template <class T>
DEVICE typename T::Element* bn_chunk(const BnActivation& x, int64_t m, const BnTile& tile) {
    return static_cast<typename T::Element*>(x.at) + m * x.branch + tile.channel + tile.first * tile.channels;
}

// 1/√(σ²+ε)
DEVICE float bn_inverse_deviation(float variance, float epsilon) { return 1.0f / sqrtf(variance + epsilon); }

// Some rows of the thread's channels, as they lie in memory: what is in flight at a time.
template <class T, int ROWS>
struct BnRows {
    typename T::Quad row[ROWS];

    // Rows from `at` on of branch `m`; 0 past the chunk's end.
    DEVICE void load(const BnActivation& x, int64_t m, const BnTile& tile, int at) {
        const typename T::Element* from = bn_chunk<T>(x, m, tile);
        if (tile.whole) {
            for (int i = 0; i < ROWS; ++i) {
                row[i] = tile.has(at, i) ? load_quad<T>(from + tile.offset(at, i)) : typename T::Quad{};
            }
        } else {
            for (int i = 0; i < ROWS; ++i) {
                row[i] = load_part<T>(from + tile.offset(at, i), tile.has(at, i) ? tile.count : 0);
            }
        }
    }

    DEVICE void unpack(float (&to)[ROWS][4]) const {
        for (int i = 0; i < ROWS; ++i) {
            const float4 v = T::unpack(row[i]);
            to[i][0] = v.x, to[i][1] = v.y, to[i][2] = v.z, to[i][3] = v.w;
        }
    }

    DEVICE void add_to(float (&to)[ROWS][4]) const {
        float v[ROWS][4];
        unpack(v);
        for (int i = 0; i < ROWS; ++i) {
            for (int c = 0; c < 4; ++c) to[i][c] += v[i][c];
        }
    }
};

// Rows that a thread has in flight at a time where registers are short: 32 bytes of each operand.
template <class T>
constexpr int BN_IN_FLIGHT = sizeof(typename T::Element) == 2 ? 4 : 2;

// Stores rows from `at` on of branch `m`, or adds to them.
template <class T, int ROWS>
DEVICE void bn_store(const BnActivation& y, int64_t m, float (&v)[ROWS][4], bool add, const BnTile& tile, int at) {
    if (add) {
        BnRows<T, ROWS> have;
        have.load(y, m, tile, at);
        have.add_to(v);
    }
    typename T::Element* to = bn_chunk<T>(y, m, tile);
    for (int i = 0; i < ROWS; ++i) {
        if (!tile.has(at, i)) continue;
        const float4 q = {v[i][0], v[i][1], v[i][2], v[i][3]};
        if (tile.whole) {
            store_quad<T>(to + tile.offset(at, i), q);
        } else {
            store_part<T>(to + tile.offset(at, i), q, tile.count);
        }
    }
}

// Means over the rows that a `BnRows` found.
template <int ROWS>
DEVICE void bn_batch_means(float (&to)[4], const float (&v)[ROWS][4], const BnTile& tile, int at) {
    float n = 0.0f;
    for (int c = 0; c < 4; ++c) to[c] = 0.0f;
    for (int i = 0; i < ROWS; ++i) {
        if (!tile.has(at, i)) continue;
        n += 1.0f;
        for (int c = 0; c < 4; ++c) to[c] += v[i][c];
    }
    for (int c = 0; c < 4; ++c) to[c] /= n;
}

// ---- Sums over rows ----

// The sums of the block's threads, from first line to last as a tree, in the threads of line 0. All threads take part.
template <class Sums>
DEVICE void bn_block_sum(Sums (&mine)[4], const BnShape& shape, const BnTile& tile) {
    Sums* area = shared_memory<Sums>() + threadIdx.x;  // [4, threads]
    for (int c = 0; c < 4; ++c) area[c * BN_THREADS] = mine[c];
    sync_threads();
    int step = BN_THREADS / 2;
    while (step >= tile.lines) step /= 2;
    for (; step > 0; step /= 2) {
        if (tile.line < step && tile.line + step < tile.lines) {
            for (int c = 0; c < 4; ++c) {
                mine[c].add(area[c * BN_THREADS + step * (shape.width / 4)]);
                area[c * BN_THREADS] = mine[c];
            }
        }
        sync_threads();
    }
}

// Ends a reduce kernel: the block's sums go to `partials` [M, chunks, C], the last of a tile's blocks adds the chunks up in a fixed
// order, and hands each channel and its sums to `finish`.
template <class Sums, class Finish>
DEVICE void bn_finish(Sums (&mine)[4], Sums* partials, uint32_t* counters, const BnShape& shape, const BnTile& tile,
                      Finish finish) {
    bn_block_sum(mine, shape, tile);
    const int chunks = static_cast<int>(gridDim.x);
    if (chunks > 1) {
        Sums* of_tile = partials + int64_t(blockIdx.z) * chunks * tile.channels + tile.channel;
        if (tile.leads()) {
            Sums* to = of_tile + int64_t(blockIdx.x) * tile.channels;
            for (int c = 0; c < tile.count; ++c) to[c] = mine[c];
        }
        if (!last_to_arrive(counters + blockIdx.z * gridDim.y + blockIdx.y, gridDim.x)) return;
        for (int c = 0; c < 4; ++c) mine[c] = {};
        for (int chunk = tile.line; chunk < chunks && tile.active; chunk += tile.lines) {
            const Sums* from = of_tile + int64_t(chunk) * tile.channels;
            for (int c = 0; c < 4; ++c) {
                if (c < tile.count) mine[c].add(from[c]);
            }
        }
        bn_block_sum(mine, shape, tile);
    }
    if (!tile.leads()) return;
    for (int c = 0; c < 4; ++c) {
        if (c < tile.count) finish(tile.channel + c, mine[c]);
    }
}

// ---- Backward and double backward ----

// Sets `v` to 0 where the ReLU let nothing through, in the rows of `x`, of the forward result `y`, from those in flight.
template <class T, int ROWS>
DEVICE void bn_mask(float (&v)[ROWS][4], BnMask mask, const BnScaleShift (&norm)[4], const float (&x)[ROWS][4],
                    const BnRows<T, ROWS>& y) {
    if (mask == BN_RECOMPUTED) {
        for (int i = 0; i < ROWS; ++i) {
            for (int c = 0; c < 4; ++c) v[i][c] = norm[c].passes(x[i][c]) ? v[i][c] : 0.0f;
        }
    } else if (mask == BN_RESULT) {
        float result[ROWS][4];
        y.unpack(result);
        for (int i = 0; i < ROWS; ++i) {
            for (int c = 0; c < 4; ++c) v[i][c] = result[i][c] > 0.0f ? v[i][c] : 0.0f;
        }
    }
}

// The ReLU's batch norm in branch `m`, for `BN_RECOMPUTED`.
DEVICE void bn_norm(BnScaleShift (&to)[4], const BnShape& shape, const BnVector& g, const BnVector& b, const BnVector& mean,
                    const BnVector& var, int64_t m, const BnTile& tile) {
    for (int c = 0; c < 4; ++c) to[c] = {};
    if (shape.mask != BN_RECOMPUTED) return;
    float gain[4], bias[4], average[4], variance[4];
    bn_vector(gain, g, m, tile);
    bn_vector(bias, b, m, tile);
    bn_vector(average, mean, m, tile);
    bn_vector(variance, var, m, tile);
    for (int c = 0; c < 4; ++c) to[c] = bn_scale_shift(gain[c], bias[c], average[c], variance[c], shape.epsilon);
}

// Fields of the factors that every apply kernel has; its own follow.
enum BnField { MEAN, NORM, NORM_SHIFT, OWN_FIELDS };

// Factors of an apply kernel in shared memory, [fields, branches of a group, width]: a thread reads those of its four channels as 16
// bytes.
struct BnFactors {
    float* at;
    int slots;  // branches of a group · width

    DEVICE void get(float (&to)[4], int field, int slot) const {
        const float4 v = *reinterpret_cast<const float4*>(at + field * slots + slot);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
    DEVICE void put(int field, int slot, float v) const { at[field * slots + slot] = v; }
    DEVICE void get_norm(BnScaleShift (&to)[4], int slot) const {
        float scale[4], shift[4];
        get(scale, NORM, slot);
        get(shift, NORM_SHIFT, slot);
        for (int c = 0; c < 4; ++c) to[c] = {scale[c], shift[c]};
    }
};

DEVICE BnFactors bn_factors(const BnShape& shape) { return {shared_memory<float>(), shape.group * shape.width}; }

// Writes a channel's value of a branch, or adds it to the sum over the branches.
DEVICE void bn_put(const BnVector& to, int64_t m, int channel, float value, bool first) {
    float* at = to.at + m * to.branch + channel;
    *at = first || to.branch != 0 ? value : *at + value;
}

// A channel's value in branch `m`.
DEVICE float bn_value(const BnVector& from, int64_t m, int channel) { return from.at[m * from.branch + channel]; }

// Factors of `count` branches from `first + from` on. `own(slot, m, channel, r)` puts those that not every apply kernel has, r being
// 1/√(σ²+ε); in the first chunk's blocks `finish(m, channel, r, i)` writes what there is one of per channel, for the block's branch i.
template <class Params, class Own, class Finish>
DEVICE void bn_put_factors(const Params& p, const BnFactors& factors, int64_t first, int from, int count, Own own, Finish finish) {
    const BnShape& shape = p.shape;
    const int tile = static_cast<int>(blockIdx.y) * shape.width;
    for (int slot = threadIdx.x; slot < count * shape.width; slot += BN_THREADS) {
        const int channel = tile + slot % shape.width;
        if (channel >= shape.channels) continue;
        const int64_t m = first + from + slot / shape.width;
        const float mean = bn_value(p.mean, m, channel), var = bn_value(p.var, m, channel);
        factors.put(MEAN, slot, mean);
        if (shape.mask == BN_RECOMPUTED) {
            const BnScaleShift norm =
                bn_scale_shift(bn_value(p.g, m, channel), bn_value(p.b, m, channel), mean, var, shape.epsilon);
            factors.put(NORM, slot, norm.scale);
            factors.put(NORM_SHIFT, slot, norm.shift);
        }
        own(slot, m, channel, bn_inverse_deviation(var, shape.epsilon));
    }
    const int channel = tile + static_cast<int>(threadIdx.x);
    if (blockIdx.x != 0 || static_cast<int>(threadIdx.x) >= shape.width || channel >= shape.channels) return;
    for (int i = from; i < from + count; ++i) {
        const int64_t m = first + i;
        finish(m, channel, bn_inverse_deviation(bn_value(p.var, m, channel), shape.epsilon), i);
    }
}
