// How reals lie in memory: f32, f16 or bf16. Kernels compute in f32 and convert as they load and store, four neighbours at a time
// where they can: 16 or 8 bytes.
#pragma once

#include "platform.cuh"

struct StoredF32 {
    using Element = float;
    // Four neighbours as they lie in memory.
    using Quad = float4;
    static DEVICE float widen(Element v) { return v; }
    static DEVICE Element narrow(float v) { return v; }
    static DEVICE float4 unpack(Quad q) { return q; }
    static DEVICE Quad pack(float4 v) { return v; }
};

struct StoredF16 {
    using Element = uint16_t;
    using Quad = uint2;
    static DEVICE float widen(Element v) { return f16_to_float(v); }
    static DEVICE Element narrow(float v) { return float_to_f16(v); }
    static DEVICE float4 unpack(Quad q) {
        const float2 a = f16x2_to_floats(q.x), b = f16x2_to_floats(q.y);
        return float4{a.x, a.y, b.x, b.y};
    }
    static DEVICE Quad pack(float4 v) { return uint2{floats_to_f16x2(v.x, v.y), floats_to_f16x2(v.z, v.w)}; }
};

struct StoredBf16 {
    using Element = uint16_t;
    using Quad = uint2;
    static DEVICE float widen(Element v) { return bf16_to_float(v); }
    static DEVICE Element narrow(float v) { return float_to_bf16(v); }
    static DEVICE float4 unpack(Quad q) {
        const float2 a = bf16x2_to_floats(q.x), b = bf16x2_to_floats(q.y);
        return float4{a.x, a.y, b.x, b.y};
    }
    static DEVICE Quad pack(float4 v) { return uint2{floats_to_bf16x2(v.x, v.y), floats_to_bf16x2(v.z, v.w)}; }
};

// The first `count` of four neighbours, at most 4, and 0 for the others, where the address or the end allows no whole load.
template <class T>
DEVICE typename T::Quad load_part(const typename T::Element* from, int64_t count) {
    float4 v = {};
    if (count > 0) v.x = T::widen(from[0]);
    if (count > 1) v.y = T::widen(from[1]);
    if (count > 2) v.z = T::widen(from[2]);
    if (count > 3) v.w = T::widen(from[3]);
    return T::pack(v);
}

template <class T>
DEVICE void store_part(typename T::Element* to, float4 v, int64_t count) {
    if (count > 0) to[0] = T::narrow(v.x);
    if (count > 1) to[1] = T::narrow(v.y);
    if (count > 2) to[2] = T::narrow(v.z);
    if (count > 3) to[3] = T::narrow(v.w);
}

template <class T>
DEVICE typename T::Quad load_quad(const typename T::Element* from) {
    return *reinterpret_cast<const typename T::Quad*>(from);
}

template <class T>
DEVICE void store_quad(typename T::Element* to, float4 v) {
    *reinterpret_cast<typename T::Quad*>(to) = T::pack(v);
}
