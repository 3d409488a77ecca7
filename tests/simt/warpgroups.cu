// y [64, 32] = x [64, 32] · w [32, 32], row-major, by one warpgroup: right, in every order of elements, and with each step left out.
#include "platform.cuh"

#include "buffers.h"

enum class Fault { none, wait, proxy_fence, early_fence, barrier, fence, strides, changed, overwritten, commit, stale };

// Bytes from a matrix to the next: along the lines, and along k. The first are padded.
constexpr int LINES_APART = 144, K_APART = 8 * LINES_APART;

// Element (line, k) of an operand of matrices whose rows are lines; transposed, those along k.
DEVICE int place(int line, int k, bool transposed) {
    const int row = transposed ? k % 8 : line % 8, in_row = transposed ? line % 8 : k % 8;
    return (line / 8 * LINES_APART + k / 8 * K_APART + row * 16) / 2 + in_row;
}

// With ANEW the accumulators hold what the first product must not add to.
template <bool A_TRANSPOSED, bool B_TRANSPOSED, Fault FAULT, bool ANEW = false>
DEVICE void product(const Buffers& p) {
    unsigned char* shared = shared_memory<unsigned char>();
    unsigned char* operands[2] = {shared, shared + 4 * K_APART};
    const int thread = int(threadIdx.x);
    // Granule by granule: eight neighbours along k of A's lines and B's columns, or eight lines at one place along k.
    for (int operand = 0; operand < 2; ++operand) {
        const bool transposed = operand == 0 ? A_TRANSPOSED : B_TRANSPOSED;
        const int lines = operand == 0 ? 64 : 32;
        for (int i = thread; i < lines * 4; i += 128) {
            const int line = transposed ? i % (lines / 8) * 8 : i % lines, k = transposed ? i / (lines / 8) : i / lines * 8;
            uint16_t v[8];
            for (int e = 0; e < 8; ++e) {
                const int l = transposed ? line + e : line, at = transposed ? k : k + e;
                v[e] = float_to_f16(operand == 0 ? p.x[l * 32 + at] : p.w[at * 32 + l]);
            }
            uint4 granule;
            __builtin_memcpy(&granule, v, 16);
            void* to = operands[operand] + 2 * place(line, k, transposed);
            if (FAULT == Fault::early_fence && operand == 1) fence_operands();
            store_operand(to, granule);
        }
    }
    if (FAULT != Fault::proxy_fence && FAULT != Fault::early_fence) fence_operands();
    if (FAULT != Fault::barrier) sync_threads();

    float d[16] = {};
    if (ANEW) {
        for (int i = 0; i < 16; ++i) d[i] = float(thread + i);
    }
    const int along_k = FAULT == Fault::strides ? LINES_APART : K_APART;
    const int along_lines = FAULT == Fault::strides ? K_APART / 4 : LINES_APART;
    const uint64_t a = wgmma_matrix(shared_address(operands[0]), along_k, along_lines);
    const uint64_t b = wgmma_matrix(shared_address(operands[1]), K_APART, LINES_APART);
    if (FAULT != Fault::fence) wgmma_fence();
    for (int k = 0; k < 2; ++k) {
        wgmma_f16<A_TRANSPOSED, B_TRANSPOSED>(d, a + k * 2 * K_APART / 16, b + k * 2 * K_APART / 16,
                                              !ANEW || FAULT == Fault::stale || k > 0);
    }
    if (FAULT != Fault::commit) wgmma_commit();
    if (FAULT == Fault::changed && thread == 77) d[5] = 1.0f;
    if (FAULT == Fault::overwritten && thread == 64) store_operand(operands[0] + 2 * place(40, 16, A_TRANSPOSED), {});
    if (FAULT != Fault::wait) wgmma_wait();
    wgmma_settle(d);
    for (int i = 0; i < 16; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
        p.y[row * 32 + column] = d[i];
    }
}

KERNEL(group_right_f16, Buffers, 128) { product<false, false, Fault::none>(p); }
KERNEL(group_transposed_f16, Buffers, 128) { product<true, true, Fault::none>(p); }
KERNEL(group_mixed_f16, Buffers, 128) { product<false, true, Fault::none>(p); }
KERNEL(group_anew_f16, Buffers, 128) { product<false, true, Fault::none, true>(p); }
KERNEL(group_stale_f16, Buffers, 128) { product<false, false, Fault::stale, true>(p); }
KERNEL(group_anew_no_fence_f16, Buffers, 128) { product<false, false, Fault::fence, true>(p); }
KERNEL(group_no_wait_f16, Buffers, 128) { product<false, false, Fault::wait>(p); }
KERNEL(group_no_commit_f16, Buffers, 128) { product<false, false, Fault::commit>(p); }
KERNEL(group_no_proxy_fence_f16, Buffers, 128) { product<false, false, Fault::proxy_fence>(p); }
KERNEL(group_early_proxy_fence_f16, Buffers, 128) { product<false, false, Fault::early_fence>(p); }
KERNEL(group_no_barrier_f16, Buffers, 128) { product<false, false, Fault::barrier>(p); }
KERNEL(group_no_fence_f16, Buffers, 128) { product<false, false, Fault::fence>(p); }
KERNEL(group_strides_f16, Buffers, 128) { product<false, false, Fault::strides>(p); }
KERNEL(group_changed_f16, Buffers, 128) { product<false, false, Fault::changed>(p); }
KERNEL(group_overwritten_f16, Buffers, 128) { product<true, false, Fault::overwritten>(p); }

// What one warpgroup does together; `x` holds zeros.
DEVICE void together(bool differs, bool swizzled, bool beyond, bool adds = true) {
    unsigned char* shared = shared_memory<unsigned char>();
    float d[16] = {};
    uint64_t a = wgmma_matrix(shared_address(shared + (beyond ? 1024 : 0)), 128, 128);
    if (differs && threadIdx.x / 32 == 2) a += 1;
    if (swizzled) a |= uint64_t(1) << 62;
    wgmma_fence();
    wgmma_f16<false, false>(d, a, a, adds);
    wgmma_commit();
    wgmma_wait();
    sync_threads();
}

KERNEL(group_differs_f16, Buffers, 128) { together(p.n > 0, false, false); }
KERNEL(group_adds_in_part_f16, Buffers, 128) { together(p.n < 0, false, false, threadIdx.x % 32 < 7); }
KERNEL(group_swizzled_f16, Buffers, 128) { together(p.n < 0, true, false); }
KERNEL(group_beyond_f16, Buffers, 128) { together(p.n < 0, false, true); }
KERNEL(group_in_part_f16, Buffers, 64) { together(p.n < 0, false, false); }
