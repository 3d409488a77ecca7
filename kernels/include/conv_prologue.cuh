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

// Those of four neighbouring channels, in registers.
struct FourFactors {
    alignas(16) float scale[4], shift[4], slope[4], rest[4];

    DEVICE BnScaleShift norm(int i) const { return {scale[i], shift[i]}; }
    DEVICE PairFactors pair(int i) const { return {norm(i), slope[i], rest[i]}; }
};

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
    // Those of four channels from `i` on, a multiple of four; without `PAIRS` only what a batch norm has.
    template <bool PAIRS>
    DEVICE FourFactors four(int i) const {
        FourFactors factors;
        __builtin_memcpy(factors.scale, scale + i, 16);
        __builtin_memcpy(factors.shift, shift + i, 16);
        if constexpr (PAIRS) {
            __builtin_memcpy(factors.slope, slope + i, 16);
            __builtin_memcpy(factors.rest, rest + i, 16);
        }
        return factors;
    }
};

// The factors of the eight channels that a thread has of a slice: read from the table, four at a time, whenever they are asked for, or
// held in registers.
template <bool PAIRS, bool HELD>
struct EightFactors {
    const FactorTable<SLICE>& table;
    int channel;  // the first

    DEVICE FourFactors four(int first) const { return table.template four<PAIRS>(channel + first); }
};
template <bool PAIRS>
struct EightFactors<PAIRS, true> {
    const FactorTable<SLICE>& table;
    int channel;
    FourFactors held[2];

    DEVICE EightFactors(const FactorTable<SLICE>& table, int channel)
        : table(table), channel(channel),
          held{table.template four<PAIRS>(channel), table.template four<PAIRS>(channel + 4)} {}
    DEVICE const FourFactors& four(int first) const { return held[first / 4]; }
};

// What an operand is made of.
enum class Made { PLAIN, NORM, PAIR };

// Puts into a table the factors of channel `first + i` of the image in a branch, for what it is made of; nothing is read beyond the last.
template <Form FORM, bool PAIRS>
DEVICE void put_image(const ConvProduct& p, Made made, int64_t branch, uint32_t first, FactorTable<SLICE>& table, int i) {
    uint32_t channel = first + uint32_t(i);
    if (channel >= uint32_t(p.image_channels)) channel = 0;
    if (made == Made::NORM) table.put(i, p.norm.of(branch, channel));
    if constexpr (PAIRS) {
        if (made == Made::PAIR) table.put(i, pair_factors<IMAGE_PAIR<FORM>>(p.image, branch, channel));
    }
}
// The same of wgrad's matrix, if it is made of anything.
DEVICE void put_matrix(const ConvProduct& p, int64_t branch, uint32_t first, FactorTable<SLICE>& table, int i) {
    if (!p.matrix.at) return;
    const uint32_t channel = first + uint32_t(i);
    table.put(i, pair_factors<Pair::DELTA>(p.matrix, branch, channel < uint32_t(p.rows) ? channel : 0));
}

// A tensor as an iteration sees it.
struct Source {
    const void* at;  // its first element
    int32_t half;

    Source() = default;
    DEVICE Source(const void* tensor, int64_t first, int32_t half)
        : at(static_cast<const unsigned char*>(tensor) + first * (half ? 2 : 4)), half(half) {}

    template <class Operand>
    DEVICE Chunk load(uint32_t offset) const {
        return chunk_load<Operand>(at, int64_t(offset), half);
    }
    // Four neighbours, aligned to as many.
    template <class Operand>
    DEVICE float4 load_four(uint32_t offset) const {
        if (!half) return *reinterpret_cast<const float4*>(static_cast<const float*>(at) + offset);
        const uint2 words = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(at) + offset);
        return four_of<Operand>(words.x, words.y);
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
    static constexpr bool PAIRED = false;
    Source of;
    uint32_t branch;
    Made made;

