// The parameters of all kernels of these tests.
#pragma once

struct Buffers {
    const float* x;  // [n]
    const float* w;  // a second operand, where there is one
    float* y;        // [n]
    int64_t n;
};
