// Both gradients of a convolution from one tile of delta, where a block's registers can hold the gradient of the whole filter: 3 × 3
// taps, a stride of 1, a border of 1, and at most 32 input and 32 output channels.
//
// A block works on a run of patches and on all branches of which the results are sums. For each patch and branch it loads the
// halo of delta and the pixels of x, with all that makes delta and x of given tensors, and takes both products from there:
//
//   dx(h, w)  = Σ_{r,s} δ(h+1−r, w+1−s) · w(r, s)      lines: the patch's pixels
//   dw(r, s)  = Σ_{h,w} δ(h+1−r, w+1−s) · x(h, w)      columns: the output channels of each tap
//
// Both meet delta at the same places, so that x needs no halo; it is zero where the patch goes beyond the image. The pixels of the patches
// are all pixels of the image, each once, and so is what a patch keeps of delta. The gradient of the filter stays in registers over the
// run. Blocks that have the same run of different branches are neighbours: they read the same of what is the same in all.
//
// There is one place for delta, one for x and one for the weights of all taps, which stay there over the run unless they are those of
// several branches. So there are two barriers for each patch and branch, and the products between them are not
// mixed with loads, which the products of a multiprocessor's other blocks hide. What follows the dgrad's product lies where delta and x were.
#pragma once

#include "conv_direct_product.cuh"

constexpr int JOINT_SIDE = 3, JOINT_TAPS = JOINT_SIDE * JOINT_SIDE;
// Chunks that a thread loads at a time, of delta's halo and of x: what the registers have room for.
constexpr int DELTA_FLIGHT = 2;
template <bool PAIRS>
constexpr int X_FLIGHT = PAIRS ? 2 : 4;
constexpr uint32_t JOINT_WEIGHTS = JOINT_TAPS * SLICE * PIXEL;  // bytes of all taps

// A thread's part of the filter's gradient. The four warps have 8 output channels each, with all taps.
template <class Operand>
struct JointTile {
    static constexpr int ROWS = SLICE, COLUMNS = JOINT_TAPS * SLICE, THREADS = DIRECT_THREADS, RUN = 8;
    float d[JOINT_TAPS][2][4];

    DEVICE void clear() {
        for (int t = 0; t < JOINT_TAPS; ++t) {
            for (int m = 0; m < 2; ++m) {
                for (int i = 0; i < 4; ++i) d[t][m][i] = 0.0f;
            }
        }
    }

    template <class F>
    DEVICE void each(F f) {
        const uint32_t thread = again(threadIdx.x);
        const int lane = int(thread % 32), row = int(thread / 32) * 8 + lane % 4 * 2, column = lane / 4;
        for (int t = 0; t < JOINT_TAPS; ++t) {
            for (int m = 0; m < 2; ++m) {
                for (int i = 0; i < 4; ++i) {
                    f((2 * t + m) * 4 + i, row + i % 2, column + SLICE * t + 16 * m + 8 * (i / 2), d[t][m][i]);
                }
            }
        }
    }
};

// A pixel of a patch or of its halo: how many pixels of the tensors lie between the patch's first and it, and where it is: image, line
// and column in a byte each, the latter counted from the halo's first; or no pixel at all.
struct alignas(8) JointPixel {
    static constexpr uint32_t EXISTS = 1u << 24, INTERIOR = 1u << 25;  // the latter: the patch has it, not its border alone
    uint32_t row, at;
};

// The first pixel of a patch; neighbours in an image run fastest.
struct JointPatch {
    int32_t image, down, across;

    DEVICE JointPatch(const ConvProduct& p, uint32_t number) {
        across = int32_t(number % p.patches_across) * p.patch_width;
        number /= p.patches_across;
        down = int32_t(number % p.patches_down) * p.patch_height;
        image = int32_t(number / p.patches_down) * p.patch_images;
    }
    // Whether the image has a pixel, and its number.
    DEVICE bool has(const ConvProduct& p, const JointPixel& pixel, uint32_t& row) const {
        const int32_t n = image + int32_t(pixel.at >> 16 & 0xff);
        const int32_t h = down - 1 + int32_t(pixel.at >> 8 & 0xff), w = across - 1 + int32_t(pixel.at & 0xff);
        row = (uint32_t(image) * uint32_t(p.grid_height) + uint32_t(down)) * uint32_t(p.grid_width) + uint32_t(across) + pixel.row;
        return (pixel.at & JointPixel::EXISTS) && n < p.images && uint32_t(h) < uint32_t(p.grid_height) &&
               uint32_t(w) < uint32_t(p.grid_width);
    }
};

