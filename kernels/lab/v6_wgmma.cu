// Version 6: products of warpgroups, which read their operands from shared memory themselves. sm_90a alone.
//
// A patch has four cells of 8 × 8 pixels, two for each of two warpgroups: the 64 lines of a product. The halo holds, line by
// line and for each eight channels of the slice, the line's pixels, 16 bytes each; so eight neighbours are a matrix of `wgmma`,
// and another tap is another address. The weights of all taps of a slice come at once, and a step is a slice. Batch norm, ReLU and
// runs of patches as in version 5.
#include "lab.cuh"

constexpr int THREADS = 256, SLICE = 32, PARTS = SLICE / 8;
constexpr int GRANULE = 16;   // bytes: eight channels of a pixel or filter
constexpr int IN_FLIGHT = 3;  // pieces of a halo that a thread loads at a time

// The batch norm of a channel.
struct alignas(8) Channel {
    float scale, shift;
};

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

template <int WIDTH>
DEVICE void conv(const LabParams& p) {
    // Granules: from one part to the next and from one line or tap to the next. Two more than a multiple of eight: stores of two
    // pixels, or filters, by eight threads meet no bank twice.
    constexpr uint32_t FILTERS = WIDTH + 2, TAP = PARTS * FILTERS;
    const uint32_t pitch = uint32_t(p.patch_width + 7) / 8 * 8 + 2, line = PARTS * pitch;
    const bool stays = p.channels <= SLICE;
    const uint32_t slots = stays ? 1 : 2, halo_lines = uint32_t(p.patch_images * (p.patch_height + 2));
    Channel* norms = shared_memory<Channel>();  // [C]
    unsigned char* weights = reinterpret_cast<unsigned char*>(norms + (p.channels + 1) / 2 * 2);  // [slots, 9, TAP] granules
    unsigned char* pixels = weights + slots * 9 * TAP * GRANULE;  // [2, halo_lines, line] granules

    const uint32_t tiles = lab_tiles(p, WIDTH);
    const int32_t column = int32_t(blockIdx.x % tiles * WIDTH);
    const int32_t first = int32_t(blockIdx.x / tiles) * p.run;
    const int32_t last = p.patches - first < p.run ? p.patches : first + p.run;
    const int32_t thread = int32_t(threadIdx.x), part = thread % PARTS, group = thread / 128;
    LabPatch patch = lab_patch(p, uint32_t(first));

    const auto fill_weights = [&](int32_t slice, uint32_t slot) {
        const bool inside = slice + part * 8 < p.channels;
        for (int32_t i = thread / PARTS; i < 9 * WIDTH; i += THREADS / PARTS) {
            const int32_t tap = i / WIDTH, k = column + i % WIDTH;
            const bool there = inside && k < p.filters;
            const uint16_t* from = there ? p.w + ((k * 9 + tap) * p.channels + slice + part * 8) : p.w;
            const uint32_t at = (slot * 9 + uint32_t(tap)) * TAP + uint32_t(part) * FILTERS + uint32_t(i % WIDTH);
            copy_async(weights + at * GRANULE, from, there);
        }
    };
    const auto fill_halo = [&](const LabPatch& of, int32_t slice, uint32_t slot) {
        LabHalo<THREADS / PARTS> halo;
        halo.begin(p);
        while (halo.more()) {
            auto ahead = halo;
            uint4 eights[IN_FLIGHT];
            bool there[IN_FLIGHT];
            for (int i = 0; i < IN_FLIGHT; ++i) {
                const uint32_t from = ahead.offset(p, of, slice + part * 8);
                there[i] = from != NOWHERE;
                eights[i] = there[i] ? *reinterpret_cast<const uint4*>(p.x + from) : uint4{};
                ahead.next(p);
            }
            for (int i = 0; i < IN_FLIGHT; ++i) {
                const uint4 eight = there[i] ? normalised(eights[i], norms + slice + part * 8) : uint4{};
                const uint32_t down = slot * halo_lines + uint32_t(halo.image * (p.patch_height + 2) + halo.down);
                const uint32_t at = down * line + uint32_t(part) * pitch + uint32_t(halo.across);
                if (halo.at < halo.pixels) store_operand(pixels + at * GRANULE, eight);
                halo.next(p);
            }
        }
    };
    // Pixel `i` of the patch: of cell i / 64.
    const auto pixel = [&](int32_t i) -> LabPixel {
        const int32_t across = p.patch_width / 8, down = p.patch_height / 8, cells = i / 64 / across;
        return {cells / down, cells % down * 8 + i % 64 / 8, i / 64 % across * 8 + i % 8};
    };

    if (thread < p.channels) norms[thread] = {p.scale[thread], p.shift[thread]};
    sync_threads();
    fill_weights(0, 0);
    fill_halo(patch, 0, 0);
    copies_done();
    fence_operands();
    sync_threads();

    // The first matrices of this warpgroup's cells and of the weights.
    uint64_t images[2];
    LabPixel at[2][2];  // pixels of this thread's part of the result
    for (int m = 0; m < 2; ++m) {
        const int32_t cell = (2 * group + m) * 64;
        const LabPixel corner = pixel(cell);
        // A patch of fewer cells has nothing for these lines.
        const int32_t down = corner.image < p.patch_images ? corner.image * (p.patch_height + 2) + corner.down : 0;
        const uint32_t place = uint32_t(down) * line + uint32_t(corner.across);
        images[m] = wgmma_matrix(shared_address(pixels + place * GRANULE), pitch * GRANULE, line * GRANULE);
        for (int half = 0; half < 2; ++half) at[m][half] = pixel(cell + thread / 32 % 4 * 16 + thread % 32 / 4 + 8 * half);
    }
    const uint64_t matrices = wgmma_matrix(shared_address(weights), FILTERS * GRANULE, 8 * GRANULE);
    uint32_t slot = 0, weight_slot = 0;
    for (int32_t number = first; number < last; ++number) {
        LabPatch next_patch = patch;
        float d[2][WIDTH / 2] = {};
        for (int32_t slice = 0; slice < p.channels; slice += SLICE) {
            // What comes next: a slice of this patch, or the first of the next.
            const bool within = slice + SLICE < p.channels, more = within || number + 1 < last;
            const int32_t next_slice = within ? slice + SLICE : 0;
            if (!within) next_patch = lab_patch(p, uint32_t(number + 1));
            wgmma_fence();
            for (uint32_t tap = 0; tap < 9; ++tap) {
                for (uint32_t k = 0; k < SLICE / 16; ++k) {
                    const uint32_t step = slot * halo_lines * line + tap / 3 * line + tap % 3 + 2 * k * pitch;
                    const uint64_t matrix = matrices + (weight_slot * 9 + tap) * TAP + 2 * k * FILTERS;
                    for (int m = 0; m < 2; ++m) wgmma_f16<false, false>(d[m], images[m] + step, matrix);
                }
            }
            wgmma_commit();
            if (more) {
                if (!stays) fill_weights(next_slice, 1 - weight_slot);
                fill_halo(next_patch, next_slice, 1 - slot);
                copies_done();
                fence_operands();
            }
            wgmma_wait();
            for (int m = 0; m < 2; ++m) wgmma_settle(d[m]);
            sync_threads();
            slot = 1 - slot;
            if (!stays) weight_slot = 1 - weight_slot;
        }
        for (int m = 0; m < 2; ++m) {
            for (int half = 0; half < 2; ++half) {
                const uint32_t row = lab_row(p, patch, at[m][half]);
                if (row == NOWHERE) continue;
                for (int n = 0; n < WIDTH / 8; ++n) {
                    const uint32_t k = uint32_t(column + 8 * n + thread % 4 * 2);
                    const uint32_t pair = floats_to_f16x2(d[m][4 * n + 2 * half], d[m][4 * n + 2 * half + 1]);
                    if (k < uint32_t(p.filters)) *reinterpret_cast<uint32_t*>(p.y + row * uint32_t(p.filters) + k) = pair;
                }
            }
        }
        patch = next_patch;
    }
}

// The wider has shared memory for one block on a multiprocessor alone.
#undef KERNEL_BLOCKS
#define KERNEL_BLOCKS 2
KERNEL(lab6_32_f16, LabParams, 256) { conv<32>(p); }
#undef KERNEL_BLOCKS
#define KERNEL_BLOCKS 1
KERNEL(lab6_64_f16, LabParams, 256) { conv<64>(p); }
