// Version 3: what a step reads comes while the step before it computes.
//
// `cp.async` brings weights and halos to the other of two places in shared memory, without registers on the way; a step is
// a tap, with one barrier. Each step asks for the next one's weights and for a piece of the next 32 channels' halo.
// Three blocks on a multiprocessor are asked for, so that some compute while another waits.
#define KERNEL_BLOCKS 3
#include "lab.cuh"

constexpr int SLICE = 32;
constexpr int PITCH = SLICE + 8;  // elements from a pixel or filter to the next: eight rows meet no bank twice

// The weights of one tap of a slice.
template <int WIDTH>
struct Weights {
    uint32_t at[WIDTH / 32];  // of this thread's filters

    DEVICE void begin(const LabParams& p, int32_t column) {
        for (int i = 0; i < WIDTH / 32; ++i) {
            const int32_t k = column + int32_t(threadIdx.x) / 4 + 32 * i;
            at[i] = k < p.filters ? uint32_t(k * 9 * p.channels) + threadIdx.x % 4 * 8 : NOWHERE;
        }
    }
    DEVICE void copy(const LabParams& p, uint16_t* to, int32_t slice, int32_t tap) const {
        const int32_t eighth = int32_t(threadIdx.x) % 4 * 8;
        for (int i = 0; i < WIDTH / 32; ++i) {
            const bool there = at[i] != NOWHERE && slice + eighth < p.channels;
            const uint16_t* from = there ? p.w + (at[i] + uint32_t(tap * p.channels + slice)) : p.w;
            copy_async(to + (int32_t(threadIdx.x) / 4 + 32 * i) * PITCH + eighth, from, there);
        }
    }
};

template <int WIDTH>
DEVICE void conv(const LabParams& p) {
    uint16_t* weights = shared_memory<uint16_t>();   // [2, WIDTH, PITCH]
    uint16_t* pixels = weights + 2 * WIDTH * PITCH;  // [2, pixels of the halo, PITCH]
    const uint32_t tiles = lab_tiles(p, WIDTH);
    const int32_t column = int32_t(blockIdx.x % tiles * WIDTH);
    const LabPatch patch = lab_patch(p, blockIdx.x / tiles);
    const int32_t thread = int32_t(threadIdx.x), lane = thread % 32, warp = thread / 32, eighth = thread % 4 * 8;
    LabHalo<32> halo;
    halo.begin(p);
    const int32_t halo_place = halo.pixels * PITCH;
    // Copies a piece of a halo, 32 pixels.
    const auto copy = [&](uint16_t* to, int32_t slice) {
        const uint32_t from = halo.offset(p, patch, slice + eighth);
        const bool there = from != NOWHERE;
        if (halo.at < halo.pixels) copy_async(to + halo.at * PITCH + eighth, there ? p.x + from : p.x, there);
        halo.next(p);
    };
    Weights<WIDTH> matrix;
    matrix.begin(p, column);
    while (halo.more()) copy(pixels, 0);
    matrix.copy(p, weights, 0, 0);

    const uint16_t* rows[2];
    for (int m = 0; m < 2; ++m) {
        rows[m] = pixels + lab_place(p, lab_pixel(p, 32 * warp + 16 * m + lane % 16)) * PITCH + lane / 16 * 8;
    }
    const uint16_t* columns = weights + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
    float d[2][WIDTH / 8][4] = {};
    int32_t weight_slot = 0, slot = 0;
    for (int32_t slice = 0; slice < p.channels; slice += SLICE) {
        const bool more = slice + SLICE < p.channels;
        halo.begin(p);
        for (int32_t tap = 0; tap < 9; ++tap) {
            // Behind the barrier all copies of this step are there, and nobody reads the other places any more.
            copies_done();
            sync_threads();
            const int32_t next_slice = tap < 8 ? slice : slice + SLICE, next_tap = tap < 8 ? tap + 1 : 0;
            uint16_t* next = weights + (1 - weight_slot) * WIDTH * PITCH;
            if (next_slice < p.channels) matrix.copy(p, next, next_slice, next_tap);
            if (more && halo.more()) copy(pixels + (1 - slot) * halo_place, slice + SLICE);
            const int32_t step = (tap / 3 * (p.patch_width + 2) + tap % 3) * PITCH + slot * halo_place;
            const uint16_t* matrices = columns + weight_slot * WIDTH * PITCH;
            for (int k = 0; k < SLICE; k += 16) {
                uint32_t a[2][4];
                for (int m = 0; m < 2; ++m) load_matrices(a[m], rows[m] + step + k);
                for (int n = 0; n < WIDTH / 16; ++n) {
                    uint32_t b[4];
                    load_matrices(b, matrices + n * 16 * PITCH + k);
                    for (int m = 0; m < 2; ++m) {
                        mma_m16n8k16_f16(d[m][2 * n], a[m], b);
                        mma_m16n8k16_f16(d[m][2 * n + 1], a[m], b + 2);
                    }
                }
            }
            weight_slot = 1 - weight_slot;
        }
        slot = 1 - slot;
    }
    for (int m = 0; m < 2; ++m) {
        for (int half = 0; half < 2; ++half) {
            const uint32_t row = lab_row(p, patch, lab_pixel(p, 32 * warp + 16 * m + 8 * half + lane / 4));
            if (row == NOWHERE) continue;
            for (int n = 0; n < WIDTH / 8; ++n) {
                const uint32_t k = uint32_t(column + 8 * n + lane % 4 * 2);
                const uint32_t pair = floats_to_f16x2(d[m][n][2 * half], d[m][n][2 * half + 1]);
                if (k < uint32_t(p.filters)) *reinterpret_cast<uint32_t*>(p.y + row * uint32_t(p.filters) + k) = pair;
            }
        }
    }
}

KERNEL(lab3_32_f16, LabParams, 128) { conv<32>(p); }
KERNEL(lab3_64_f16, LabParams, 128) { conv<64>(p); }