// The beginning of a block's shared memory.
struct JointTables {
    uint32_t arrived;            // `last_to_arrive`
    // Of the block, which has no registers for them: its patches end before `last`. The present patch.
    uint32_t branch, run, last, number;
    JointPatch patch;
    FactorTable<SLICE> delta, x;
    FactorTable<SLICE> sums;    // of the batch norm of which sums are found, with its mean for a slope
    uint32_t places[PATCH];     // where delta's halo has what tap (2, 2) of the patch's pixels reads: bytes, before they are swizzled
    JointPixel pixels[PATCH];
    JointPixel halo[];          // in whole flights

    DEVICE void describe(const ConvProduct& p, uint32_t halo_pixels) {
        const auto pixel = [&](int32_t image, int32_t down, int32_t across, bool exists) -> JointPixel {
            const int32_t row = (image * p.grid_height + down - 1) * p.grid_width + across - 1;
            const bool interior = down > 0 && down <= p.patch_height && across > 0 && across <= p.patch_width;
            const uint32_t at = uint32_t(image) << 16 | uint32_t(down) << 8 | uint32_t(across) | JointPixel::EXISTS |
                                (interior ? JointPixel::INTERIOR : 0);
            return {uint32_t(row), exists ? at : 0};
        };
        const Pixel mine = pixel_of(p, int(threadIdx.x));
        places[threadIdx.x] = place_of(p, mine, 1);
        pixels[threadIdx.x] = pixel(mine.image, mine.down + 1, mine.across + 1, mine.image >= 0);
        for (uint32_t i = threadIdx.x; i < halo_pixels; i += DIRECT_THREADS) {
            const int32_t line = int32_t(i) / p.halo_width, image = line / p.halo_height;
            halo[i] = pixel(image, line - image * p.halo_height, int32_t(i) - line * p.halo_width, image < p.patch_images);
        }
    }
};
static_assert(sizeof(JointTables) == 3104);

// A thread's part of a patch of the input's gradient. What the sums of a batch norm want is found once for a run: roots and quotients are calls,
// and there are no registers for those beside the other gradient.
template <class Operand>
struct JointRows : DirectTile<Operand, SLICE> {};
template <class Operand>
struct SumFlight<JointRows<Operand>> {
    template <class, class Sums>
    static DEVICE void add(const ConvProduct& p, const ConvPlace& place, ConvFinish<JointRows<Operand>>& shared, uint32_t column,
                           Sums& mine) {
        if (p.sums.next_half) {
            sum_rows<Operand, JointRows<Operand>, 4>(p, place, shared, column, 1, mine);
        } else {
            sum_rows<Operand, JointRows<Operand>, 1>(p, place, shared, column, 0, mine);
        }
    }
};
template <class Operand>
struct SumNorms<JointRows<Operand>> {
    template <bool TANGENT, int RUN>
    static DEVICE void find(const ConvProduct&, int64_t, uint32_t column, BnScaleShift (&norm)[RUN], float (&mean)[RUN]) {
        for (int c = 0; c < RUN; c += 4) {
            const FourFactors four = shared_memory<JointTables>()->sums.template four<true>(int(column) + c);
            for (int i = 0; i < 4; ++i) {
                norm[c + i] = four.norm(i);
                mean[c + i] = four.slope[i];
            }
        }
    }
};

// How a block uses its shared memory: bytes from its beginning, where the tables are, multiples of eight lines.
struct JointAreas {
    int32_t weights, x, delta;
    int32_t halo_pixels;  // delta's, in whole flights
};

// `conv2d_direct_joint_*`: the runs of patches are the splits of wgrad.
struct ConvJointParams {
    ConvBackwardParams both;
    JointAreas areas;
};
static_assert(sizeof(ConvJointParams) == 1784);

