// What the harness needs for either direction: memory and launches on a card or on the host machine, patches, numbers, times.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "lab_back.cuh"

// Products of warpgroups are for cards of compute capability 9.0 alone.
#if __has_include("v6_wgmma.cu") && !defined(LAB_NO_WGMMA)
#define LAB_WGMMA
#endif

#if defined(__CUDACC__)
using Entry = const void*;
#define LAB_KERNEL(name, Params) extern "C" __global__ void name(const __grid_constant__ Params p);
#define LAB_ENTRY(name) reinterpret_cast<const void*>(&name)
#else
using Entry = const simt::Kernel*;
#define LAB_KERNEL(name, Params) extern "C" const simt::Kernel mlnt_simt_##name;
#define LAB_ENTRY(name) &mlnt_simt_##name
#endif
#define ONE(name) {#name, #name}, {LAB_ENTRY(name), LAB_ENTRY(name)}
#define TWO(a, b) {#a, #b}, {LAB_ENTRY(a), LAB_ENTRY(b)}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[noreturn]] void fail(const char* what, const char* why) {
    fprintf(stderr, "harness: %s: %s\n", what, why);
    exit(1);
}

// ---- What differs between a card and the host machine: memory and launches ----

uint64_t seed = 1;  // of the host machine

#if defined(__CUDACC__)

void must(cudaError_t error, const char* what) {
    if (error != cudaSuccess) fail(what, cudaGetErrorString(error));
}

