// Four neighbouring elements of a tensor at a time: one load or store of 16 or 8 bytes where the address allows it and all four are there.
#pragma once

#include "storage.cuh"

template <class T>
DEVICE bool whole_quad(const typename T::Element* x, int64_t at, int64_t len) {
    return at + 4 <= len && reinterpret_cast<uintptr_t>(x + at) % sizeof(typename T::Quad) == 0;
}

// Elements at..at+4 of [len]; 0 behind the end.
template <class T>
DEVICE typename T::Quad load(const void* from, int64_t at, int64_t len) {
    const typename T::Element* x = static_cast<const typename T::Element*>(from);
    return whole_quad<T>(x, at, len) ? load_quad<T>(x + at) : load_part<T>(x + at, len - at);
}

template <class T>
DEVICE void store(void* to, int64_t at, int64_t len, float4 v) {
    typename T::Element* y = static_cast<typename T::Element*>(to);
    if (whole_quad<T>(y, at, len)) {
        store_quad<T>(y + at, v);
    } else {
        store_part<T>(y + at, v, len - at);
    }
}
