// 2-D convolutions of 16-bit operands by products of warpgroups (wgmma), for cards of compute capability 9.0: the kernels of
// `conv_direct.cu` with another tile. Forms, operands and blocks: `conv_params.cuh`; patches and halos: `conv_cells.cuh`.
//
// Both operands come from shared memory by descriptors without swizzle. A in registers would take any geometry, but an `ldmatrix`
// for each product, registers that cannot be written while it runs, and as much of shared memory's bandwidth; the layout of the halo takes
// any geometry too, for the price of cells that stick out of small images. There is then nothing in the loop over the taps but
// products, each with two descriptors that are sums of few numbers.
//
// An iteration is a slice of 32 channels with all its taps, 36 products for each warpgroup and a filter of 3 × 3. They run while the next
// slice is loaded: to the other slot, with batch norm and rounding; one fence and one barrier later they are waited for and the next begin.
// What a patch needs of f32 weights is more than the halo, and more than the second-level cache can give to all multiprocessors at
// the tensor cores' speed (9 · 32 · 64 · 4 bytes for 2300 cycles, and 24 bytes a cycle): so a block works on several patches, one after the
// other, and keeps the weights of all its iterations if shared memory has room for them. The blocks are about as many as a
// card runs at a time. The next patch's first halo is loaded during a patch's last products, and what follows those uses the slot that they
// have read. The next patch's first products begin before that where there are registers for two tiles. No tile is cleared: its first products do
// not add to what is there.
//
// A product of 64 × 32 × 16 reads 3 KiB of shared memory in 24 cycles and computes 16; one of 64 × 64 × 16 reads and
// computes 32; one of 64 × 96 × 16 reads 40 and computes 48.
#define KERNEL_SM_90A
#include "conv_cells_tile.cuh"
#include "conv_cells_wgrad.cuh"

