// Version 2: the part of x that a patch of 128 pixels reaches, its halo, lies in shared memory once for all nine taps.
//
// Of 32 channels at a time. Tap (r, s) of a pixel is a fixed step from its tap (0, 0), so that rows of x are read where
// they lie, by `ldmatrix`; nothing is gathered, and nothing is loaded nine times. Threads load eight channels each.
#include "lab.cuh"

constexpr int SLICE = 32;
constexpr int PITCH = SLICE + 8;  // elements from a pixel or filter to the next: eight rows meet no bank twice

template <int WIDTH>
DEVICE void conv(const LabParams& p) {
    uint16_t* weights = shared_memory<uint16_t>();  // [WIDTH, PITCH]
    uint16_t* pixels = weights + WIDTH * PITCH;     // [pixels of the halo, PITCH]
    const uint32_t tiles = lab_tiles(p, WIDTH);
    const int32_t column = int32_t(blockIdx.x % tiles * WIDTH);
    const LabPatch patch = lab_patch(p, blockIdx.x / tiles);
    const int32_t thread = int32_t(threadIdx.x), lane = thread % 32, warp = thread / 32, eighth = thread % 4 * 8;
    // This lane's rows of matrices: 16 pixels by 16 channels of x, 16 filters by 16 channels of w.
    const uint16_t* rows[2];
    for (int m = 0; m < 2; ++m) {
        rows[m] = pixels + lab_place(p, lab_pixel(p, 32 * warp + 16 * m + lane % 16)) * PITCH + lane / 16 * 8;
    }
    const uint16_t* columns = weights + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;

    float d[2][WIDTH / 8][4] = {};
    for (int32_t slice = 0; slice < p.channels; slice += SLICE) {
        LabHalo<32> halo;
        for (halo.begin(p); halo.more(); halo.next(p)) {
            const uint32_t from = halo.offset(p, patch, slice + eighth);
            const uint4 eight = from != NOWHERE ? *reinterpret_cast<const uint4*>(p.x + from) : uint4{};
            if (halo.at < halo.pixels) *reinterpret_cast<uint4*>(pixels + halo.at * PITCH + eighth) = eight;
        }
        for (int32_t tap = 0; tap < 9; ++tap) {
            for (int i = 0; i < WIDTH / 32; ++i) {
                const int32_t line = thread / 4 + 32 * i, k = column + line, c = slice + eighth;
                const bool there = k < p.filters && c < p.channels;
                const uint16_t* from = p.w + ((k * 9 + tap) * p.channels + c);
                *reinterpret_cast<uint4*>(weights + line * PITCH + eighth) =
                    there ? *reinterpret_cast<const uint4*>(from) : uint4{};
            }
            sync_threads();
            const int32_t step = (tap / 3 * (p.patch_width + 2) + tap % 3) * PITCH;
            for (int k = 0; k < SLICE; k += 16) {
                uint32_t a[2][4];
                for (int m = 0; m < 2; ++m) load_matrices(a[m], rows[m] + step + k);
                for (int n = 0; n < WIDTH / 16; ++n) {
                    uint32_t b[4];
                    load_matrices(b, columns + n * 16 * PITCH + k);
                    for (int m = 0; m < 2; ++m) {
                        mma_m16n8k16_f16(d[m][2 * n], a[m], b);
                        mma_m16n8k16_f16(d[m][2 * n + 1], a[m], b + 2);
                    }
                }
            }
            sync_threads();
        }
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

KERNEL(lab2_32_f16, LabParams, 128) { conv<32>(p); }
KERNEL(lab2_64_f16, LabParams, 128) { conv<64>(p); }
