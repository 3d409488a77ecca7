// Version 7: what is the same again is done once, and the tensor cores work while a patch is stored. sm_90a alone.
//
// Version 6 with four differences. Batch norms are read four channels at a time for three pieces of a halo, not for each; where a block
// has a multiprocessor for itself they stay in registers for a slice. Where the pieces of a halo come from and go to is the same for all
// patches but for where the patch begins: it stands in a table. Descriptors are made of numbers that the compiler knows to be
// the same in all lanes. And what a patch comes to is packed to half its registers, and is stored while the next patch's first products run.
#include "lab.cuh"

constexpr int THREADS = 256, SLICE = 32, PARTS = SLICE / 8;
constexpr int GRANULE = 16;   // bytes: eight channels of a pixel or filter
constexpr int IN_FLIGHT = 3;  // pieces of a halo that a thread loads at a time
constexpr int PIXELS = 256;   // of a patch

// A pixel of a halo: counted from the halo's first, and the granule of its first channels in a slot.
struct alignas(8) Place {
    uint16_t image, down, across, granule;
};

// The batch norms of four channels.
struct alignas(16) Four {
    float scale[4], shift[4];
};

// Those of eight, read whenever they are asked for, or held.
template <bool HELD>
struct Eight {
    const Four* from;
    DEVICE Four four(int i) const { return from[i]; }
};
template <>
struct Eight<true> {
    Four held[2];
    DEVICE explicit Eight(const Four* from) : held{from[0], from[1]} {}
    DEVICE const Four& four(int i) const { return held[i]; }
};

DEVICE uint32_t normalised(uint32_t pair, const Four& norms, int i) {
    const float2 v = f16x2_to_floats(pair);
    return floats_to_f16x2(lab_norm(v.x, norms.scale[i], norms.shift[i]), lab_norm(v.y, norms.scale[i + 1], norms.shift[i + 1]));
}

