// Batch norm double backward, with and without a ReLU behind the batch norm, whose mask comes from the forward result or is computed
// again from x. Formulas: src/ops/batch_norm.rs; division into launches: batch_norm_backward.cu.

#include "batch_norm.cuh"

// Means of dy and ẋ over some rows, `Σ (dy−⟨dy⟩)(ẋ−⟨ẋ⟩)`, `Σ dy·(x−μ)`, `Σ ẋ·(x−μ)`. The product of dy and ẋ is
// centred from the start: its mean less the product of the means, as in the formula, would cancel.
struct BnDoubleSums {
    float n, dy, x_dot, dy_x_dot, dy_x, x_dot_x;

    // Chan's formula for a covariance.
    DEVICE void add(const BnDoubleSums& other) {
        if (other.n == 0.0f) return;
        if (n == 0.0f) {
            *this = other;
            return;
        }
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

struct BnDoubleParams {
    BnActivation x_dot;      // [M, N, H, W, C]
    BnVector g_dot;          // [M, C]
    BnVector b_dot;          // [M, C]
    BnActivation dy;         // [M, N, H, W, C]
    BnActivation x;          // [M, N, H, W, C]
    BnVector g;              // [M, C]
    BnVector b;              // [M, C], null unless the mask is recomputed
    BnVector mean;           // [M, C]
    BnVector var;            // [M, C]
    BnActivation y;          // [M, N, H, W, C], null unless the mask comes from it
    BnActivation y_dot;      // [M, N, H, W, C]
    BnActivation x_bar;      // [M, N, H, W, C]
    BnVector g_bar;          // [M, C]
    BnDoubleSums* partials;  // [M, chunks, C]
    BnDoubleSums* totals;    // [M, C]
    uint32_t* counters;      // [M, tiles]
    BnShape shape;
};
static_assert(sizeof(BnDoubleParams) == 280);

// Rows that a thread has in flight at a time.
constexpr int ROWS = 2;

template <class T>
DEVICE void bn_double_reduce(const BnDoubleParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.reduce_rows);
    const int64_t m = blockIdx.z;
    const BnMask mask = p.shape.mask;
    float mean[4];
    bn_vector(mean, p.mean, m, tile);
    BnScaleShift norm[4];
    bn_norm(norm, p.shape, p.g, p.b, p.mean, p.var, m, tile);
    float n = 0.0f, dy_shift[4] = {}, x_dot_shift[4] = {};
    float dy_sum[4] = {}, x_dot_sum[4] = {}, product[4] = {}, dy_x[4] = {}, x_dot_x[4] = {};
    for (int row = tile.line; row < tile.end; row += ROWS * tile.lines) {
        BnRows<T, ROWS> dy_rows, x_rows, x_dot_rows, y_rows;
        dy_rows.load(p.dy, m, tile, row);
        x_rows.load(p.x, m, tile, row);
        x_dot_rows.load(p.x_dot, m, tile, row);
        if (mask == BN_RESULT) y_rows.load(p.y, m, tile, row);
        float dy[ROWS][4], x[ROWS][4], x_dot[ROWS][4];
        dy_rows.unpack(dy);
        x_rows.unpack(x);
        x_dot_rows.unpack(x_dot);
        bn_mask(dy, mask, norm, x, y_rows);
        if (row == tile.line) {
            bn_batch_means(dy_shift, dy, tile, row);
            bn_batch_means(x_dot_shift, x_dot, tile, row);
        }
        for (int i = 0; i < ROWS; ++i) {
            if (!tile.has(row, i)) continue;
            n += 1.0f;
            for (int c = 0; c < 4; ++c) {
                const float a = dy[i][c] - dy_shift[c], b = x_dot[i][c] - x_dot_shift[c], v = x[i][c] - mean[c];
                dy_sum[c] += a;
                x_dot_sum[c] += b;
                product[c] = fmaf(a, b, product[c]);
                dy_x[c] = fmaf(dy[i][c], v, dy_x[c]);
                x_dot_x[c] = fmaf(x_dot[i][c], v, x_dot_x[c]);
            }
        }
    }
    BnDoubleSums mine[4] = {};
    for (int c = 0; c < 4 && n != 0.0f; ++c) {
        const float around = product[c] - dy_sum[c] * x_dot_sum[c] / n;
        mine[c] = {n, dy_shift[c] + dy_sum[c] / n, x_dot_shift[c] + x_dot_sum[c] / n, around, dy_x[c], x_dot_x[c]};
    }
    bn_finish(mine, p.partials, p.counters, p.shape, tile, [&](int channel, const BnDoubleSums& sums) {
        p.totals[m * p.shape.total_branch + channel] = sums;
    });
}

KERNEL(bn_double_backward_reduce_f32, BnDoubleParams, 256) { bn_double_reduce<StoredF32>(p); }
KERNEL(bn_double_backward_reduce_f16, BnDoubleParams, 256) { bn_double_reduce<StoredF16>(p); }
KERNEL(bn_double_backward_reduce_bf16, BnDoubleParams, 256) { bn_double_reduce<StoredBf16>(p); }

// With u = ẋ − ⟨ẋ⟩, v = x − μ, w = dy − ⟨dy⟩: `ẏ = a·u + b·v + ḃ` and `x̄ = b·w + c·u + d·v`, where `a = g r`,
// `b = r(ġ − g r ρ) = ġ r + g r'`, `c = −g r²⟨dy x̂⟩`, `d = −r b⟨dy x̂⟩ + g r²(r ρ⟨dy x̂⟩ − ⟨dy x̂'⟩)`.
enum BnDoubleField { MEAN, X_DOT_MEAN, DY_MEAN, A, B, C, D, B_DOT, NORM };

// `Σ dy x̂'`
DEVICE float bn_dy_x_hat_dot(const BnDoubleSums& sums, float r, float n) {
    const float rho = sums.x_dot_x * r / n;
    return r * (sums.dy_x_dot - sums.dy_x * r * rho);
}

// Factors of `count` branches from `from` on; the first chunk's blocks write the results of these branches.
DEVICE void bn_double_factors(const BnDoubleParams& p, const BnFactors& factors, int64_t first, int from, int count) {
    const BnShape& shape = p.shape;
    const float n = static_cast<float>(shape.rows);
    const int tile = static_cast<int>(blockIdx.y) * shape.width;
    for (int slot = threadIdx.x; slot < count * shape.width; slot += BN_THREADS) {
        const int channel = tile + slot % shape.width;
        if (channel >= shape.channels) continue;
        const int64_t m = first + from + slot / shape.width;
        const BnDoubleSums sums = p.totals[m * shape.total_branch + channel];
        const float g = bn_value(p.g, m, channel);
        const float r = bn_inverse_deviation(bn_value(p.var, m, channel), shape.epsilon);
        const float rho = sums.x_dot_x * r / n, dy_x_hat = sums.dy_x * r / n;
        const float dy_x_hat_dot = bn_dy_x_hat_dot(sums, r, n) / n;
        const float b = r * (bn_value(p.g_dot, m, channel) - g * r * rho);
        factors.put(MEAN, slot, bn_value(p.mean, m, channel));
        factors.put(X_DOT_MEAN, slot, sums.x_dot);
        factors.put(DY_MEAN, slot, sums.dy);
        factors.put(A, slot, g * r);
        factors.put(B, slot, b);
        factors.put(C, slot, -g * r * r * dy_x_hat);
        factors.put(D, slot, g * r * r * (r * rho * dy_x_hat - dy_x_hat_dot) - r * b * dy_x_hat);
        factors.put(B_DOT, slot, bn_value(p.b_dot, m, channel));
        if (shape.mask == BN_RECOMPUTED) {
            factors.put_norm(NORM, slot, bn_norm_of(shape, p.g, p.b, p.mean, p.var, m, channel));
        }
    }
    const int channel = tile + static_cast<int>(threadIdx.x);
    if (blockIdx.x != 0 || static_cast<int>(threadIdx.x) >= shape.width || channel >= shape.channels) return;
    for (int i = from; i < from + count; ++i) {
        const int64_t m = first + i;
        const float r = bn_inverse_deviation(bn_value(p.var, m, channel), shape.epsilon);
        bn_put(p.g_bar, m, channel, bn_dy_x_hat_dot(p.totals[m * shape.total_branch + channel], r, n), i == 0);
    }
}

template <class T>
DEVICE void bn_double_apply(const BnDoubleParams& p) {
    const BnTile tile = bn_tile(p.shape, p.shape.apply_rows);
    const BnFactors factors = bn_factors(p.shape);
    const BnMask mask = p.shape.mask;
    const int branches = p.shape.branches;
    const int64_t first = int64_t(blockIdx.z) * branches;
    const bool y_dot_summed = p.y_dot.branch == 0, x_bar_summed = p.x_bar.branch == 0;
    for (int from = 0; from < branches; from += p.shape.group) {
        const int count = branches - from < p.shape.group ? branches - from : p.shape.group;
        if (from != 0) sync_threads();
        bn_double_factors(p, factors, first, from, count);
        sync_threads();
        for (int row = tile.line; row < tile.end; row += ROWS * tile.lines) {
            float y_dot[ROWS][4] = {}, x_bar[ROWS][4] = {};
            BnRows<T, ROWS> dy_rows, x_rows, x_dot_rows, y_rows;
            for (int i = 0; i < count; ++i) {
                const int64_t m = first + from + i;
                const int slot = i * p.shape.width + 4 * tile.lane;
                dy_rows.load(p.dy, m, tile, row);
                if (i == 0 || p.x.branch != 0) x_rows.load(p.x, m, tile, row);
                x_dot_rows.load(p.x_dot, m, tile, row);
                if (mask == BN_RESULT) y_rows.load(p.y, m, tile, row);
                float dy[ROWS][4], x[ROWS][4], x_dot[ROWS][4], tangent[ROWS][4];
                dy_rows.unpack(dy);
                x_rows.unpack(x);
                x_dot_rows.unpack(x_dot);
                BnScaleShift norm[4] = {};
                if (mask == BN_RECOMPUTED) factors.get_norm(norm, NORM, slot);
                bn_mask(dy, mask, norm, x, y_rows);
                float mean[4], x_dot_mean[4], dy_mean[4], a[4], b[4], c[4], d[4], b_dot[4];
                factors.get(mean, MEAN, slot);
                factors.get(x_dot_mean, X_DOT_MEAN, slot);
                factors.get(dy_mean, DY_MEAN, slot);
                factors.get(a, A, slot);
                factors.get(b, B, slot);
                factors.get(c, C, slot);
                factors.get(d, D, slot);
                factors.get(b_dot, B_DOT, slot);
                for (int k = 0; k < ROWS; ++k) {
                    for (int j = 0; j < 4; ++j) {
                        const float u = x_dot[k][j] - x_dot_mean[j], v = x[k][j] - mean[j], w = dy[k][j] - dy_mean[j];
                        tangent[k][j] = fmaf(a[j], u, fmaf(b[j], v, b_dot[j]));
                        const float bar = fmaf(b[j], w, fmaf(c[j], u, d[j] * v));
                        x_bar[k][j] = x_bar_summed ? x_bar[k][j] + bar : bar;
                    }
                }
                bn_mask(tangent, mask, norm, x, y_rows);
                for (int k = 0; k < ROWS; ++k) {
                    for (int j = 0; j < 4; ++j) y_dot[k][j] = y_dot_summed ? y_dot[k][j] + tangent[k][j] : tangent[k][j];
                }
                if (!y_dot_summed) bn_store<T>(p.y_dot, m, y_dot, false, tile, row);
                if (!x_bar_summed) bn_store<T>(p.x_bar, m, x_bar, false, tile, row);
            }
            if (y_dot_summed) bn_store<T>(p.y_dot, first, y_dot, from != 0, tile, row);
            if (x_bar_summed) bn_store<T>(p.x_bar, first, x_bar, from != 0, tile, row);
        }
    }
}

KERNEL(bn_double_backward_apply_f32, BnDoubleParams, 256) { bn_double_apply<StoredF32>(p); }
KERNEL(bn_double_backward_apply_f16, BnDoubleParams, 256) { bn_double_apply<StoredF16>(p); }
KERNEL(bn_double_backward_apply_bf16, BnDoubleParams, 256) { bn_double_apply<StoredBf16>(p); }
