// Backward, version 1: two roles in one launch, products by `mma.sync`. Cut down from `conv_direct.cu`.
//
// A block of dgrad has a patch of dx: the halo of δ, 32 channels at a time, and a tap's weights for each step, asked
// for two steps before. A block of wgrad has 32 by 32 channels of all taps of dw and a part of the patches: the patch's
// pixels of δ, and the halo of h. Both make δ as they load it.
#define KERNEL_BLOCKS 3
#include "lab_back_patches.cuh"

constexpr int STAGES = 3;     // places for the weights of a tap
constexpr int IN_FLIGHT = 4;  // pieces that a thread loads at a time where it has nothing else to do

template <int WIDTH>
DEVICE void dgrad_of_block(const LabBackParams& p, uint32_t block) {
    constexpr uint32_t WEIGHTS = 2 * WIDTH * BACK_SLICE;  // bytes of a tap's
    const uint32_t tiles = uint32_t(p.channels + WIDTH - 1) / WIDTH;
    const int32_t column = int32_t(block % tiles * WIDTH);
    const uint32_t branch = block / tiles / uint32_t(p.patches);
    const LabPatch patch = lab_patch(p, block / tiles % uint32_t(p.patches));
    const uint16_t *dy = p.dy + lab_before(p, branch, p.filters), *y = p.y + lab_before(p, branch, p.filters);
    LabDeltas* deltas = shared_memory<LabDeltas>();  // [K / 4]
    const uint32_t weights = back_factors(p), halos = weights + STAGES * WEIGHTS;
    const int32_t thread = int32_t(threadIdx.x), lane = thread % 32, warp = thread / 32, eighth = thread % 4 * 8;
    LabHalo<BACK_THREADS / 4> halo;
    halo.begin(p);
    const uint32_t halo_bytes = back_bytes(halo.pixels);
    const auto load = [&](const LabHalo<BACK_THREADS / 4>& at, int32_t slice) {
        return back_load_delta(dy, y, back_offset(p, patch, at, slice + eighth));
    };
    const auto store = [&](uint32_t to, int32_t slice, const BackDelta& piece) {
        // Factors of channels that there are not are not read.
        const LabDeltas* factors = deltas + (slice + eighth < p.filters ? slice + eighth : 0) / 4;
        if (halo.at < halo.pixels) back_store_delta(to + uint32_t(halo.at) * PIXEL_BYTES + uint32_t(eighth) * 2, piece, factors);
        halo.next(p);
    };
    lab_load_deltas<BACK_THREADS>(p, deltas);
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        back_copy_weights<WIDTH>(p, weights + stage * WEIGHTS, 0, stage, column, true);
        copies_commit();
    }
    sync_threads();
    while (halo.more()) {
        LabHalo<BACK_THREADS / 4> ahead = halo;
        BackDelta pieces[IN_FLIGHT];
        for (int i = 0; i < IN_FLIGHT; ++i) {
            pieces[i] = load(ahead, 0);
            ahead.next(p);
        }
        for (int i = 0; i < IN_FLIGHT; ++i) store(halos, 0, pieces[i]);
    }
    uint32_t rows[2];
    for (int m = 0; m < 2; ++m) {
        const int32_t place = lab_place(p, lab_pixel(p, 32 * warp + 16 * m + lane % 16));
        rows[m] = halos + uint32_t(place) * PIXEL_BYTES + uint32_t(lane / 16 * 16);
    }
    const uint32_t weight_row = back_weight_row<WIDTH>(uint32_t(lane));
    uint32_t stage = weights, free_stage = weights + (STAGES - 1) * WEIGHTS, slot = 0;
    float d[2 * WIDTH / 8][4] = {};
    ROLLED
    for (int32_t slice = 0; slice < p.filters; slice += BACK_SLICE) {
        const bool more = slice + BACK_SLICE < p.filters;
        halo.begin(p);
        ROLLED
        for (int32_t tap = 0; tap < 9; ++tap) {
            // Behind the barrier this step's weights are there, and nobody reads those of the step before.
            copies_pending<STAGES - 2>();
            sync_threads();
            const int32_t ahead = tap + STAGES - 1, tap_ahead = ahead < 9 ? ahead : ahead - 9;
            back_copy_weights<WIDTH>(p, free_stage, ahead < 9 ? slice : slice + BACK_SLICE, tap_ahead, column, ahead < 9 || more);
            copies_commit();
            const bool loads = more && halo.more();
            BackDelta piece = {};
            if (loads) piece = load(halo, slice + BACK_SLICE);
            const int32_t r = tap / 3, step = (2 - r) * (p.patch_width + 2) + 2 - (tap - 3 * r);
            const uint32_t at = slot * halo_bytes + uint32_t(step) * PIXEL_BYTES;
            const uint32_t here[2] = {back_swizzled<PIXEL_BYTES>(rows[0] + at), back_swizzled<PIXEL_BYTES>(rows[1] + at)};
            for (int k = 0; k < BACK_SLICE / 16; ++k) back_add_dgrad<WIDTH>(d, here, stage + weight_row, k);
            if (loads) store(halos + (1 - slot) * halo_bytes, slice + BACK_SLICE, piece);
            free_stage = stage;
            stage = stage + WEIGHTS == halos ? weights : stage + WEIGHTS;
        }
        slot = 1 - slot;
    }
    back_store_dx<WIDTH>(p, p.dx + lab_before(p, branch, p.channels), patch, column, d,
                         [&](int32_t i) { return lab_pixel(p, i); });
}

