// 2-D convolutions in their three forms, as matrix products whose operands are gathered into shared memory one element
// at a time: any number of channels. Forms, operands and blocks: `conv_params.cuh`.
//
// Operands are rounded to the operand type on their way into shared memory; tensors are f32, or 16 bits of that type.
#include "conv_finish.cuh"
#include "conv_prologue.cuh"
#include "platform.cuh"
#include "tile_product.cuh"

// A pixel's place in the image, or a tap's displacement from it. An element is there if the phases agree (in dgrad: the
// remainders by the stride) and the sum lies in the image. Offsets wrap around 2^32; those of elements do not.
struct alignas(16) Position {
    uint32_t offset;
    int32_t h, w;
    int32_t phase;
};
// Phases of lines and inner indices beyond the end: they agree with none.
constexpr int32_t NO_PIXEL = -1;
constexpr int32_t NO_TAP = -2;
// Offset in the matrix of an inner index beyond the end.
constexpr uint32_t NO_OFFSET = 0xffffffffu;

// Pixel number `i` of the form's grid.
template <Form FORM>
DEVICE Position pixel(const ConvProduct& p, uint32_t i, uint32_t end) {
    if (i >= end) return {0, 0, 0, NO_PIXEL};
    const uint32_t line = i / p.grid_width, n = line / p.grid_height;
    int32_t w = int32_t(i - line * p.grid_width), h = int32_t(line - n * p.grid_height), phase = 0;
    if constexpr (FORM == Form::DGRAD) {
        // h + pad − r = stride · (row of dy), which splits into quotients and remainders of h + pad and of r.
        const int32_t up = (h + p.pad) / p.stride, left = (w + p.pad) / p.stride;
        phase = (h + p.pad - up * p.stride) * p.stride + (w + p.pad - left * p.stride);
        h = up;
        w = left;
    } else {
        h = h * p.stride - p.pad;
        w = w * p.stride - p.pad;
    }
    const uint32_t at = (n * uint32_t(p.image_height) + uint32_t(h)) * uint32_t(p.image_width) + uint32_t(w);
    return {at * uint32_t(p.image_channels), h, w, phase};
}

// Tap number `i`: (r, s, channel of the image), the channel running fastest. `filter_pixel` is r·S + s.
template <Form FORM>
DEVICE Position tap(const ConvProduct& p, uint32_t i, uint32_t end, uint32_t& channel, uint32_t& filter_pixel) {
    if (i >= end) return {0, 0, 0, NO_TAP};
    filter_pixel = i / p.image_channels;
    channel = i - filter_pixel * p.image_channels;
    int32_t r = int32_t(filter_pixel / p.kernel_width), s = int32_t(filter_pixel) - r * p.kernel_width, phase = 0;
    if constexpr (FORM == Form::DGRAD) {
        const int32_t up = r / p.stride, left = s / p.stride;
        phase = (r - up * p.stride) * p.stride + (s - left * p.stride);
        r = -up;
        s = -left;
    }
    const uint32_t at = uint32_t(r) * uint32_t(p.image_width) + uint32_t(s);
    return {at * uint32_t(p.image_channels) + channel, r, s, phase};
}

// The part of a tensor that belongs to a branch.
template <class Operand>
struct Part {
    const void* at;
    int64_t first;
    int32_t half;

    DEVICE float operator[](uint32_t i) const { return conv_load<Operand>(at, first + i, half); }
};

// Each thread loads 16 elements of a tile. A warp runs along consecutive memory: along the inner dimension (element i
// is line 16·warp + i, inner index `lane`) or along the lines (8j + i is line lane + 32j, inner index 8·warp + i).
constexpr int HELD = TILE * DEPTH / THREADS;
constexpr int INNER_HELD = HELD * 32 / TILE;

template <class Operand, bool ALONG_INNER>
DEVICE void store(typename Operand::Stored* tile, const float held[HELD]) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    typename Operand::Stored coded[HELD];
    for (int i = 0; i < HELD; ++i) coded[i] = Operand::encode(held[i]);
    if constexpr (ALONG_INNER) {
        for (int i = 0; i < HELD; ++i) tile[(HELD * warp + i) * Operand::PITCH + lane] = coded[i];
    } else {
        // Stores of 16 bytes whose lines, 144 or 80 bytes apart, meet no bank twice.
        constexpr int RUN = 16 / int(sizeof(typename Operand::Stored));
        struct alignas(16) Run {
            typename Operand::Stored v[RUN];
        };
        for (int i = 0; i < HELD; i += RUN) {
            Run run;
            for (int e = 0; e < RUN; ++e) run.v[e] = coded[i + e];
            const int line = lane + i / INNER_HELD * 32, inner = INNER_HELD * warp + i % INNER_HELD;
            *reinterpret_cast<Run*>(tile + line * Operand::PITCH + inner) = run;
        }
    }
}

