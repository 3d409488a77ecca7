// Products of warpgroups whose rows are pixels, fprop and dgrad: a thread's part of a patch, and the weights in shared memory. See
// `conv_wgmma.cu`.
#pragma once

#include "conv_cells.cuh"

// A thread's part of the result of both cells of its warpgroup, or of one: a patch, or half of one.
template <class Operand, int WIDTH, int OF_GROUP>
struct CellTile {
    static constexpr int ROWS = 2 * OF_GROUP * CELL_PIXELS, COLUMNS = WIDTH, THREADS = GROUP_THREADS, RUN = 8;
    float d[OF_GROUP][WIDTH / 2];

    DEVICE void clear() {
        for (int m = 0; m < OF_GROUP; ++m) {
            for (int i = 0; i < WIDTH / 2; ++i) d[m][i] = 0.0f;
        }
    }

    template <class F>
    DEVICE void each(F f) {
        const uint32_t thread = thread_again();
        const int lane = int(thread % 32), column = lane % 4 * 2;
        const int row = int(thread / 128) * OF_GROUP * CELL_PIXELS + int(thread % 128 / 32) * 16 + lane / 4;
        for (int m = 0; m < OF_GROUP; ++m) {
            for (int i = 0; i < WIDTH / 2; ++i) {
                f(m * (WIDTH / 2) + i, row + m * CELL_PIXELS + i % 4 / 2 * 8, column + i / 4 * 8 + i % 2, d[m][i]);
            }
        }
    }
};

// The weights of a slice, tap by tap: for each eight input channels of fprop the granules of all WIDTH columns; for each eight columns
// of dgrad those of all channels of the slice. Stores of eight threads meet no bank twice.
template <Form FORM, class Operand, int WIDTH>
struct CellWeights {
    static constexpr bool FPROP = FORM == Form::FPROP;
    static constexpr int LINE = FPROP ? PARTS : WIDTH / 8;                             // granules, neighbours in memory
    static constexpr int PITCH = FPROP ? WIDTH + 2 : SLICE + (WIDTH == 64 ? 1 : 2);  // from one of those to the next
    static constexpr int TAP = LINE * PITCH;
    static constexpr int SECOND = FPROP ? 2 * PITCH : 16;  // from the first 16 channels to the second
    static constexpr int NUMBER = WIDTH * PARTS, ABREAST = GROUP_THREADS / NUMBER;

    static DEVICE uint64_t matrix(uint32_t address) {
        return FPROP ? wgmma_matrix(address, PITCH * GRANULE, 8 * GRANULE) : wgmma_matrix(address, 8 * GRANULE, PITCH * GRANULE);
    }
    // A thread has FLIGHT chunks under way.
    template <int FLIGHT = CELL_FLIGHT>
    static DEVICE void load(const ConvProduct& p, const Patch& patch, const Source& w, uint32_t column, uint32_t slice,
                            unsigned char* slot) {
        const uint32_t thread = thread_again(), number = thread % NUMBER, line = number / LINE, along = number % LINE;
        const uint32_t k = FPROP ? column + line : slice + line, c = (FPROP ? slice : column) + along * 8;
        const uint32_t channels = uint32_t(FPROP ? p.image_channels : p.columns);
        const bool there = c < channels && k < uint32_t(FPROP ? p.columns : p.image_channels);
        const uint32_t from = there ? k * uint32_t(p.filter) + c : 0;
        const int32_t step = FPROP ? 1 : p.stride, taps = patch.taps_down * patch.taps_across;
        slot += (along * PITCH + line) * GRANULE;
        ROLLED
        for (int32_t tap = int32_t(thread) / NUMBER; tap < taps; tap += FLIGHT * ABREAST) {
            Chunk chunks[FLIGHT];
            UNROLLED
            for (int i = 0; i < FLIGHT; ++i) {
                const int32_t t = tap + i * ABREAST, down = t / patch.taps_across, across = t - down * patch.taps_across;
                const int32_t pixel = (patch.phase_down + down * step) * p.kernel_width + patch.phase_across + across * step;
                chunks[i] = there && t < taps ? w.load<Operand>(from + uint32_t(pixel) * channels) : Chunk{};
            }
            for (int i = 0; i < FLIGHT; ++i) {
                const int32_t t = tap + i * ABREAST;
                if (t < taps) store_operand(slot + t * TAP * GRANULE, chunk_round<Operand>(chunks[i], w.half, there));
            }
        }
    }
};
