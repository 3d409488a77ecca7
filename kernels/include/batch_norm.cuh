// What the batch-norm kernels have in common: which elements a block works on, and sums over rows in a fixed order.
//
// Activations are [M, N, H, W, C]; a row is one pixel of one sample, and statistics are per channel of a branch.
// A block takes a tile of neighbouring channels and a chunk of rows. Its threads lie as `lines` rows of the tile, so
// that a warp reads consecutive memory also where there are fewer channels than lanes.
#pragma once

#include "platform.cuh"

// Threads of a block.
constexpr int BN_THREADS = 256;
// Rows that a thread has in flight at a time.
constexpr int BN_ROWS = 4;

// An operand: 0 elements from one branch to the next where it is shared.
struct BnSource {
    const float* at;
    int64_t branch;
};

// A result: 0 elements from one branch to the next where it is shared, or the sum over the branches.
struct BnTarget {
    float* at;
    int64_t branch;
};

struct BnShape {
    int64_t rows;         // N·H·W
    int64_t sums_branch;  // partial sums from one branch to the next; 0 where they are shared
    int32_t reduce_rows;  // of a chunk of the reduce kernel
    int32_t apply_rows;   // of a chunk of the apply kernel
    int32_t chunks;       // of the reduce kernel
    int32_t channels;     // C
    int32_t width;        // channels of a tile
    int32_t branches;     // that a block of the apply kernel works on, one after the other
    float epsilon;        // added to the variance
    int32_t padding;
};
static_assert(sizeof(BnShape) == 48);

// The present thread's part of the block's work: rows `line, line + lines, …` of a chunk, below `end`, of one channel.
// Threads that are left over have no rows and point at channel 0, so that what they read exists.
struct BnTile {
    int64_t first;  // row of the branch that the chunk starts with
    int end, channels, width, lines, lane, line, channel;
    bool active;

    // Whether there is row `i` of those that a thread has in flight from `row` on.
    DEVICE bool has(int row, int i) const { return row + i * lines < end; }
    DEVICE int64_t offset(int row, int i) const { return int64_t(row + i * lines) * channels; }
    DEVICE int step() const { return BN_ROWS * lines; }
    // Whether this thread writes what the block finds out about its channel.
    DEVICE bool leads() const { return active && line == 0; }
};

DEVICE BnTile bn_tile(const BnShape& shape, int chunk_rows) {
    BnTile tile;
    const int thread = static_cast<int>(threadIdx.x);
    tile.first = int64_t(blockIdx.x) * chunk_rows;
    tile.channels = shape.channels;
    tile.width = shape.width;
    tile.lines = BN_THREADS / shape.width;
    tile.lane = thread % shape.width;
    tile.line = thread / shape.width;
    tile.channel = static_cast<int>(blockIdx.y) * shape.width + tile.lane;
    tile.active = tile.line < tile.lines && tile.channel < shape.channels;
    if (!tile.active) tile.channel = 0;
    const int64_t left = tile.active ? shape.rows - tile.first : 0;
    tile.end = left < chunk_rows ? static_cast<int>(left) : chunk_rows;
    return tile;
}

// The channel's value in branch `m` of a vector; that of the first row of an activation.
DEVICE const float* bn_channel(const BnSource& source, int64_t m, const BnTile& tile) {
    return source.at + m * source.branch + tile.channel;
}
DEVICE float* bn_channel(const BnTarget& target, int64_t m, const BnTile& tile) {
    return target.at + m * target.branch + tile.channel;
}

// The channel in the first row of the chunk in branch `m` of an activation.
DEVICE const float* bn_chunk(const BnSource& source, int64_t m, const BnTile& tile) {
    return bn_channel(source, m, tile) + tile.first * tile.channels;
}
DEVICE float* bn_chunk(const BnTarget& target, int64_t m, const BnTile& tile) {
    return bn_channel(target, m, tile) + tile.first * tile.channels;
}

// 1/√(σ²+ε)
DEVICE float bn_inverse_deviation(float variance, float epsilon) { return 1.0f / sqrtf(variance + epsilon); }

