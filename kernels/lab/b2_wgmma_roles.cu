// Backward, version 2: two roles in one launch, products of warpgroups. Cut down from `conv_wgmma.cu`; sm_90a alone.
//
// A block of dgrad works as version 7 of the forward does, on the halo of δ. A block of wgrad has six pairs of taps,
// one below the other, of 32 channels of h by WIDTH of δ: lines of its products are the channels of both taps, 64, and
// their depth is two lines of a cell. Three pairs are of a fourth line of taps, which there is not: 12 taps are
// computed for 9.
#define KERNEL_SM_90A
#include "lab_back_cells.cuh"

constexpr int OWN_PAIRS = 3;  // of taps, of a warpgroup

template <int WIDTH>
DEVICE void dgrad_of_cells(const LabBackParams& p, uint32_t block) {
    using Weights = BackWeights<WIDTH>;
    const uint32_t tiles = uint32_t(p.channels + WIDTH - 1) / WIDTH, runs = uint32_t(p.patches + p.run - 1) / uint32_t(p.run);
    const int32_t column = int32_t(block % tiles * WIDTH);
    const uint32_t branch = uniform(block / tiles / runs);
    const int32_t first = int32_t(uniform(block / tiles % runs)) * p.run;
    const int32_t last = p.patches - first < p.run ? p.patches : first + p.run;
    const uint16_t *dy = p.dy + lab_before(p, branch, p.filters), *y = p.y + lab_before(p, branch, p.filters);
    uint16_t* dx = p.dx + lab_before(p, branch, p.channels);
    const CellArea area(p, p.patch_height + 2, p.patch_width + 2, 1);
    const bool stays = p.filters <= CELL_SLICE;
    LabDeltas* deltas = shared_memory<LabDeltas>();                                 // [K / 4]
    uint32_t* pixels = reinterpret_cast<uint32_t*>(deltas + p.filters / 4);         // [256]
    CellPlace* places = reinterpret_cast<CellPlace*>(pixels + CELL_PATCH);          // [area.pixels]
    unsigned char* halos = reinterpret_cast<unsigned char*>(places + area.places());  // two
    unsigned char* weights = halos + 2 * area.bytes();                              // [1 or 2, 9, TAP] granules
    lab_load_deltas<CELL_THREADS>(p, deltas);
    cell_describe_pixels(p, pixels);
    area.describe(places);
    sync_threads();
    const auto fill = [&](const LabPatch& of, int32_t slice, uint32_t slot) {
        cell_fill<true, CELL_PARTS, 2>(p, of, places, area.pixels, area.border, area.pitch, {dy, y, slice, p.filters}, deltas,
                                    halos + slot * area.bytes());
    };
    LabPatch patch = lab_patch_of_block(p, first);
    Weights::fill(p, 0, column, weights);
    fill(patch, 0, 0);
    copies_done();
    fence_operands();
    sync_threads();

    const uint32_t group = uniform(threadIdx.x / 128);
    const uint32_t corners[2] = {uniform(cell_corner(p, area, 2 * group)), uniform(cell_corner(p, area, 2 * group + 1))};
    const uint64_t halo_matrix = wgmma_matrix(shared_address(halos), area.pitch * GRANULE_BYTES, area.line() * GRANULE_BYTES);
    const uint64_t weight_matrix = Weights::matrix(weights);
    CellPacked<WIDTH> packed;
    uint32_t slot = 0, weight_slot = 0;
    LabPatch before = patch;
    for (int32_t number = first; number < last; ++number) {
        LabPatch next_patch = patch;
        float d[2][WIDTH / 2] = {};
        for (int32_t slice = 0; slice < p.filters; slice += CELL_SLICE) {
            // What comes next: a slice of this patch, or the first of the next.
            const bool within = slice + CELL_SLICE < p.filters, more = within || number + 1 < last;
            const int32_t next_slice = within ? slice + CELL_SLICE : 0;
            if (!within) next_patch = lab_patch_of_block(p, number + 1);
            for (int m = 0; m < 2; ++m) wgmma_settle(d[m]);
            wgmma_fence();
            cell_dgrad<WIDTH>(d, area, wgmma_behind(halo_matrix, slot * (area.bytes() / GRANULE_BYTES)), corners,
                              wgmma_behind(weight_matrix, weight_slot * 9 * Weights::TAP));
            wgmma_commit();
            if (slice == 0 && number > first) packed.store(p, dx, before, pixels, column);
            if (more) {
                if (!stays) Weights::fill(p, next_slice, column, weights + (1 - weight_slot) * 9 * Weights::TAP * GRANULE_BYTES);
                fill(next_patch, next_slice, 1 - slot);
                copies_done();
                fence_operands();
            }
            wgmma_wait();
            for (int m = 0; m < 2; ++m) wgmma_settle(d[m]);
            sync_threads();
            slot = 1 - slot;
            if (!stays) weight_slot = 1 - weight_slot;
        }
        packed.pack(d);
        before = patch;
        patch = next_patch;
    }
    packed.store(p, dx, before, pixels, column);
}

