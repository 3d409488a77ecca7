// Patches of 128 pixels in shared memory, of the backward's versions with `mma.sync`: 32 channels of a pixel are a line
// of 64 bytes.
#pragma once

#include "lab_back.cuh"

constexpr int BACK_THREADS = 128, BACK_SLICE = 32;
constexpr int PATCH_PIXELS = 128;
constexpr uint32_t PIXEL_BYTES = 2 * BACK_SLICE;

// Byte `at` of shared memory, in lines of LINE bytes, lies at `swizzled(at)`: pieces of 16 bytes change places in their
// line with the number of the 128 bytes where they are, so that neither a matrix as it is loaded nor pieces that eight
// threads store meet a bank twice. Where `at` goes on by eight lines, or piece i becomes piece i ^ j, so does what is
// made of it.
template <uint32_t LINE>
DEVICE uint32_t back_swizzled(uint32_t at) {
    return at ^ (at >> 3 & (LINE - 16));
}
DEVICE uint16_t* back_at(uint32_t at) { return reinterpret_cast<uint16_t*>(shared_memory<unsigned char>() + at); }

// Pixels, in bytes, to a multiple of eight lines.
DEVICE uint32_t back_bytes(int32_t pixels) { return uint32_t(pixels + 7) / 8 * (8 * PIXEL_BYTES); }

// Where what comes behind the factors begins.
DEVICE uint32_t back_factors(const LabBackParams& p) { return uint32_t(16 * p.filters + 8 * p.channels + 1023) / 1024 * 1024; }

// The element of dy and y, from `channel` on, of a halo's next pixel; NOWHERE if they do not have it.
DEVICE uint32_t back_offset(const LabBackParams& p, const LabPatch& patch, const LabHalo<BACK_THREADS / 4>& halo, int32_t channel) {
    const int32_t n = patch.image + halo.image, h = patch.down + halo.down - 1, w = patch.across + halo.across - 1;
    const bool there = halo.at < halo.pixels && n < p.images && uint32_t(h) < uint32_t(p.height) && uint32_t(w) < uint32_t(p.width) &&
                       channel < p.filters;
    const uint32_t row = (uint32_t(n) * uint32_t(p.height) + uint32_t(h)) * uint32_t(p.width) + uint32_t(w);
    return there ? row * uint32_t(p.filters) + uint32_t(channel) : NOWHERE;
}

// Eight channels of a pixel, on their way: of dy and y, or of x.
struct BackDelta {
    uint4 dy, y;
    bool there;
};
struct BackInput {
    uint4 x;
    bool there;
};

DEVICE BackDelta back_load_delta(const uint16_t* dy, const uint16_t* y, uint32_t from) {
    if (from == NOWHERE) return {{}, {}, false};
    return {*reinterpret_cast<const uint4*>(dy + from), *reinterpret_cast<const uint4*>(y + from), true};
}
DEVICE BackInput back_load_input(const uint16_t* x, uint32_t from) {
    if (from == NOWHERE) return {{}, false};
    return {*reinterpret_cast<const uint4*>(x + from), true};
}
DEVICE void back_store_delta(uint32_t to, const BackDelta& piece, const LabDeltas* factors) {
    uint4 eight[1] = {piece.dy};
    const uint4 y[1] = {piece.y};
    const bool there[1] = {piece.there};
    lab_make_deltas(eight, y, there, factors);
    *reinterpret_cast<uint4*>(back_at(back_swizzled<PIXEL_BYTES>(to))) = eight[0];
}
DEVICE void back_store_input(uint32_t to, const BackInput& piece, const LabNorms* factors) {
    uint4 eight[1] = {piece.x};
    const bool there[1] = {piece.there};
    lab_make_norms(eight, there, factors);
    *reinterpret_cast<uint4*>(back_at(back_swizzled<PIXEL_BYTES>(to))) = eight[0];
}

