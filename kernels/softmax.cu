// Softmax with cross entropy and with Kullback-Leibler divergence, at first and second order; see src/ops/softmax.rs.
//
// One warp per sample, lanes stride over the classes. The head is small, so all is computed in double precision:
// p - target keeps its digits where the network is sure of itself.

#include "platform.cuh"

#include <string.h>

struct HeadParams {
    const float* z;         // [M or 1, samples, classes], logits
    const float* target;    // [M or 1, samples, classes], probabilities; KL only
    const int32_t* labels;  // [M or 1, samples]; cross entropy only
    const float* e;         // [M or 1, samples, classes], cotangent; jvp only
    const float* weights;   // [M or 1, samples]; all but softmax
    const float* scale;     // [M or 1]; gradients and jvp
    float* y;               // [branches, samples, classes]
    int64_t z_branch;       // elements of a branch, or 0 where shared; the same for those below
    int64_t target_branch;  // of target or labels
    int64_t e_branch;
    int64_t weights_branch;
    int64_t scale_branch;
    int64_t samples;
    int32_t classes;
    int32_t branches;       // of the result
    int32_t summed;         // branches that a shared result sums over, else 1
    int32_t padding;
};
static_assert(sizeof(HeadParams) == 120);

struct LossParams {
    const float* z;         // [M or 1, samples, classes], logits
    const float* target;    // [M or 1, samples, classes], probabilities; KL only
    const int32_t* labels;  // [M or 1, samples]; cross entropy only
    const float* weights;   // [M or 1, samples]
    float* y;               // [branches]; null where branches are still to be summed
    double* partial;        // [branches] then
    int64_t z_branch;       // elements of a branch, or 0 where shared; the same for those below
    int64_t target_branch;  // of target or labels
    int64_t weights_branch;
    int64_t samples;
    int32_t classes;
    int32_t padding;
};
static_assert(sizeof(LossParams) == 88);

enum class Target { LABELS, PROBABILITIES };

DEVICE double shuffle_xor(double v, int mask) {
    uint32_t halves[2];
    memcpy(halves, &v, 8);
    halves[0] = shuffle_xor(halves[0], mask);
    halves[1] = shuffle_xor(halves[1], mask);
    memcpy(&v, halves, 8);
    return v;
}

DEVICE double warp_sum(double v) {
    for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
}

// What a row of logits has in common: p = exp(z - max) / sum.
struct Row {
    double max, sum;
    DEVICE double shifted(float z) const { return static_cast<double>(z) - max; }
    DEVICE double probability(float z) const { return exp(shifted(z)) / sum; }
};

// Whatever the maximum, a NaN among the logits makes the sum one: a broken network is seen.
DEVICE Row row_of(const float* z, int classes) {
    const int lane = threadIdx.x % 32;
    float max = -INFINITY;
    for (int c = lane; c < classes; c += 32) max = fmaxf(max, z[c]);
    for (int mask = 16; mask > 0; mask /= 2) max = fmaxf(max, shuffle_xor(max, mask));
    Row row{max, 0.0};
    for (int c = lane; c < classes; c += 32) row.sum += exp(row.shifted(z[c]));
    row.sum = warp_sum(row.sum);
    return row;
}

// Probability that the target gives to class c of a sample.
template <Target TARGET, class Params>
DEVICE double target_of(const Params& p, int64_t branch, int64_t sample, int c) {
    if constexpr (TARGET == Target::LABELS) {
        return p.labels[branch * p.target_branch + sample] == c ? 1.0 : 0.0;
    } else {
        return p.target[branch * p.target_branch + sample * p.classes + c];
    }
}

// For each sample, one per warp: y[c] = Σ over branches of value(row, branch, c, z[c]), added in order. `begin` is
// called by all lanes before the values of a row.
template <class Rule>
DEVICE void each_class(const HeadParams& p, Rule& rule) {
    const int lane = threadIdx.x % 32;
    const int64_t sample = blockIdx.x * static_cast<int64_t>(blockDim.x / 32) + threadIdx.x / 32;
    if (sample >= p.samples) return;
    for (int64_t branch = blockIdx.y; branch < p.branches; branch += gridDim.y) {
        float* y = p.y + (branch * p.samples + sample) * p.classes;
        for (int64_t m = branch; m < branch + p.summed; m++) {
            const float* z = p.z + m * p.z_branch + sample * p.classes;
            const Row row = row_of(z, p.classes);
            rule.begin(p, row, m, sample, z);
            for (int c = lane; c < p.classes; c += 32) {
                const float value = static_cast<float>(rule.value(p, row, m, sample, c, z[c]));
                y[c] = m == branch ? value : y[c] + value;
            }
        }
    }
}

