// Batch norm backward, with and without a ReLU behind the batch norm, whose mask comes from the forward result or is computed again
// from x. Formulas: src/ops/batch_norm.rs.
//
// Two launches: `bn_backward_reduce` makes the sums over rows, `bn_backward_apply` works element by element, and the blocks of its
// first chunk write what there is one of per channel. Where a result is a sum over branches, its blocks go through the branches and
// keep the sum in registers.
//
// The first launch is spared where a convolution's dgrad makes dy and recomputes relu(bn(x)) from the same x: its epilogue makes the
// sums, and they are operands of `bn_backward_apply`. That also takes the sum ḡ of the same batch norm's double backward, and adds the term of
// its x̄ that holds ḡ.

// Two blocks on a multiprocessor: with one, too few loads are in flight.
#define KERNEL_BLOCKS 2
#include "batch_norm.cuh"

struct BnBackwardSums {
    float dy, dy_x;  // Σ dy, Σ dy·(x−μ)

    DEVICE void add(const BnBackwardSums& other) {
        dy += other.dy;
        dy_x += other.dy_x;
    }
};
static_assert(sizeof(BnBackwardSums) == 8);

struct BnBackwardParams {
    BnActivation dy;           // [M, N, H, W, C]
    BnActivation x;            // [M, N, H, W, C]
    BnVector g;                // [M, C]
    BnVector b;                // [M, C], null unless the mask is recomputed
    BnVector mean;             // [M, C]
    BnVector var;              // [M, C]
    BnActivation y;            // [M, N, H, W, C], null unless the mask comes from it
    BnActivation starts[2];    // [M, N, H, W, C], added to dx, which may lie where one does; null for nothing
    BnActivation dx;           // [M, N, H, W, C]
    BnVector dg;               // [M, C], an operand where `totals` is null
    BnVector db;               // [M, C], as dg
    BnVector g_bar;            // [M, C], added to dg in dx; null for nothing
    BnBackwardSums* partials;  // [M, chunks, C]
    BnBackwardSums* totals;    // [M, C], null where no launch has made them
    uint32_t* counters;        // [M, tiles]
    BnShape shape;
};
static_assert(sizeof(BnBackwardParams) == 280);

template <class T>
DEVICE void bn_backward_reduce(const BnBackwardParams& p) {
    constexpr int ROWS = BN_IN_FLIGHT<T>;
    const BnTile tile = bn_tile(p.shape, p.shape.reduce_rows);
    const int64_t m = blockIdx.z;
    const BnMask mask = p.shape.mask;
    float mean[4];
    bn_vector(mean, p.mean, m, tile);
    BnScaleShift norm[4];
    bn_norm(norm, p.shape, p.g, p.b, p.mean, p.var, m, tile);
    BnBackwardSums mine[4] = {};
    for (int row = tile.line; row < tile.end; row += ROWS * tile.lines) {
        BnRows<T, ROWS> dy_rows, x_rows, y_rows;
        dy_rows.load(p.dy, m, tile, row);
        x_rows.load(p.x, m, tile, row);
        if (mask == BN_RESULT) y_rows.load(p.y, m, tile, row);
        float dy[ROWS][4], x[ROWS][4];
        dy_rows.unpack(dy);
        x_rows.unpack(x);
        bn_mask(dy, mask, norm, x, y_rows);
        // Past the end dy is 0.
        for (int i = 0; i < ROWS; ++i) {
            for (int c = 0; c < 4; ++c) {
                mine[c].dy += dy[i][c];
                mine[c].dy_x = fmaf(dy[i][c], x[i][c] - mean[c], mine[c].dy_x);
            }
        }
    }
    bn_finish(mine, p.partials, p.counters, p.shape, tile, [&](int channel, const BnBackwardSums& sums) {
        p.totals[m * p.shape.total_branch + channel] = sums;
    });
}

KERNEL(bn_backward_reduce_f32, BnBackwardParams, 256) { bn_backward_reduce<StoredF32>(p); }
KERNEL(bn_backward_reduce_f16, BnBackwardParams, 256) { bn_backward_reduce<StoredF16>(p); }
KERNEL(bn_backward_reduce_bf16, BnBackwardParams, 256) { bn_backward_reduce<StoredBf16>(p); }

// `Σ dy·x̂` and `Σ dy` of a channel
struct BnGradients {
    float dg, db;
};

DEVICE BnGradients bn_gradients(const BnBackwardParams& p, int64_t m, int channel, float r) {
    if (!p.totals) return {bn_value(p.dg, m, channel), bn_value(p.db, m, channel)};
    const BnBackwardSums sums = p.totals[m * p.shape.total_branch + channel];
    return {sums.dy_x * r, sums.dy};
}

