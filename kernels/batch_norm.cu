// Batch norm forward, with batch statistics and with given ones, with and without a ReLU behind it. Formulas: src/ops/batch_norm.rs.
//
// Forward takes two launches. `bn_forward_reduce` finds the statistics; `bn_forward_apply` works element by element. The number of
// chunks of rows depends on shapes only, so the order of additions is the same on every card.

#include "batch_norm.cuh"
#include "moments.cuh"

struct BnForwardParams {
    BnActivation x;           // [M, N, H, W, C]
    BnVector g;               // [M, C]
    BnVector b;               // [M, C]
    BnActivation y;           // [M, N, H, W, C]
    BnVector mean;            // [M, C]
    BnVector var;             // [M, C], biased
    Moments* partials;        // [M, chunks, C], of x less the pivot, the branch's first row: a large mean costs no digits
    Moments* totals;          // [M, C]; null where only the statistics are wanted
    uint32_t* counters;       // [M, tiles]
    BnShape shape;
};
static_assert(sizeof(BnForwardParams) == 168);

struct BnEvalParams {
    BnActivation x;  // [M, N, H, W, C]
    BnVector g;      // [M, C]
    BnVector b;      // [M, C]
    BnVector mean;   // [M, C]
    BnVector var;    // [M, C]
    BnActivation y;  // [M, N, H, W, C]
    BnShape shape;
};
static_assert(sizeof(BnEvalParams) == 144);

// Rows that a thread has in flight at a time.
constexpr int ROWS = 4;

// Knuth's sum: a + b exactly, as the rounded sum and the rest.
DEVICE void bn_exact_sum(float a, float b, float& sum, float& rest) {
    sum = a + b;
    const float of_b = sum - a;
    rest = (a - (sum - of_b)) + (b - of_b);
}

// The thread's channels in the first row of branch `m`.
template <class T>
DEVICE void bn_pivot(float (&to)[4], const BnActivation& x, int64_t m, const BnTile& tile) {
    const typename T::Element* at = static_cast<const typename T::Element*>(x.at) + m * x.branch + tile.channel;
    for (int c = 0; c < 4; ++c) to[c] = c < tile.count ? T::widen(at[c]) : 0.0f;
}

template <class T>
DEVICE void bn_forward_reduce(const BnForwardParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.reduce_rows);
    const int64_t m = blockIdx.z;
    float pivot[4];
    bn_pivot<T>(pivot, p.x, m, tile);
    // Sums around the mean of the thread's first rows: close enough to the mean that no digits cancel.
    float n = 0.0f, shift[4] = {}, sum[4] = {}, squares[4] = {};
    for (int row = tile.line; row < tile.end; row += ROWS * tile.lines) {
        BnRows<T, ROWS> rows;
        rows.load(p.x, m, tile, row);
        float v[ROWS][4];
        rows.unpack(v);
        for (int i = 0; i < ROWS; ++i) {
            for (int c = 0; c < 4; ++c) v[i][c] -= pivot[c];
        }
        if (row == tile.line) bn_batch_means(shift, v, tile, row);
        for (int i = 0; i < ROWS; ++i) {
            if (!tile.has(row, i)) continue;
            n += 1.0f;
            for (int c = 0; c < 4; ++c) {
                const float d = v[i][c] - shift[c];
                sum[c] += d;
                squares[c] = fmaf(d, d, squares[c]);
            }
        }
    }
    Moments mine[4] = {};
    for (int c = 0; c < 4 && n != 0.0f; ++c) {
        mine[c].n = n;
        bn_exact_sum(shift[c], sum[c] / n, mine[c].mean, mine[c].rest);
        mine[c].squares = fmaxf(squares[c] - sum[c] * sum[c] / n, 0.0f);
    }
    bn_finish(mine, p.partials, p.counters, p.shape, tile, [&](int channel, const Moments& sums) {
        const int c = channel - tile.channel;
        float mean, rest;
        bn_exact_sum(pivot[c], sums.mean, mean, rest);
        p.mean.at[m * p.mean.branch + channel] = mean + (rest + sums.rest);
        p.var.at[m * p.var.branch + channel] = sums.squares / sums.n;
        if (p.totals) p.totals[m * p.shape.total_branch + channel] = sums;
    });
}