template <Form FORM, class Operand, int WIDTH, bool PAIRS>
DEVICE void cells(const ConvProduct& p, const CellTiling& tiling, uint32_t block) {
    using Weights = CellWeights<FORM, Operand, WIDTH>;
    // What follows a product takes twice the shared memory of a block of 64 columns than of one of 32: it is done by halves.
    constexpr int HALVES = WIDTH / 32, OF_GROUP = 2 / HALVES;
    const uint32_t patches = uint32_t(p.row_tiles) / HALVES, runs = (patches + tiling.run - 1) / tiling.run;
    ConvPlace place = {};
    place.column_tile = uniform(block % p.column_tiles);
    block /= p.column_tiles;
    const uint32_t run = uniform(block % runs);
    block /= runs;
    place.split = uniform(block % p.splits);
    place.branch = uniform(block / p.splits);
    const uint32_t first_patch = uniform(run * tiling.run);
    const uint32_t last_patch = uniform(patches - first_patch < uint32_t(tiling.run) ? patches : first_patch + tiling.run);
    const uint64_t iterations = uint64_t(p.inner_tiles) * uint32_t(p.segments);
    const uint32_t first = uniform(uint32_t(iterations * place.split / p.splits));
    const uint32_t all = uniform(uint32_t(iterations * (place.split + 1) / p.splits) - first);
    const uint32_t column = place.column_tile * WIDTH;

    auto& tables = *shared_memory<CellRows>();
    unsigned char* shared = shared_memory<unsigned char>();
    HaloPixel* places = reinterpret_cast<HaloPixel*>(shared + tiling.places);
    const Patch any = patch_of<FORM>(p, 0);
    const CellHalo halo(p, tiling, any.pixel_step);
    const uint64_t image_matrix = wgmma_matrix(shared_address(shared + tiling.halos), uint32_t(tiling.halo_pitch) * GRANULE,
                                               halo.step * halo.line() * GRANULE);
    const uint64_t weight_matrix = Weights::matrix(shared_address(shared + tiling.matrices));

    // Iterations are counted from the first of each patch on, since all patches have the same channels of the same branches, and over all
    // patches: that is `turn`.
    const auto step_of = [&](uint32_t i) { return cell_step(p, place.branch, first + i); };
    const auto term_of = [&](const ConvStep& step) -> const ConvTerm& {
        return FORM == Form::FPROP && step.second ? p.terms[1] : p.terms[0];
    };
    const auto made_of = [&](const ConvStep& step) {
        if (PAIRS && p.image.at && !(FORM == Form::FPROP && step.second)) return Made::PAIR;
        return FORM == Form::FPROP && term_of(step).norm ? Made::NORM : Made::PLAIN;
    };
    const auto describe = [&](uint32_t i, uint32_t slot) {
        const ConvStep step = step_of(i);
        tables.describe_image<FORM, PAIRS>(p, made_of(step), step.branch, step.inner_tile * SLICE, slot);
    };
    // The patch that is loaded and its number; those without taps are passed over. Behind the last there is one that has no products.
    Patch patch = any;
    uint32_t loaded = first_patch;
    // With a slot for each iteration weights are loaded where the phase changes; the products of the iteration before must not read the same
    // slot then.
    const bool keeps = tiling.keeps && (FORM != Form::DGRAD || p.stride == 1 || all > 1);
    bool loads = true;
    int32_t held = -1;  // the phase whose weights were loaded last
    const auto find = [&] {
        for (; loaded < last_patch; ++loaded) {
            patch = cell_patch<FORM>(p, loaded);
            if (FORM != Form::DGRAD || patch.taps_down * patch.taps_across > 0) break;
        }
        if (loaded == last_patch) patch.taps_down = 0;
        const int32_t phase = FORM == Form::DGRAD ? patch.phase_down * p.stride + patch.phase_across : 0;
        loads = !keeps || held != phase;
        held = phase;
    };
    const auto slot_of_weights = [&](uint32_t i, uint32_t turn) { return (keeps ? i : turn % 2) * uint32_t(tiling.matrix_bytes); };
    const auto fill = [&](uint32_t i, uint32_t turn) {
        const ConvStep step = step_of(i);
        const ConvTerm& term = term_of(step);
        const uint32_t slice = step.inner_tile * SLICE;
        const Prologue<Operand, IMAGE_PAIR<FORM>, PAIRS> image = {
            {term.image, step.branch * term.image_branch, term.image_half}, step.branch, made_of(step)};
        load_halo<HELD_OF<WIDTH>>(p, patch, halo, places, image, int32_t(slice), tables.image[turn % 2],
                                  shared + tiling.halos + turn % 2 * tiling.halo_step);
        if (loads) {
            const Source matrix = {term.matrix, step.branch * term.matrix_branch, term.matrix_half};
            Weights::load(p, patch, matrix, column, slice, shared + tiling.matrices + slot_of_weights(i, turn));
        }
        copies_done();
        fence_operands();
    };
    tables.describe(p, halo, place);
    describe_halo(p, halo, any.halo_step, places);
    for (uint32_t i = 0; i < 2; ++i) describe(i % all, i);
    find();
    sync_threads();
    if (loaded < last_patch) fill(0, 0);
    sync_threads();

    CellTile<Operand, WIDTH, 2> tile;
    tile.clear();
    uint32_t turn = 0;
    // The products of iteration `i` of the patch that is loaded, in turn `turn`; the first begin the tile anew.
    const auto start = [&](uint32_t i) {
        uint32_t cell[2];
        for (int m = 0; m < 2; ++m) cell[m] = uniform(tables.cells[thread_again() / 128 * 2 + m]);
        uint32_t line = turn % 2 * uint32_t(tiling.halo_step) / GRANULE;
        uint32_t weights = slot_of_weights(i, turn) / GRANULE;
        // In dgrad taps go up and left.
        if (FORM == Form::DGRAD) line += halo.tap(uint32_t(patch.taps_down) - 1, uint32_t(patch.taps_across) - 1);
        for (int m = 0; m < 2; ++m) wgmma_settle(tile.d[m]);
        wgmma_fence();
        bool accumulates = i > 0;
        for (int32_t down = 0; down < patch.taps_down; ++down) {
            uint32_t at = line, in_pixel = 0;
            ROLLED
            for (int32_t across = 0; across < patch.taps_across; ++across) {
                for (int k = 0; k < SLICE / 16; ++k) {
                    for (int m = 0; m < 2; ++m) {
                        Operand::template wgmma<false, FORM == Form::DGRAD>(
                            tile.d[m], wgmma_behind(image_matrix, at + cell[m] + k * 2 * halo.pitch),
                            wgmma_behind(weight_matrix, weights + k * Weights::SECOND), accumulates || k > 0);
                    }
                }
                accumulates = true;
                weights += Weights::TAP;
                if (FORM == Form::DGRAD) {
                    --at;
                } else {
                    // `CellHalo::column` of the next.
                    at += halo.sorted;
                    if (++in_pixel == halo.step) {
                        at -= halo.step * halo.sorted - 1;
                        in_pixel = 0;
                    }
                }
            }
            line += FORM == Form::DGRAD ? -halo.line() : halo.line();
        }
        wgmma_commit();
    };
    // What follows a patch's products is done while those of the next run, and so in two parts: `stage` takes the tile, of 64 columns one
    // half of it, from the registers, `finish` goes on from shared memory. Between products and the wait for them nothing touches the
    // tile on any way through the loop, or ptxas would wait there.
    using Part = CellTile<Operand, WIDTH, OF_GROUP>;
    // In the slot that the last turn read, and the next but one will be loaded to.
    const auto area = [&]() -> ConvFinish<Part>& {
        return *reinterpret_cast<ConvFinish<Part>*>(shared + tiling.finish + (turn + 1) % 2 * tiling.finish_step);
    };
    const auto place_of = [&](uint32_t number, int half) {
        ConvPlace place = tables.place;
        place.row_tile = HALVES * number + half;
        return place;
    };
    const auto row_of_half = [&](int r, int half) {
        const int cell = r / CELL_PIXELS;
        return tables.rows[(HALVES == 1 ? cell : 2 * cell + half) * CELL_PIXELS + r % CELL_PIXELS];
    };
    const auto stage = [&](uint32_t number, int half, Part& part) {
        return conv_stage<Part>(area(), p, place_of(number, half), part, [&](int r) { return row_of_half(r, half); });
    };
    // The same of a patch without taps, of whose zeros there is nothing to add up.
    const auto stage_zeros = [&](int half) {
        if (tables.place.split > 0) return false;
        ConvFinish<Part>& to = area();
        for (int r = int(thread_again()); r < Part::ROWS; r += Part::THREADS) to.rows[r] = row_of_half(r, half);
        for (int i = int(thread_again()); i < Part::ROWS * ConvFinish<Part>::PITCH; i += Part::THREADS) to.values[i] = 0.0f;
        return true;
    };
    const auto finish = [&](uint32_t number, int half) {
        const ConvPlace place = place_of(number, half);
        conv_finish_staged<Operand, Part, FORM>(area(), p, place, [&](int c) { return place.column_tile * WIDTH + c; });
        sync_threads();  // the area is written to again
    };
    uint32_t next = first_patch, number = loaded, i = 0;  // the patch to be finished; that of the products, and their iteration
    bool computed = FORM != Form::DGRAD, staged = false;  // whether `next` had products; whether there is a part of it to finish
    Part rest;                                            // its second half
    for (;;) {
        start(i);
        for (; i == 0 && next < number; next = uniform(next + 1)) {
            if (FORM == Form::DGRAD && !computed) {
                tables.describe_rows(p, cell_patch<FORM>(p, next));
                sync_threads();
            }
            for (int half = 0; half < HALVES; ++half) {
                if (FORM == Form::DGRAD && !computed) {
                    staged = stage_zeros(half);
                } else if (half > 0) {
                    staged = stage(next, half, rest);
                }
                if (staged) finish(next, half);
            }
            if (FORM == Form::DGRAD) computed = false;
        }
        if (number == last_patch) {
            wgmma_wait();
            for (int m = 0; m < 2; ++m) wgmma_settle(tile.d[m]);
            break;
        }
        if (i == 0) tables.describe_rows(p, patch);
        // Its slot served this turn's halo, which is loaded.
        if (all > 2 && (i + 2 < all || number + 1 < last_patch)) describe(i + 2 < all ? i + 2 : i + 2 - all, turn % 2);
        const bool within = i + 1 < all;
        if (!within) {
            ++loaded;
            find();
        }
        if (within || loaded < last_patch) fill(within ? i + 1 : 0, turn + 1);
        wgmma_wait();
        for (int m = 0; m < 2; ++m) wgmma_settle(tile.d[m]);
        sync_threads();
        ++turn;
        if (++i < all) continue;
        Part part;
        for (int m = 0; m < OF_GROUP; ++m) {
            for (int j = 0; j < WIDTH / 2; ++j) part.d[m][j] = tile.d[m][j];
        }
        if constexpr (HALVES == 2) {
            for (int j = 0; j < WIDTH / 2; ++j) rest.d[0][j] = tile.d[1][j];
        }
        staged = stage(number, 0, part);
        computed = true;
        number = loaded;
        i = 0;
    }
}

