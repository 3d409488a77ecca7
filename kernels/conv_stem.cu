// 2-D convolutions of 16-bit operands on tensor cores, for images of one to four channels, on which few filters of many channels look:
// the first of a network. Forms, operands and blocks: `conv_params.cuh`; patches: `conv_patch.cuh`; the image: `conv_stem.cuh`.
//
// A pixel of the halo has four channels in 8 bytes, so that an operand's fragment is a load of 8 bytes: the inner dimension of a product
// is in an order of its own, which both operands share. In fprop 16 of it are four taps: thread t of the four that have a row has all
// channels of tap t, the first two as elements 2t and 2t + 1, the others as 2t + 8 and 2t + 9. A filter of 3 × 3 takes three products,
// one of 7 × 7 takes 13. In wgrad the columns of a product are eight taps of one channel: of the four pixels that a thread loads, all
// channels, it makes the fragments of as many products, and those of a channel that there is not are left out.
//
// Nothing can be done to the image as it is loaded, and there is no gradient of it: other forms are left to `conv.cu`.
#define KERNEL_BLOCKS 3
#include "conv_stem_wgrad.cuh"

constexpr int STEM_TAPS = DIRECT_THREADS;  // most taps of fprop
constexpr int STEM_AHEAD = 4;              // weights of taps that a thread loads before it looks at the image

// The beginning of a block's shared memory. Behind it lie the weights, as their fragments are loaded, and the halo.
struct StemRows {
    uint32_t places[PATCH];    // `stem_place_of`
    uint32_t taps[STEM_TAPS];  // `stem_tap`
};
static_assert(sizeof(StemRows) == 1024);

template <class Operand, int WIDTH>
DEVICE void stem_fprop(const ConvProduct& p, uint32_t block) {
    const ConvPlace place = stem_block(p, block);
    const uint32_t segments = uint32_t(p.segments), first = segments * place.split / p.splits;
    const uint32_t count = segments * (place.split + 1) / p.splits - first;
    const Patch patch = patch_of<Form::FPROP>(p, place.row_tile);
    const uint32_t pitch = stem_pitch<Form::FPROP>(p, patch.pixel_step), halo_pixels = stem_pixels(p);
    const uint32_t taps = uint32_t(p.kernel_height * p.kernel_width), steps = (taps + 3) / 4;

    auto& tables = *shared_memory<StemRows>();
    constexpr uint32_t WEIGHTS = sizeof(StemRows), STEP = 4 * WIDTH;  // pixels' worth of weights of four taps
    const uint32_t halo = WEIGHTS + steps * STEP * STEM_PIXEL;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Pixel mine = pixel_of(p, int(threadIdx.x));
    const uint32_t my_row = row_of(p, patch, mine);
    tables.places[threadIdx.x] = halo + stem_place_of(p, mine, patch.pixel_step, pitch);
    tables.taps[threadIdx.x] = stem_tap(p, int(threadIdx.x), pitch);

    DirectTile<Operand, WIDTH> tile;
    tile.clear();
    for (uint32_t i = 0; i < count; ++i) {
        const ConvStep step = conv_step(p, place.branch, first + i);
        const ConvTerm& term = step.second ? p.terms[1] : p.terms[0];
        const Source x = {term.image, step.branch * term.image_branch, term.image_half};
        const Source w = {term.matrix, step.branch * term.matrix_branch, term.matrix_half};
        // Weights of a tap, in the order [steps, WIDTH, 4]; zeros beyond the last tap and the last column.
        const auto load_weights = [&](uint32_t at) {
            const uint32_t tap = at / STEP * 4 + at % 4, k = place.column_tile * WIDTH + at / 4 % WIDTH;
            const bool inside = tap < taps && k < uint32_t(p.columns);
            const uint32_t from = k * uint32_t(p.filter) + tap * uint32_t(p.image_channels);
            return stem_channels<Operand>(p.image_channels, w, from, inside);
        };
        const auto store_weights = [&](uint32_t at, const float4& v) {
            if (at < steps * STEP) stem_store<Operand>(WEIGHTS + at * STEM_PIXEL, v);
        };
        float4 weights[STEM_AHEAD];
        UNROLLED
        for (int part = 0; part < STEM_AHEAD; ++part) weights[part] = load_weights(threadIdx.x + part * DIRECT_THREADS);
        // The products of the segment before have read theirs.
        if (i > 0) sync_threads();
        for (uint32_t from = threadIdx.x; from < halo_pixels; from += STEM_FLIGHT * DIRECT_THREADS) {
            uint32_t pixels[STEM_FLIGHT];
            float4 loaded[STEM_FLIGHT];
            UNROLLED
            for (int part = 0; part < STEM_FLIGHT; ++part) {
                const uint32_t at = from + part * DIRECT_THREADS;
                pixels[part] = at < halo_pixels ? stem_pixel(p, at) : NO_ROW;
                loaded[part] = pixels[part] == NO_ROW ? float4{} : stem_load<Operand>(p, patch, x, pixels[part]);
            }
            UNROLLED
            for (int part = 0; part < STEM_FLIGHT; ++part) {
                if (pixels[part] != NO_ROW) stem_store<Operand>(halo + stem_place(p, pixels[part], pitch), loaded[part]);
            }
        }
        UNROLLED
        for (int part = 0; part < STEM_AHEAD; ++part) store_weights(threadIdx.x + part * DIRECT_THREADS, weights[part]);
        for (uint32_t from = threadIdx.x + STEM_AHEAD * DIRECT_THREADS; from < steps * STEP; from += STEM_AHEAD * DIRECT_THREADS) {
            UNROLLED
            for (int part = 0; part < STEM_AHEAD; ++part) weights[part] = load_weights(from + part * DIRECT_THREADS);
            UNROLLED
            for (int part = 0; part < STEM_AHEAD; ++part) store_weights(from + part * DIRECT_THREADS, weights[part]);
        }
        sync_threads();
        uint32_t rows[4];
        for (int r = 0; r < 4; ++r) rows[r] = tables.places[32 * warp + 8 * r + lane / 4];
        uint32_t column = WEIGHTS + lane * STEM_PIXEL;
        ROLLED
        for (uint32_t tap = lane % 4; tap < 4 * steps; tap += 4) {
            const uint32_t offset = tables.taps[tap];
            uint32_t a[2][4];
            for (int r = 0; r < 4; ++r) {
                const uint2 channels = stem_read(rows[r] + offset);
                a[r / 2][r % 2] = channels.x, a[r / 2][r % 2 + 2] = channels.y;
            }
            for (int n = 0; n < WIDTH / 8; ++n) {
                const uint2 channels = stem_read(column + n * 32 * STEM_PIXEL);
                const uint32_t b[2] = {channels.x, channels.y};
                for (int m = 0; m < 2; ++m) Operand::mma(tile.d[m][n], a[m], b);
            }
            column += STEP * STEM_PIXEL;
        }
    }
    sync_threads();
    // A thread is asked for one row, its own, which is not worked out again.
    using Tile = DirectTile<Operand, WIDTH>;
    static_assert(Tile::ROWS == Tile::THREADS);
    const auto row = [&](int) { return my_row; };
    const auto column_of = [&](int c) { return place.column_tile * WIDTH + c; };
    conv_finish<Operand, Tile, Form::FPROP>(p, place, tile, row, column_of);
}