template <int WIDTH>
DEVICE void wgrad_of_cells(const LabBackParams& p, uint32_t block) {
    // δ: for each eight channels all pixels of the patch, cell by cell. Stores of eight threads meet no bank twice.
    constexpr uint32_t PARTS = WIDTH / 8, PITCH = CELL_PATCH + (WIDTH == 64 ? 1 : 2), DELTA_BYTES = PARTS * PITCH * GRANULE_BYTES;
    const uint32_t across = uint32_t(p.channels + CELL_SLICE - 1) / CELL_SLICE, down = uint32_t(p.filters + WIDTH - 1) / WIDTH;
    const uint32_t split = uniform(block % uint32_t(p.splits)), tile = uniform(block / uint32_t(p.splits));
    const uint32_t branch = uniform(tile / across / down);
    const int32_t c = int32_t(tile % across) * CELL_SLICE, k = int32_t(tile / across % down) * WIDTH;
    const int32_t first = lab_part(p, split), last = lab_part(p, split + 1);
    const uint16_t *dy = p.dy + lab_before(p, branch, p.filters), *y = p.y + lab_before(p, branch, p.filters);
    const uint16_t* x = p.x + lab_before(p, branch, p.channels);
    const CellArea area(p, p.patch_height + 2, p.patch_width + 2, 1);
    LabDeltas* deltas = shared_memory<LabDeltas>();                             // [K / 4]
    LabNorms* norms = reinterpret_cast<LabNorms*>(deltas + p.filters / 4);      // [C / 4]
    uint32_t* corners = reinterpret_cast<uint32_t*>(norms + p.channels / 4);    // [4], of the cells in a halo
    CellPlace* own_places = reinterpret_cast<CellPlace*>(corners + 4);          // [256], of δ
    CellPlace* places = own_places + CELL_PATCH;                                // [area.pixels], of h
    unsigned char* halos = reinterpret_cast<unsigned char*>(places + area.places());  // two
    // Two; the fourth line of taps reads a line of a halo too far.
    unsigned char* of_delta = halos + 2 * area.bytes();
    lab_load_deltas<CELL_THREADS>(p, deltas);
    lab_load_norms<CELL_THREADS>(p, norms);
    const LabPixel mine = cell_pixel(p, int32_t(threadIdx.x));
    // A pixel that a patch of fewer cells has not is of an image that there is not.
    const uint16_t image = mine.image < p.patch_images ? uint16_t(mine.image) : uint16_t(0xffff);
    own_places[threadIdx.x] = {image, uint16_t(mine.down), uint16_t(mine.across), uint16_t(threadIdx.x)};
    area.describe(places);
    if (threadIdx.x < 4) corners[threadIdx.x] = cell_corner(p, area, threadIdx.x);
    sync_threads();
    const auto fill = [&](const LabPatch& of, uint32_t slot) {
        cell_fill<false, CELL_PARTS, 3>(p, of, places, area.pixels, area.border, area.pitch, {x, nullptr, c, p.channels}, norms,
                                     halos + slot * area.bytes());
        cell_fill<true, int(PARTS), 2>(p, of, own_places, CELL_PATCH, 0, PITCH, {dy, y, k, p.filters}, deltas, of_delta + slot * DELTA_BYTES);
        fence_operands();
    };
    fill(lab_patch_of_block(p, first), 0);
    sync_threads();

    const uint64_t input_matrix = wgmma_matrix(shared_address(halos), area.line() * GRANULE_BYTES, area.pitch * GRANULE_BYTES);
    const uint64_t delta_matrix = wgmma_matrix(shared_address(of_delta), 8 * GRANULE_BYTES, PITCH * GRANULE_BYTES);
    // A warpgroup's pairs are those of its two lines of taps.
    const uint32_t lines = uniform(threadIdx.x / 128) * 2 * area.line();
    float d[OWN_PAIRS][WIDTH / 2] = {};
    uint32_t slot = 0;
    for (int32_t number = first; number < last; ++number) {
        for (int pair = 0; pair < OWN_PAIRS; ++pair) wgmma_settle(d[pair]);
        wgmma_fence();
        ROLLED
        for (uint32_t cell = 0; cell < 4; ++cell) {
            const uint32_t at = slot * (area.bytes() / GRANULE_BYTES) + uniform(corners[cell]) + lines;
            const uint32_t delta = slot * (DELTA_BYTES / GRANULE_BYTES) + cell * 64;
            for (uint32_t line = 0; line < 8; line += 2) {
                for (int pair = 0; pair < OWN_PAIRS; ++pair) {
                    wgmma_f16<true, true>(d[pair], wgmma_behind(input_matrix, at + line * area.line() + uint32_t(pair)),
                                          wgmma_behind(delta_matrix, delta + line * 8));
                }
            }
        }
        wgmma_commit();
        if (number + 1 < last) fill(lab_patch_of_block(p, number + 1), 1 - slot);
        wgmma_wait();
        for (int pair = 0; pair < OWN_PAIRS; ++pair) wgmma_settle(d[pair]);
        sync_threads();
        slot = 1 - slot;
    }
    if (!lab_sum(p, tile, split, CELL_THREADS, d)) return;
    const int32_t own = int32_t(thread_again()), line = own % 128 / 32 * 16 + own % 32 / 4;
    UNROLLED
    for (int pair = 0; pair < OWN_PAIRS; ++pair) {
        UNROLLED
        for (int i = 0; i < WIDTH / 2; ++i) {
            const int32_t at = line + i % 4 / 2 * 8, r = own / 128 * 2 + at / CELL_SLICE;
            const int32_t of_c = c + at % CELL_SLICE, of_k = k + i / 4 * 8 + own % 4 * 2 + i % 2;
            const bool there = r < 3 && of_c < p.channels && of_k < p.filters;
            const int64_t to = ((int64_t(branch) * p.filters + of_k) * 9 + 3 * r + pair) * p.channels + of_c;
            if (there) p.dw[to] = d[pair][i];
        }
    }
}

template <int WIDTH>
DEVICE void roles_of_cells(const LabBackParams& p) {
    uint32_t block;
    const bool of_weights = lab_is_wgrad(p, block);
    block = uniform(block);
    if (of_weights) {
        wgrad_of_cells<WIDTH>(p, block);
    } else {
        dgrad_of_cells<WIDTH>(p, block);
    }
}

// The wider has shared memory for one block on a multiprocessor alone.
#undef KERNEL_BLOCKS
#define KERNEL_BLOCKS 2
KERNEL(lab_back2_32_f16, LabBackParams, 256) { roles_of_cells<32>(p); }
#undef KERNEL_BLOCKS
#define KERNEL_BLOCKS 1
KERNEL(lab_back2_64_f16, LabBackParams, 256) { roles_of_cells<64>(p); }
