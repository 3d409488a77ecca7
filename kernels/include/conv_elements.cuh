// Elements of tensors of 32 bits, or of 16 where the operand type of a convolution has them: one, or eight neighbours.
#pragma once

#include "platform.cuh"

// An element of a tensor of 32 bits, or of 16 where the operand type has them.
template <class Operand>
DEVICE float conv_load(const void* from, int64_t at, int half) {
    if constexpr (Operand::HALVES) {
        if (half) return Operand::decode(static_cast<const uint16_t*>(from)[at]);
    }
    return static_cast<const float*>(from)[at];
}

// Stores an element; what was stored, as later readers will see it.
template <class Operand>
DEVICE float conv_store(void* to, int64_t at, int half, float v) {
    if constexpr (Operand::HALVES) {
        if (half) {
            const uint16_t coded = Operand::encode(v);
            static_cast<uint16_t*>(to)[at] = coded;
            return Operand::decode(coded);
        }
    }
    static_cast<float*>(to)[at] = v;
    return v;
}

// Eight neighbours, aligned to 16 bytes.
DEVICE void eight_of(float (&v)[8], const float* from) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}
DEVICE void eight_to(float* to, const float (&v)[8]) {
    reinterpret_cast<float4*>(to)[0] = {v[0], v[1], v[2], v[3]};
    reinterpret_cast<float4*>(to)[1] = {v[4], v[5], v[6], v[7]};
}

// Eight neighbours in memory: 16 bytes, or 32.
struct Chunk {
    uint4 low, high;
};

template <class Operand>
DEVICE Chunk chunk_load(const void* from, int64_t at, int half) {
    if (half) return {*reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + at), {}};
    const uint4* words = reinterpret_cast<const uint4*>(static_cast<const float*>(from) + at);
    return {words[0], words[1]};
}

template <class Operand>
DEVICE void chunk_decode(float (&v)[8], const Chunk& chunk, int half) {
    if (half) {
        const uint32_t words[4] = {chunk.low.x, chunk.low.y, chunk.low.z, chunk.low.w};
        for (int i = 0; i < 4; ++i) {
            const float2 pair = Operand::decode_pair(words[i]);
            v[2 * i] = pair.x;
            v[2 * i + 1] = pair.y;
        }
    } else {
        __builtin_memcpy(v, &chunk.low, 16);
        __builtin_memcpy(v + 4, &chunk.high, 16);
    }
}

// Four elements of 16 bits.
template <class Operand>
DEVICE float4 four_of(uint32_t low, uint32_t high) {
    const float2 a = Operand::decode_pair(low), b = Operand::decode_pair(high);
    return {a.x, a.y, b.x, b.y};
}

// Of eight elements of 16 bits those from `first` on, 0 or 4; and the same with others in their place, of which all bits of `mask` stay.
template <class Operand>
DEVICE float4 four_in(const uint4& eight, int first) {
    return first == 0 ? four_of<Operand>(eight.x, eight.y) : four_of<Operand>(eight.z, eight.w);
}
template <class Operand>
DEVICE void four_into(uint4& eight, int first, const float4& v, uint32_t mask) {
    const uint32_t low = Operand::encode(v.x, v.y) & mask, high = Operand::encode(v.z, v.w) & mask;
    if (first == 0) {
        eight.x = low, eight.y = high;
    } else {
        eight.z = low, eight.w = high;
    }
}

// Rounds eight elements to the operand type.
template <class Operand>
DEVICE uint4 chunk_encode(const float (&v)[8]) {
    return {Operand::encode(v[0], v[1]), Operand::encode(v[2], v[3]), Operand::encode(v[4], v[5]),
            Operand::encode(v[6], v[7])};
}

// The same as they are loaded; zeros where they are not inside.
template <class Operand>
DEVICE uint4 chunk_round(const Chunk& chunk, int half, bool inside) {
    if (!inside) return {};
    if (half) return chunk.low;
    float v[8];
    chunk_decode<Operand>(v, chunk, half);
    return chunk_encode<Operand>(v);
}
