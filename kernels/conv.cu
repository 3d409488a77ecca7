// 2-D convolutions in their three forms, as matrix products whose operands are gathered into shared memory.
//
//   form    rows      columns   inner     "image", gathered by pixel and tap   "matrix"
//   fprop   N·P·Q     K         R·S·C     x  [M, N, H, W, C]                   w  [M, K, R, S, C]
//   dgrad   N·H·W     C         R·S·K     dy [M, N, P, Q, K]                   w  [M, K, R, S, C]
//   wgrad   K         R·S·C     N·P·Q     x  [M, N, H, W, C]                   dy [M, N, P, Q, K]
//
// The image is the rows of the product in fprop and dgrad, its columns in wgrad. An element of it belongs to a pixel
// of the form's grid (P × Q, or H × W in dgrad) and to a tap (r, s, channel): both are positions that add up.
//
// Per-branch results have a block per branch. A result that is summed over branches has an inner dimension of
// branches · inner, each branch padded to whole tiles. All tensors are f32; operands are rounded to the operand type
// on their way into shared memory, and sums are f32.
#include "platform.cuh"
#include "tile_product.cuh"

struct ConvParams {
    const float* image;    // x [M, N, H, W, C]; dgrad: dy [M, N, P, Q, K]
    const float* matrix;   // w [M, K, R, S, C]; wgrad: dy [M, N, P, Q, K]
    const float* start;    // [M, rows, columns], may be `out` itself; null: zero
    float* out;            // [M, rows, columns]; with several splits: partial sums [splits, M, rows, columns]
    const uint32_t* amax;  // [2], bits of the largest magnitude in image and matrix; f16 only
    int64_t image_branch;  // elements from one branch to the next, 0: the same in all
    int64_t matrix_branch;
    int64_t start_branch;
    int64_t out_branch;
    int64_t out_split;  // elements from one split to the next
    int32_t rows, columns, inner;
    int32_t image_height, image_width, image_channels;
    int32_t grid_height, grid_width;  // of the pixels
    int32_t kernel_width;             // S
    int32_t stride, pad;
    int32_t filter;       // R·S·C
    int32_t row_tiles;    // ⌈rows / 64⌉
    int32_t column_tiles;
    int32_t inner_tiles;  // ⌈inner / 32⌉
    int32_t iterations;   // inner_tiles · branches summed over
    int32_t splits;       // parts into which the iterations are divided
    int32_t unused;
};
static_assert(sizeof(ConvParams) == 152);