// A block's shared memory.
template <class Operand>
struct Shared {
    Position lines[TILE];        // of the image: pixels, or taps in wgrad
    Position inner[2][DEPTH];    // taps, or pixels in wgrad, of this iteration and the next
    uint32_t matrix[2][DEPTH];   // offset of the inner index in the matrix
    PairFactors of_image[2][TILE];   // of the taps: of inner indices, or of lines in wgrad
    PairFactors of_matrix[2][TILE];  // of wgrad's lines
    typename Operand::Stored rows[2][TILE * Operand::PITCH];
    typename Operand::Stored columns[2][TILE * Operand::PITCH];
};
static_assert(sizeof(Shared<F32>) == 43264 && sizeof(Shared<Tf32>) == 43264);
static_assert(sizeof(Shared<F16>) == 26880 && sizeof(Shared<Bf16>) == 26880);
static_assert(sizeof(ConvFinish<Product<F16>>) <= sizeof(Shared<F16>));

template <Form FORM, class Operand, bool PAIRS>
struct Block {
    static constexpr bool WGRAD = FORM == Form::WGRAD;
    static constexpr bool MATRIX_ALONG_INNER = FORM == Form::FPROP;

    const ConvProduct& p;
    Shared<Operand>& shared;
    uint32_t branch;                // of the result
    uint32_t row, column;           // where its tile begins
    float image_held[HELD], matrix_held[HELD];

    // One entry of the table of lines of the image.
    DEVICE void describe_line(int i) {
        [[maybe_unused]] uint32_t channel, filter_pixel;
        if constexpr (WGRAD) {
            shared.lines[i] = tap<FORM>(p, column + i, p.columns, channel, filter_pixel);
        } else {
            shared.lines[i] = pixel<FORM>(p, row + i, p.rows);
        }
    }

    // One entry of the tables of inner indices for an iteration.
    DEVICE void describe_inner(uint32_t iteration, int slot, int i) {
        const ConvStep step = conv_step(p, branch, iteration);
        const uint32_t inner = step.inner_tile * DEPTH + i;
        uint32_t channel = 0, filter_pixel = 0, offset = inner;
        if constexpr (WGRAD) {
            shared.inner[slot][i] = pixel<FORM>(p, inner, p.inner);
            offset = inner * p.rows;
        } else {
            shared.inner[slot][i] = tap<FORM>(p, inner, p.inner, channel, filter_pixel);
            if constexpr (FORM == Form::DGRAD) offset = channel * p.filter + filter_pixel * p.columns;
            describe_image(step, slot, i, channel);
        }
        shared.matrix[slot][i] = inner < uint32_t(p.inner) ? offset : NO_OFFSET;
    }

    // What the image is made of in an iteration.
    DEVICE Made image_made(const ConvStep& step) const {
        if (PAIRS && p.image.at && !(FORM == Form::FPROP && step.second)) return Made::PAIR;
        return FORM != Form::DGRAD && term(step).norm ? Made::NORM : Made::PLAIN;
    }
    DEVICE bool matrix_pair() const { return PAIRS && WGRAD && p.matrix.at; }

    // One entry of the tables of factors for an iteration.
    DEVICE void describe_image(const ConvStep& step, int slot, int i, uint32_t channel) {
        const Made made = image_made(step);
        if (made == Made::NORM) shared.of_image[slot][i].norm = p.norm.of(step.branch, channel);
        if (PAIRS && made == Made::PAIR) {
            shared.of_image[slot][i] = pair_factors<IMAGE_PAIR<FORM>>(p.image, step.branch, channel);
        }
    }
    DEVICE void describe_matrix(const ConvStep& step, int slot, int i) {
        const uint32_t channel = row + i;
        shared.of_matrix[slot][i] =
            pair_factors<Pair::DELTA>(p.matrix, step.branch, channel < uint32_t(p.rows) ? channel : 0);
    }

