// Version 5: a block goes on from patch to patch.
//
// What is the same for all patches is computed once: where this lane's rows of matrices and its part of the weights lie. The next
// patch's halo comes while the present one computes, as the next slice's does. Where there is but one slice, the weights of all
// taps come once and stay. Batch norm and ReLU as in version 4.
#define KERNEL_BLOCKS 3
#include "lab.cuh"

constexpr int SLICE = 32;
constexpr int PITCH = SLICE + 8;  // elements from a pixel or filter to the next: eight rows meet no bank twice

// The batch norm of a channel.
struct alignas(8) Channel {
    float scale, shift;
};

// Eight channels of a pixel, on their way.
struct Piece {
    uint4 eight;
    bool there;
};
constexpr int IN_FLIGHT = 4;  // pieces that a thread loads at a time where it has nothing else to do

DEVICE uint4 normalised(const uint4& eight, const Channel* norms) {
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
    uint32_t result[4];
    for (int i = 0; i < 4; ++i) {
        const float2 v = f16x2_to_floats(words[i]);
        const Channel a = norms[2 * i], b = norms[2 * i + 1];
        result[i] = floats_to_f16x2(lab_norm(v.x, a.scale, a.shift), lab_norm(v.y, b.scale, b.shift));
    }
    return {result[0], result[1], result[2], result[3]};
}

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
    const bool stays = p.channels <= SLICE;
    const int32_t slots = stays ? 9 : 2;  // for the weights of a tap
    Channel* norms = shared_memory<Channel>();  // [C]
    uint16_t* weights = reinterpret_cast<uint16_t*>(norms + (p.channels + 1) / 2 * 2);  // [slots, WIDTH, PITCH]
    uint16_t* pixels = weights + slots * WIDTH * PITCH;  // [2, pixels of the halo, PITCH]
    const uint32_t tiles = lab_tiles(p, WIDTH);
    const int32_t column = int32_t(blockIdx.x % tiles * WIDTH);
    const int32_t first = int32_t(blockIdx.x / tiles) * p.run;
    const int32_t last = p.patches - first < p.run ? p.patches : first + p.run;
    LabPatch patch = lab_patch(p, uint32_t(first));
    const int32_t thread = int32_t(threadIdx.x), lane = thread % 32, warp = thread / 32, eighth = thread % 4 * 8;
    LabHalo<32> halo;
    halo.begin(p);
    const int32_t halo_place = halo.pixels * PITCH;
    const auto load = [&](const LabHalo<32>& at, const LabPatch& of, int32_t slice) -> Piece {
        const uint32_t from = at.offset(p, of, slice + eighth);
        const bool there = from != NOWHERE;
        return {there ? *reinterpret_cast<const uint4*>(p.x + from) : uint4{}, there};
    };
    const auto store = [&](uint16_t* to, int32_t slice, const Piece& piece) {
        const uint4 eight = piece.there ? normalised(piece.eight, norms + slice + eighth) : uint4{};
        if (halo.at < halo.pixels) *reinterpret_cast<uint4*>(to + halo.at * PITCH + eighth) = eight;
        halo.next(p);
    };
    Weights<WIDTH> matrix;
    matrix.begin(p, column);
    matrix.copy(p, weights, 0, 0);
    if (thread < p.channels) norms[thread] = {p.scale[thread], p.shift[thread]};
    sync_threads();
    while (halo.more()) {
        LabHalo<32> ahead = halo;
        Piece pieces[IN_FLIGHT];
        for (int i = 0; i < IN_FLIGHT; ++i) {
            pieces[i] = load(ahead, patch, 0);
            ahead.next(p);
        }
        for (int i = 0; i < IN_FLIGHT; ++i) store(pixels, 0, pieces[i]);
    }

    const uint16_t* rows[2];
    for (int m = 0; m < 2; ++m) {
        rows[m] = pixels + lab_place(p, lab_pixel(p, 32 * warp + 16 * m + lane % 16)) * PITCH + lane / 16 * 8;
    }
    // Pixels of this thread's part of the result.
    LabPixel at[2][2];
    for (int m = 0; m < 2; ++m) {
        for (int half = 0; half < 2; ++half) at[m][half] = lab_pixel(p, 32 * warp + 16 * m + 8 * half + lane / 4);
    }
    const uint16_t* columns = weights + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
    int32_t weight_slot = 0, slot = 0;
    for (int32_t number = first; number < last; ++number) {
        LabPatch next_patch = patch;
        float d[2][WIDTH / 8][4] = {};
        for (int32_t slice = 0; slice < p.channels; slice += SLICE) {
            // What comes next: a slice of this patch, or the first of the next.
            const bool within = slice + SLICE < p.channels, more = within || number + 1 < last;
            const int32_t next_slice = within ? slice + SLICE : 0;
            if (!within) next_patch = lab_patch(p, uint32_t(number + 1));
            halo.begin(p);
            for (int32_t tap = 0; tap < 9; ++tap) {
                // Behind the barrier all copies of this step are there, and nobody reads the other places any more.
                copies_done();
                sync_threads();
                const int32_t next_weights = weight_slot + 1 < slots ? weight_slot + 1 : 0;
                if (stays ? number == first && tap < 8 : tap < 8 || more) {
                    matrix.copy(p, weights + next_weights * WIDTH * PITCH, tap < 8 ? slice : next_slice, tap < 8 ? tap + 1 : 0);
                }
                const bool loads = more && halo.more();
                Piece piece = {};
                if (loads) piece = load(halo, next_patch, next_slice);
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
                if (loads) store(pixels + (1 - slot) * halo_place, next_slice, piece);
                weight_slot = next_weights;
            }
            slot = 1 - slot;
        }
        for (int m = 0; m < 2; ++m) {
            for (int half = 0; half < 2; ++half) {
                const uint32_t row = lab_row(p, patch, at[m][half]);
                if (row == NOWHERE) continue;
                for (int n = 0; n < WIDTH / 8; ++n) {
                    const uint32_t k = uint32_t(column + 8 * n + lane % 4 * 2);
                    const uint32_t pair = floats_to_f16x2(d[m][n][2 * half], d[m][n][2 * half + 1]);
                    if (k < uint32_t(p.filters)) *reinterpret_cast<uint32_t*>(p.y + row * uint32_t(p.filters) + k) = pair;
                }
            }
        }
        patch = next_patch;
    }
}

KERNEL(lab5_32_f16, LabParams, 128) { conv<32>(p); }
KERNEL(lab5_64_f16, LabParams, 128) { conv<64>(p); }