    struct Loaded {
        Chunk of;
        bool inside;
    };
    DEVICE Loaded load(const ConvPair&, bool, uint32_t offset, bool inside, const FactorTable<SLICE>&, int, uint16_t*) const {
        return {inside ? of.template load<Operand>(offset) : Chunk{}, inside};
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

    // The same for a flight of chunks of 16 bits, all of the same channels: their factors are read once for all.
    DEVICE bool waits(const ConvPair&, bool) const { return of.half; }
    struct Waiting {
        uint4 of;
        bool inside;
    };
    DEVICE Waiting fetch(const ConvPair&, uint32_t offset, bool inside, uint16_t*) const {
        return {inside ? of.template load<Operand>(offset).low : uint4{}, inside};
    }
    // What waits, and is not `plain`, becomes what is made of it; zeros stay for what is not inside. `place(i)` is that of chunk i in shared memory.
    template <int FLIGHT, bool HELD, class Place>
    DEVICE void round_all(const ConvPair&, Waiting (&flight)[FLIGHT], const EightFactors<false, HELD>& factors, Place) const {
        UNROLLED
        for (int first = 0; first < 8; first += 4) {
            const FourFactors& four = factors.four(first);
            UNROLLED
            for (int i = 0; i < FLIGHT; ++i) {
                float4 v = four_in<Operand>(flight[i].of, first);
                v = {four.norm(0).relu(v.x), four.norm(1).relu(v.y), four.norm(2).relu(v.z), four.norm(3).relu(v.w)};
                four_into<Operand>(flight[i].of, first, v, flight[i].inside ? 0xffffffffu : 0);
            }
        }
    }
    // Whether nothing is to be done to it.
    DEVICE bool plain() const { return made == Made::PLAIN && of.half; }
};

// There are registers for two tensors of 16 bits; the residual term waits in shared memory where what is made of all will lie. Wider
// ones are rounded at once.
template <class Operand, Pair PAIR>
struct Prologue<Operand, PAIR, true> {
    static constexpr bool PAIRED = true;
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
    static DEVICE bool keeps_wide(const ConvPair& pair, bool keeps) {
        return PAIR == Pair::DELTA && keeps && !pair.kept_half;
    }
    DEVICE bool waits(const ConvPair& pair, bool keeps) const {
        const bool wide = made == Made::PAIR && (!pair.half || (has_residual(pair) && !pair.residual_half));
        return of.half && !wide && !keeps_wide(pair, keeps);
    }
    // `place`: where what is made will lie in shared memory; `keeps`: it is stored as well, here if that has 32 bits.
    DEVICE Loaded load(const ConvPair& pair, bool keeps, uint32_t offset, bool inside, const FactorTable<SLICE>& factors,
                       int channel, uint16_t* place) const {
        if (!inside) return {{}, {}, false};
        const Source with(pair.at, branch * pair.branch, pair.half);
        const Source residual(pair.residual, branch * pair.residual_branch, pair.residual_half);
        if (waits(pair, keeps)) {
            if (has_residual(pair)) copy_async(place, residual.place(offset, true), true);
            const uint4 mine = of.template load<Operand>(offset).low;
            return {mine, made == Made::PAIR ? with.template load<Operand>(offset).low : uint4{}, true};
        }
        uint2 coded[2];
        UNROLLED
        for (int i = 0; i < 2; ++i) {
            const uint32_t at = offset + 4 * i;
            const float4 mine = of.template load_four<Operand>(at);
            const float4 other = made == Made::PAIR ? with.template load_four<Operand>(at) : float4{};
            const float4 v = four(mine, other, has_residual(pair), residual, at, factors, channel + 4 * i);
            if (keeps_wide(pair, keeps)) {
                *reinterpret_cast<float4*>(static_cast<float*>(pair.kept) + (branch * pair.kept_branch + at)) = v;
            }
            coded[i] = {Operand::encode(v.x, v.y), Operand::encode(v.z, v.w)};
        }
        return {{coded[0].x, coded[0].y, coded[1].x, coded[1].y}, {}, true};
    }
    DEVICE uint4 round(const ConvPair& pair, bool keeps, const Loaded& loaded, const FactorTable<SLICE>& factors, int channel,
                       const uint16_t* place) const {
        if (!loaded.inside) return {};
        if (!waits(pair, keeps) || made == Made::PLAIN) return loaded.of;
        if (has_residual(pair)) copies_done();
        // Four at a time: with the factors of all eight, registers would run short.
        const Source term(place, 0, 1);
        const float4 low = four(four_of<Operand>(loaded.of.x, loaded.of.y), four_of<Operand>(loaded.with.x, loaded.with.y),
                                has_residual(pair), term, 0, factors, channel);
        const uint2 first = {Operand::encode(low.x, low.y), Operand::encode(low.z, low.w)};
        const float4 high = four(four_of<Operand>(loaded.of.z, loaded.of.w), four_of<Operand>(loaded.with.z, loaded.with.w),
                                 has_residual(pair), term, 4, factors, channel + 4);
        return {first.x, first.y, Operand::encode(high.x, high.y), Operand::encode(high.z, high.w)};
    }
    // What is made of four elements and, if there is `more`, of those at `at` of the residual term.
    DEVICE float4 four(const float4& mine, const float4& other, bool more, const Source& residual, uint32_t at,
                       const FactorTable<SLICE>& factors, int channel) const {
        float4 v = mine;
        if (made == Made::NORM) {
            v = {factors.norm(channel).relu(v.x), factors.norm(channel + 1).relu(v.y), factors.norm(channel + 2).relu(v.z),
                 factors.norm(channel + 3).relu(v.w)};
        } else if (made == Made::PAIR) {
            v = {factors.pair(channel).template of<PAIR>(v.x, other.x),
                 factors.pair(channel + 1).template of<PAIR>(v.y, other.y),
                 factors.pair(channel + 2).template of<PAIR>(v.z, other.z),
                 factors.pair(channel + 3).template of<PAIR>(v.w, other.w)};
        }
        if (more) {
            const float4 term = residual.template load_four<Operand>(at);
            v = {v.x + term.x, v.y + term.y, v.z + term.z, v.w + term.w};
        }
        return v;
    }