// An array on the device.
template <class T>
struct Array {
    T* at = nullptr;
    size_t size;
    explicit Array(const std::vector<T>& from) : size(from.size()) {
        must(cudaMalloc(&at, size * sizeof(T)), "cudaMalloc");
        must(cudaMemcpy(at, from.data(), size * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    Array(const Array&) = delete;
    Array(Array&& other) : at(other.at), size(other.size) { other.at = nullptr; }
    ~Array() { cudaFree(at); }
    std::vector<T> read() const {
        std::vector<T> to(size);
        must(cudaMemcpy(to.data(), at, size * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return to;
    }
};

// Lets a kernel have so much shared memory.
void allow(Entry entry, const char* name, size_t shared) {
    must(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
}

template <class Params>
void launch(Entry entry, const char* name, const Params& p, int64_t blocks, uint32_t threads, size_t shared) {
    Params copy = p;
    void* arguments[] = {&copy};
    must(cudaLaunchKernel(entry, dim3(unsigned(blocks)), dim3(threads), arguments, shared, nullptr), name);
}

#else

template <class T>
struct Array {
    std::vector<T> all;
    T* at;
    explicit Array(const std::vector<T>& from) : all(from), at(all.data()) {}
    Array(const Array&) = delete;
    std::vector<T> read() const { return all; }
};

void allow(Entry, const char*, size_t) {}

template <class Params>
void launch(Entry entry, const char* name, const Params& p, int64_t blocks, uint32_t threads, size_t shared) {
    const uint32_t grid[3] = {uint32_t(blocks), 1, 1};
    char error[512] = "";
    if (mlnt_simt_launch(entry, &p, sizeof p, grid, threads, shared, 0, uint64_t(blocks), seed, error, sizeof error)) {
        fail(name, error);
    }
}

#endif

// ---- Patches ----

template <class Params>
int32_t halo_of(const Params& p) { return p.patch_images * (p.patch_height + 2) * (p.patch_width + 2); }

template <class Params>
int64_t patches_of(const Params& p) {
    return ceil_div(p.images, p.patch_images) * ceil_div(p.height, p.patch_height) * ceil_div(p.width, p.patch_width);
}

// Patches with the least to compute and to load; of equals the widest, which reads the longest runs of memory.
template <class Params>
void choose_patches(Params& p) {
    int64_t best = INT64_MAX;
    for (int32_t width = std::min(p.width, 128); width >= 1; --width) {
        Params with = p;
        with.patch_width = width;
        const int64_t most = std::min(128 / width, p.height);
        with.patch_height = int32_t(ceil_div(p.height, ceil_div(p.height, most)));
        const bool whole = with.patch_height == p.height && width == p.width;
        with.patch_images = whole ? std::min(128 / (with.patch_height * width), p.images) : 1;
        // Fewer images where their halos are too large together.
        while (with.patch_images > 1 && halo_of(with) > 288) --with.patch_images;
        const int64_t cost = patches_of(with) * (2 * 128 + halo_of(with));
        if (halo_of(with) <= 288 && cost < best) {
            best = cost;
            p = with;
        }
    }
    if (best == INT64_MAX) fail("patches", "none fits");
}

// Patches of four cells of 8 × 8 pixels, or of fewer where the images have no more.
template <class Params>
void choose_cells(Params& p) {
    const int32_t down = int32_t(ceil_div(p.height, 8)), across = int32_t(ceil_div(p.width, 8));
    p.patch_width = 8 * std::min(across, 2);
    p.patch_height = 8 * std::min(down, 32 / p.patch_width);
    if (down == 1 && across > 2) p.patch_width = 8 * std::min(across, 4);
    const bool whole = p.patch_height == 8 * down && p.patch_width == 8 * across;
    p.patch_images = whole ? std::min(256 / (p.patch_height * p.patch_width), p.images) : 1;
}

// ---- Numbers ----

constexpr double TOLERANCE = 0.000489;  // half of f16's last place, and a little for the order of sums
// f16 conversions of normal numbers and zero on the host, for either compiler.
float widen(uint16_t h) {
    const uint32_t size = h & 0x7fffu, bits = (h & 0x8000u) << 16 | (size ? (size << 13) + 0x38000000u : 0u);
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
uint16_t narrow(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const uint32_t size = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    if (size < 0x38800000u) return uint16_t(sign);
    return uint16_t(sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13));
}

// Numbers of about normal distribution, all normal in f16.
struct Random {
    uint32_t state;
    float next() {
        float sum = 0;
        for (int i = 0; i < 4; ++i) {
            state = state * 1664525u + 1013904223u;
            sum += float(state >> 8) / float(1 << 24) - 0.5f;
        }
        return fabsf(sum) < 1e-3f ? 1e-3f : sum;
    }
};

constexpr size_t GUARD = 64;            // elements before and behind a result
constexpr uint16_t POISON = 0xffff;     // not a number

// Relative error in the Euclidean norm; infinite where something is not a number.
double value_of(uint16_t v) { return (v & 0x7c00u) == 0x7c00u ? INFINITY : double(widen(v)); }
double value_of(float v) { return isfinite(v) ? double(v) : INFINITY; }
template <class T>
double error_of(const T* found, const std::vector<float>& want) {
    double wrong = 0, all = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        const double value = value_of(found[i]), d = value - double(want[i]);
        if (!isfinite(value)) return INFINITY;
        wrong += d * d;
        all += double(want[i]) * double(want[i]);
    }
    return sqrt(wrong / all);
}

// What a kernel left in an array between two guards: its error, infinite where it wrote beyond, and a hash of its bits.
struct Found {
    double error;
    unsigned long long hash;
};
template <class T>
Found found_in(const std::vector<T>& got, T poison, const std::vector<float>& want) {
    Found found = {0, 0xcbf29ce484222325u};
    bool guarded = true;
    for (size_t i = 0; i < got.size(); ++i) {
        uint32_t bits = 0, of_poison = 0;
        memcpy(&bits, &got[i], sizeof(T));
        memcpy(&of_poison, &poison, sizeof(T));
        found.hash = (found.hash ^ bits) * 0x100000001b3u;
        if (i < GUARD || i >= got.size() - GUARD) guarded &= bits == of_poison;
    }
    found.error = guarded ? error_of(got.data() + GUARD, want) : INFINITY;
    return found;
}

#if defined(__CUDACC__)

constexpr int SETS = 4;      // of tensors in turn: more than the L2 cache holds
constexpr int REPEATS = 31;  // times that are taken, each of ROUNDS launches on each set
constexpr int ROUNDS = 5;    // so many that the first launch's way to the card does not count

// Microseconds of a launch: quartiles.
struct Times {
    float first, median, third;
};
// `run(set)` launches once.
template <class Run>
Times times_of(const char* what, int repeats, int rounds, Run run) {
    cudaEvent_t start, stop;
    must(cudaEventCreate(&start), "cudaEventCreate");
    must(cudaEventCreate(&stop), "cudaEventCreate");
    std::vector<float> times;
    for (int repeat = 0; repeat < repeats + 1; ++repeat) {
        must(cudaEventRecord(start), "cudaEventRecord");
        for (int i = 0; i < rounds * SETS; ++i) run(i % SETS);
        must(cudaEventRecord(stop), "cudaEventRecord");
        must(cudaEventSynchronize(stop), what);
        float milliseconds = 0;
        must(cudaEventElapsedTime(&milliseconds, start, stop), "cudaEventElapsedTime");
        if (repeat > 0) times.push_back(1e3f * milliseconds / float(rounds * SETS));
    }
    must(cudaEventDestroy(start), "cudaEventDestroy");
    must(cudaEventDestroy(stop), "cudaEventDestroy");
    std::sort(times.begin(), times.end());
    const size_t n = times.size();
    return {times[n / 4], times[n / 2], times[3 * n / 4]};
}

#endif

}  // namespace
