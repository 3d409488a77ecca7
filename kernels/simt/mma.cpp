#include "mma.h"

#if defined(__x86_64__) && !defined(MLNT_SIMT_PORTABLE)
#include <immintrin.h>
#endif

namespace simt {

// Both versions give the same bits: a product of two 16-bit or tf32 numbers is exact in f32, fused or not, as long as
// it does not fall below f32's smallest number.
namespace portable {
#define TARGET
#include "mma_product.inc"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__) && !defined(MLNT_SIMT_PORTABLE)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define F16C
#include "mma_product.inc"
#undef F16C
#undef TARGET
}  // namespace avx2
#endif

void multiply(Operands operands, Fragments& fragments) {
#if defined(__x86_64__) && !defined(MLNT_SIMT_PORTABLE)
    // Every processor with AVX2 has F16C; not every compiler can ask for it.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::multiply(operands, fragments);
#endif
    portable::multiply(operands, fragments);
}

}  // namespace simt
