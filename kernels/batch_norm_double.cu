// Batch norm double backward, with and without a ReLU behind the batch norm, whose mask comes from the forward result or is computed
// again from x. Formulas: src/ops/batch_norm.rs; division into launches: batch_norm_backward.cu.
//
// `bn_double_backward_bar` is one launch, for x̄ and ḡ alone: convolutions, which make ẏ as they load ẋ, have found the other sums. It
// leaves the term of x̄ that holds ḡ to the backward kernel, which comes after it.

// Two blocks on a multiprocessor: with one, too few loads are in flight.
#define KERNEL_BLOCKS 2
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

// What the sums over rows say of a channel: means, and `Σ dy x̂'`.
struct BnDoubleMeans {
    float dy, x_dot, dy_x_hat, rho, dy_x_hat_dot;
};

DEVICE BnDoubleMeans bn_double_means(const BnDoubleParams& p, int64_t m, int channel, float r) {
    const float n = static_cast<float>(p.shape.rows);
    const BnDoubleSums sums = p.totals[m * p.shape.total_branch + channel];
    const float dg = sums.dy_x * r, rho = sums.x_dot_x * r / n;
    return {sums.dy, sums.x_dot, dg / n, rho, r * (sums.dy_x_dot - dg * rho)};
}

// With u = ẋ − ⟨ẋ⟩, v = x − μ, w = dy − ⟨dy⟩: `ẏ = a·u + b·v + ḃ` and `x̄ = b·w + c·u + d·v`, where `a = g r`,
// `b = r(ġ − g r ρ) = ġ r + g r'`, `c = −g r²⟨dy x̂⟩`, `d = −r b⟨dy x̂⟩ + g r²(r ρ⟨dy x̂⟩ − ⟨dy x̂'⟩)`.
enum BnDoubleField { X_DOT_MEAN = OWN_FIELDS, DY_MEAN, A, B, B_DOT, C, D };

