// Batch norm at three orders, with and without a ReLU behind it. Formulas: src/ops/batch_norm.rs.
//
// Two launches per operation. `*_reduce` makes partial sums over chunks of rows; `*_apply` combines those of its
// channels in a fixed order, then works element by element, and its first chunk's blocks write what there is one of
// per channel. The number of chunks depends on shapes only, so the order of additions is the same on every card.
//
// Where a result is a sum over branches, the blocks of an apply kernel go through the branches and keep the sum in
// registers.

#include "batch_norm.cuh"

struct BnForwardSums;
struct BnBackwardSums;
struct BnDoubleSums;

struct BnForwardParams {
    BnSource x;                // [M, N, H, W, C]
    BnSource g;                // [M, C]
    BnSource b;                // [M, C]
    BnTarget y;                // [M, N, H, W, C]
    BnTarget mean;             // [M, C]
    BnTarget var;              // [M, C], biased
    BnForwardSums* partials;   // [M, chunks, C]
    BnShape shape;
};
static_assert(sizeof(BnForwardParams) == 152);

struct BnEvalParams {
    BnSource x;     // [M, N, H, W, C]
    BnSource g;     // [M, C]
    BnSource b;     // [M, C]
    BnSource mean;  // [M, C]
    BnSource var;   // [M, C]
    BnTarget y;     // [M, N, H, W, C]
    BnShape shape;
};
static_assert(sizeof(BnEvalParams) == 144);

struct BnBackwardParams {
    BnSource dy;               // [M, N, H, W, C]
    BnSource x;                // [M, N, H, W, C]
    BnSource g;                // [M, C]
    BnSource mean;             // [M, C]
    BnSource var;              // [M, C]
    BnSource y;                // [M, N, H, W, C], null without ReLU
    BnTarget dx;               // [M, N, H, W, C]
    BnTarget dg;               // [M, C]
    BnTarget db;               // [M, C]
    BnBackwardSums* partials;  // [M, chunks, C]
    BnShape shape;
};
static_assert(sizeof(BnBackwardParams) == 200);

struct BnDoubleParams {
    BnSource x_dot;          // [M, N, H, W, C]
    BnSource g_dot;          // [M, C]
    BnSource b_dot;          // [M, C]
    BnSource dy;             // [M, N, H, W, C]
    BnSource x;              // [M, N, H, W, C]
    BnSource g;              // [M, C]
    BnSource mean;           // [M, C]
    BnSource var;            // [M, C]
    BnSource y;              // [M, N, H, W, C], null without ReLU
    BnTarget y_dot;          // [M, N, H, W, C]
    BnTarget x_bar;          // [M, N, H, W, C]
    BnTarget g_bar;          // [M, C]
    BnDoubleSums* partials;  // [M, chunks, C]
    BnShape shape;
};
static_assert(sizeof(BnDoubleParams) == 248);

// ---- Forward ----

// Knuth's sum: a + b exactly, as the rounded sum and the rest.
DEVICE void bn_exact_sum(float a, float b, float& sum, float& rest) {
    sum = a + b;
    const float of_b = sum - a;
    rest = (a - (sum - of_b)) + (b - of_b);
}

// Mean and sum of squares around it of some rows. The mean is relative to the branch's first row, the pivot, so that
// a large mean costs no digits; it has a second number for the digits that a small mean would lose to the pivot.
struct BnForwardSums {
    float n, mean, mean_rest, squares;

    // Chan's formula.
    DEVICE void add(const BnForwardSums& other) {
        if (other.n == 0.0f) return;
        const float total = n + other.n;
        const float part = other.n / total;
        const float apart = (other.mean - mean) + (other.mean_rest - mean_rest);
        float rest;
        bn_exact_sum(mean, apart * part, mean, rest);
        mean_rest += rest;
        squares += other.squares + apart * apart * n * part;
        n = total;
    }
};
static_assert(sizeof(BnForwardSums) == 16);

