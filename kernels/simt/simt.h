// The host meaning of the kernels' vocabulary: what a kernel sees of the SIMT machine, and its entry point.
//
// Kernels include this through `platform.cuh`. Compile them with -std=c++20 -DMLNT_SIMT -fno-strict-aliasing (kernels
// read shared memory as several types, as CUDA allows), and link `machine.cpp`, `fiber.cpp`, `mma.cpp` and `wgmma.cpp`. MLNT_SIMT_PORTABLE
// compiles these as for a processor that they do not know.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Vectors that CUDA knows without a header; one load or store of 8 or 16 bytes on a card.
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int32_t x, y;
};
struct alignas(16) int4 {
    int32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct uint3 {
    uint32_t x, y, z;
};

namespace simt {

// A kernel as `KERNEL` defines it; `mlnt_simt_NAME` in the linker's eyes.
struct Kernel {
    const char* name;
    void (*body)(const void* params);  // runs one thread
    uint32_t params_size;              // bytes
    uint32_t most_threads;             // per block
};

// A place in a kernel's source.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Machine;

// What the running thread knows of itself. One per OS thread; fibers never leave theirs.
struct State {
    uint3 thread, block, block_size, grid_size;
    void* shared;
    Machine* machine;
};

#if defined(__ELF__)
// Without the call that a shared library would otherwise make for each access.
#define MLNT_SIMT_TLS __attribute__((tls_model("initial-exec")))
#else
#define MLNT_SIMT_TLS
#endif
extern constinit thread_local State state MLNT_SIMT_TLS;

// How an mma's operands are coded.
enum class Operands : uint8_t { f16, bf16, tf32 };

void sync_threads(Site site);
void sync_warp(Site site);
uint32_t shuffle_xor(uint32_t bits, int mask, Site site);
void mma(Operands operands, float d[4], const uint32_t a[4], const uint32_t b[2], Site site);
void copy_async(void* to, const void* from, Site site);
void copies_commit();
void copies_pending(uint32_t groups);
void copies_done();
void load_matrices(uint32_t d[4], const void* row, bool transposed, Site site);

// A product of a warpgroup as a thread asks for it: which operands are transposed, accumulators of a thread, matrix descriptors.
struct GroupProduct {
    Operands operands;
    bool a_transposed, b_transposed;
    int registers;
    uint64_t a, b;
    bool accumulates;  // else D is the product alone
};
void wgmma(const GroupProduct& product, float* d, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(Site site);
uint32_t shared_address(const void* at);
void store_operand(void* to, const uint4& v, Site site);
void fence_operands();

// Accesses of 16 bytes to shared memory: rows of matrices, `store_operand`, `copy_async`.
enum class Access : uint32_t { matrices, stores, copies };

// How one kind of them meets in the banks.
struct BankUse {
    uint64_t phases;     // eight lanes each
    uint64_t conflicts;  // their wavefronts beyond the first
    uint64_t most;       // wavefronts of a phase
};

inline uint32_t to_bits(float v) { return __builtin_bit_cast(uint32_t, v); }
inline float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// cvt.rn.f16.f32
inline uint16_t float_to_f16(float v) {
    const uint32_t bits = to_bits(v);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return 0x7fff;  // NaN
    if (size >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 2^16 and more
    if (size < 0x38800000u) {
        // Below 2^-14 the result is a multiple of 2^-24: adding 0.5, whose last bit is worth that, rounds to it.
        return static_cast<uint16_t>(sign | (to_bits(from_bits(size) + 0.5f) - 0x3f000000u));
    }
    const uint32_t odd = (size >> 13) & 1u;
    return static_cast<uint16_t>(sign | ((size - 0x38000000u + 0xfffu + odd) >> 13));
}

// cvt.f32.f16
inline float f16_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t size = static_cast<uint32_t>(h & 0x7fffu) << 13;
    if (size >= 0x0f800000u) return from_bits(sign | size | 0x7f800000u);
    if (size >= 0x00800000u) return from_bits(sign | (size + 0x38000000u));
    // Subnormal: 2^-14 with these bits for a mantissa, less 2^-14.
    return from_bits(sign | to_bits(from_bits(size + 0x38800000u) - from_bits(0x38800000u)));
}

// cvt.rn.bf16.f32
inline uint16_t float_to_bf16(float v) {
    const uint32_t bits = to_bits(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// cvt.rna.tf32.f32
inline float round_tf32(float v) {
    const uint32_t bits = to_bits(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return from_bits(0x7fffe000u);
    return from_bits((bits + 0x1000u) & 0xffffe000u);
}

}  // namespace simt

#define threadIdx (::simt::state.thread)
#define blockIdx (::simt::state.block)
#define blockDim (::simt::state.block_size)
#define gridDim (::simt::state.grid_size)

// Runs the blocks `block_from..block_to` (x runs fastest) of a grid on the calling OS thread. `params` are copied.
// Returns 0, or 1 with the fault in words in `error`. May be called from any number of OS threads at once.
extern "C" int mlnt_simt_launch(const simt::Kernel* kernel, const void* params, size_t params_size,
                                const uint32_t grid[3], uint32_t threads, size_t shared_bytes, uint64_t block_from,
                                uint64_t block_to, uint64_t seed, char* error, size_t error_size);

// What the launches on the calling OS thread have counted since it last asked, by `Access`.
extern "C" void mlnt_simt_banks(simt::BankUse use[3]);
