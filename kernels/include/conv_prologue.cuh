// What is done to the operands of a convolution as they are loaded; what is outside the image stays zero. The formulas are those of
// `src/ops/fused.rs`, with the mask m of `relu(bn(·))`, x̂ = (x−μ)r, r = 1/√(σ²+ε):
//
//   norm     relu(bn(x))
//   tangent  m (g r (ẋ − ⟨ẋ⟩ − x̂ρ) + ġ x̂ + ḃ)     of the pair ẋ, x
//   delta    R + g r (m dy − db/n − x̂ dg/n)         of the pair dy, y; R: the residual term, if there is one
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

constexpr int SLICE = 32;  // channels that a direct kernel loads at a time

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

// Eight elements at a time of an operand that is made of others as it is loaded. What is loaded waits in registers until there is
// time for it.
template <class Operand, Pair PAIR, bool PAIRS>
struct Prologue {
    Source of;
    uint32_t branch;
    Made made;

    struct Loaded {
        Chunk of;
        bool inside;
    };
    DEVICE Loaded load(const ConvPair&, bool, uint32_t offset, bool inside, const FactorTable<SLICE>&, int, uint16_t*) const {
        return {inside ? chunk_load<Operand>(of.at, of.branch + offset, of.half) : Chunk{}, inside};
    }
    // Rounds what is loaded, `channel` the first of its channels in the table; zeros stay for what is not inside.
    DEVICE uint4 round(const ConvPair&, bool, const Loaded& loaded, const FactorTable<SLICE>& factors, int channel,
                       const uint16_t*) const {
        if (!loaded.inside || made == Made::PLAIN) return chunk_round<Operand>(loaded.of, of.half, loaded.inside);
        float v[8];
        chunk_decode<Operand>(v, loaded.of, of.half);
        for (int i = 0; i < 8; ++i) v[i] = factors.norm(channel + i).relu(v[i]);
        return chunk_encode<Operand>(v);
    }
    // Whether nothing is to be done to it.
    DEVICE bool plain() const { return made == Made::PLAIN && of.half; }
};

// There are registers for two tensors of 16 bits; the residual term waits in shared memory where what is made of them will lie. Wider
// ones are rounded at once.
template <class Operand, Pair PAIR>
struct Prologue<Operand, PAIR, true> {
    Source of;
    uint32_t branch;
    Made made;

    struct Loaded {
        uint4 of, with;
        bool inside;
    };
    DEVICE bool has_residual(const ConvPair& pair) const {
        return PAIR == Pair::DELTA && made == Made::PAIR && pair.residual;
    }
    DEVICE bool waits(const ConvPair& pair, bool keeps) const {
        const bool wide = made == Made::PAIR && (!pair.half || (has_residual(pair) && !pair.residual_half));
        return of.half && !wide && !(PAIR == Pair::DELTA && keeps && !pair.kept_half);
    }
    // `keeps`: what is made is stored as well; here, if in 32 bits.
    DEVICE Loaded load(const ConvPair& pair, bool keeps, uint32_t offset, bool inside, const FactorTable<SLICE>& factors,
                       int channel, uint16_t* place) const {
        if (!inside) return {{}, {}, false};
        const Chunk mine = chunk_load<Operand>(of.at, of.branch + offset, of.half);
        Chunk other = {};
        if (made == Made::PAIR) other = chunk_load<Operand>(pair.at, branch * pair.branch + offset, pair.half);
        const int64_t residual = branch * pair.residual_branch + offset;
        if (waits(pair, keeps)) {
            if (has_residual(pair)) copy_async(place, static_cast<const uint16_t*>(pair.residual) + residual, true);
            return {mine.low, other.low, true};
        }
        float v[8];
        make(v, mine, of.half, other, pair.half, factors, channel);
        if (has_residual(pair)) add(v, chunk_load<Operand>(pair.residual, residual, pair.residual_half), pair.residual_half);
        if (PAIR == Pair::DELTA && keeps && !pair.kept_half) {
            eight_to(static_cast<float*>(pair.kept) + branch * pair.kept_branch + offset, v);
        }
        return {chunk_encode<Operand>(v), {}, true};
    }
    DEVICE uint4 round(const ConvPair& pair, bool keeps, const Loaded& loaded, const FactorTable<SLICE>& factors, int channel,
                       const uint16_t* place) const {
        if (!loaded.inside) return {};
        if (!waits(pair, keeps) || made == Made::PLAIN) return loaded.of;
        float v[8];
        make(v, {loaded.of, {}}, 1, {loaded.with, {}}, 1, factors, channel);
        if (has_residual(pair)) {
            copies_done();
            add(v, {*reinterpret_cast<const uint4*>(place), {}}, 1);
        }
        return chunk_encode<Operand>(v);
    }
    DEVICE void make(float (&v)[8], const Chunk& mine, int half, const Chunk& other, int other_half,
                     const FactorTable<SLICE>& factors, int channel) const {
        chunk_decode<Operand>(v, mine, half);
        if (made == Made::NORM) {
            for (int i = 0; i < 8; ++i) v[i] = factors.norm(channel + i).relu(v[i]);
        } else if (made == Made::PAIR) {
            float x[8];
            chunk_decode<Operand>(x, other, other_half);
            for (int i = 0; i < 8; ++i) v[i] = factors.pair(channel + i).template of<PAIR>(v[i], x[i]);
        }
    }
    static DEVICE void add(float (&v)[8], const Chunk& chunk, int half) {
        float more[8];
        chunk_decode<Operand>(more, chunk, half);
        for (int i = 0; i < 8; ++i) v[i] += more[i];
    }
    DEVICE bool plain() const { return made == Made::PLAIN && of.half; }
};