template <class Operand, int WIDTH, bool PAIRS>
DEVICE void cells_backward(const CellBackwardParams& p) {
    uint32_t block;
    const bool of_weights = is_wgrad_block(p.both, block);
    block = uniform(block);
    if (of_weights) {
        cells_wgrad<Operand, WIDTH, PAIRS>(p.both.wgrad, p.wgrad, block);
    } else {
        cells<Form::DGRAD, Operand, WIDTH, PAIRS>(p.both.dgrad, p.dgrad, block);
    }
}

// Two blocks of 32 columns fit a multiprocessor, by shared memory and by registers.
#undef KERNEL_BLOCKS
#define KERNEL_BLOCKS 2
KERNEL(conv2d_wgmma_fprop_32_f16, CellParams, 256) { cells<Form::FPROP, F16, 32, false>(p.product, p.tiling, blockIdx.x); }
KERNEL(conv2d_wgmma_fprop_32_bf16, CellParams, 256) { cells<Form::FPROP, Bf16, 32, false>(p.product, p.tiling, blockIdx.x); }
KERNEL(conv2d_wgmma_backward_32_f16, CellBackwardParams, 256) { cells_backward<F16, 32, false>(p); }
KERNEL(conv2d_wgmma_backward_32_bf16, CellBackwardParams, 256) { cells_backward<Bf16, 32, false>(p); }
KERNEL(conv2d_wgmma_fprop_pair_32_f16, CellParams, 256) {
    cells<Form::FPROP, F16, 32, true>(p.product, p.tiling, blockIdx.x);
}
KERNEL(conv2d_wgmma_fprop_pair_32_bf16, CellParams, 256) {
    cells<Form::FPROP, Bf16, 32, true>(p.product, p.tiling, blockIdx.x);
}
KERNEL(conv2d_wgmma_backward_pair_32_f16, CellBackwardParams, 256) { cells_backward<F16, 32, true>(p); }
KERNEL(conv2d_wgmma_backward_pair_32_bf16, CellBackwardParams, 256) { cells_backward<Bf16, 32, true>(p); }