KERNEL(bn_forward_reduce_f32, BnForwardParams, 256) {
    const BnTile tile = bn_tile(p.shape, p.shape.reduce_rows);
    const float pivot = *bn_channel(p.x, blockIdx.z, tile);
    const float* x = bn_chunk(p.x, blockIdx.z, tile);
    // Sums around the mean of the thread's first rows: close enough to the mean that no digits cancel.
    float n = 0.0f, shift = 0.0f, sum = 0.0f, squares = 0.0f;
    for (int row = tile.line; row < tile.end; row += tile.step()) {
        float v[BN_ROWS];
        bn_load(v, x, tile, row);
        for (int i = 0; i < BN_ROWS; ++i) v[i] -= pivot;
        if (row == tile.line) shift = bn_batch_mean(v, tile, row);
        for (int i = 0; i < BN_ROWS; ++i) {
            if (!tile.has(row, i)) continue;
            const float d = v[i] - shift;
            n += 1.0f;
            sum += d;
            squares = fmaf(d, d, squares);
        }
    }
    BnForwardSums mine = {};
    if (n != 0.0f) {
        mine.n = n;
        bn_exact_sum(shift, sum / n, mine.mean, mine.mean_rest);
        mine.squares = fmaxf(squares - sum * sum / n, 0.0f);
    }
    bn_write_partial(mine, p.partials, p.shape, tile);
}

// `y = ((x − pivot) − mean)·scale + bias`
struct BnForwardFactors {
    float pivot, mean, scale, bias;
};

template <bool RELU>
DEVICE void bn_normalise(const float* x, float* y, const BnForwardFactors& f, const BnTile& tile) {
    for (int row = tile.line; row < tile.end; row += tile.step()) {
        float v[BN_ROWS];
        bn_load(v, x, tile, row);
        for (int i = 0; i < BN_ROWS; ++i) {
            v[i] = fmaf((v[i] - f.pivot) - f.mean, f.scale, f.bias);
            if (RELU) v[i] = bn_positive(v[i]);
        }
        bn_store(y, v, false, tile, row);
    }
}

template <bool RELU>
DEVICE void bn_forward(const BnForwardParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.apply_rows);
    const int64_t m = blockIdx.z;
    BnForwardFactors* factors = bn_factors<BnForwardFactors, BnForwardSums>();
    const BnForwardSums sums = bn_combine(p.partials, m, p.shape, tile);
    if (tile.line == 0) {
        const float pivot = *bn_channel(p.x, m, tile);
        const float var = sums.squares / sums.n;
        const float scale = *bn_channel(p.g, m, tile) * bn_inverse_deviation(var, p.shape.epsilon);
        factors[tile.lane] = {pivot, sums.mean, scale, *bn_channel(p.b, m, tile)};
        // Statistics of a shared x are the same in all branches: the first writes them.
        if (tile.leads() && blockIdx.x == 0 && (m == 0 || p.mean.branch != 0)) {
            float mean, rest;
            bn_exact_sum(pivot, sums.mean, mean, rest);
            *bn_channel(p.mean, m, tile) = mean + (rest + sums.mean_rest);
            *bn_channel(p.var, m, tile) = var;
        }
    }
    sync_threads();
    bn_normalise<RELU>(bn_chunk(p.x, m, tile), bn_chunk(p.y, m, tile), factors[tile.lane], tile);
}

KERNEL(bn_forward_apply_f32, BnForwardParams, 256) { bn_forward<false>(p); }
KERNEL(bn_relu_forward_apply_f32, BnForwardParams, 256) { bn_forward<true>(p); }

// ---- Evaluation ----

template <bool RELU>
DEVICE void bn_eval(const BnEvalParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.apply_rows);
    const int64_t m = blockIdx.z;
    const float r = bn_inverse_deviation(*bn_channel(p.var, m, tile), p.shape.epsilon);
    const float scale = *bn_channel(p.g, m, tile) * r;
    const BnForwardFactors factors = {0.0f, *bn_channel(p.mean, m, tile), scale, *bn_channel(p.b, m, tile)};
    bn_normalise<RELU>(bn_chunk(p.x, m, tile), bn_chunk(p.y, m, tile), factors, tile);
}

KERNEL(bn_eval_f32, BnEvalParams, 256) { bn_eval<false>(p); }
KERNEL(bn_relu_eval_f32, BnEvalParams, 256) { bn_eval<true>(p); }

// ---- Backward ----

struct BnBackwardSums {
    float dy, dy_x;  // Σ dy, Σ dy·(x−μ)

    DEVICE void add(const BnBackwardSums& other) {
        dy += other.dy;
        dy_x += other.dy_x;
    }
};
static_assert(sizeof(BnBackwardSums) == 8);