    // What the threads that are not busy otherwise prepare for an iteration.
    DEVICE void describe(uint32_t iteration, int slot) {
        const int thread = int(threadIdx.x);
        if (thread < DEPTH) describe_inner(iteration, slot, thread);
        if constexpr (WGRAD) {
            const ConvStep step = conv_step(p, branch, iteration);
            if (thread < TILE) {
                if (matrix_pair()) describe_matrix(step, slot, thread);
            } else {
                const uint32_t line = column + (thread - TILE);
                const uint32_t channel = line < uint32_t(p.columns) ? line % uint32_t(p.image_channels) : 0;
                describe_image(step, slot, thread - TILE, channel);
            }
        }
    }

    DEVICE const ConvTerm& term(const ConvStep& step) const {
        return FORM == Form::FPROP && step.second ? p.terms[1] : p.terms[0];
    }

    DEVICE float matrix_element(const Part<Operand>& matrix, const Part<Operand>& with, uint32_t line, uint32_t offset,
                                bool pair, const PairFactors& factors) const {
        const uint32_t at = (FORM == Form::FPROP ? line * p.filter : line) + offset;
        const bool inside = line < uint32_t(WGRAD ? p.rows : p.columns) && offset != NO_OFFSET;
        const float v = inside ? matrix[at] : 0.0f;
        return PAIRS && pair && inside ? factors.of<Pair::DELTA>(v, with[at]) : v;
    }

    // An element of the image as it is made where it is inside.
    DEVICE float image_element(const Part<Operand>& image, const Part<Operand>& with, const Position& a, const Position& b,
                               Made made, const PairFactors& factors) const {
        const bool inside = a.phase == b.phase && uint32_t(a.h + b.h) < uint32_t(p.image_height) &&
                            uint32_t(a.w + b.w) < uint32_t(p.image_width);
        const uint32_t at = a.offset + b.offset;
        const float v = inside ? image[at] : 0.0f;
        if (PAIRS && made == Made::PAIR && inside) return factors.of<IMAGE_PAIR<FORM>>(v, with[at]);
        return made == Made::NORM && inside ? factors.norm.relu(v) : v;
    }

    // Loads this thread's elements of both tiles.
    DEVICE void load(uint32_t iteration, int slot) {
        const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
        const ConvStep step = conv_step(p, branch, iteration);
        const ConvTerm& of = term(step);
        const Part<Operand> image = {of.image, step.branch * of.image_branch, of.image_half};
        const Part<Operand> image_with = {p.image.at, step.branch * p.image.branch, p.image.half};
        const Part<Operand> matrix = {of.matrix, step.branch * of.matrix_branch, of.matrix_half};
        const Part<Operand> matrix_with = {p.matrix.at, step.branch * p.matrix.branch, p.matrix.half};
        const Made made = image_made(step);
        if constexpr (!WGRAD) {
            const Position inner = shared.inner[slot][lane];
            const PairFactors factors = made != Made::PLAIN ? shared.of_image[slot][lane] : PairFactors{};
            for (int i = 0; i < HELD; ++i) {
                image_held[i] = image_element(image, image_with, shared.lines[HELD * warp + i], inner, made, factors);
            }
        } else {
            for (int i = 0; i < HELD; ++i) {
                const int line = lane + i / INNER_HELD * 32;
                const PairFactors factors = made != Made::PLAIN ? shared.of_image[slot][line] : PairFactors{};
                const Position& inner = shared.inner[slot][INNER_HELD * warp + i % INNER_HELD];
                image_held[i] = image_element(image, image_with, inner, shared.lines[line], made, factors);
            }
        }
        const bool pair = matrix_pair();
        const uint32_t matrix_line = WGRAD ? row : column;
        if constexpr (MATRIX_ALONG_INNER) {
            const uint32_t offset = shared.matrix[slot][lane];
            for (int i = 0; i < HELD; ++i) {
                matrix_held[i] =
                    matrix_element(matrix, matrix_with, matrix_line + HELD * warp + i, offset, false, PairFactors{});
            }
        } else {
            for (int i = 0; i < HELD; ++i) {
                const int line = lane + i / INNER_HELD * 32;
                const PairFactors factors = pair ? shared.of_matrix[slot][line] : PairFactors{};
                const uint32_t offset = shared.matrix[slot][INNER_HELD * warp + i % INNER_HELD];
                matrix_held[i] = matrix_element(matrix, matrix_with, matrix_line + line, offset, pair, factors);
            }
        }
    }

    DEVICE void store_tiles(int slot) {
        store<Operand, !WGRAD>(WGRAD ? shared.columns[slot] : shared.rows[slot], image_held);
        store<Operand, MATRIX_ALONG_INNER>(WGRAD ? shared.rows[slot] : shared.columns[slot], matrix_held);
    }
};

