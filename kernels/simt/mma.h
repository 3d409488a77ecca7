// The product of one warp's fragments. Layouts: `platform.cuh`.
#pragma once

#include "simt.h"

namespace simt {

// The registers of all 32 lanes, one row per register. In this order the accumulators are the matrix D [16, 8] itself,
// and rows of A and columns of B are runs of four words.
struct alignas(64) Fragments {
    uint32_t a[4][32];
    uint32_t b[2][32];
    float d[2][32][2];
};

// d += a·b. Products are exact and sums are f32, along k from first to last, then added to d.
void multiply(Operands operands, Fragments& fragments);

}  // namespace simt