// Its name differs from that of version 6, so that on the host their lambdas do.
template <int WIDTH>
DEVICE void conv_once(const LabParams& p) {
    // Granules: from one part to the next and from one line or tap to the next. Two more than a multiple of eight: stores of two
    // pixels, or filters, by eight threads meet no bank twice.
    constexpr uint32_t FILTERS = WIDTH + 2, TAP = PARTS * FILTERS;
    const uint32_t pitch = uint32_t(p.patch_width + 7) / 8 * 8 + 2, line = PARTS * pitch;
    const bool stays = p.channels <= SLICE;
    const uint32_t slots = stays ? 1 : 2, halo_lines = uint32_t(p.patch_images * (p.patch_height + 2));
    const uint32_t halo_pixels = halo_lines * uint32_t(p.patch_width + 2);
    Four* norms = shared_memory<Four>();                           // [C / 4]
    uint32_t* pixels = reinterpret_cast<uint32_t*>(norms + p.channels / 4);  // [PIXELS] image, line and column in the patch, or NOWHERE
    Place* places = reinterpret_cast<Place*>(pixels + PIXELS);     // [halo_pixels]
    unsigned char* weights = reinterpret_cast<unsigned char*>(places + (halo_pixels + 1) / 2 * 2);  // [slots, 9, TAP] granules
    unsigned char* halos = weights + slots * 9 * TAP * GRANULE;                                     // [2, halo_lines, line] granules

    const uint32_t tiles = lab_tiles(p, WIDTH);
    const int32_t column = int32_t(blockIdx.x % tiles * WIDTH);
    const int32_t first = int32_t(blockIdx.x / tiles) * p.run;
    const int32_t last = p.patches - first < p.run ? p.patches : first + p.run;
    LabPatch patch = lab_patch(p, uint32_t(first));

    const auto fill_weights = [&](int32_t slice, uint32_t slot) {
        const int32_t thread = int32_t(thread_again()), part = thread % PARTS;
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
        const uint32_t thread = thread_again(), part = thread % PARTS, own = thread / PARTS;
        const uint32_t channel = uint32_t(slice) + part * 8;
        // Of channels that there are not nothing is read.
        const int32_t images = channel < uint32_t(p.channels) ? p.images : 0;
        unsigned char* to = halos + (slot * halo_lines * line + part * pitch) * GRANULE;
        const Eight<WIDTH == 64> eight(norms + (images > 0 ? channel / 4 : 0));
        ROLLED
        for (uint32_t at = own; at - own < halo_pixels; at += IN_FLIGHT * THREADS / PARTS) {
            uint4 eights[IN_FLIGHT];
            bool there[IN_FLIGHT];
            uint32_t granules[IN_FLIGHT] = {};
            for (int i = 0; i < IN_FLIGHT; ++i) {
                const uint32_t pixel = at + i * THREADS / PARTS;
                const Place place = places[pixel < halo_pixels ? pixel : 0];
                granules[i] = place.granule;
                const int32_t n = of.image + place.image, h = of.down + place.down - 1, w = of.across + place.across - 1;
                there[i] = pixel < halo_pixels && n < images && uint32_t(h) < uint32_t(p.height) && uint32_t(w) < uint32_t(p.width);
                const uint32_t row = (uint32_t(n) * uint32_t(p.height) + uint32_t(h)) * uint32_t(p.width) + uint32_t(w);
                eights[i] = there[i] ? *reinterpret_cast<const uint4*>(p.x + (row * uint32_t(p.channels) + channel)) : uint4{};
            }
            for (int four = 0; four < 2; ++four) {
                const Four& norm = eight.four(four);
                for (int i = 0; i < IN_FLIGHT; ++i) {
                    uint32_t& low = four == 0 ? eights[i].x : eights[i].z;
                    uint32_t& high = four == 0 ? eights[i].y : eights[i].w;
                    // Cheaper than a branch.
                    const uint32_t mask = there[i] ? 0xffffffffu : 0;
                    low = normalised(low, norm, 0) & mask;
                    high = normalised(high, norm, 2) & mask;
                }
            }
            for (int i = 0; i < IN_FLIGHT; ++i) {
                if (at + i * THREADS / PARTS < halo_pixels) store_operand(to + granules[i] * GRANULE, eights[i]);
            }
        }
    };
    // Pixel `i` of the patch: of cell i / 64.
    const auto pixel = [&](int32_t i) -> LabPixel {
        const int32_t across = p.patch_width / 8, down = p.patch_height / 8, cells = i / 64 / across;
        return {cells / down, cells % down * 8 + i % 64 / 8, i / 64 % across * 8 + i % 8};
    };

    const int32_t thread = int32_t(threadIdx.x);
    if (thread < p.channels) {
        norms[thread / 4].scale[thread % 4] = p.scale[thread];
        norms[thread / 4].shift[thread % 4] = p.shift[thread];
    }
    const LabPixel mine = pixel(thread);
    pixels[thread] = mine.image < p.patch_images ? uint32_t(mine.image << 16 | mine.down << 8 | mine.across) : NOWHERE;
    for (uint32_t at = threadIdx.x; at < halo_pixels; at += THREADS) {
        const uint32_t width = uint32_t(p.patch_width + 2), height = uint32_t(p.patch_height + 2), lines = at / width;
        const uint32_t image = lines / height, across = at - lines * width;
        places[at] = {uint16_t(image), uint16_t(lines - image * height), uint16_t(across), uint16_t(lines * line + across)};
    }
    sync_threads();
    fill_weights(0, 0);
    fill_halo(patch, 0, 0);
    copies_done();
    fence_operands();
    sync_threads();

    // The first matrices of this warpgroup's cells and of the weights.
    uint32_t images[2];
    for (int m = 0; m < 2; ++m) {
        const LabPixel corner = pixel(int32_t(uniform(threadIdx.x / 128)) * 128 + m * 64);
        // A patch of fewer cells has nothing for these lines.
        const int32_t down = corner.image < p.patch_images ? corner.image * (p.patch_height + 2) + corner.down : 0;
        images[m] = uniform(uint32_t(down) * line + uint32_t(corner.across));
    }
    const uint64_t halo_matrix = wgmma_matrix(shared_address(halos), pitch * GRANULE, line * GRANULE);
    const uint64_t weight_matrix = wgmma_matrix(shared_address(weights), FILTERS * GRANULE, 8 * GRANULE);

    // What a patch came to, packed: of cell m, rows 8 · half further down and eight columns n.
    uint32_t packed[2][2][WIDTH / 8];
    const auto store = [&](const LabPatch& of) {
        const uint32_t own = thread_again();
        for (int m = 0; m < 2; ++m) {
            for (int half = 0; half < 2; ++half) {
                const uint32_t at = pixels[own / 128 * 128 + m * 64 + own / 32 % 4 * 16 + own % 32 / 4 + 8 * half];
                const LabPixel in_patch = {int32_t(at >> 16), int32_t(at >> 8 & 0xff), int32_t(at & 0xff)};
                const uint32_t row = at == NOWHERE ? NOWHERE : lab_row(p, of, in_patch);
                if (row == NOWHERE) continue;
                for (int n = 0; n < WIDTH / 8; ++n) {
                    const uint32_t k = uint32_t(column) + 8 * n + own % 4 * 2;
                    uint32_t* to = reinterpret_cast<uint32_t*>(p.y + row * uint32_t(p.filters) + k);
                    if (k < uint32_t(p.filters)) *to = packed[m][half][n];
                }
            }
        }
    };
    uint32_t slot = 0, weight_slot = 0;
    LabPatch before = patch;
    for (int32_t number = first; number < last; ++number) {
        LabPatch next_patch = patch;
        float d[2][WIDTH / 2] = {};
        for (int32_t slice = 0; slice < p.channels; slice += SLICE) {
            // What comes next: a slice of this patch, or the first of the next.
            const bool within = slice + SLICE < p.channels, more = within || number + 1 < last;
            const int32_t next_slice = within ? slice + SLICE : 0;
            if (!within) next_patch = lab_patch(p, uint32_t(number + 1));
            for (int m = 0; m < 2; ++m) wgmma_settle(d[m]);
            wgmma_fence();
            for (uint32_t tap = 0; tap < 9; ++tap) {
                for (uint32_t k = 0; k < SLICE / 16; ++k) {
                    const uint32_t step = slot * halo_lines * line + tap / 3 * line + tap % 3 + 2 * k * pitch;
                    const uint64_t matrix = wgmma_behind(weight_matrix, (weight_slot * 9 + tap) * TAP + 2 * k * FILTERS);
                    for (int m = 0; m < 2; ++m) {
                        wgmma_f16<false, false>(d[m], wgmma_behind(halo_matrix, images[m] + step), matrix);
                    }
                }
            }
            wgmma_commit();
            if (slice == 0 && number > first) store(before);
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
                for (int n = 0; n < WIDTH / 8; ++n) {
                    packed[m][half][n] = floats_to_f16x2(d[m][4 * n + 2 * half], d[m][4 * n + 2 * half + 1]);
                }
            }
        }
        before = patch;
        patch = next_patch;
    }
    store(before);
}

// The wider has shared memory for one block on a multiprocessor alone.
#undef KERNEL_BLOCKS
#define KERNEL_BLOCKS 2
KERNEL(lab7_32_f16, LabParams, 256) { conv_once<32>(p); }
#undef KERNEL_BLOCKS
#define KERNEL_BLOCKS 1
KERNEL(lab7_64_f16, LabParams, 256) { conv_once<64>(p); }