// Block number `block` of a product.
template <Form FORM, class Operand, bool PAIRS>
DEVICE void conv(const ConvProduct& p, uint32_t block) {
    const ConvPlace place = conv_place(p, block);
    const uint64_t iterations = uint64_t(p.inner_tiles) * uint32_t(p.segments);
    const uint32_t first = uint32_t(iterations * place.split / p.splits);
    const uint32_t count = uint32_t(iterations * (place.split + 1) / p.splits) - first;

    auto& shared = *shared_memory<Shared<Operand>>();
    Block<FORM, Operand, PAIRS> tiles{p, shared, place.branch, place.row_tile * TILE, place.column_tile * TILE, {}, {}};
    Product<Operand> product;
    product.clear();
    if (threadIdx.x < TILE) tiles.describe_line(int(threadIdx.x));
    if (count > 0) tiles.describe(first, 0);
    if (count > 1) tiles.describe(first + 1, 1);
    sync_threads();
    if (count > 0) {
        tiles.load(first, 0);
        tiles.store_tiles(0);
    }
    sync_threads();
    // One barrier per iteration: it separates the work on a slot from the writes to it, one iteration later.
    for (uint32_t i = 0; i < count; ++i) {
        const int slot = int(i % 2);
        if (i + 1 < count) tiles.load(first + i + 1, 1 - slot);
        if (i + 2 < count) tiles.describe(first + i + 2, slot);
        product.add(shared.rows[slot], shared.columns[slot]);
        if (i + 1 < count) tiles.store_tiles(1 - slot);
        sync_threads();
    }
    const auto row_of = [&](int r) {
        const uint32_t row = place.row_tile * TILE + r;
        return row < uint32_t(p.rows) ? row : NO_ROW;
    };
    const auto column_of = [&](int c) { return place.column_tile * TILE + c; };
    conv_finish<Operand, Product<Operand>, FORM>(p, place, product, row_of, column_of);
}

template <class Operand, bool PAIRS>
DEVICE void conv_backward(const ConvBackwardParams& p) {
    uint32_t block;
    if (is_wgrad_block(p, block)) {
        conv<Form::WGRAD, Operand, PAIRS>(p.wgrad, block);
    } else {
        conv<Form::DGRAD, Operand, PAIRS>(p.dgrad, block);
    }
}

KERNEL(conv2d_fprop_f32, ConvParams, 128) { conv<Form::FPROP, F32, false>(p.product, blockIdx.x); }
KERNEL(conv2d_fprop_tf32, ConvParams, 128) { conv<Form::FPROP, Tf32, false>(p.product, blockIdx.x); }
KERNEL(conv2d_fprop_f16, ConvParams, 128) { conv<Form::FPROP, F16, false>(p.product, blockIdx.x); }
KERNEL(conv2d_fprop_bf16, ConvParams, 128) { conv<Form::FPROP, Bf16, false>(p.product, blockIdx.x); }
KERNEL(conv2d_fprop_pair_f32, ConvParams, 128) { conv<Form::FPROP, F32, true>(p.product, blockIdx.x); }
KERNEL(conv2d_fprop_pair_tf32, ConvParams, 128) { conv<Form::FPROP, Tf32, true>(p.product, blockIdx.x); }
KERNEL(conv2d_fprop_pair_f16, ConvParams, 128) { conv<Form::FPROP, F16, true>(p.product, blockIdx.x); }
KERNEL(conv2d_fprop_pair_bf16, ConvParams, 128) { conv<Form::FPROP, Bf16, true>(p.product, blockIdx.x); }
KERNEL(conv2d_backward_f32, ConvBackwardParams, 128) { conv_backward<F32, false>(p); }
KERNEL(conv2d_backward_tf32, ConvBackwardParams, 128) { conv_backward<Tf32, false>(p); }
KERNEL(conv2d_backward_f16, ConvBackwardParams, 128) { conv_backward<F16, false>(p); }
KERNEL(conv2d_backward_bf16, ConvBackwardParams, 128) { conv_backward<Bf16, false>(p); }
KERNEL(conv2d_backward_pair_f32, ConvBackwardParams, 128) { conv_backward<F32, true>(p); }
KERNEL(conv2d_backward_pair_tf32, ConvBackwardParams, 128) { conv_backward<Tf32, true>(p); }
KERNEL(conv2d_backward_pair_f16, ConvBackwardParams, 128) { conv_backward<F16, true>(p); }
KERNEL(conv2d_backward_pair_bf16, ConvBackwardParams, 128) { conv_backward<Bf16, true>(p); }