struct SoftmaxRule {
    DEVICE void begin(const HeadParams&, const Row&, int64_t, int64_t, const float*) {}
    DEVICE double value(const HeadParams&, const Row& row, int64_t, int64_t, int, float z) {
        return row.probability(z);
    }
};

// s · w of a sample.
DEVICE double scale_of(const HeadParams& p, int64_t m, int64_t sample) {
    return static_cast<double>(p.scale[m * p.scale_branch]) * p.weights[m * p.weights_branch + sample];
}

// s w (p - target).
template <Target TARGET>
struct GradRule {
    double scale;
    DEVICE void begin(const HeadParams& p, const Row&, int64_t m, int64_t sample, const float*) {
        scale = scale_of(p, m, sample);
    }
    DEVICE double value(const HeadParams& p, const Row& row, int64_t m, int64_t sample, int c, float z) {
        return scale * (row.probability(z) - target_of<TARGET>(p, m, sample, c));
    }
};

// s w p ⊙ (E - ⟨p, E⟩).
struct JvpRule {
    double scale, dot;
    const float* e;
    DEVICE void begin(const HeadParams& p, const Row& row, int64_t m, int64_t sample, const float* z) {
        scale = scale_of(p, m, sample);
        e = p.e + m * p.e_branch + sample * p.classes;
        dot = 0.0;
        for (int c = threadIdx.x % 32; c < p.classes; c += 32) dot += row.probability(z[c]) * e[c];
        dot = warp_sum(dot);
    }
    DEVICE double value(const HeadParams&, const Row& row, int64_t, int64_t, int c, float z) {
        return scale * row.probability(z) * (e[c] - dot);
    }
};

// Σ_i w_i Σ_c t (log t - log p) of one branch, which is the block's: warps stride over the samples.
template <Target TARGET>
DEVICE void loss(const LossParams& p) {
    double* sums = shared_memory<double>();  // [warps]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t m = blockIdx.x;
    double total = 0.0;
    for (int64_t sample = warp; sample < p.samples; sample += warps) {
        const float* z = p.z + m * p.z_branch + sample * p.classes;
        const Row row = row_of(z, p.classes);
        const double log_sum = log(row.sum);
        double sum = 0.0;
        for (int c = lane; c < p.classes; c += 32) {
            const double t = target_of<TARGET>(p, m, sample, c), log_p = row.shifted(z[c]) - log_sum;
            if constexpr (TARGET == Target::LABELS) {
                if (t != 0.0) sum -= log_p;
            } else if (t != 0.0) {
                sum += t * (log(t) - log_p);
            }
        }
        sum = warp_sum(sum);
        // A sample of weight zero takes no part, whatever its loss.
        const double weight = p.weights[m * p.weights_branch + sample];
        if (weight != 0.0) total += weight * sum;
    }
    if (lane == 0) sums[warp] = total;
    sync_threads();
    if (threadIdx.x == 0) {
        for (int other = 1; other < warps; other++) total += sums[other];
        if (p.partial) {
            p.partial[m] = total;
        } else {
            p.y[m] = static_cast<float>(total);
        }
    }
}

KERNEL(softmax_f32, HeadParams, 256) {
    SoftmaxRule rule;
    each_class(p, rule);
}

KERNEL(softmax_jvp_f32, HeadParams, 256) {
    JvpRule rule;
    each_class(p, rule);
}

KERNEL(ce_grad_f32, HeadParams, 256) {
    GradRule<Target::LABELS> rule;
    each_class(p, rule);
}

KERNEL(kl_grad_f32, HeadParams, 256) {
    GradRule<Target::PROBABILITIES> rule;
    each_class(p, rule);
}

KERNEL(ce_loss_f32, LossParams, 512) { loss<Target::LABELS>(p); }

KERNEL(kl_loss_f32, LossParams, 512) { loss<Target::PROBABILITIES>(p); }
