// What is done to the operands of a convolution as they are loaded; what is outside the image stays zero. The formulas are those of
// `src/ops/fused.rs`, with the mask m of `relu(bn(·))`, x̂ = (x−μ)r, r = 1/√(σ²+ε):
//
//   norm     relu(bn(x))
//   tangent  m (g r (ẋ − ⟨ẋ⟩ − x̂ρ) + ġ x̂ + ḃ)     of the pair ẋ, x
//   delta    g r (m dy − db/n − x̂ dg/n)             of the pair dy, y
//
// A pair's element is affine in both of its tensors: `scale·t + slope·x + rest`, with scale = g r as in bn(x). Each constant is rounded
// once, so that it costs no more digits than the given mean had, and ends in one rounding each.
#pragma once

#include "conv_elements.cuh"
#include "conv_params.cuh"

enum class Pair { TANGENT, DELTA };

// The pair that a form's image is.
template <Form FORM>
constexpr Pair IMAGE_PAIR = FORM == Form::DGRAD ? Pair::DELTA : Pair::TANGENT;

// The factors of one channel.
struct alignas(16) PairFactors {
    BnScaleShift norm;
    float slope, rest;

    // The pair of `t` and of `x`, which the batch norm normalises.
    template <Pair PAIR>
    DEVICE float of(float t, float x) const {
        const bool passes = norm.passes(x);
        if constexpr (PAIR == Pair::DELTA) t = passes ? t : 0.0f;
        const float v = fmaf(slope, x, fmaf(norm.scale, t, rest));
        return PAIR == Pair::DELTA || passes ? v : 0.0f;
    }
};

// Those of a channel in a branch.
template <Pair PAIR>
DEVICE PairFactors pair_factors(const ConvPair& pair, int64_t branch, uint32_t channel) {
    const auto vector = [&](int i) { return pair.vectors[i][branch * pair.vector_branches[i] + channel]; };
    const BnScaleShift norm = pair.norm.of(branch, channel);
    const float mean = pair.norm.mean[branch * pair.norm.mean_branch + channel];
    const float variance = pair.norm.var[branch * pair.norm.var_branch + channel];
    const float r = 1.0f / sqrtf(variance + pair.norm.epsilon);
    float slope, rest;
    if constexpr (PAIR == Pair::DELTA) {
        slope = -norm.scale * r * (vector(0) / pair.count);
        rest = -norm.scale * (vector(1) / pair.count);
    } else {
        slope = r * fmaf(-norm.scale, vector(3), vector(0));
        rest = fmaf(-norm.scale, vector(2), vector(1));
    }
    return {norm, slope, fmaf(-slope, mean, rest)};
}

// The factors of neighbouring channels, so that a thread loads those of eight without meeting another's banks.
template <int CHANNELS>
struct FactorTable {
    alignas(16) float scale[CHANNELS], shift[CHANNELS], slope[CHANNELS], rest[CHANNELS];

    DEVICE void put(int i, const BnScaleShift& norm) {
        scale[i] = norm.scale;
        shift[i] = norm.shift;
    }
    DEVICE void put(int i, const PairFactors& factors) {
        put(i, factors.norm);
        slope[i] = factors.slope;
        rest[i] = factors.rest;
    }
    DEVICE BnScaleShift norm(int i) const { return {scale[i], shift[i]}; }
    DEVICE PairFactors pair(int i) const { return {norm(i), slope[i], rest[i]}; }
};

// What an operand is made of.
enum class Made { PLAIN, NORM, PAIR };

// A tensor as an iteration sees it.
struct Source {
    const void* at;
    int64_t branch;  // first element
    int32_t half;
};

// Eight elements as they are loaded: of the given tensor and, in a pair, of the other.
struct Loaded {
    Chunk of, with;
    bool inside;
};

template <class Operand, bool PAIRS>
DEVICE Loaded load_pair(const Source& of, const Source& with, Made made, uint32_t offset, bool inside) {
    Loaded loaded = {{}, {}, inside};
    if (!inside) return loaded;
    loaded.of = chunk_load<Operand>(of.at, of.branch + offset, of.half);
    if (PAIRS && made == Made::PAIR) loaded.with = chunk_load<Operand>(with.at, with.branch + offset, with.half);
    return loaded;
}

// Rounds eight elements, `channel` the first of theirs in the table; zeros stay for what is not inside.
template <class Operand, Pair PAIR, bool PAIRS, int CHANNELS>
DEVICE uint4 chunk_round(const Loaded& loaded, int half, int with_half, Made made, const FactorTable<CHANNELS>& factors,
                         int channel) {
    if (!loaded.inside || made == Made::PLAIN) return chunk_round<Operand>(loaded.of, half, loaded.inside);
    float v[8];
    chunk_decode<Operand>(v, loaded.of, half);
    if (made == Made::NORM) {
        for (int i = 0; i < 8; ++i) v[i] = factors.norm(channel + i).relu(v[i]);
    }
    if constexpr (PAIRS) {
        if (made == Made::PAIR) {
            float x[8];
            chunk_decode<Operand>(x, loaded.with, with_half);
            for (int i = 0; i < 8; ++i) v[i] = factors.pair(channel + i).template of<PAIR>(v[i], x[i]);
        }
    }
    return chunk_encode<Operand>(v);
}
