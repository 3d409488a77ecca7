// The product of pixels of a patch with the weights of a tap, by four warps: fprop and dgrad. See `conv_direct.cu`.
#pragma once

#include "conv_patch.cuh"

// The weights of one tap and slice: [WIDTH, SLICE] in fprop, [SLICE, WIDTH] in dgrad.
template <Form FORM, class Operand, int WIDTH>
struct Weights {
    static constexpr int LINE = 2 * (FORM == Form::FPROP ? SLICE : WIDTH);  // bytes
    static constexpr int BYTES = 2 * WIDTH * SLICE;  // of a place for them
    static constexpr int HELD = WIDTH * SLICE / 8 / DIRECT_THREADS;  // parts, of eight elements for each thread
    static_assert(HELD <= SLICE / 16);
    Source from;
    uint32_t at[HELD];  // of tap (0, 0), or NO_ROW

    // Turns to the weights of a slice; a tap's begin `filter` elements later.
    DEVICE void begin(const ConvProduct& p, const Source& w, uint32_t column, uint32_t slice) {
        from = w;
        for (int i = 0; i < HELD; ++i) {
            const uint32_t number = threadIdx.x + i * DIRECT_THREADS;
            const uint32_t line = number / (LINE / 16), along = number % (LINE / 16) * 8;
            const uint32_t k = FORM == Form::FPROP ? column + line : slice + line;
            const uint32_t c = FORM == Form::FPROP ? slice + along : column + along;
            const bool there = c < channels(p) && k < uint32_t(FORM == Form::FPROP ? p.columns : p.image_channels);
            at[i] = there ? k * uint32_t(p.filter) + c : NO_ROW;
        }
    }
    // C
    static DEVICE uint32_t channels(const ConvProduct& p) {
        return uint32_t(FORM == Form::FPROP ? p.image_channels : p.columns);
    }
    // Part `i` of HELD: its place in one of all, as it is copied there, and as it is loaded and stored.
    static DEVICE uint16_t* place(uint32_t to, int i) {
        static_assert(DIRECT_THREADS * 16 % (8 * LINE) == 0);
        return shared_at(to + swizzled<LINE>(threadIdx.x * 16) + i * DIRECT_THREADS * 16);
    }
    DEVICE void copy(uint32_t filter, uint32_t to, int i) const {
        const bool there = at[i] != NO_ROW;
        copy_async(place(to, i), from.place(at[i] + filter, there), there);
    }
    DEVICE Chunk load(uint32_t filter, int i) const {
        return at[i] != NO_ROW ? from.load<Operand>(at[i] + filter) : Chunk{};
    }
    static DEVICE void store(uint32_t to, int i, const Chunk& wide) {
        store_operand(place(to, i), chunk_round<Operand>(wide, false, true));
    }
    // This lane's row of the first matrices, swizzled.
    static DEVICE uint32_t row(uint32_t lane) {
        const uint32_t line = FORM == Form::FPROP ? lane / 16 * 8 + lane % 8 : lane / 8 % 2 * 8 + lane % 8;
        return swizzled<LINE>(line * LINE + (FORM == Form::FPROP ? lane / 8 % 2 : lane / 16) * 16);
    }
};

// Adds the products of channels 16·k to 16·k + 15 of a slice and tap. `image` and `weights`: where this lane's rows of matrices are,
// of the first channels, and of the first columns.
template <Form FORM, class Operand, int WIDTH>
DEVICE void direct_add(DirectTile<Operand, WIDTH>& tile, const uint32_t image[2], uint32_t weights, int k) {
    constexpr int LINE = Weights<FORM, Operand, WIDTH>::LINE;
    uint32_t a[2][4];
    for (int m = 0; m < 2; ++m) load_matrices(a[m], shared_at(image[m] ^ 32 * k));
    for (int n = 0; n < WIDTH / 16; ++n) {
        uint32_t b[4];
        if constexpr (FORM == Form::FPROP) {
            load_matrices(b, shared_at((weights ^ 32 * k) + n * 16 * LINE));
        } else {
            load_matrices_transposed(b, shared_at((weights ^ 32 * n) + k * 16 * LINE));
        }
        for (int m = 0; m < 2; ++m) {
            Operand::mma(tile.d[m][2 * n], a[m], b);
            Operand::mma(tile.d[m][2 * n + 1], a[m], b + 2);
        }
    }
}