// The forward result's rows, where the ReLU needs them.
template <bool RELU>
DEVICE void bn_load_result(float (&y)[BN_ROWS], const BnSource& from, int64_t m, const BnTile& tile, int row) {
    if constexpr (RELU) bn_load(y, bn_chunk(from, m, tile), tile, row);
}

template <bool RELU>
DEVICE void bn_backward_reduce(const BnBackwardParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.reduce_rows);
    const int64_t m = blockIdx.z;
    const float mean = *bn_channel(p.mean, m, tile);
    BnBackwardSums mine = {};
    for (int row = tile.line; row < tile.end; row += tile.step()) {
        float y[BN_ROWS], dy[BN_ROWS], x[BN_ROWS];
        bn_load_result<RELU>(y, p.y, m, tile, row);
        bn_load_masked<RELU>(dy, bn_chunk(p.dy, m, tile), y, tile, row);
        bn_load(x, bn_chunk(p.x, m, tile), tile, row);
        for (int i = 0; i < BN_ROWS; ++i) {
            // Past the end dy is 0.
            mine.dy += dy[i];
            mine.dy_x = fmaf(dy[i], x[i] - mean, mine.dy_x);
        }
    }
    bn_write_partial(mine, p.partials, p.shape, tile);
}

KERNEL(bn_backward_reduce_f32, BnBackwardParams, 256) { bn_backward_reduce<false>(p); }
KERNEL(bn_relu_backward_reduce_f32, BnBackwardParams, 256) { bn_backward_reduce<true>(p); }

// An odd number of words: the lanes of a warp then read different banks.
struct BnBackwardFactors {
    float mean, r;
    float scale;         // g·r
    float dy, dy_x_hat;  // ⟨dy⟩, ⟨dy·x̂⟩

    DEVICE float apply(float dy_, float x) const {
        const float x_hat = (x - mean) * r;
        return scale * ((dy_ - dy) - x_hat * dy_x_hat);
    }
};
static_assert(sizeof(BnBackwardFactors) == 20);

template <bool RELU>
DEVICE void bn_backward(const BnBackwardParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.apply_rows);
    const float n = static_cast<float>(p.shape.rows);
    const int branches = p.shape.branches;
    const int64_t first = int64_t(blockIdx.z) * branches;
    BnBackwardFactors* factors = bn_factors<BnBackwardFactors, BnBackwardSums>();
    for (int from = 0; from < branches; from += BN_GROUP) {
        const int group = branches - from < BN_GROUP ? branches - from : BN_GROUP;
        for (int i = 0; i < group; ++i) {
            const int64_t m = first + from + i;
            const BnBackwardSums sums = bn_combine(p.partials, m, p.shape, tile);
            if (tile.line != 0) continue;
            const float r = bn_inverse_deviation(*bn_channel(p.var, m, tile), p.shape.epsilon);
            const float dy_x_hat = sums.dy_x * r;
            const float mean = *bn_channel(p.mean, m, tile), g = *bn_channel(p.g, m, tile);
            factors[i * tile.width + tile.lane] = {mean, r, g * r, sums.dy / n, dy_x_hat / n};
            if (tile.leads() && blockIdx.x == 0) {
                bn_put(p.dg, m, dy_x_hat, m == first, tile);
                bn_put(p.db, m, sums.dy, m == first, tile);
            }
        }
        sync_threads();
        for (int row = tile.line; row < tile.end; row += tile.step()) {
            float dx[BN_ROWS] = {};
            for (int i = 0; i < group; ++i) {
                const int64_t m = first + from + i;
                const BnBackwardFactors f = factors[i * tile.width + tile.lane];
                float y[BN_ROWS], dy[BN_ROWS], x[BN_ROWS];
                bn_load_result<RELU>(y, p.y, m, tile, row);
                bn_load_masked<RELU>(dy, bn_chunk(p.dy, m, tile), y, tile, row);
                bn_load(x, bn_chunk(p.x, m, tile), tile, row);
                for (int k = 0; k < BN_ROWS; ++k) {
                    const float v = f.apply(dy[k], x[k]);
                    dx[k] = p.dx.branch == 0 ? dx[k] + v : v;
                }
                if (p.dx.branch != 0) bn_store(bn_chunk(p.dx, m, tile), dx, false, tile, row);
            }
            if (p.dx.branch == 0) bn_store(bn_chunk(p.dx, first, tile), dx, from != 0, tile, row);
        }
    }
}