// max(v, 0); not a number stays what it is.
DEVICE float bn_positive(float v) { return 0.0f > v ? 0.0f : v; }

// Rows from `row` on of one channel; 0 past the chunk's end.
DEVICE void bn_load(float (&to)[BN_ROWS], const float* from, const BnTile& tile, int row) {
    for (int i = 0; i < BN_ROWS; ++i) to[i] = tile.has(row, i) ? from[tile.offset(row, i)] : 0.0f;
}

// As `bn_load`, with 0 where the forward result `y` is not positive.
template <bool RELU>
DEVICE void bn_load_masked(float (&to)[BN_ROWS], const float* from, const float (&y)[BN_ROWS], const BnTile& tile,
                           int row) {
    bn_load(to, from, tile, row);
    for (int i = 0; i < BN_ROWS; ++i) {
        if (RELU && !(y[i] > 0.0f)) to[i] = 0.0f;
    }
}

// Stores rows from `row` on of one channel, or adds to them.
DEVICE void bn_store(float* to, const float (&from)[BN_ROWS], bool add, const BnTile& tile, int row) {
    for (int i = 0; i < BN_ROWS; ++i) {
        if (!tile.has(row, i)) continue;
        float* at = to + tile.offset(row, i);
        *at = add ? *at + from[i] : from[i];
    }
}

// Mean of the rows that `bn_load` found.
DEVICE float bn_batch_mean(const float (&v)[BN_ROWS], const BnTile& tile, int row) {
    float n = 0.0f, sum = 0.0f;
    for (int i = 0; i < BN_ROWS; ++i) {
        if (!tile.has(row, i)) continue;
        n += 1.0f;
        sum += v[i];
    }
    return sum / n;
}

// The sum of `mine` over the lines of a block, from first to last, in the threads of line 0. All threads take part.
template <class Sums>
DEVICE Sums bn_block_sum(Sums mine, const BnTile& tile) {
    Sums* area = shared_memory<Sums>();
    area[threadIdx.x] = mine;
    sync_threads();
    if (tile.line == 0) {
        for (int line = 1; line < tile.lines; ++line) mine.add(area[line * tile.width + tile.lane]);
    }
    sync_threads();
    return mine;
}

// Ends a reduce kernel: one chunk's sums to `partials` [M, chunks, C].
template <class Sums>
DEVICE void bn_write_partial(Sums mine, Sums* partials, const BnShape& shape, const BnTile& tile) {
    const Sums sum = bn_block_sum(mine, tile);
    if (!tile.leads()) return;
    partials[blockIdx.z * shape.sums_branch + int64_t(blockIdx.x) * tile.channels + tile.channel] = sum;
}

// The sums over all chunks of a branch, in the threads of line 0. All threads take part.
template <class Sums>
DEVICE Sums bn_combine(const Sums* partials, int64_t m, const BnShape& shape, const BnTile& tile) {
    const Sums* from = partials + m * shape.sums_branch + tile.channel;
    Sums mine = {};
    for (int chunk = tile.line; chunk < shape.chunks; chunk += tile.lines) {
        mine.add(from[int64_t(chunk) * tile.channels]);
    }
    return bn_block_sum(mine, tile);
}

// ---- The apply kernels of backward and double backward ----

// Branches whose factors a block keeps at a time; beyond it, results that are sums are read back and added to.
constexpr int BN_GROUP = 16;

// Where the factors lie, [branches of the group, width]: behind the area of `bn_block_sum`.
template <class Factors, class Sums>
DEVICE Factors* bn_factors() {
    return reinterpret_cast<Factors*>(shared_memory<Sums>() + BN_THREADS);
}

// Writes a channel's value of a branch, or adds it to the sum over the branches.
DEVICE void bn_put(const BnTarget& target, int64_t m, float value, bool first, const BnTile& tile) {
    float* at = bn_channel(target, m, tile);
    *at = first || target.branch != 0 ? value : *at + value;
}
