#include "mma.h"

namespace simt {

// Both versions give the same bits: a product of two 16-bit or tf32 numbers is exact in f32, fused or not.
namespace portable {
#define TARGET
#include "mma_product.inc"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
#include "mma_product.inc"
#undef TARGET
}  // namespace avx2
#endif

void multiply(Operands operands, Fragments& fragments) {
#if defined(__x86_64__)
    static const bool fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (fast) return avx2::multiply(operands, fragments);
#endif
    portable::multiply(operands, fragments);
}

}  // namespace simt