KERNEL(bn_backward_apply_f32, BnBackwardParams, 256) { bn_backward<false>(p); }
KERNEL(bn_relu_backward_apply_f32, BnBackwardParams, 256) { bn_backward<true>(p); }

// ---- Double backward ----

// Means of dy and ẋ over some rows, `Σ (dy−⟨dy⟩)(ẋ−⟨ẋ⟩)`, `Σ dy·(x−μ)`, `Σ ẋ·(x−μ)`. The product of dy and ẋ is
// centred from the start: its mean less the product of the means, as in the formula, would cancel.
struct BnDoubleSums {
    float n, dy, x_dot, dy_x_dot, dy_x, x_dot_x;

    // Chan's formula for a covariance.
    DEVICE void add(const BnDoubleSums& other) {
        if (other.n == 0.0f) return;
        const float total = n + other.n;
        const float part = other.n / total;
        const float dy_apart = other.dy - dy, x_dot_apart = other.x_dot - x_dot;
        dy += dy_apart * part;
        x_dot += x_dot_apart * part;
        dy_x_dot += other.dy_x_dot + dy_apart * x_dot_apart * n * part;
        dy_x += other.dy_x;
        x_dot_x += other.x_dot_x;
        n = total;
    }
};
static_assert(sizeof(BnDoubleSums) == 24);

template <bool RELU>
DEVICE void bn_double_reduce(const BnDoubleParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.reduce_rows);
    const int64_t m = blockIdx.z;
    const float mean = *bn_channel(p.mean, m, tile);
    float n = 0.0f, dy_shift = 0.0f, x_dot_shift = 0.0f;
    float dy_sum = 0.0f, x_dot_sum = 0.0f, product = 0.0f, dy_x = 0.0f, x_dot_x = 0.0f;
    for (int row = tile.line; row < tile.end; row += tile.step()) {
        float y[BN_ROWS], dy[BN_ROWS], x[BN_ROWS], x_dot[BN_ROWS];
        bn_load_result<RELU>(y, p.y, m, tile, row);
        bn_load_masked<RELU>(dy, bn_chunk(p.dy, m, tile), y, tile, row);
        bn_load(x, bn_chunk(p.x, m, tile), tile, row);
        bn_load(x_dot, bn_chunk(p.x_dot, m, tile), tile, row);
        if (row == tile.line) {
            dy_shift = bn_batch_mean(dy, tile, row);
            x_dot_shift = bn_batch_mean(x_dot, tile, row);
        }
        for (int i = 0; i < BN_ROWS; ++i) {
            if (!tile.has(row, i)) continue;
            const float a = dy[i] - dy_shift, b = x_dot[i] - x_dot_shift, v = x[i] - mean;
            n += 1.0f;
            dy_sum += a;
            x_dot_sum += b;
            product = fmaf(a, b, product);
            dy_x = fmaf(dy[i], v, dy_x);
            x_dot_x = fmaf(x_dot[i], v, x_dot_x);
        }
    }
    BnDoubleSums mine = {};
    if (n != 0.0f) {
        mine = {n, dy_shift + dy_sum / n, x_dot_shift + x_dot_sum / n, product - dy_sum * x_dot_sum / n, dy_x, x_dot_x};
    }
    bn_write_partial(mine, p.partials, p.shape, tile);
}

KERNEL(bn_double_backward_reduce_f32, BnDoubleParams, 256) { bn_double_reduce<false>(p); }
KERNEL(bn_relu_double_backward_reduce_f32, BnDoubleParams, 256) { bn_double_reduce<true>(p); }

// An odd number of words: the lanes of a warp then read different banks.
struct BnDoubleFactors {
    float mean, r, g, g_dot, b_dot;
    float x_dot, rho;          // ⟨ẋ⟩, ⟨ẋ·x̂⟩
    float dy, dy_x_hat;        // ⟨dy⟩, ⟨dy·x̂⟩
    float dy_x_hat_dot;        // ⟨dy·x̂'⟩
    float scale_dot;           // ġ r + g r'