// Loads pixels of a tensor, or of what is made of it, to lines of shared memory from `to` on. `first`: of the patch; `kept`: where what is
// made of its interior is stored as well, in 16 bits, or null; `keeps`: whether it is stored at all.
template <int FLIGHT, class Operand, class Image>
DEVICE void joint_load(const ConvProduct& p, const ConvPair& pair, const Image& image, const JointPatch& of_patch, uint32_t channels,
                       const JointPixel* pixels, uint32_t count, const FactorTable<SLICE>& factors, uint32_t to, bool keeps) {
    const JointPatch first = of_patch;
    const uint32_t thread = thread_again(), channel = thread % CHUNKS * 8;
    pixels += thread / CHUNKS;
    to = swizzled<PIXEL>(to + thread * 16);
    // Of the pixel `at` further on: whether the tensor has it, and its first element.
    const auto inside = [&](uint32_t at, uint32_t& offset) {
        uint32_t row;
        const bool there = first.has(p, pixels[at], row);
        offset = row * channels + channel;
        return channel < channels && there;
    };
    const auto place = [&](uint32_t at) { return shared_at(to + at * PIXEL); };
    const auto keeps_pixel = [&](uint32_t at) { return keeps && (pixels[at].at & JointPixel::INTERIOR); };
    // Made again for each flight: no registers keep it.
    const auto kept = [&] { return static_cast<uint16_t*>(pair.kept) + again(image.branch) * pair.kept_branch; };
    if (image.plain()) {
        for (uint32_t at = 0; at < count; at += ABREAST) {
            uint32_t offset;
            const bool there = inside(at, offset);
            copy_async(place(at), image.of.place(offset, there), there);
        }
        return;
    }
    if (!image.waits(pair, keeps)) {
        ROLLED
        for (uint32_t at = 0; at < count; at += ABREAST) {
            uint32_t offset;
            const bool there = inside(at, offset), keep = keeps_pixel(at);
            const auto loaded = image.load(pair, keep, offset, there, factors, int(channel), place(at));
            const uint4 coded = image.round(pair, keep, loaded, factors, int(channel), place(at));
            store_operand(place(at), coded);
            if (keep && there && pair.kept_half) *reinterpret_cast<uint4*>(kept() + offset) = coded;
        }
        return;
    }
    const EightFactors<Image::PAIRED, false> eight = {factors, int(channel)};
    ROLLED
    for (uint32_t at = 0; at < count; at += FLIGHT * ABREAST) {
        typename Image::Waiting flight[FLIGHT];
        const auto place_in = [&](int i) { return place(at + uint32_t(i) * ABREAST); };
        UNROLLED
        for (int i = 0; i < FLIGHT; ++i) {
            uint32_t offset;
            const bool there = inside(at + uint32_t(i) * ABREAST, offset);
            flight[i] = image.fetch(pair, offset, there, place_in(i));
        }
        image.round_all(pair, flight, eight, place_in);
        UNROLLED
        for (int i = 0; i < FLIGHT; ++i) store_operand(place_in(i), flight[i].of);
        if (keeps) {
            uint16_t* to = kept();
            UNROLLED
            for (int i = 0; i < FLIGHT; ++i) {
                uint32_t offset;
                const bool there = inside(at + uint32_t(i) * ABREAST, offset);
                if (there && keeps_pixel(at + uint32_t(i) * ABREAST)) *reinterpret_cast<uint4*>(to + offset) = flight[i].of;
            }
        }
    }
}

// Loads the weights of all taps of a branch: [C, K] each, as `Weights` has them. FLIGHT of those of 32 bits are loaded at a time.
template <class Operand, int FLIGHT>
DEVICE void joint_weights(const ConvProduct& p, uint32_t branch, uint32_t to) {
    constexpr int TAP = Weights<Form::DGRAD, Operand, SLICE>::BYTES;
    static_assert(TAP * JOINT_TAPS == JOINT_WEIGHTS && TAP == DIRECT_THREADS * 16);
    const ConvTerm& term = p.terms[0];
    const Source from = {term.matrix, branch * term.matrix_branch, term.matrix_half};
    const uint32_t thread = thread_again(), k = thread / CHUNKS, c = thread % CHUNKS * 8;
    const bool there = k < uint32_t(p.image_channels) && c < uint32_t(p.columns);
    const auto at = [&](int tap) { return k * uint32_t(p.filter) + uint32_t(tap) * uint32_t(p.columns) + c; };
    to = swizzled<PIXEL>(to + thread * 16);
    if (from.half) {
        ROLLED
        for (int tap = 0; tap < JOINT_TAPS; ++tap) copy_async(shared_at(to + tap * TAP), from.place(at(tap), there), there);
        return;
    }
    ROLLED
    for (int first = 0; first < JOINT_TAPS; first += FLIGHT) {
        static_assert(JOINT_TAPS % FLIGHT == 0);
        Chunk wide[FLIGHT];
        UNROLLED
        for (int i = 0; i < FLIGHT; ++i) wide[i] = there ? from.load<Operand>(at(first + i)) : Chunk{};
        UNROLLED
        for (int i = 0; i < FLIGHT; ++i) store_operand(shared_at(to + (first + i) * TAP), chunk_round<Operand>(wide[i], false, true));
    }
}