    // The same for a flight of chunks that wait in 16 bits, all of the same channels: their factors are read once for all.
    using Waiting = Loaded;
    DEVICE Waiting fetch(const ConvPair& pair, uint32_t offset, bool inside, uint16_t* place) const {
        if (!inside) return {{}, {}, false};
        const Source with(pair.at, branch * pair.branch, 1);
        if (has_residual(pair)) {
            copy_async(place, Source(pair.residual, branch * pair.residual_branch, 1).place(offset, true), true);
        }
        const uint4 mine = of.template load<Operand>(offset).low;
        return {mine, made == Made::PAIR ? with.template load<Operand>(offset).low : uint4{}, true};
    }
    // What waits, and is not `plain`, becomes what is made of it; zeros stay for what is not inside. `place(i)` is that of chunk i in shared memory.
    template <int FLIGHT, bool HELD, class Place>
    DEVICE void round_all(const ConvPair& pair, Waiting (&flight)[FLIGHT], const EightFactors<true, HELD>& factors,
                          Place place) const {
        const bool more = has_residual(pair);
        if (more) copies_done();
        UNROLLED
        for (int first = 0; first < 8; first += 4) {
            const FourFactors& four = factors.four(first);
            UNROLLED
            for (int i = 0; i < FLIGHT; ++i) {
                float4 v = four_in<Operand>(flight[i].of, first);
                if (made == Made::NORM) {
                    v = {four.norm(0).relu(v.x), four.norm(1).relu(v.y), four.norm(2).relu(v.z), four.norm(3).relu(v.w)};
                } else {
                    const float4 x = four_in<Operand>(flight[i].with, first);
                    v = {four.pair(0).template of<PAIR>(v.x, x.x), four.pair(1).template of<PAIR>(v.y, x.y),
                         four.pair(2).template of<PAIR>(v.z, x.z), four.pair(3).template of<PAIR>(v.w, x.w)};
                }
                if (more && flight[i].inside) {
                    const float4 term = Source(place(i), 0, 1).template load_four<Operand>(uint32_t(first));
                    v = {v.x + term.x, v.y + term.y, v.z + term.z, v.w + term.w};
                }
                four_into<Operand>(flight[i].of, first, v, flight[i].inside ? 0xffffffffu : 0);
            }
        }
    }
    DEVICE bool plain() const { return made == Made::PLAIN && of.half; }
};
