// Mean and squared deviations of a set of numbers, and of the union of two sets.
#pragma once

#include "platform.cuh"

// The mean has a second number for the digits that the first has no room for, so that a large mean costs none of the
// deviations'.
struct Moments {
    float n, mean, rest;
    float squares;  // Σ (v − mean)²

    // Chan, Golub and LeVeque's formula; Knuth's sum keeps what rounding takes from the mean.
    DEVICE void add(const Moments& other) {
        if (other.n == 0.0f) return;
        if (n == 0.0f) {
            *this = other;
            return;
        }
        const float total = n + other.n, part = other.n / total;
        const float apart = (other.mean - mean) + (other.rest - rest), step = apart * part;
        const float sum = mean + step, of_step = sum - mean;
        rest += (mean - (sum - of_step)) + (step - of_step);
        mean = sum;
        squares += other.squares + apart * apart * n * part;
        n = total;
    }
};
static_assert(sizeof(Moments) == 16);

// Those of the numbers `at(i)` for all i below `count` of which `has(i)`, in two passes.
template <class At, class Has>
DEVICE Moments moments_of(int count, At at, Has has) {
    int first = 0;
    while (first < count && !has(first)) ++first;
    if (first == count) return {0.0f, 0.0f, 0.0f, 0.0f};
    const float pivot = at(first);
    float n = 0.0f, sum = 0.0f, squares = 0.0f;
    for (int i = first; i < count; ++i) {
        if (!has(i)) continue;
        n += 1.0f;
        sum += at(i) - pivot;
    }
    const float shift = sum / n;
    for (int i = first; i < count; ++i) {
        if (!has(i)) continue;
        const float d = (at(i) - pivot) - shift;
        squares = fmaf(d, d, squares);
    }
    const float mean = pivot + shift, of_shift = mean - pivot;
    return {n, mean, (pivot - (mean - of_shift)) + (shift - of_shift), squares};
}
