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
    const void* at;  // its first element
    int32_t half;

    DEVICE Source() = default;
    DEVICE Source(const void* tensor, int64_t first, int32_t half)
        : at(static_cast<const unsigned char*>(tensor) + first * (half ? 2 : 4)), half(half) {}

    template <class Operand>
    DEVICE Chunk load(uint32_t offset) const {
        return chunk_load<Operand>(at, int64_t(offset), half);
    }
    // Eight elements of a tensor of 16 bits.
    DEVICE uint4 halves(uint32_t offset) const {
        return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(at) + offset);
    }
    // An element of a tensor of 16 bits, or the tensor itself if it is not there.
    DEVICE const uint16_t* place(uint32_t offset, bool there) const {
        return static_cast<const uint16_t*>(at) + (there ? int64_t(offset) : 0);
    }
};

// Eight elements at a time of an operand that is made of others as it is loaded. What is loaded waits in registers until there is
// time for it.
template <class Operand, Pair PAIR, bool PAIRS>
struct Prologue {
    Source of;
    Made made;

    struct Loaded {
        Chunk of;
        bool inside;
    };
    DEVICE Loaded load(uint32_t offset, bool inside) const {
        return {inside ? of.template load<Operand>(offset) : Chunk{}, inside};
    }
    // Rounds what is loaded, `channel` the first of its channels in the table; zeros stay for what is not inside.
    DEVICE uint4 round(const Loaded& loaded, const FactorTable<SLICE>& factors, int channel) const {
        if (!loaded.inside || made == Made::PLAIN) return chunk_round<Operand>(loaded.of, of.half, loaded.inside);
        float v[8];
        chunk_decode<Operand>(v, loaded.of, of.half);
        for (int i = 0; i < 8; ++i) v[i] = factors.norm(channel + i).relu(v[i]);
        return chunk_encode<Operand>(v);
    }
    // Whether nothing is to be done to it.
    DEVICE bool plain() const { return made == Made::PLAIN && of.half; }
};

// There are registers for two tensors of 16 bits to wait in, no more: in kernels for pairs all images have 16 bits.
template <class Operand, Pair PAIR>
struct Prologue<Operand, PAIR, true> {
    Source of, with;
    Made made;

    struct Loaded {
        uint4 of, with;
        bool inside;
    };
    DEVICE Loaded load(uint32_t offset, bool inside) const {
        Loaded loaded = {{}, {}, inside};
        if (inside) loaded.of = of.halves(offset);
        if (inside && made == Made::PAIR) loaded.with = with.halves(offset);
        return loaded;
    }
    DEVICE uint4 round(const Loaded& loaded, const FactorTable<SLICE>& factors, int channel) const {
        if (!loaded.inside || made == Made::PLAIN) return loaded.of;
        const uint2 low = make(loaded.of.x, loaded.of.y, loaded.with.x, loaded.with.y, factors, channel);
        const uint2 high = make(loaded.of.z, loaded.of.w, loaded.with.z, loaded.with.w, factors, channel + 4);
        return {low.x, low.y, high.x, high.y};
    }
    // Four elements at a time: the factors of eight take too many registers.
    DEVICE uint2 make(uint32_t first, uint32_t second, uint32_t with_first, uint32_t with_second,
                      const FactorTable<SLICE>& factors, int channel) const {
        const float4 given = four_of<Operand>(first, second);
        float v[4] = {given.x, given.y, given.z, given.w};
        if (made == Made::NORM) {
            for (int i = 0; i < 4; ++i) v[i] = factors.norm(channel + i).relu(v[i]);
        } else {
            const float4 other = four_of<Operand>(with_first, with_second);
            const float x[4] = {other.x, other.y, other.z, other.w};
            for (int i = 0; i < 4; ++i) v[i] = factors.pair(channel + i).template of<PAIR>(v[i], x[i]);
        }
        return {Operand::encode(v[0], v[1]), Operand::encode(v[2], v[3])};
    }
    DEVICE bool plain() const { return made == Made::PLAIN; }
};

// That of a tensor, and of the other of a pair, in a branch.
template <class Operand, Pair PAIR, bool PAIRS>
DEVICE Prologue<Operand, PAIR, PAIRS> prologue(const Source& of, const ConvPair& pair, int64_t branch, Made made) {
    if constexpr (PAIRS) {
        return {of, {pair.at, branch * pair.branch, pair.half}, made};
    } else {
        return {of, made};
    }
}