KERNEL(conv2d_stem_fprop_64_f16, ConvParams, 128) { stem_fprop<F16, 64>(p.product, blockIdx.x); }
KERNEL(conv2d_stem_fprop_64_bf16, ConvParams, 128) { stem_fprop<Bf16, 64>(p.product, blockIdx.x); }
KERNEL(conv2d_stem_wgrad_16_f16, ConvBackwardParams, 128) { stem_wgrad<F16, 16, false>(p.wgrad, blockIdx.x); }
KERNEL(conv2d_stem_wgrad_64_f16, ConvBackwardParams, 128) { stem_wgrad<F16, 64, false>(p.wgrad, blockIdx.x); }
KERNEL(conv2d_stem_wgrad_16_bf16, ConvBackwardParams, 128) { stem_wgrad<Bf16, 16, false>(p.wgrad, blockIdx.x); }
KERNEL(conv2d_stem_wgrad_64_bf16, ConvBackwardParams, 128) { stem_wgrad<Bf16, 64, false>(p.wgrad, blockIdx.x); }
KERNEL(conv2d_stem_wgrad_pair_16_f16, ConvBackwardParams, 128) { stem_wgrad<F16, 16, true>(p.wgrad, blockIdx.x); }
KERNEL(conv2d_stem_wgrad_pair_64_f16, ConvBackwardParams, 128) { stem_wgrad<F16, 64, true>(p.wgrad, blockIdx.x); }
KERNEL(conv2d_stem_wgrad_pair_16_bf16, ConvBackwardParams, 128) { stem_wgrad<Bf16, 16, true>(p.wgrad, blockIdx.x); }
KERNEL(conv2d_stem_wgrad_pair_64_bf16, ConvBackwardParams, 128) { stem_wgrad<Bf16, 64, true>(p.wgrad, blockIdx.x); }

// Of 32 columns a thread has half the sums: there are registers for more blocks, which hide each other's loads and what follows a product.
#undef KERNEL_BLOCKS
#define KERNEL_BLOCKS 5
KERNEL(conv2d_stem_fprop_32_f16, ConvParams, 128) { stem_fprop<F16, 32>(p.product, blockIdx.x); }
KERNEL(conv2d_stem_fprop_32_bf16, ConvParams, 128) { stem_fprop<Bf16, 32>(p.product, blockIdx.x); }