enum class Form { FPROP, DGRAD, WGRAD };

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
DEVICE Position pixel(const ConvParams& p, uint32_t i, uint32_t end) {
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
DEVICE Position tap(const ConvParams& p, uint32_t i, uint32_t end, uint32_t& channel, uint32_t& filter_pixel) {
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

DEVICE float gathered(const ConvParams& p, const float* image, const Position& a, const Position& b) {
    const bool inside = a.phase == b.phase && uint32_t(a.h + b.h) < uint32_t(p.image_height) &&
                        uint32_t(a.w + b.w) < uint32_t(p.image_width);
    return inside ? image[a.offset + b.offset] : 0.0f;
}

// Each thread loads 16 elements of a tile. A warp runs along consecutive memory: along the inner dimension (element i
// is line 16·warp + i, inner index `lane`) or along the lines (8j + i is line lane + 32j, inner index 8·warp + i).
constexpr int HELD = TILE * DEPTH / THREADS;
constexpr int INNER_HELD = HELD * 32 / TILE;

template <class Operand, bool ALONG_INNER>
DEVICE void store(typename Operand::Stored* tile, const float held[HELD], [[maybe_unused]] float scale) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    typename Operand::Stored coded[HELD];
    for (int i = 0; i < HELD; ++i) coded[i] = Operand::encode(Operand::SCALED ? held[i] * scale : held[i]);
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
    Position lines[TILE];       // of the image: pixels, or taps in wgrad
    Position inner[2][DEPTH];   // taps, or pixels in wgrad, of this iteration and the next
    uint32_t matrix[2][DEPTH];  // offset of the inner index in the matrix
    typename Operand::Stored rows[2][TILE * Operand::PITCH];
    typename Operand::Stored columns[2][TILE * Operand::PITCH];
};
static_assert(sizeof(Shared<F32>) == 39168 && sizeof(Shared<Tf32>) == 39168);
static_assert(sizeof(Shared<F16>) == 22784 && sizeof(Shared<Bf16>) == 22784);

template <Form FORM, class Operand>
struct Block {
    static constexpr bool IMAGE_ALONG_INNER = FORM != Form::WGRAD;
    static constexpr bool MATRIX_ALONG_INNER = FORM == Form::FPROP;

    const ConvParams& p;
    Shared<Operand>& shared;
    uint32_t branch;        // of the result
    uint32_t matrix_line;   // first line of the matrix in this block's tile
    uint32_t matrix_lines;  // lines of the matrix in all
    float image_held[HELD], matrix_held[HELD];

    // One entry of the table of lines of the image.
    DEVICE void describe_line(uint32_t first, int i) {
        [[maybe_unused]] uint32_t channel, filter_pixel;
        if constexpr (FORM == Form::WGRAD) {
            shared.lines[i] = tap<FORM>(p, first + i, p.columns, channel, filter_pixel);
        } else {
            shared.lines[i] = pixel<FORM>(p, first + i, p.rows);
        }
    }

    // One entry of the tables of inner indices for an iteration.
    DEVICE void describe_inner(uint32_t iteration, int slot, int i) {
        const uint32_t inner = iteration % p.inner_tiles * DEPTH + i;
        uint32_t channel = 0, filter_pixel = 0, offset = inner;
        if constexpr (FORM == Form::WGRAD) {
            shared.inner[slot][i] = pixel<FORM>(p, inner, p.inner);
            offset = inner * p.rows;
        } else {
            shared.inner[slot][i] = tap<FORM>(p, inner, p.inner, channel, filter_pixel);
            if constexpr (FORM == Form::DGRAD) offset = channel * p.filter + filter_pixel * p.columns;
        }
        shared.matrix[slot][i] = inner < uint32_t(p.inner) ? offset : NO_OFFSET;
    }

    DEVICE float matrix_element(const float* matrix, uint32_t line, uint32_t offset) const {
        const uint32_t at = (FORM == Form::FPROP ? line * p.filter : line) + offset;
        return line < matrix_lines && offset != NO_OFFSET ? matrix[at] : 0.0f;
    }

    // Loads this thread's elements of both tiles.
    DEVICE void load(uint32_t iteration, int slot) {
        const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
        const int64_t from = branch + iteration / p.inner_tiles;
        const float* image = p.image + from * p.image_branch;
        const float* matrix = p.matrix + from * p.matrix_branch;
        if constexpr (IMAGE_ALONG_INNER) {
            const Position inner = shared.inner[slot][lane];
            for (int i = 0; i < HELD; ++i) image_held[i] = gathered(p, image, shared.lines[HELD * warp + i], inner);
        } else {
            for (int i = 0; i < HELD; ++i) {
                const Position& line = shared.lines[lane + i / INNER_HELD * 32];
                image_held[i] = gathered(p, image, shared.inner[slot][INNER_HELD * warp + i % INNER_HELD], line);
            }
        }
        if constexpr (MATRIX_ALONG_INNER) {
            const uint32_t offset = shared.matrix[slot][lane];
            for (int i = 0; i < HELD; ++i) {
                matrix_held[i] = matrix_element(matrix, matrix_line + HELD * warp + i, offset);
            }
        } else {
            for (int i = 0; i < HELD; ++i) {
                const uint32_t offset = shared.matrix[slot][INNER_HELD * warp + i % INNER_HELD];
                matrix_held[i] = matrix_element(matrix, matrix_line + lane + i / INNER_HELD * 32, offset);
            }
        }
    }

    DEVICE void store_tiles(int slot, float image_scale, float matrix_scale) {
        auto* image = FORM == Form::WGRAD ? shared.columns[slot] : shared.rows[slot];
        auto* matrix = FORM == Form::WGRAD ? shared.rows[slot] : shared.columns[slot];
        store<Operand, IMAGE_ALONG_INNER>(image, image_held, image_scale);
        store<Operand, MATRIX_ALONG_INNER>(matrix, matrix_held, matrix_scale);
    }
};

// The exponent of the power of two by which f16 operands are multiplied, from the bits of their largest magnitude.
//
// It brings that magnitude to [2^14, 2^15): as high as f16 (up to 65504) allows, so that as much as possible stays
// above 2^-14, where f16 begins to lose bits: 28 binades below the largest. The largest is known exactly, so that
// nothing needs room above, and products below 2^30 are safe in f32 sums of any length. Zeros stay as they are;
// infinities and NaNs too, so that they show in the result.
DEVICE int scale_exponent(uint32_t amax) {
    const int exponent = int(amax >> 23);
    if (amax == 0 || exponent == 255) return 0;
    // The power itself must be a normal number. Beyond 2^126 come only operands below 2^-112 throughout.
    const int e = 14 - (exponent - 127);
    return e < 126 ? e : 126;
}

template <Form FORM, class Operand>
DEVICE void conv(const ConvParams& p) {
    uint32_t block = blockIdx.x;
    const uint32_t column = block % p.column_tiles * TILE;
    block /= p.column_tiles;
    const uint32_t row = block % p.row_tiles * TILE;
    block /= p.row_tiles;
    const uint32_t split = block % p.splits, branch = block / p.splits;
    const uint32_t first = uint32_t(uint64_t(p.iterations) * split / p.splits);
    const uint32_t count = uint32_t(uint64_t(p.iterations) * (split + 1) / p.splits) - first;

    auto& shared = *shared_memory<Shared<Operand>>();
    constexpr bool WGRAD = FORM == Form::WGRAD;
    Block<FORM, Operand> tiles{p, shared, branch, WGRAD ? row : column, uint32_t(WGRAD ? p.rows : p.columns), {}, {}};
    int image_exponent = 0, matrix_exponent = 0;
    if constexpr (Operand::SCALED) {
        image_exponent = scale_exponent(p.amax[0]);
        matrix_exponent = scale_exponent(p.amax[1]);
    }
    const float image_scale = ldexpf(1.0f, image_exponent), matrix_scale = ldexpf(1.0f, matrix_exponent);

    Product<Operand> product;
    product.clear();
    const int thread = int(threadIdx.x);
    if (thread < TILE) {
        tiles.describe_line(WGRAD ? column : row, thread);
    } else {
        const uint32_t i = uint32_t(thread - TILE) / DEPTH;
        if (i < count) tiles.describe_inner(first + i, int(i), thread % DEPTH);
    }
    sync_threads();
    if (count > 0) {
        tiles.load(first, 0);
        tiles.store_tiles(0, image_scale, matrix_scale);
    }
    sync_threads();
    // One barrier per iteration: it separates the work on a slot from the writes to it, one iteration later.
    for (uint32_t i = 0; i < count; ++i) {
        const int slot = int(i % 2);
        if (i + 1 < count) tiles.load(first + i + 1, 1 - slot);
        if (i + 2 < count && thread < DEPTH) tiles.describe_inner(first + i + 2, slot, thread);
        product.add(shared.rows[slot], shared.columns[slot]);
        if (i + 1 < count) tiles.store_tiles(1 - slot, image_scale, matrix_scale);
        sync_threads();
    }

    // Both halves of the exponent have one sign: what is out of range in between is so at the end.
    const int exponent = -(image_exponent + matrix_exponent), half = exponent / 2;
    const float unscale = ldexpf(1.0f, half), unscale_rest = ldexpf(1.0f, exponent - half);
    float* out = p.out + split * p.out_split + branch * p.out_branch;
    const float* start = p.start ? p.start + branch * p.start_branch : nullptr;
    product.each([&](int r, int c, float v) {
        const uint32_t at_row = row + r, at_column = column + c;
        if (at_row >= uint32_t(p.rows) || at_column >= uint32_t(p.columns)) return;
        const uint32_t at = at_row * uint32_t(p.columns) + at_column;
        if constexpr (Operand::SCALED) v = v * unscale * unscale_rest;
        out[at] = start ? v + start[at] : v;
    });
}

KERNEL(conv2d_fprop_f32, ConvParams, 128) { conv<Form::FPROP, F32>(p); }
KERNEL(conv2d_dgrad_f32, ConvParams, 128) { conv<Form::DGRAD, F32>(p); }
KERNEL(conv2d_wgrad_f32, ConvParams, 128) { conv<Form::WGRAD, F32>(p); }
KERNEL(conv2d_fprop_tf32, ConvParams, 128) { conv<Form::FPROP, Tf32>(p); }
KERNEL(conv2d_dgrad_tf32, ConvParams, 128) { conv<Form::DGRAD, Tf32>(p); }
KERNEL(conv2d_wgrad_tf32, ConvParams, 128) { conv<Form::WGRAD, Tf32>(p); }
KERNEL(conv2d_fprop_f16, ConvParams, 128) { conv<Form::FPROP, F16>(p); }
KERNEL(conv2d_dgrad_f16, ConvParams, 128) { conv<Form::DGRAD, F16>(p); }
KERNEL(conv2d_wgrad_f16, ConvParams, 128) { conv<Form::WGRAD, F16>(p); }
KERNEL(conv2d_fprop_bf16, ConvParams, 128) { conv<Form::FPROP, Bf16>(p); }
KERNEL(conv2d_dgrad_bf16, ConvParams, 128) { conv<Form::DGRAD, Bf16>(p); }
KERNEL(conv2d_wgrad_bf16, ConvParams, 128) { conv<Form::WGRAD, Bf16>(p); }

// ---- Partial sums ----

struct ConvSumParams {
    const float* partial;  // [splits, M, len]
    const float* start;    // [M, len], may be `out` itself; null: zero
    float* out;            // [M, len]
    int64_t start_branch;  // elements from one branch to the next, 0: the same in all
    int64_t len;           // elements of a branch
    int32_t branches;
    int32_t splits;
};
static_assert(sizeof(ConvSumParams) == 48);

// Adds the splits, first to last.
KERNEL(conv2d_sum_f32, ConvSumParams, 256) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t branch = blockIdx.y; branch < p.branches; branch += gridDim.y) {
        for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.len; i += step) {
            const float* partial = p.partial + branch * p.len + i;
            float sum = 0.0f;
            for (int split = 0; split < p.splits; ++split) sum += partial[int64_t(split) * p.branches * p.len];
            p.out[branch * p.len + i] = p.start ? sum + p.start[branch * p.start_branch + i] : sum;
        }
    }
}

// ---- Largest magnitudes ----

struct AmaxParams {
    const uint32_t* image;   // [image_len], bits of f32
    const uint32_t* matrix;  // [matrix_len], bits of f32
    uint32_t* amax;          // [2]
    int64_t image_len;       // elements in all branches
    int64_t matrix_len;
};
static_assert(sizeof(AmaxParams) == 40);

KERNEL(amax_clear_f32, AmaxParams, 32) {
    if (threadIdx.x < 2) p.amax[threadIdx.x] = 0;
}

// The largest |x| of the operand that blockIdx.y names. As bits, magnitudes are ordered like the numbers, with
// infinities and then NaNs above all.
KERNEL(amax_f32, AmaxParams, 256) {
    const uint32_t* from = blockIdx.y == 0 ? p.image : p.matrix;
    const int64_t len = blockIdx.y == 0 ? p.image_len : p.matrix_len;
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    uint32_t largest = 0;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < len; i += step) {
        const uint32_t bits = from[i] & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint32_t other = shuffle_xor(largest, mask);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % 32 == 0) atomic_max(p.amax + blockIdx.y, largest);
}
