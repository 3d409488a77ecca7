// Backward, version 3: both gradients of one δ, products of warpgroups; up to 32 channels on both sides; sm_90a alone.
//
// A block goes from patch to patch of a branch. It makes δ of a patch and its halo once: dgrad's products read it as in
// version 2, and wgrad's take their taps from it too, so that h needs no halo but for a line below.
//
// A product of wgrad is of two lines of δ, a and a + 1, by two of h, b and b + 1, for each 64 lines and columns: 32
// channels of both. Of a column of taps that is r = 1, 0 and 2, and r = 1 once more, which is left alone: the pair of
// line g of δ and line g + 1 of h is met where g is the patch's. Three products of 32 clocks for 16 pixels take the
// place of six of 24. A warpgroup has its own two cells of both gradients, and the sums of both warpgroups are added up
// when the run is over.
#define KERNEL_SM_90A
#include "lab_back_cells.cuh"

DEVICE void tile_of_cells(const LabBackParams& p) {
    using Weights = BackWeights<CELL_SLICE>;
    const uint32_t split = uniform(blockIdx.x % uint32_t(p.splits)), branch = uniform(blockIdx.x / uint32_t(p.splits));
    const int32_t first = lab_part(p, split), last = lab_part(p, split + 1);
    const uint16_t *dy = p.dy + lab_before(p, branch, p.filters), *y = p.y + lab_before(p, branch, p.filters);
    const uint16_t* x = p.x + lab_before(p, branch, p.channels);
    uint16_t* dx = p.dx + lab_before(p, branch, p.channels);
    const CellArea of_delta(p, p.patch_height + 2, p.patch_width + 2, 1), of_input(p, p.patch_height + 1, p.patch_width, 0);
    LabDeltas* deltas = shared_memory<LabDeltas>();                           // [K / 4]
    LabNorms* norms = reinterpret_cast<LabNorms*>(deltas + p.filters / 4);    // [C / 4]
    uint32_t* pixels = reinterpret_cast<uint32_t*>(norms + p.channels / 4);   // [256]
    CellPlace* delta_places = reinterpret_cast<CellPlace*>(pixels + CELL_PATCH);
    CellPlace* input_places = delta_places + of_delta.places();
    unsigned char* halos = reinterpret_cast<unsigned char*>(input_places + of_input.places());  // two
    unsigned char* inputs = halos + 2 * of_delta.bytes();                                       // two
    unsigned char* weights = inputs + 2 * of_input.bytes();                                     // [9, TAP] granules
    lab_load_deltas<CELL_THREADS>(p, deltas);
    lab_load_norms<CELL_THREADS>(p, norms);
    cell_describe_pixels(p, pixels);
    of_delta.describe(delta_places);
    of_input.describe(input_places);
    sync_threads();
    const auto fill = [&](const LabPatch& of, uint32_t slot) {
        cell_fill<true, CELL_PARTS, 2>(p, of, delta_places, of_delta.pixels, of_delta.border, of_delta.pitch, {dy, y, 0, p.filters}, deltas,
                                    halos + slot * of_delta.bytes());
        cell_fill<false, CELL_PARTS, 3>(p, of, input_places, of_input.pixels, of_input.border, of_input.pitch, {x, nullptr, 0, p.channels},
                                     norms, inputs + slot * of_input.bytes());
        copies_done();
        fence_operands();
    };
    LabPatch patch = lab_patch_of_block(p, first), before = patch;
    Weights::fill(p, 0, 0, weights);
    fill(patch, 0);
    sync_threads();

    const uint32_t group = uniform(threadIdx.x / 128), cells = uint32_t(p.patch_images * p.patch_height * p.patch_width) / 64;
    const uint32_t own_cells = cells > 2 * group ? (cells - 2 * group < 2 ? cells - 2 * group : 2) : 0;
    const uint32_t corners[2] = {uniform(cell_corner(p, of_delta, 2 * group)), uniform(cell_corner(p, of_delta, 2 * group + 1))};
    const uint32_t input_corners[2] = {uniform(cell_corner(p, of_input, 2 * group)), uniform(cell_corner(p, of_input, 2 * group + 1))};
    const uint32_t halo_at = shared_address(halos), line = of_delta.line(), input_line = of_input.line();
    const uint64_t pixels_by_channels = wgmma_matrix(halo_at, of_delta.pitch * GRANULE_BYTES, line * GRANULE_BYTES);
    const uint64_t channels_by_pixels = wgmma_matrix(halo_at, line * GRANULE_BYTES, of_delta.pitch * GRANULE_BYTES);
    const uint64_t input_matrix = wgmma_matrix(shared_address(inputs), input_line * GRANULE_BYTES, of_input.pitch * GRANULE_BYTES);
    const uint64_t weight_matrix = Weights::matrix(weights);
    CellPacked<CELL_SLICE> packed;
    float sums[3][32] = {};  // of a column of taps
    uint32_t slot = 0;
    for (int32_t number = first; number < last; ++number) {
        LabPatch next_patch = patch;
        float d[2][CELL_SLICE / 2] = {};
        for (int m = 0; m < 2; ++m) wgmma_settle(d[m]);
        for (int s = 0; s < 3; ++s) wgmma_settle(sums[s]);
        wgmma_fence();
        const uint32_t halo = slot * (of_delta.bytes() / GRANULE_BYTES), input = slot * (of_input.bytes() / GRANULE_BYTES);
        cell_dgrad<CELL_SLICE>(d, of_delta, wgmma_behind(pixels_by_channels, halo), corners, weight_matrix);
        // A cell that a patch of fewer has not must add nothing.
        ROLLED
        for (uint32_t m = 0; m < own_cells; ++m) {
            const uint32_t at = halo + (m == 0 ? corners[0] : corners[1]) + line;
            const uint32_t input_at = input + (m == 0 ? input_corners[0] : input_corners[1]);
            for (uint32_t l = 0; l < 8; l += 2) {
                const uint64_t matrix = wgmma_behind(input_matrix, input_at + l * input_line);
                for (uint32_t s = 0; s < 3; ++s) {
                    wgmma_f16<true, true>(sums[s], wgmma_behind(channels_by_pixels, at + l * line + 2 - s), matrix);
                }
            }
        }
        wgmma_commit();
        if (number > first) packed.store(p, dx, before, pixels, 0);
        if (number + 1 < last) {
            next_patch = lab_patch_of_block(p, number + 1);
            fill(next_patch, 1 - slot);
        }
        wgmma_wait();
        for (int m = 0; m < 2; ++m) wgmma_settle(d[m]);
        for (int s = 0; s < 3; ++s) wgmma_settle(sums[s]);
        sync_threads();
        packed.pack(d);
        slot = 1 - slot;
        before = patch;
        patch = next_patch;
    }
    packed.store(p, dx, before, pixels, 0);

    // The second warpgroup's sums come to the first through the halos' place.
    const uint32_t own = thread_again();
    float* other = reinterpret_cast<float*>(halos) + own % 128;
    if (own >= 128) {
        UNROLLED
        for (int s = 0; s < 3; ++s) {
            UNROLLED
            for (int i = 0; i < 32; ++i) other[(s * 32 + i) * 128] = sums[s][i];
        }
    }
    sync_threads();
    if (own < 128) {
        UNROLLED
        for (int s = 0; s < 3; ++s) {
            UNROLLED
            for (int i = 0; i < 32; ++i) sums[s][i] += other[(s * 32 + i) * 128];
        }
    }
    // Found again: no register has kept them.
    const uint32_t at_end = again(blockIdx.x), tile = at_end / uint32_t(p.splits);
    if (!lab_sum(p, tile, at_end % uint32_t(p.splits), 128, sums) || own >= 128) return;
    const int32_t first_line = int32_t(own) / 32 * 16 + int32_t(own) % 32 / 4, first_column = int32_t(own) % 4 * 2;
    UNROLLED
    for (int32_t s = 0; s < 3; ++s) {
        UNROLLED
        for (int32_t i = 0; i < 32; i += 2) {
            const int32_t lines = first_line + i % 4 / 2 * 8, columns = first_column + i / 4 * 8;
            const int32_t a = lines / CELL_SLICE, b = columns / CELL_SLICE, k = lines % CELL_SLICE, c = columns % CELL_SLICE;
            if (a == 1 && b == 1) continue;
            lab_store_pair(p, tile, k, 3 * (1 - a + b) + s, c, sums[s][i], sums[s][i + 1]);
        }
    }
}

KERNEL(lab_back3_f16, LabBackParams, 256) { tile_of_cells(p); }
