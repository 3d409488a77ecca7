// Backward, version 4: both gradients of one δ, products by `mma.sync`; up to 32 channels on both sides.
//
// A block goes from patch to patch of a branch. It makes δ of a patch and its halo once: dgrad's products read it as in
// version 1, and wgrad's take their taps from it too, so that h needs no halo: the pair of a pixel of h and one of δ is
// met in the patch that has the former. Each warp has eight channels of δ by 32 of h. The sums of dw stay in registers
// for all of the run, and the weights in shared memory.
#define KERNEL_BLOCKS 2
#include "lab_back_patches.cuh"

constexpr int AT_ONCE = 4;  // pieces that a thread loads at a time where it has nothing else to do

DEVICE void tile_of_block(const LabBackParams& p) {
    constexpr uint32_t WEIGHTS = 2 * BACK_SLICE * BACK_SLICE;  // bytes of a tap's
    const uint32_t split = blockIdx.x % uint32_t(p.splits), branch = blockIdx.x / uint32_t(p.splits);
    const int32_t first = lab_part(p, split), last = lab_part(p, split + 1);
    const uint16_t *dy = p.dy + lab_before(p, branch, p.filters), *y = p.y + lab_before(p, branch, p.filters);
    const uint16_t* x = p.x + lab_before(p, branch, p.channels);
    LabDeltas* deltas = shared_memory<LabDeltas>();                         // [K / 4]
    LabNorms* norms = reinterpret_cast<LabNorms*>(deltas + p.filters / 4);  // [C / 4]
    const uint32_t tables = back_factors(p);
    uint32_t* pixels = reinterpret_cast<uint32_t*>(back_at(tables));  // [128]: image, line and column in the patch
    uint32_t* places = pixels + PATCH_PIXELS;                         // [128]: bytes in the halo, of its first tap
    const uint32_t weights = tables + 1024;                           // [9, 32, 32]
    const uint32_t slots = weights + 9 * WEIGHTS;                     // two, of the pixels of h and the halo of δ
    const int32_t thread = int32_t(threadIdx.x), lane = thread % 32, warp = thread / 32, eighth = thread % 4 * 8;
    const LabPixel mine = lab_pixel(p, thread);
    pixels[thread] = uint32_t(mine.image << 16 | mine.down << 8 | mine.across);
    places[thread] = uint32_t(lab_place(p, mine)) * PIXEL_BYTES;
    lab_load_deltas<BACK_THREADS>(p, deltas);
    lab_load_norms<BACK_THREADS>(p, norms);
    for (int32_t tap = 0; tap < 9; ++tap) back_copy_weights<BACK_SLICE>(p, weights + uint32_t(tap) * WEIGHTS, 0, tap, 0, true);
    LabHalo<BACK_THREADS / 4> halo;
    halo.begin(p);
    const uint32_t halos = PATCH_PIXELS * PIXEL_BYTES, slot_bytes = halos + back_bytes(halo.pixels);
    LabPatch patch = lab_patch_of_block(p, first), next = patch;
    int32_t input_at = thread / 4;
    const auto load_delta = [&](const LabHalo<BACK_THREADS / 4>& at) {
        return back_load_delta(dy, y, back_offset(p, next, at, eighth));
    };
    const auto store_delta = [&](uint32_t slot, const BackDelta& piece) {
        const LabDeltas* factors = deltas + (eighth < p.filters ? eighth : 0) / 4;
        const uint32_t to = slot + halos + uint32_t(halo.at) * PIXEL_BYTES + uint32_t(eighth) * 2;
        if (halo.at < halo.pixels) back_store_delta(to, piece, factors);
        halo.next(p);
    };
    const auto pixel_of = [&](int32_t i) -> LabPixel {
        return {int32_t(pixels[i] >> 16), int32_t(pixels[i] >> 8 & 0xff), int32_t(pixels[i] & 0xff)};
    };
    const auto load_input = [&](int32_t at) {
        const uint32_t row = lab_row(p, next, pixel_of(at));
        const bool there = row != NOWHERE && eighth < p.channels;
        return back_load_input(x, there ? row * uint32_t(p.channels) + uint32_t(eighth) : NOWHERE);
    };
    const auto store_input = [&](uint32_t slot, const BackInput& piece) {
        const LabNorms* factors = norms + (eighth < p.channels ? eighth : 0) / 4;
        back_store_input(slot + uint32_t(input_at) * PIXEL_BYTES + uint32_t(eighth) * 2, piece, factors);
        input_at += BACK_THREADS / 4;
    };
    sync_threads();
    while (halo.more()) {
        LabHalo<BACK_THREADS / 4> ahead = halo;
        BackDelta pieces[AT_ONCE];
        for (int i = 0; i < AT_ONCE; ++i) {
            pieces[i] = load_delta(ahead);
            ahead.next(p);
        }
        for (int i = 0; i < AT_ONCE; ++i) store_delta(slots, pieces[i]);
    }
    BackInput inputs[AT_ONCE];
    for (int i = 0; i < AT_ONCE; ++i) inputs[i] = load_input(thread / 4 + i * (BACK_THREADS / 4));
    for (int i = 0; i < AT_ONCE; ++i) store_input(slots, inputs[i]);
    copies_done();
    sync_threads();

    uint32_t taps[5];  // of wgrad: two share a load of matrices, this lane's in each pair
    for (int pair = 0; pair < 5; ++pair) {
        const int32_t tap = 2 * pair + lane / 16 < 9 ? 2 * pair + lane / 16 : 8;
        taps[pair] = uint32_t((2 - tap / 3) * (p.patch_width + 2) + 2 - tap % 3) * PIXEL_BYTES + uint32_t(warp) * 16;
    }
    const uint32_t line_row = back_line_row(uint32_t(lane)), weight_row = weights + back_weight_row<BACK_SLICE>(uint32_t(lane));
    uint32_t rows[2];
    for (int m = 0; m < 2; ++m) rows[m] = halos + places[32 * warp + 16 * m + lane % 16] + uint32_t(lane / 16 * 16);
    float sums[18][4] = {};
    uint32_t slot = slots;
    for (int32_t number = first; number < last; ++number) {
        const bool more = number + 1 < last;
        const uint32_t other = slots + slots + slot_bytes - slot;
        if (more) next = lab_patch_of_block(p, number + 1);
        halo.begin(p);
        input_at = thread / 4;
        float d[8][4] = {};
        ROLLED
        for (int32_t tap = 0; tap < 9; ++tap) {
            // The halo has nine pieces at most.
            const bool loads = more && halo.more();
            BackDelta piece = {};
            if (loads) piece = load_delta(halo);
            const int32_t r = tap / 3, step = (2 - r) * (p.patch_width + 2) + 2 - (tap - 3 * r);
            const uint32_t at = slot + uint32_t(step) * PIXEL_BYTES;
            const uint32_t here[2] = {back_swizzled<PIXEL_BYTES>(rows[0] + at), back_swizzled<PIXEL_BYTES>(rows[1] + at)};
            for (int k = 0; k < BACK_SLICE / 16; ++k) back_add_dgrad<BACK_SLICE>(d, here, weight_row + uint32_t(tap) * WEIGHTS, k);
            if (loads) store_delta(other, piece);
        }
        back_store_dx<BACK_SLICE>(p, p.dx + lab_before(p, branch, p.channels), patch, 0, d, pixel_of);
        ROLLED
        for (int pixel = 0; pixel < PATCH_PIXELS; pixel += 16) {
            const bool loads = more && input_at < PATCH_PIXELS;
            BackInput piece = {};
            if (loads) piece = load_input(input_at);
            back_add_wgrad(sums, slot + line_row + uint32_t(pixel) * PIXEL_BYTES, slot + halos + places[pixel + lane % 16], taps);
            if (loads) store_input(other, piece);
        }
        sync_threads();
        slot = other;
        patch = next;
    }
    // Found again: no register has kept them.
    const uint32_t at_end = again(blockIdx.x), tile = at_end / uint32_t(p.splits);
    if (!lab_sum(p, tile, at_end % uint32_t(p.splits), BACK_THREADS, sums)) return;
    const int32_t own = int32_t(thread_again()), c = own % 32 / 4, k = own / 32 * 8 + own % 4 * 2;
    for (int tap = 0; tap < 9; ++tap) {
        for (int i = 0; i < 2 * 4; ++i) {
            const int32_t of_c = c + i / 2 * 8, of_k = k + i % 2;
            const int64_t at = ((int64_t(tile) * p.filters + of_k) * 9 + tap) * p.channels + of_c;
            if (of_k < p.filters && of_c < p.channels) p.dw[at] = sums[2 * tap + i / 4][i % 4];
        }
    }
}

KERNEL(lab_back4_f16, LabBackParams, 128) { tile_of_block(p); }
