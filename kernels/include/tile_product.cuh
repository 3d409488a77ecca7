// Products of tiles in shared memory: D [64, 64] += A [64, 32] · B [64, 32]ᵀ by the 128 threads of a block.
//
// A tile is 64 lines of 32 elements along the inner dimension, which is what the fragments of `mma` want of both
// operands. An operand type says how an element is stored; `PITCH` elements lie from one line to the next, padded so
// that the loads below meet no bank twice.
#pragma once

#include "platform.cuh"

constexpr int TILE = 64;   // lines of a tile
constexpr int DEPTH = 32;  // elements of a line
constexpr int THREADS = 128;

// IEEE single precision, on the ordinary arithmetic units.
struct F32 {
    using Stored = float;
    static constexpr int PITCH = 36;
    static constexpr bool HALVES = false;
    static DEVICE Stored encode(float v) { return v; }
};

// 10 bits of mantissa, range of f32.
struct Tf32 {
    using Stored = float;
    static constexpr int PITCH = 36;
    static constexpr bool HALVES = false;
    static DEVICE Stored encode(float v) { return round_tf32(v); }
    static DEVICE void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) { mma_m16n8k8_tf32(d, a, b); }
};

// IEEE half precision. What is beyond its range becomes infinite, and shows.
struct F16 {
    using Stored = uint16_t;
    static constexpr int PITCH = 40;
    static constexpr bool HALVES = true;
    static DEVICE Stored encode(float v) { return float_to_f16(v); }
    static DEVICE float decode(Stored v) { return f16_to_float(v); }
    static DEVICE uint32_t encode(float low, float high) { return floats_to_f16x2(low, high); }
    static DEVICE float2 decode_pair(uint32_t v) { return f16x2_to_floats(v); }
    static DEVICE void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) { mma_m16n8k16_f16(d, a, b); }
    template <bool A_TRANSPOSED, bool B_TRANSPOSED, int REGISTERS>
    static DEVICE void wgmma(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulates = true) {
        wgmma_f16<A_TRANSPOSED, B_TRANSPOSED>(d, a, b, accumulates);
    }
};

// 7 bits of mantissa, range of f32.
struct Bf16 {
    using Stored = uint16_t;
    static constexpr int PITCH = 40;
    static constexpr bool HALVES = true;
    static DEVICE Stored encode(float v) { return float_to_bf16(v); }
    static DEVICE float decode(Stored v) { return bf16_to_float(v); }
    static DEVICE uint32_t encode(float low, float high) { return floats_to_bf16x2(low, high); }
    static DEVICE float2 decode_pair(uint32_t v) { return bf16x2_to_floats(v); }
    static DEVICE void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) { mma_m16n8k16_bf16(d, a, b); }
    template <bool A_TRANSPOSED, bool B_TRANSPOSED, int REGISTERS>
    static DEVICE void wgmma(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulates = true) {
        wgmma_bf16<A_TRANSPOSED, B_TRANSPOSED>(d, a, b, accumulates);
    }
};

// A thread's part of D on tensor cores. The warps form 2 × 2 quarters of 32 × 32, each of 2 × 4 products m16n8.
//
// Seen as 32-bit words, the fragments of all operand types have one layout: with g = lane / 4 and t = lane % 4, lines g
// and g + 8 of A and line g of B, words t and t + 4 of the 8 that one `mma` takes. Words of a warp's load lie 4g + t
// (pitch 36 words) or 20g + t (20 words) modulo 32: all different.
template <class Operand>
struct Product {
    static constexpr int ROWS = TILE, COLUMNS = TILE, THREADS = ::THREADS, RUN = 1;
    static constexpr int WORDS = DEPTH * int(sizeof(typename Operand::Stored)) / 4;
    static constexpr int PITCH = Operand::PITCH * int(sizeof(typename Operand::Stored)) / 4;
    float d[2][4][4];