    DEVICE void apply(float x_dot_, float dy_, float x, float& y_dot, float& x_bar) const {
        const float x_hat = (x - mean) * r;
        const float x_hat_dot = r * ((x_dot_ - x_dot) - x_hat * rho);
        y_dot = g * x_hat_dot + g_dot * x_hat + b_dot;
        x_bar = scale_dot * ((dy_ - dy) - x_hat * dy_x_hat) -
                g * r * (x_hat_dot * dy_x_hat + x_hat * dy_x_hat_dot);
    }
};
static_assert(sizeof(BnDoubleFactors) == 44);

template <bool RELU>
DEVICE void bn_double(const BnDoubleParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.apply_rows);
    const float n = static_cast<float>(p.shape.rows);
    const int branches = p.shape.branches;
    const int64_t first = int64_t(blockIdx.z) * branches;
    BnDoubleFactors* factors = bn_factors<BnDoubleFactors, BnDoubleSums>();
    for (int from = 0; from < branches; from += BN_GROUP) {
        const int group = branches - from < BN_GROUP ? branches - from : BN_GROUP;
        for (int i = 0; i < group; ++i) {
            const int64_t m = first + from + i;
            const BnDoubleSums sums = bn_combine(p.partials, m, p.shape, tile);
            if (tile.line != 0) continue;
            BnDoubleFactors f;
            f.mean = *bn_channel(p.mean, m, tile);
            f.r = bn_inverse_deviation(*bn_channel(p.var, m, tile), p.shape.epsilon);
            f.g = *bn_channel(p.g, m, tile);
            f.g_dot = *bn_channel(p.g_dot, m, tile);
            f.b_dot = *bn_channel(p.b_dot, m, tile);
            f.x_dot = sums.x_dot;
            f.rho = sums.x_dot_x * f.r / n;
            f.dy = sums.dy;
            f.dy_x_hat = sums.dy_x * f.r / n;
            const float dy_x_hat_dot = f.r * (sums.dy_x_dot - sums.dy_x * f.r * f.rho);
            f.dy_x_hat_dot = dy_x_hat_dot / n;
            f.scale_dot = f.r * (f.g_dot - f.g * f.r * f.rho);
            factors[i * tile.width + tile.lane] = f;
            if (tile.leads() && blockIdx.x == 0) bn_put(p.g_bar, m, dy_x_hat_dot, m == first, tile);
        }
        sync_threads();
        for (int row = tile.line; row < tile.end; row += tile.step()) {
            float y_dot[BN_ROWS] = {}, x_bar[BN_ROWS] = {};
            for (int i = 0; i < group; ++i) {
                const int64_t m = first + from + i;
                const BnDoubleFactors f = factors[i * tile.width + tile.lane];
                float y[BN_ROWS], dy[BN_ROWS], x[BN_ROWS], x_dot[BN_ROWS];
                bn_load_result<RELU>(y, p.y, m, tile, row);
                bn_load_masked<RELU>(dy, bn_chunk(p.dy, m, tile), y, tile, row);
                bn_load(x, bn_chunk(p.x, m, tile), tile, row);
                bn_load(x_dot, bn_chunk(p.x_dot, m, tile), tile, row);
                for (int k = 0; k < BN_ROWS; ++k) {
                    float a, b;
                    f.apply(x_dot[k], dy[k], x[k], a, b);
                    if (RELU && !(y[k] > 0.0f)) a = 0.0f;
                    y_dot[k] = p.y_dot.branch == 0 ? y_dot[k] + a : a;
                    x_bar[k] = p.x_bar.branch == 0 ? x_bar[k] + b : b;
                }
                if (p.y_dot.branch != 0) bn_store(bn_chunk(p.y_dot, m, tile), y_dot, false, tile, row);
                if (p.x_bar.branch != 0) bn_store(bn_chunk(p.x_bar, m, tile), x_bar, false, tile, row);
            }
            if (p.y_dot.branch == 0) bn_store(bn_chunk(p.y_dot, first, tile), y_dot, from != 0, tile, row);
            if (p.x_bar.branch == 0) bn_store(bn_chunk(p.x_bar, first, tile), x_bar, from != 0, tile, row);
        }
    }
}

KERNEL(bn_double_backward_apply_f32, BnDoubleParams, 256) { bn_double<false>(p); }
KERNEL(bn_relu_double_backward_apply_f32, BnDoubleParams, 256) { bn_double<true>(p); }