#undef KERNEL_BLOCKS
#define KERNEL_BLOCKS 1
KERNEL(conv2d_wgmma_fprop_64_f16, CellParams, 256) { cells<Form::FPROP, F16, 64, false>(p.product, p.tiling, blockIdx.x); }
KERNEL(conv2d_wgmma_fprop_64_bf16, CellParams, 256) { cells<Form::FPROP, Bf16, 64, false>(p.product, p.tiling, blockIdx.x); }
KERNEL(conv2d_wgmma_fprop_pair_64_f16, CellParams, 256) {
    cells<Form::FPROP, F16, 64, true>(p.product, p.tiling, blockIdx.x);
}
KERNEL(conv2d_wgmma_fprop_pair_64_bf16, CellParams, 256) {
    cells<Form::FPROP, Bf16, 64, true>(p.product, p.tiling, blockIdx.x);
}
KERNEL(conv2d_wgmma_backward_64_f16, CellBackwardParams, 256) { cells_backward<F16, 64, false>(p); }
KERNEL(conv2d_wgmma_backward_64_bf16, CellBackwardParams, 256) { cells_backward<Bf16, 64, false>(p); }
KERNEL(conv2d_wgmma_backward_pair_64_f16, CellBackwardParams, 256) { cells_backward<F16, 64, true>(p); }
KERNEL(conv2d_wgmma_backward_pair_64_bf16, CellBackwardParams, 256) { cells_backward<Bf16, 64, true>(p); }