    DEVICE void clear() {
        for (int m = 0; m < 2; ++m) {
            for (int n = 0; n < 4; ++n) {
                for (int i = 0; i < 4; ++i) d[m][n][i] = 0.0f;
            }
        }
    }

    static DEVICE int first_row() { return int(threadIdx.x / 32) % 2 * 32 + int(threadIdx.x % 32) / 4; }
    static DEVICE int first_column() { return int(threadIdx.x / 64) * 32; }

    DEVICE void add(const typename Operand::Stored* rows, const typename Operand::Stored* columns) {
        const int g = int(threadIdx.x % 32) / 4, t = int(threadIdx.x % 4);
        const uint32_t* row = reinterpret_cast<const uint32_t*>(rows) + first_row() * PITCH + t;
        const uint32_t* column = reinterpret_cast<const uint32_t*>(columns) + (first_column() + g) * PITCH + t;
        for (int k = 0; k < WORDS; k += 8) {
            uint32_t a[2][4], b[4][2];
            for (int m = 0; m < 2; ++m) {
                for (int i = 0; i < 4; ++i) a[m][i] = row[(16 * m + 8 * (i % 2)) * PITCH + k + 4 * (i / 2)];
            }
            for (int n = 0; n < 4; ++n) {
                for (int i = 0; i < 2; ++i) b[n][i] = column[8 * n * PITCH + k + 4 * i];
            }
            for (int m = 0; m < 2; ++m) {
                for (int n = 0; n < 4; ++n) Operand::mma(d[m][n], a[m], b[n]);
            }
        }
    }

    // Calls `f(i, row, column, value)` for every element that this thread holds, i = 0, 1, ….
    template <class F>
    DEVICE void each(F f) {
        const int row = first_row(), column = first_column() + int(threadIdx.x % 4) * 2;
        for (int m = 0; m < 2; ++m) {
            for (int n = 0; n < 4; ++n) {
                for (int i = 0; i < 4; ++i) {
                    f(16 * m + 4 * n + i, row + 16 * m + 8 * (i / 2), column + 8 * n + i % 2, d[m][n][i]);
                }
            }
        }
    }
};

// A thread's part of D on the ordinary units: rows r, r + 16, … and columns c, c + 8, …, so that a warp loads 4 rows
// and 8 columns, 36 words apart, four elements each: no bank twice. A warp's stores are runs of 8 columns.
template <>
struct Product<F32> {
    static constexpr int ROWS = TILE, COLUMNS = TILE, THREADS = ::THREADS, RUN = 1;
    struct alignas(16) Four {
        float v[4];
    };
    float d[4][8];

    DEVICE void clear() {
        for (int m = 0; m < 4; ++m) {
            for (int n = 0; n < 8; ++n) d[m][n] = 0.0f;
        }
    }

    DEVICE void add(const float* rows, const float* columns) {
        const float* row = rows + int(threadIdx.x / 8) * F32::PITCH;
        const float* column = columns + int(threadIdx.x % 8) * F32::PITCH;
        for (int k = 0; k < DEPTH; k += 4) {
            Four a[4];
            for (int m = 0; m < 4; ++m) a[m] = *reinterpret_cast<const Four*>(row + 16 * m * F32::PITCH + k);
            for (int n = 0; n < 8; ++n) {
                const Four b = *reinterpret_cast<const Four*>(column + 8 * n * F32::PITCH + k);
                for (int m = 0; m < 4; ++m) {
                    for (int i = 0; i < 4; ++i) d[m][n] += a[m].v[i] * b.v[i];
                }
            }
        }
    }

    template <class F>
    DEVICE void each(F f) {
        const int row = int(threadIdx.x / 8), column = int(threadIdx.x % 8);
        for (int m = 0; m < 4; ++m) {
            for (int n = 0; n < 8; ++n) f(8 * m + n, row + 16 * m, column + 8 * n, d[m][n]);
        }
    }
};
