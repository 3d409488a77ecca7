// `h = relu(bn(x))` computed again wherever it is read. h is never in memory, and all that read it or its mask must see
// the same bits: they go through these functions, whose every rounding is written out.
#pragma once

#include "platform.cuh"

// `bn(x) = x·scale + shift` in one channel of a branch.
struct BnScaleShift {
    float scale, shift;

    // The batch norm of x, in one rounding.
    DEVICE float apply(float x) const { return fmaf(x, scale, shift); }
    // max(bn(x), 0); not a number stays what it is.
    DEVICE float relu(float x) const {
        const float v = apply(x);
        return 0.0f > v ? 0.0f : v;
    }
    // Whether x passes the ReLU.
    DEVICE bool passes(float x) const { return apply(x) > 0.0f; }
};

// The coefficients from scale `g`, bias `b`, mean and biased variance.
DEVICE BnScaleShift bn_scale_shift(float g, float b, float mean, float variance, float epsilon) {
    const float scale = g / sqrtf(variance + epsilon);
    return {scale, fmaf(-mean, scale, b)};
}