// `dx = of_dy·(dy − ⟨dy⟩) + of_x·(x − μ)`
enum BnBackwardField { DY_MEAN = OWN_FIELDS, OF_DY, OF_X };

DEVICE void bn_backward_factors(const BnBackwardParams& p, const BnFactors& factors, int64_t first, int from, int count) {
    const float n = static_cast<float>(p.shape.rows);
    const auto own = [&](int slot, int64_t m, int channel, float r) {
        const BnGradients sums = bn_gradients(p, m, channel, r);
        // A term that all branches share counts once in their sum.
        const bool more = p.g_bar.at && (m == first || p.g_bar.branch != 0 || p.x.branch != 0);
        const float dg = more ? sums.dg + bn_value(p.g_bar, m, channel) : sums.dg;
        const float scale = bn_value(p.g, m, channel) * r, dy_x_hat = dg / n;
        factors.put(DY_MEAN, slot, sums.db / n);
        factors.put(OF_DY, slot, scale);
        factors.put(OF_X, slot, -scale * r * dy_x_hat);
    };
    bn_put_factors(p, factors, first, from, count, own, [&](int64_t m, int channel, float r, int i) {
        if (!p.totals) return;
        const BnGradients sums = bn_gradients(p, m, channel, r);
        bn_put(p.dg, m, channel, sums.dg, i == 0);
        bn_put(p.db, m, channel, sums.db, i == 0);
    });
}

template <class T>
DEVICE void bn_backward_apply(const BnBackwardParams& p) {
    constexpr int ROWS = BN_IN_FLIGHT<T>;
    const BnTile tile = bn_tile(p.shape, p.shape.apply_rows);
    const BnFactors factors = bn_factors(p.shape);
    const BnMask mask = p.shape.mask;
    const int branches = p.shape.branches;
    const int64_t first = int64_t(blockIdx.z) * branches;
    const bool summed = p.dx.branch == 0;
    for (int from = 0; from < branches; from += p.shape.group) {
        const int count = branches - from < p.shape.group ? branches - from : p.shape.group;
        if (from != 0) sync_threads();
        bn_backward_factors(p, factors, first, from, count);
        sync_threads();
        for (int row = tile.line; row < tile.end; row += ROWS * tile.lines) {
            BnRows<T, ROWS> dy_rows, x_rows, y_rows, start_rows[2];
            float dx[ROWS][4] = {};
            for (int i = 0; i < count; ++i) {
                const int64_t m = first + from + i;
                const int slot = i * p.shape.width + 4 * tile.lane;
                dy_rows.load(p.dy, m, tile, row);
                if (i == 0 || p.x.branch != 0) x_rows.load(p.x, m, tile, row);
                if (mask == BN_RESULT) y_rows.load(p.y, m, tile, row);
                const bool begins = !summed || from + i == 0;
                for (int s = 0; s < 2; ++s) {
                    if (begins && p.starts[s].at) start_rows[s].load(p.starts[s], m, tile, row);
                }
                float dy[ROWS][4], x[ROWS][4];
                dy_rows.unpack(dy);
                x_rows.unpack(x);
                BnScaleShift norm[4] = {};
                if (mask == BN_RECOMPUTED) factors.get_norm(norm, slot);
                bn_mask(dy, mask, norm, x, y_rows);
                float mean[4], dy_mean[4], of_dy[4], of_x[4];
                factors.get(mean, MEAN, slot);
                factors.get(dy_mean, DY_MEAN, slot);
                factors.get(of_dy, OF_DY, slot);
                factors.get(of_x, OF_X, slot);
                for (int k = 0; k < ROWS; ++k) {
                    for (int c = 0; c < 4; ++c) {
                        const float v = fmaf(of_x[c], x[k][c] - mean[c], of_dy[c] * (dy[k][c] - dy_mean[c]));
                        dx[k][c] = summed ? dx[k][c] + v : v;
                    }
                }
                for (int s = 0; s < 2; ++s) {
                    if (begins && p.starts[s].at) start_rows[s].add_to(dx);
                }
                if (!summed) bn_store<T>(p.dx, m, dx, false, tile, row);
            }
            if (summed) bn_store<T>(p.dx, first, dx, from != 0, tile, row);
        }
    }
}

KERNEL(bn_backward_apply_f32, BnBackwardParams, 256) { bn_backward_apply<StoredF32>(p); }
KERNEL(bn_backward_apply_f16, BnBackwardParams, 256) { bn_backward_apply<StoredF16>(p); }
KERNEL(bn_backward_apply_bf16, BnBackwardParams, 256) { bn_backward_apply<StoredBf16>(p); }