KERNEL(bn_forward_reduce_f32, BnForwardParams, 256) { bn_forward_reduce<StoredF32>(p); }
KERNEL(bn_forward_reduce_f16, BnForwardParams, 256) { bn_forward_reduce<StoredF16>(p); }
KERNEL(bn_forward_reduce_bf16, BnForwardParams, 256) { bn_forward_reduce<StoredBf16>(p); }

// `y = ((x − pivot) − mean)·scale + bias`, and ReLU: not a number stays what it is.
template <class T>
DEVICE void bn_normalise(const BnActivation& x, const BnActivation& y, int64_t m, const BnShape& shape, const BnTile& tile,
                         const float (&pivot)[4], const float (&mean)[4], const float (&scale)[4], const float (&bias)[4]) {
    const float least = shape.mask == BN_PLAIN ? -INFINITY : 0.0f;
    for (int row = tile.line; row < tile.end; row += ROWS * tile.lines) {
        BnRows<T, ROWS> rows;
        rows.load(x, m, tile, row);
        float v[ROWS][4];
        rows.unpack(v);
        for (int i = 0; i < ROWS; ++i) {
            for (int c = 0; c < 4; ++c) {
                const float normal = fmaf((v[i][c] - pivot[c]) - mean[c], scale[c], bias[c]);
                v[i][c] = least > normal ? least : normal;
            }
        }
        bn_store<T>(y, m, v, false, tile, row);
    }
}

template <class T>
DEVICE void bn_forward_apply(const BnForwardParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.apply_rows);
    const int64_t m = blockIdx.z;
    float pivot[4], mean[4], scale[4], bias[4];
    bn_pivot<T>(pivot, p.x, m, tile);
    bn_vector(scale, p.g, m, tile);
    bn_vector(bias, p.b, m, tile);
    const Moments* totals = p.totals + m * p.shape.total_branch + tile.channel;
    for (int c = 0; c < 4; ++c) {
        const Moments sums = totals[c < tile.count ? c : 0];
        mean[c] = sums.mean;
        scale[c] *= bn_inverse_deviation(sums.squares / sums.n, p.shape.epsilon);
    }
    bn_normalise<T>(p.x, p.y, m, p.shape, tile, pivot, mean, scale, bias);
}

KERNEL(bn_forward_apply_f32, BnForwardParams, 256) { bn_forward_apply<StoredF32>(p); }
KERNEL(bn_forward_apply_f16, BnForwardParams, 256) { bn_forward_apply<StoredF16>(p); }
KERNEL(bn_forward_apply_bf16, BnForwardParams, 256) { bn_forward_apply<StoredBf16>(p); }

template <class T>
DEVICE void bn_eval(const BnEvalParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.apply_rows);
    const int64_t m = blockIdx.z;
    const float zero[4] = {};
    float mean[4], var[4], scale[4], bias[4];
    bn_vector(mean, p.mean, m, tile);
    bn_vector(var, p.var, m, tile);
    bn_vector(scale, p.g, m, tile);
    bn_vector(bias, p.b, m, tile);
    for (int c = 0; c < 4; ++c) scale[c] *= bn_inverse_deviation(var[c], p.shape.epsilon);
    bn_normalise<T>(p.x, p.y, m, p.shape, tile, zero, mean, scale, bias);
}

KERNEL(bn_eval_f32, BnEvalParams, 256) { bn_eval<StoredF32>(p); }
KERNEL(bn_eval_f16, BnEvalParams, 256) { bn_eval<StoredF16>(p); }
KERNEL(bn_eval_bf16, BnEvalParams, 256) { bn_eval<StoredBf16>(p); }