DEVICE void wgrad_of_block(const LabBackParams& p, uint32_t block) {
    const uint32_t across = uint32_t(p.channels + BACK_SLICE - 1) / BACK_SLICE, down = uint32_t(p.filters + BACK_SLICE - 1) / BACK_SLICE;
    const uint32_t split = block % uint32_t(p.splits), tile = block / uint32_t(p.splits), branch = tile / across / down;
    const int32_t c = int32_t(tile % across) * BACK_SLICE, k = int32_t(tile / across % down) * BACK_SLICE;
    const int32_t first = lab_part(p, split), last = lab_part(p, split + 1);
    const uint16_t *dy = p.dy + lab_before(p, branch, p.filters), *y = p.y + lab_before(p, branch, p.filters);
    const uint16_t* x = p.x + lab_before(p, branch, p.channels);
    LabDeltas* deltas = shared_memory<LabDeltas>();                         // [K / 4]
    LabNorms* norms = reinterpret_cast<LabNorms*>(deltas + p.filters / 4);  // [C / 4]
    const uint32_t tables = back_factors(p);
    uint32_t* pixels = reinterpret_cast<uint32_t*>(back_at(tables));  // [128]: image, line and column in the patch
    uint32_t* places = pixels + PATCH_PIXELS;                         // [128]: bytes in the halo, of tap (0, 0)
    const uint32_t slots = tables + 1024;                             // two, of the pixels of δ and the halo of h
    const int32_t thread = int32_t(threadIdx.x), lane = thread % 32, warp = thread / 32, eighth = thread % 4 * 8;
    const LabPixel mine = lab_pixel(p, thread);
    pixels[thread] = uint32_t(mine.image << 16 | mine.down << 8 | mine.across);
    places[thread] = uint32_t(lab_place(p, mine)) * PIXEL_BYTES;
    lab_load_deltas<BACK_THREADS>(p, deltas);
    lab_load_norms<BACK_THREADS>(p, norms);
    LabHalo<BACK_THREADS / 4> halo;
    halo.begin(p);
    const uint32_t halos = PATCH_PIXELS * PIXEL_BYTES, slot_bytes = halos + back_bytes(halo.pixels);
    LabPatch patch = lab_patch_of_block(p, first);
    int32_t delta_at = thread / 4;
    const auto load_delta = [&](int32_t at) {
        const uint32_t pixel = pixels[at];
        const uint32_t row = lab_row(p, patch, {int32_t(pixel >> 16), int32_t(pixel >> 8 & 0xff), int32_t(pixel & 0xff)});
        const bool there = row != NOWHERE && k + eighth < p.filters;
        return back_load_delta(dy, y, there ? row * uint32_t(p.filters) + uint32_t(k + eighth) : NOWHERE);
    };
    const auto store_delta = [&](uint32_t slot, const BackDelta& piece) {
        const LabDeltas* factors = deltas + (k + eighth < p.filters ? k + eighth : 0) / 4;
        back_store_delta(slot + uint32_t(delta_at) * PIXEL_BYTES + uint32_t(eighth) * 2, piece, factors);
        delta_at += BACK_THREADS / 4;
    };
    const auto load_input = [&](const LabHalo<BACK_THREADS / 4>& at) { return back_load_input(x, at.offset(p, patch, c + eighth)); };
    const auto store_input = [&](uint32_t slot, const BackInput& piece) {
        const LabNorms* factors = norms + (c + eighth < p.channels ? c + eighth : 0) / 4;
        const uint32_t to = slot + halos + uint32_t(halo.at) * PIXEL_BYTES + uint32_t(eighth) * 2;
        if (halo.at < halo.pixels) back_store_input(to, piece, factors);
        halo.next(p);
    };
    sync_threads();
    while (halo.more()) {
        LabHalo<BACK_THREADS / 4> ahead = halo;
        BackInput pieces[IN_FLIGHT];
        for (int i = 0; i < IN_FLIGHT; ++i) {
            pieces[i] = load_input(ahead);
            ahead.next(p);
        }
        for (int i = 0; i < IN_FLIGHT; ++i) store_input(slots, pieces[i]);
    }
    BackDelta deltas_ahead[IN_FLIGHT];
    for (int i = 0; i < IN_FLIGHT; ++i) deltas_ahead[i] = load_delta(thread / 4 + i * (BACK_THREADS / 4));
    for (int i = 0; i < IN_FLIGHT; ++i) store_delta(slots, deltas_ahead[i]);
    sync_threads();

    uint32_t taps[5];  // two share a load of matrices: this lane's in each pair
    for (int pair = 0; pair < 5; ++pair) {
        const int32_t tap = 2 * pair + lane / 16 < 9 ? 2 * pair + lane / 16 : 8;
        taps[pair] = uint32_t(tap / 3 * (p.patch_width + 2) + tap % 3) * PIXEL_BYTES + uint32_t(warp) * 16;
    }
    const uint32_t line_row = back_line_row(uint32_t(lane));
    float d[18][4] = {};
    uint32_t slot = slots;
    for (int32_t number = first; number < last; ++number) {
        const bool more = number + 1 < last;
        const uint32_t other = slots + slots + slot_bytes - slot;
        if (more) patch = lab_patch_of_block(p, number + 1);
        halo.begin(p);
        delta_at = thread / 4;
        ROLLED
        for (int pixel = 0; pixel < PATCH_PIXELS; pixel += 16) {
            const bool loads_input = more && halo.more(), loads_delta = more && delta_at < PATCH_PIXELS;
            BackInput input = {};
            BackDelta delta = {};
            if (loads_input) input = load_input(halo);
            if (loads_delta) delta = load_delta(delta_at);
            back_add_wgrad(d, slot + line_row + uint32_t(pixel) * PIXEL_BYTES, slot + halos + places[pixel + lane % 16], taps);
            if (loads_input) store_input(other, input);
            if (loads_delta) store_delta(other, delta);
        }
        if (more) {
            while (halo.more()) store_input(other, load_input(halo));
        }
        sync_threads();
        slot = other;
    }
    if (!lab_sum(p, tile, split, BACK_THREADS, d)) return;
    const int32_t own = int32_t(thread_again()), row = k + own % 32 / 4, in_slice = c + own / 32 * 8 + own % 4 * 2;
    for (int tap = 0; tap < 9; ++tap) {
        for (int m = 0; m < 2; ++m) {
            for (int half = 0; half < 2; ++half) {
                const float* of = d[2 * tap + m] + 2 * half;
                lab_store_pair(p, branch, row + 16 * m + 8 * half, tap, in_slice, of[0], of[1]);
            }
        }
    }
}

template <int WIDTH>
DEVICE void roles(const LabBackParams& p) {
    uint32_t block;
    if (lab_is_wgrad(p, block)) {
        wgrad_of_block(p, block);
    } else {
        dgrad_of_block<WIDTH>(p, block);
    }
}

KERNEL(lab_back1_32_f16, LabBackParams, 128) { roles<32>(p); }
KERNEL(lab_back1_64_f16, LabBackParams, 128) { roles<64>(p); }