DEVICE void bn_double_factors(const BnDoubleParams& p, const BnFactors& factors, int64_t first, int from, int count) {
    const float n = static_cast<float>(p.shape.rows);
    const auto own = [&](int slot, int64_t m, int channel, float r) {
        const BnDoubleMeans means = bn_double_means(p, m, channel, r);
        const float g = bn_value(p.g, m, channel), dy_x_hat = means.dy_x_hat, dy_x_hat_dot = means.dy_x_hat_dot / n;
        const float b = r * (bn_value(p.g_dot, m, channel) - g * r * means.rho);
        factors.put(X_DOT_MEAN, slot, means.x_dot);
        factors.put(DY_MEAN, slot, means.dy);
        factors.put(A, slot, g * r);
        factors.put(B, slot, b);
        factors.put(B_DOT, slot, bn_value(p.b_dot, m, channel));
        factors.put(C, slot, -g * r * r * dy_x_hat);
        factors.put(D, slot, g * r * r * (r * means.rho * dy_x_hat - dy_x_hat_dot) - r * b * dy_x_hat);
    };
    bn_put_factors(p, factors, first, from, count, own, [&](int64_t m, int channel, float r, int i) {
        bn_put(p.g_bar, m, channel, bn_double_means(p, m, channel, r).dy_x_hat_dot, i == 0);
    });
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
                if (mask == BN_RECOMPUTED) factors.get_norm(norm, slot);
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

// Σ over rows of a product of centred numbers.
struct BnSum {
    float v;

    DEVICE void add(const BnSum& other) { v += other.v; }
};
static_assert(sizeof(BnSum) == 4);

struct BnDoubleBarParams {
    BnActivation x_dot;   // [M, N, H, W, C]
    BnVector g_dot;       // [M, C]
    BnActivation dy;      // [M, N, H, W, C]
    BnActivation x;       // [M, N, H, W, C]
    BnVector g;           // [M, C]
    BnVector b;           // [M, C]
    BnVector mean;        // [M, C]
    BnVector var;         // [M, C]
    BnVector dg;          // [M, C], Σ dy·x̂
    BnVector db;          // [M, C], Σ dy
    BnVector x_dot_mean;  // [M, C]
    BnVector rho;         // [M, C], ⟨x̂ẋ⟩
    BnActivation start;   // [M, N, H, W, C], added to x̄, which may lie where it, dy or ẋ does; null for nothing
    BnActivation x_bar;   // [M, N, H, W, C]
    BnVector g_bar;       // [M, C]
    BnSum* partials;      // [M, chunks, C]
    uint32_t* counters;   // [M, tiles]
    BnShape shape;        // the mask is recomputed
};
static_assert(sizeof(BnDoubleBarParams) == 304);

// With u, v, w as above: `x̂' = r·u − k·v`, `x̄ = b·(w − s·v) + c·x̂'` and `ḡ = Σ w·x̂'`, where `k = r²ρ`, `s = r⟨dy x̂⟩`,
// `b = r(ġ − g r ρ)`, `c = −g r⟨dy x̂⟩`. x̄ is without its last term, which needs ḡ.
enum BnDoubleBarField { BAR_X_DOT_MEAN = OWN_FIELDS, BAR_DY_MEAN, BAR_R, BAR_K, BAR_S, BAR_B, BAR_C };

DEVICE void bn_double_bar_factors(const BnDoubleBarParams& p, const BnFactors& factors, int64_t first, int from, int count) {
    const float n = static_cast<float>(p.shape.rows);
    const auto own = [&](int slot, int64_t m, int channel, float r) {
        const float g = bn_value(p.g, m, channel), rho = bn_value(p.rho, m, channel);
        const float dy_x_hat = bn_value(p.dg, m, channel) / n;
        factors.put(BAR_X_DOT_MEAN, slot, bn_value(p.x_dot_mean, m, channel));
        factors.put(BAR_DY_MEAN, slot, bn_value(p.db, m, channel) / n);
        factors.put(BAR_R, slot, r);
        factors.put(BAR_K, slot, r * r * rho);
        factors.put(BAR_S, slot, r * dy_x_hat);
        factors.put(BAR_B, slot, r * (bn_value(p.g_dot, m, channel) - g * r * rho));
        factors.put(BAR_C, slot, -g * r * dy_x_hat);
    };
    bn_put_factors(p, factors, first, from, count, own, [](int64_t, int, float, int) {});
}

// Where x̄ is summed over the branches but ḡ is not, the first block of a chunk makes x̄ alone, and one more for each branch its ḡ.
template <class T>
DEVICE void bn_double_bar(const BnDoubleBarParams& p) {
    constexpr int ROWS = BN_IN_FLIGHT<T>;
    const BnTile tile = bn_tile(p.shape, p.shape.apply_rows);
    const BnFactors factors = bn_factors(p.shape);
    const bool summed = p.x_bar.branch == 0;
    const bool apart = summed && p.g_bar.branch != 0 && p.shape.branches > 1;
    const bool stores = !apart || blockIdx.z == 0;
    const int branches = stores ? p.shape.branches : 1;
    const int64_t first = apart ? (stores ? 0 : int64_t(blockIdx.z) - 1) : int64_t(blockIdx.z) * branches;
    BnSum g_bar[4] = {};
    for (int from = 0; from < branches; from += p.shape.group) {
        const int count = branches - from < p.shape.group ? branches - from : p.shape.group;
        if (from != 0) sync_threads();
        bn_double_bar_factors(p, factors, first, from, count);
        sync_threads();
        for (int row = tile.line; row < tile.end; row += ROWS * tile.lines) {
            float x_bar[ROWS][4] = {};
            BnRows<T, ROWS> dy_rows, x_rows, x_dot_rows, start_rows;
            for (int i = 0; i < count; ++i) {
                const int64_t m = first + from + i;
                const int slot = i * p.shape.width + 4 * tile.lane;
                dy_rows.load(p.dy, m, tile, row);
                if (i == 0 || p.x.branch != 0) x_rows.load(p.x, m, tile, row);
                x_dot_rows.load(p.x_dot, m, tile, row);
                const bool begins = p.start.at && (!summed || from + i == 0);
                if (begins) start_rows.load(p.start, m, tile, row);
                float dy[ROWS][4], x[ROWS][4], x_dot[ROWS][4];
                dy_rows.unpack(dy);
                x_rows.unpack(x);
                x_dot_rows.unpack(x_dot);
                BnScaleShift norm[4];
                factors.get_norm(norm, slot);
                bn_mask(dy, BN_RECOMPUTED, norm, x, dy_rows);
                float mean[4], x_dot_mean[4], dy_mean[4], r[4], k[4], s[4], b[4], c[4];
                factors.get(mean, MEAN, slot);
                factors.get(x_dot_mean, BAR_X_DOT_MEAN, slot);
                factors.get(dy_mean, BAR_DY_MEAN, slot);
                factors.get(r, BAR_R, slot);
                factors.get(k, BAR_K, slot);
                factors.get(s, BAR_S, slot);
                factors.get(b, BAR_B, slot);
                factors.get(c, BAR_C, slot);
                for (int o = 0; o < ROWS; ++o) {
                    // What is past the end is no number of the channel's.
                    const bool has = tile.has(row, o);
                    for (int j = 0; j < 4; ++j) {
                        const float v = x[o][j] - mean[j], w = dy[o][j] - dy_mean[j];
                        const float x_hat_dot = fmaf(r[j], x_dot[o][j] - x_dot_mean[j], -k[j] * v);
                        const float bar = fmaf(b[j], fmaf(-s[j], v, w), c[j] * x_hat_dot);
                        x_bar[o][j] = summed ? x_bar[o][j] + bar : bar;
                        if (has) g_bar[j].v = fmaf(w, x_hat_dot, g_bar[j].v);
                    }
                }
                if (begins) start_rows.add_to(x_bar);
                if (!summed) bn_store<T>(p.x_bar, m, x_bar, false, tile, row);
            }
            if (summed && stores) bn_store<T>(p.x_bar, first, x_bar, from != 0, tile, row);
        }
    }
    if (apart && stores) return;
    // The sums go where the factors are. The tile found anew takes no registers from the loop.
    sync_threads();
    const BnTile own = bn_tile(p.shape, p.shape.apply_rows);
    bn_finish(g_bar, p.partials, p.counters, p.shape, own, [&](int channel, const BnSum& sum) {
        p.g_bar.at[first * p.g_bar.branch + channel] = sum.v;
    });
}

KERNEL(bn_double_backward_bar_f32, BnDoubleBarParams, 256) { bn_double_bar<StoredF32>(p); }
KERNEL(bn_double_backward_bar_f16, BnDoubleBarParams, 256) { bn_double_bar<StoredF16>(p); }
KERNEL(bn_double_backward_bar_bf16, BnDoubleBarParams, 256) { bn_double_bar<StoredBf16>(p); }
