// The vocabulary in which kernels are written, with two meanings: CUDA, and the SIMT host machine of `kernels/simt/`.
//
// All inline PTX of the project stands in this file, each instruction with its host meaning beside it. A kernel that
// keeps to this vocabulary (and to plain C++20 and the functions of <math.h>) means the same on both machines.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)

#define DEVICE __device__ __forceinline__

// A file with instructions of sm_90a defines KERNEL_SM_90A before it includes this, on a line of its own: the build then compiles it for
// no other card.
#if defined(KERNEL_SM_90A) && defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "these kernels are for sm_90a alone"
#endif

// Blocks that should fit a multiprocessor at least by their registers; a file may define it before it includes this.
#ifndef KERNEL_BLOCKS
#define KERNEL_BLOCKS 1
#endif

// Before a loop: all of its rounds one after the other, so that arrays that it indexes are registers; or as they are written, since
// unrolled they would take more registers.
#define UNROLLED _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")

// The value itself, but what is made of it is made again, not kept in registers from where it was made of the same before.
DEVICE uint32_t again(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

// The value itself, which is kept in a register from here on, not made again where it is used.
DEVICE uint32_t kept(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

// threadIdx.x, asked for again: no register keeps it, or what is made of it, meanwhile.
DEVICE uint32_t thread_again() {
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// Defines a kernel: `p` is its parameter struct, `threads` the most threads a block may have.
#define KERNEL(name, Params, threads) \
    extern "C" __global__ void __launch_bounds__(threads, KERNEL_BLOCKS) name(const __grid_constant__ Params p)

// Start of the block's dynamic shared memory, 16-byte aligned.
template <class T>
DEVICE T* shared_memory() {
    extern __shared__ __align__(16) unsigned char shared_area[];
    return reinterpret_cast<T*>(shared_area);
}

#elif defined(MLNT_SIMT)

#include "simt.h"

// Always inlined, as on CUDA: helpers of one name in different `.cu` files then never meet in the linker.
#define DEVICE inline __attribute__((always_inline))

#define UNROLLED
#define ROLLED

DEVICE uint32_t again(uint32_t value) { return value; }
DEVICE uint32_t kept(uint32_t value) { return value; }
DEVICE uint32_t thread_again() { return threadIdx.x; }

#define KERNEL(name, Params, threads)                                                                             \
    static void name##_body(const Params& p);                                                                     \
    extern "C" {                                                                                                  \
    extern const simt::Kernel mlnt_simt_##name;                                                                   \
    const simt::Kernel mlnt_simt_##name = {                                                                       \
        #name, [](const void* p) { name##_body(*static_cast<const Params*>(p)); }, sizeof(Params), threads};      \
    }                                                                                                             \
    static void name##_body([[maybe_unused]] const Params& p)

template <class T>
DEVICE T* shared_memory() {
    static_assert(alignof(T) <= 16);
    return static_cast<T*>(simt::state.shared);
}

#else
#error "kernels are compiled by nvcc, or as C++ with MLNT_SIMT"
#endif

// ---- Barriers and warp collectives: every thread of the block, or all 32 lanes of the warp, take part ----

#if defined(__CUDACC__)

DEVICE void sync_threads() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE int32_t shuffle_xor(int32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
// `v`, which is the same in all lanes: the compiler learns that it may keep it in one register for all.
DEVICE uint32_t uniform(uint32_t v) { return __shfl_sync(0xffffffffu, v, 0); }
DEVICE int32_t uniform(int32_t v) { return __shfl_sync(0xffffffffu, v, 0); }

#else

DEVICE uint32_t uniform(uint32_t v) { return v; }
DEVICE int32_t uniform(int32_t v) { return v; }

DEVICE void sync_threads(simt::Site site = simt::Site::here()) { simt::sync_threads(site); }
DEVICE void sync_warp(simt::Site site = simt::Site::here()) { simt::sync_warp(site); }
DEVICE uint32_t shuffle_xor(uint32_t v, int mask, simt::Site site = simt::Site::here()) {
    return simt::shuffle_xor(v, mask, site);
}
DEVICE float shuffle_xor(float v, int mask, simt::Site site = simt::Site::here()) {
    return simt::from_bits(simt::shuffle_xor(simt::to_bits(v), mask, site));
}
DEVICE int32_t shuffle_xor(int32_t v, int mask, simt::Site site = simt::Site::here()) {
    return static_cast<int32_t>(simt::shuffle_xor(static_cast<uint32_t>(v), mask, site));
}

#endif

// ---- Atomics on integers: the order of arrival cannot change the result. They return the former value. ----
//
// `thread_fence` makes what a thread wrote before it visible to all blocks before what it writes after it, and what it
// reads after it no older than what it read before. A block's last to arrive at a counter then sees what the others
// wrote: write, fence, barrier; one thread adds to the counter; barrier, fence, read.

#if defined(__CUDACC__)

DEVICE void thread_fence() { __threadfence(); }

DEVICE uint32_t atomic_max(uint32_t* at, uint32_t v) { return atomicMax(at, v); }
DEVICE uint32_t atomic_add(uint32_t* at, uint32_t v) { return atomicAdd(at, v); }

#else

DEVICE void thread_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

DEVICE uint32_t atomic_max(uint32_t* at, uint32_t v) {
    uint32_t old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (old < v && !__atomic_compare_exchange_n(at, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
DEVICE uint32_t atomic_add(uint32_t* at, uint32_t v) { return __atomic_fetch_add(at, v, __ATOMIC_RELAXED); }

#endif

// ---- Conversions ----
//
// f16 and bf16 round to nearest, ties to even, and keep subnormal numbers. tf32 rounds the mantissa to 10 bits, ties
// away from zero, which is all that `cvt.tf32` offers before sm_90; its result is an f32 with 13 low bits of zero. Of a pair of
// 16-bit numbers the lower half of the word is the first.

#if defined(__CUDACC__)

DEVICE uint16_t float_to_f16(float v) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
DEVICE float f16_to_float(uint16_t h) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
    return v;
}
DEVICE uint16_t float_to_bf16(float v) {
    uint16_t h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
DEVICE float bf16_to_float(uint16_t h) { return __uint_as_float(static_cast<uint32_t>(h) << 16); }
DEVICE uint32_t floats_to_f16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE uint32_t floats_to_bf16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE float2 f16x2_to_floats(uint32_t pair) {
    float2 v;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(pair));
    return v;
}
DEVICE float2 bf16x2_to_floats(uint32_t pair) {
    return float2{__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
DEVICE float round_tf32(float v) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
    return __uint_as_float(bits);
}

#else

DEVICE uint16_t float_to_f16(float v) { return simt::float_to_f16(v); }
DEVICE float f16_to_float(uint16_t h) { return simt::f16_to_float(h); }
DEVICE uint16_t float_to_bf16(float v) { return simt::float_to_bf16(v); }
DEVICE float bf16_to_float(uint16_t h) { return simt::from_bits(static_cast<uint32_t>(h) << 16); }
DEVICE uint32_t floats_to_f16x2(float low, float high) {
    return float_to_f16(low) | static_cast<uint32_t>(float_to_f16(high)) << 16;
}
DEVICE uint32_t floats_to_bf16x2(float low, float high) {
    return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}
DEVICE float2 f16x2_to_floats(uint32_t pair) {
    return float2{f16_to_float(static_cast<uint16_t>(pair)), f16_to_float(static_cast<uint16_t>(pair >> 16))};
}
DEVICE float2 bf16x2_to_floats(uint32_t pair) {
    return float2{bf16_to_float(static_cast<uint16_t>(pair)), bf16_to_float(static_cast<uint16_t>(pair >> 16))};
}
DEVICE float round_tf32(float v) { return simt::round_tf32(v); }

#endif

// ---- Tensor cores: d += a·b for one warp, f32 accumulators (PTX ISA, "Matrix fragments for mma") ----
//
// With g = lane / 4 and t = lane % 4, the lanes of a warp hold
//
//   m16n8k16, f16 and bf16: a 32-bit register packs two neighbours along k, the lower k in the lower half.
//     A [16, 16]  a[0]: row g,   k 2t, 2t+1     a[2]: row g,   k 2t+8, 2t+9
//                 a[1]: row g+8, k 2t, 2t+1     a[3]: row g+8, k 2t+8, 2t+9
//     B [16, 8]   b[0]: k 2t, 2t+1, column g    b[1]: k 2t+8, 2t+9, column g
//   m16n8k8, tf32: a register holds one f32, whose 13 low bits are ignored.
//     A [16, 8]   a[0]: row g,   k t            a[2]: row g,   k t+4
//                 a[1]: row g+8, k t            a[3]: row g+8, k t+4
//     B [8, 8]    b[0]: k t, column g           b[1]: k t+4, column g
//   D [16, 8]     d[0]: row g,   column 2t      d[2]: row g+8, column 2t
//                 d[1]: row g,   column 2t+1    d[3]: row g+8, column 2t+1

#if defined(__CUDACC__)

#define MLNT_MMA(instruction)                                                                              \
    asm volatile("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "         \
                 "{%0, %1, %2, %3};"                                                                       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

DEVICE void mma_m16n8k16_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    MLNT_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
DEVICE void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    MLNT_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
DEVICE void mma_m16n8k8_tf32(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    MLNT_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef MLNT_MMA

#else

DEVICE void mma_m16n8k16_f16(float d[4], const uint32_t a[4], const uint32_t b[2],
                             simt::Site site = simt::Site::here()) {
    simt::mma(simt::Operands::f16, d, a, b, site);
}
DEVICE void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2],
                              simt::Site site = simt::Site::here()) {
    simt::mma(simt::Operands::bf16, d, a, b, site);
}
DEVICE void mma_m16n8k8_tf32(float d[4], const uint32_t a[4], const uint32_t b[2],
                             simt::Site site = simt::Site::here()) {
    simt::mma(simt::Operands::tf32, d, a, b, site);
}

#endif

// ---- Matrices of 8 × 8 elements of 16 bits from shared memory (PTX ISA, "ldmatrix") ----
//
// Lane 8i + j gives the address of row j of matrix i, 16 bytes aligned to 16. Register i of lane 4g + t holds elements
// 2t and 2t+1 of row g of matrix i; transposed: those of column g, the lower row in the lower half.

#if defined(__CUDACC__)

DEVICE void load_matrices(uint32_t d[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}
DEVICE void load_matrices_transposed(uint32_t d[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

#else

DEVICE void load_matrices(uint32_t d[4], const void* row, simt::Site site = simt::Site::here()) {
    simt::load_matrices(d, row, false, site);
}
DEVICE void load_matrices_transposed(uint32_t d[4], const void* row, simt::Site site = simt::Site::here()) {
    simt::load_matrices(d, row, true, site);
}

#endif

// ---- Copies of 16 bytes from global to shared memory that go on while the thread does other things (PTX ISA, "cp.async") ----
//
// Both addresses are aligned to 16; without `there`, zeros are written and `from` is not read. A thread's copies are done, in
// its own eyes, behind its `copies_done`, in those of others behind the next barrier. `copies_commit` makes a group, which may be
// empty, of the copies begun since the last; `copies_pending<N>` waits for all groups but the last N. On the host nothing is
// copied before its wait, and what is read too early is poison.

#if defined(__CUDACC__)

DEVICE void copy_async(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
DEVICE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
DEVICE void copies_pending() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

#else

DEVICE void copy_async(void* to, const void* from, bool there, simt::Site site = simt::Site::here()) {
    simt::copy_async(to, there ? from : nullptr, site);
}
DEVICE void copies_done() { simt::copies_done(); }
DEVICE void copies_commit() { simt::copies_commit(); }
template <int GROUPS>
DEVICE void copies_pending() {
    simt::copies_pending(GROUPS);
}

#endif

// ---- Reads ahead (PTX ISA, "cp.async.bulk.prefetch"; sm_90 and later) ----
//
// Asks that the second-level cache load these bytes, which all belong to a tensor; address and number are multiples of 16. On the host the first
// and the last are read, for whatever watches over memory.

#if defined(__CUDACC__)

DEVICE void prefetch(const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

#else

DEVICE void prefetch(const void* from, uint32_t bytes) {
    const volatile uint32_t* words = static_cast<const volatile uint32_t*>(from);
    (void)words[0];
    (void)words[bytes / 4 - 1];
}

#endif

// ---- Products of a warpgroup: D [64, N] += A [64, 16] · B [16, N], operands in shared memory (PTX ISA, "wgmma"; sm_90a alone) ----
//
// Without `accumulates` D is the product, whatever it was before: no thread has to write zeros, for which it would wait for products
// under way.
// Four warps in a row, the first's number a multiple of four, take part. The accumulators are f32: with w, g and t the warp in the
// group, lane / 4 and lane % 4, d[4·j + i] is row 16·w + g + 8·(i / 2), column 8·j + 2·t + i % 2.
//
// An operand is made of matrices of 8 × 8 elements, 8 rows of 16 bytes one behind the other. Rows are lines of A, or columns of B, and
// run along k (K-major, the shape of a product of lines by lines); transposed (MN-major), rows are places along k and run along the
// lines. `wgmma_matrix` describes one without swizzle: the address of its first matrix, the bytes from a matrix to the next along
// k, and those to the next along the lines. These are the leading and the stride dimension byte offset of the interleaved
// layouts, K-major ((8,m),(T,2)):((1T,SBO),(1,LBO)) and MN-major ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO)) in the words of CUTLASS; the
// PTX ISA ("Strides") says the same. All are multiples of 16.
//
// A product runs behind the back of the threads, and so do its reads: in the order of
//
//   store_operand (or copy_async, copies_done), fence_operands, sync_threads    what is read; all that write it do all three
//   wgmma_fence                                                                 behind all other use of the accumulators
//   products, wgmma_commit
//   wgmma_wait, wgmma_settle of each of the accumulators                        from here on they can be used, and memory be written
//
// On the host nothing is read before `wgmma_wait`. Till then accumulators are poison; and so is for ever what came of
// products without a fence, of accumulators that changed meanwhile, and of memory that did not come as above. That the four warps
// of a group do the same is checked at the next barrier.

DEVICE uint64_t wgmma_matrix(uint32_t address, uint32_t along_k, uint32_t along_lines) {
    return uint64_t(address >> 4 & 0x3fffu) | uint64_t(along_k >> 4 & 0x3fffu) << 16 |
           uint64_t(along_lines >> 4 & 0x3fffu) << 32;
}

// The matrix that lies so many granules, 16 bytes each, behind another.
DEVICE uint64_t wgmma_behind(uint64_t matrix, uint32_t granules) {
    return (matrix >> 32 << 32) | uint32_t(uint32_t(matrix) + granules);
}

#if defined(__CUDACC__)

#define MLNT_WGMMA_16(d)                                                                                                   \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), \
        "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define MLNT_WGMMA_32(d)                                                                                                  \
    MLNT_WGMMA_16(d), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),          \
        "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])

#define MLNT_WGMMA_48(d)                                                                                                  \
    MLNT_WGMMA_32(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]),          \
        "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])

// The `1`s: neither operand is negated.
#define MLNT_WGMMA(type)                                                                                                \
    template <bool A_TRANSPOSED, bool B_TRANSPOSED>                                                                     \
    DEVICE void wgmma_##type(float (&d)[16], uint64_t a, uint64_t b, bool accumulates = true) {                         \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %20, 0; "                                                            \
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32." #type "." #type " {%0, %1, %2, %3, %4, %5, %6, %7, " \
                     "%8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, %18, %19;}"                             \
                     : MLNT_WGMMA_16(d)                                                                                 \
                     : "l"(a), "l"(b), "n"(int(A_TRANSPOSED)), "n"(int(B_TRANSPOSED)), "r"(int(accumulates)));          \
    }                                                                                                                   \
    template <bool A_TRANSPOSED, bool B_TRANSPOSED>                                                                     \
    DEVICE void wgmma_##type(float (&d)[32], uint64_t a, uint64_t b, bool accumulates = true) {                         \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %36, 0; "                                                            \
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32." #type "." #type " {%0, %1, %2, %3, %4, %5, %6, %7, " \
                     "%8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "    \
                     "%27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %34, %35;}"                                          \
                     : MLNT_WGMMA_32(d)                                                                                 \
                     : "l"(a), "l"(b), "n"(int(A_TRANSPOSED)), "n"(int(B_TRANSPOSED)), "r"(int(accumulates)));          \
    }                                                                                                                   \
    template <bool A_TRANSPOSED, bool B_TRANSPOSED>                                                                     \
    DEVICE void wgmma_##type(float (&d)[48], uint64_t a, uint64_t b, bool accumulates = true) {                         \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %52, 0; "                                                            \
                     "wgmma.mma_async.sync.aligned.m64n96k16.f32." #type "." #type " {%0, %1, %2, %3, %4, %5, %6, %7, " \
                     "%8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "    \
                     "%27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
                     "%46, %47}, %48, %49, p, 1, 1, %50, %51;}"                                                         \
                     : MLNT_WGMMA_48(d)                                                                                 \
                     : "l"(a), "l"(b), "n"(int(A_TRANSPOSED)), "n"(int(B_TRANSPOSED)), "r"(int(accumulates)));          \
    }

MLNT_WGMMA(f16)
MLNT_WGMMA(bf16)

#undef MLNT_WGMMA
#undef MLNT_WGMMA_48
#undef MLNT_WGMMA_32
#undef MLNT_WGMMA_16

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all products that were committed.
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Keeps the compiler from using accumulators before, or changing them behind, this place.
template <int REGISTERS>
DEVICE void wgmma_settle(float (&d)[REGISTERS]) {
    for (int i = 0; i < REGISTERS; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }
DEVICE void store_operand(void* to, const uint4& v) { *static_cast<uint4*>(to) = v; }
DEVICE void fence_operands() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#else

template <bool A_TRANSPOSED, bool B_TRANSPOSED, int REGISTERS>
DEVICE void wgmma_f16(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulates = true,
                      simt::Site site = simt::Site::here()) {
    simt::wgmma({simt::Operands::f16, A_TRANSPOSED, B_TRANSPOSED, REGISTERS, a, b, accumulates}, d, site);
}
template <bool A_TRANSPOSED, bool B_TRANSPOSED, int REGISTERS>
DEVICE void wgmma_bf16(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulates = true,
                       simt::Site site = simt::Site::here()) {
    simt::wgmma({simt::Operands::bf16, A_TRANSPOSED, B_TRANSPOSED, REGISTERS, a, b, accumulates}, d, site);
}
DEVICE void wgmma_fence(simt::Site site = simt::Site::here()) { simt::wgmma_fence(site); }
DEVICE void wgmma_commit(simt::Site site = simt::Site::here()) { simt::wgmma_commit(site); }
DEVICE void wgmma_wait(simt::Site site = simt::Site::here()) { simt::wgmma_wait(site); }
template <int REGISTERS>
DEVICE void wgmma_settle(float (&)[REGISTERS]) {}
DEVICE uint32_t shared_address(const void* at) { return simt::shared_address(at); }
DEVICE void store_operand(void* to, const uint4& v, simt::Site site = simt::Site::here()) {
    simt::store_operand(to, v, site);
}
DEVICE void fence_operands() { simt::fence_operands(); }

#endif