// Adds the products of 16 channels of δ, the k-th of a slice, to a warp's 32 pixels of dx. `rows`: this lane's rows of
// the first matrices; `weights`: that of a tap's, [32, WIDTH].
template <int WIDTH>
DEVICE void back_add_dgrad(float (&d)[2 * WIDTH / 8][4], const uint32_t (&rows)[2], uint32_t weights, int k) {
    uint32_t a[2][4];
    for (int m = 0; m < 2; ++m) load_matrices(a[m], back_at(rows[m] ^ 32 * k));
    for (int n = 0; n < WIDTH / 16; ++n) {
        uint32_t b[4];
        load_matrices_transposed(b, back_at((weights ^ 32 * n) + k * 16 * (2 * WIDTH)));
        for (int m = 0; m < 2; ++m) {
            mma_m16n8k16_f16(d[m * (WIDTH / 8) + 2 * n], a[m], b);
            mma_m16n8k16_f16(d[m * (WIDTH / 8) + 2 * n + 1], a[m], b + 2);
        }
    }
}
// This lane's row of the first matrices of a tap's weights.
template <int WIDTH>
DEVICE uint32_t back_weight_row(uint32_t lane) {
    return back_swizzled<2 * WIDTH>((lane / 8 % 2 * 8 + lane % 8) * 2 * WIDTH + lane / 16 * 16);
}
// Granules of a tap's weights that come to [32, WIDTH] at `to`; zeros where they are not `wanted`.
template <int WIDTH>
DEVICE void back_copy_weights(const LabBackParams& p, uint32_t to, int32_t slice, int32_t tap, int32_t column,
                              bool wanted) {
    for (int i = 0; i < WIDTH / 32; ++i) {
        const int32_t number = int32_t(threadIdx.x) + i * BACK_THREADS;
        const int32_t k = slice + number / (WIDTH / 8), c = column + number % (WIDTH / 8) * 8;
        const bool there = wanted && k < p.filters && c < p.channels;
        const uint16_t* from = there ? p.w + uint32_t((k * 9 + tap) * p.channels + c) : p.w;
        copy_async(back_at(to + back_swizzled<2 * WIDTH>(uint32_t(number) * 16)), from, there);
    }
}
// A warp's part of dx of a patch; `pixel(i)`: where its pixel i is.
template <int WIDTH, class Pixel>
DEVICE void back_store_dx(const LabBackParams& p, uint16_t* dx, const LabPatch& patch, int32_t column,
                          const float (&d)[2 * WIDTH / 8][4], Pixel pixel) {
    const int32_t thread = int32_t(thread_again()), lane = thread % 32;
    for (int m = 0; m < 2; ++m) {
        for (int half = 0; half < 2; ++half) {
            const uint32_t row = lab_row(p, patch, pixel(thread / 32 * 32 + 16 * m + 8 * half + lane / 4));
            if (row == NOWHERE) continue;
            for (int n = 0; n < WIDTH / 8; ++n) {
                const uint32_t c = uint32_t(column + 8 * n + lane % 4 * 2);
                const float* of = d[m * (WIDTH / 8) + n] + 2 * half;
                const uint32_t pair = floats_to_f16x2(of[0], of[1]);
                if (c < uint32_t(p.channels)) *reinterpret_cast<uint32_t*>(dx + row * uint32_t(p.channels) + c) = pair;
            }
        }
    }
}

// Adds the products of 16 pixels to nine taps of 32 channels by a warp's eight, with those 32 as rows: `lines`, this
// lane's row of the matrices of the tensor without taps; `halo`, its pixel's of the other, `taps` further for two taps
// at a time.
DEVICE void back_add_wgrad(float (&d)[18][4], uint32_t lines, uint32_t halo, const uint32_t (&taps)[5]) {
    uint32_t a[2][4];
    for (int m = 0; m < 2; ++m) load_matrices_transposed(a[m], back_at(lines ^ 32 * m));
    for (int pair = 0; pair < 5; ++pair) {
        uint32_t b[4];
        load_matrices_transposed(b, back_at(back_swizzled<PIXEL_BYTES>(halo + taps[pair])));
        for (int m = 0; m < 2; ++m) {
            mma_m16n8k16_f16(d[4 * pair + m], a[m], b);
            if (pair < 4) mma_m16n8k16_f16(d[4 * pair + 2 + m], a[m], b + 2);
        }
    }
}
// This lane's row of the first matrices of the tensor without taps.
DEVICE uint32_t back_line_row(uint32_t lane) {
    return back_swizzled<PIXEL_BYTES>((lane / 16 * 8 + lane % 8) * PIXEL_BYTES + lane / 8 % 2 * 16);
}