template <class Operand, bool PAIRS>
DEVICE void direct_joint(const ConvJointParams& params) {
    const ConvProduct &p = params.both.dgrad, &wgrad = params.both.wgrad;
    const uint32_t halo_pixels = uint32_t(params.areas.halo_pixels);
    const uint32_t weights = uint32_t(params.areas.weights), x_at = uint32_t(params.areas.x), delta_at = uint32_t(params.areas.delta);
    auto& tables = *shared_memory<JointTables>();
    const auto patches_before = [&](uint32_t run) {
        return uint32_t(uint64_t(uint32_t(p.row_tiles)) * run / uint32_t(wgrad.splits));
    };
    const uint32_t segments = uint32_t(p.segments);
    const bool weights_stay = segments == 1 || p.terms[0].matrix_branch == 0;

    const Made x_made = PAIRS && wgrad.image.at ? Made::PAIR : wgrad.terms[0].norm ? Made::NORM : Made::PLAIN;
    const Made delta_made = PAIRS && wgrad.matrix.at ? Made::PAIR : Made::PLAIN;
    const auto describe = [&](uint32_t of) {
        const int thread = int(thread_again());
        if (thread < SLICE) {
            put_image<Form::WGRAD, PAIRS>(wgrad, x_made, of, 0, tables.x, thread);
        } else if (PAIRS && thread < 2 * SLICE) {
            put_matrix(wgrad, of, 0, tables.delta, thread - SLICE);
        }
    };
    // The branch of a segment.
    const auto branch_of = [&](uint32_t segment) { return uniform(tables.branch) + segment; };
    const auto load_delta = [&](uint32_t of) {
        const ConvTerm& term = wgrad.terms[0];
        const Prologue<Operand, Pair::DELTA, PAIRS> delta = {
            {term.matrix, of * term.matrix_branch, term.matrix_half}, of, delta_made};
        // Of a delta that is the same in all branches the first stores it.
        const bool keeps = PAIRS && wgrad.matrix.kept && (wgrad.matrix.kept_branch != 0 || of == 0);
        joint_load<DELTA_FLIGHT, Operand>(p, wgrad.matrix, delta, tables.patch, uint32_t(p.image_channels), tables.halo, halo_pixels,
                                          tables.delta, delta_at, keeps);
    };
    const auto load_x = [&](uint32_t of) {
        const ConvTerm& term = wgrad.terms[0];
        const Prologue<Operand, Pair::TANGENT, PAIRS> x = {{term.image, of * term.image_branch, term.image_half}, of, x_made};
        joint_load<X_FLIGHT<PAIRS>, Operand>(p, wgrad.image, x, tables.patch, uint32_t(p.columns), tables.pixels, PATCH, tables.x, x_at, false);
    };
    // By one thread.
    const auto begin = [&](uint32_t number) {
        tables.number = number;
        tables.patch = JointPatch(p, number);
    };
    {
        const uint32_t branch = blockIdx.x % uint32_t(wgrad.branches), run = blockIdx.x / uint32_t(wgrad.branches);
        if (threadIdx.x == 0) {
            tables.branch = branch;
            tables.run = run;
            tables.last = patches_before(run + 1);
            begin(patches_before(run));
        }
        tables.describe(p, halo_pixels);
        describe(branch);
        const uint32_t c = threadIdx.x - 2 * SLICE;
        if (p.sums.next && c < uint32_t(p.columns)) {
            const ConvNorm& norm = p.sums.norm;
            tables.sums.put(int(c), {norm.of(branch, c), norm.mean[branch * norm.mean_branch + c], 0.0f});
        }
        if (weights_stay) joint_weights<Operand, JOINT_TAPS>(p, branch, weights);
    }
    JointTile<Operand> sums;
    sums.clear();
    sync_threads();

    ROLLED
    while (tables.number < tables.last) {
        JointRows<Operand> tile;
        tile.clear();
        ROLLED
        for (uint32_t segment = 0; segment < segments; ++segment) {
            if (!weights_stay) joint_weights<Operand, 1>(p, branch_of(segment), weights);
            load_delta(branch_of(segment));
            load_x(branch_of(segment));
            copies_done();
            sync_threads();
            // The tables are read again behind the next barrier.
            if (segments > 1) describe(branch_of(segment + 1 < segments ? segment + 1 : 0));
            const uint32_t thread = thread_again(), lane = thread % 32, warp = thread / 32;

            // Two taps share a load of matrices: this lane's, in each pair.
            uint32_t tap_offsets[(JOINT_TAPS + 1) / 2];
            for (int pair = 0; pair < (JOINT_TAPS + 1) / 2; ++pair) {
                const uint32_t mine = 2 * pair + lane / 16, tap = mine < JOINT_TAPS ? mine : JOINT_TAPS - 1;
                const uint32_t r = tap / JOINT_SIDE, s = tap % JOINT_SIDE;
                const uint32_t line = (JOINT_SIDE - 1 - r) * uint32_t(p.halo_width) + JOINT_SIDE - 1 - s;
                tap_offsets[pair] = delta_at + line * PIXEL + warp * 16;
            }
            const uint32_t x_row = x_at + swizzled<PIXEL>((lane / 16 * 8 + lane % 8) * PIXEL + lane / 8 % 2 * 16);
            ROLLED
            for (int pixel = 0; pixel < PATCH; pixel += 16) {
                const uint32_t at = tables.places[pixel + lane % 16];
                uint32_t a[2][4];
                for (int m = 0; m < 2; ++m) load_matrices_transposed(a[m], shared_at((x_row + pixel * PIXEL) ^ m * 32));
                for (int pair = 0; pair < (JOINT_TAPS + 1) / 2; ++pair) {
                    uint32_t b[4];
                    load_matrices_transposed(b, shared_at(swizzled<PIXEL>(at + tap_offsets[pair])));
                    for (int m = 0; m < 2; ++m) {
                        Operand::mma(sums.d[2 * pair][m], a[m], b);
                        if (2 * pair + 1 < JOINT_TAPS) Operand::mma(sums.d[2 * pair + 1][m], a[m], b + 2);
                    }
                }
            }

            using Matrix = Weights<Form::DGRAD, Operand, SLICE>;
            uint32_t image_rows[2];
            for (int m = 0; m < 2; ++m) {
                image_rows[m] = delta_at + tables.places[32 * warp + 16 * m + lane % 16] + lane / 16 * 16;
            }
            uint32_t weight_row = weights + Matrix::row(lane);
            ROLLED
            for (int r = 0; r < JOINT_SIDE; ++r) {
                for (int s = 0; s < JOINT_SIDE; ++s) {
                    const uint32_t at = (uint32_t(JOINT_SIDE - 1 - r) * uint32_t(p.halo_width) + uint32_t(JOINT_SIDE - 1 - s)) * PIXEL;
                    const uint32_t rows[2] = {swizzled<PIXEL>(image_rows[0] + at), swizzled<PIXEL>(image_rows[1] + at)};
                    for (int k = 0; k < SLICE / 16; ++k) direct_add<Form::DGRAD, Operand, SLICE>(tile, rows, weight_row, k);
                    weight_row += Matrix::BYTES;
                }
            }
            sync_threads();
        }
        const ConvPlace place = {tables.number, 0, 0, tables.branch};
        const JointPatch patch = tables.patch;
        const auto row = [&](int r) {
            uint32_t row;
            return patch.has(p, tables.pixels[r], row) ? row : NO_ROW;
        };
        auto& finish = *reinterpret_cast<ConvFinish<JointRows<Operand>>*>(shared_memory<unsigned char>() + x_at);
        conv_finish<Operand, JointRows<Operand>, Form::DGRAD>(finish, p, place, tile, row, [](int c) { return uint32_t(c); });
        if (thread_again() == 0) begin(tables.number + 1);
        // What follows is loaded to where the tile was.
        sync_threads();
    }
    const auto row = [&](int k) { return k < wgrad.rows ? uint32_t(k) : NO_ROW; };
    const auto column = [&](int at) {
        const int32_t c = at % SLICE;
        return c < wgrad.image_channels ? uint32_t(at / SLICE * wgrad.image_channels + c) : NO_ROW;
    };
    const ConvPlace place = {0, 0, tables.run, tables.branch};
    // The tables are overwritten.
    sync_threads();
    conv_finish<Operand, JointTile<Operand>, Form::WGRAD>(wgrad, place, sums, row, column);
}
