// What a convolution kernel is told: one product of gathered operands, and how it is divided into blocks.
//
//   form    rows      columns   inner     "image", gathered by pixel and tap   "matrix"
//   fprop   N·P·Q     K         R·S·C     x  [M, N, H, W, C]                   w  [M, K, R, S, C]
//   dgrad   N·H·W     C         R·S·K     dy [M, N, P, Q, K]                   w  [M, K, R, S, C]
//   wgrad   K         R·S·C     N·P·Q     x  [M, N, H, W, C]                   dy [M, N, P, Q, K]
//
// The image is the rows of the product in fprop and dgrad, its columns in wgrad. An element of it belongs to a pixel
// of the form's grid (P × Q, or H × W in dgrad) and to a tap (r, s, channel): both are positions that add up.
//
// A result is the sum of segments, each with the inner dimension of the form padded to whole tiles: the branches of a
// first term, if the result is summed over them, then those of a second. All sums are f32.
#pragma once

#include "bn_relu.cuh"

enum class Form { FPROP, DGRAD, WGRAD };

// A bilinear term of the result.
struct ConvTerm {
    const void* image;      // x [M, N, H, W, C]; dgrad: dy [M, N, P, Q, K]
    const void* matrix;     // w [M, K, R, S, C]; wgrad: dy [M, N, P, Q, K]
    int64_t image_branch;   // elements from one branch to the next, 0: the same in all
    int64_t matrix_branch;
    int32_t segments;       // branches that are summed; 0: there is no such term
    int32_t image_half;     // it has 16 bits, not 32
    int32_t matrix_half;
    int32_t norm;           // the operand is relu(bn(image)); padding stays zero
};
static_assert(sizeof(ConvTerm) == 48);

// The batch norm of an image; branch strides in elements, 0: the same in all.
struct ConvNorm {
    const float* g;     // [M, C]
    const float* b;     // [M, C]
    const float* mean;  // [M, C]
    const float* var;   // [M, C], biased
    int64_t g_branch, b_branch, mean_branch, var_branch;
    float epsilon;
    int32_t unused;

    DEVICE BnScaleShift of(int64_t branch, uint32_t channel) const {
        return bn_scale_shift(g[branch * g_branch + channel], b[branch * b_branch + channel],
                              mean[branch * mean_branch + channel], var[branch * var_branch + channel], epsilon);
    }
};
static_assert(sizeof(ConvNorm) == 72);

// An operand that is made of a given tensor and of what a batch norm with a ReLU behind it normalises: `conv_prologue.cuh`.
struct ConvPair {
    const void* at;           // what the batch norm normalises, at the same places as the given tensor; null: there is no pair
    int64_t branch;           // elements from one branch to the next, 0: the same in all
    ConvNorm norm;
    const float* vectors[4];  // [M, C] delta: dg, db, null, null; tangent: ġ, ḃ, ⟨ẋ⟩, ρ
    int64_t vector_branches[4];
    const void* residual;     // a further term of delta, at the same places; null: there is none
    int64_t residual_branch;
    void* kept;               // wgrad: delta is stored here as well, at the same places; null: it is not
    int64_t kept_branch;
    int32_t half;             // it has 16 bits, not 32
    int32_t residual_half, kept_half;
    float count;              // of the samples and pixels that a sum is over
};
static_assert(sizeof(ConvPair) == 200);

// Sums of the columns of the result with a batch norm: `conv_sums.cuh`. Tensors are [M, rows, columns].
struct ConvSums {
    const void* next;    // what the batch norm normalises; null: no sums are wanted
    int64_t next_branch;
    ConvNorm norm;       // tangent: without g and b
    float* results[2];   // [M, columns] backward: dg, db; tangent: ⟨ẏ⟩, ρ
    int32_t next_half;
    int32_t unused;
};
static_assert(sizeof(ConvSums) == 112);

struct ConvProduct {
    ConvTerm terms[2];       // the second is fprop's alone
    ConvNorm norm;
    ConvPair image;          // fprop's first term, wgrad: a tangent; dgrad: delta
    ConvPair matrix;         // wgrad: delta
    ConvSums sums;           // dgrad, fprop
    const void* start;       // [M, rows, columns], may be `out` itself; null: zero
    void* out;               // [M, rows, columns]
    int64_t start_branch;
    int64_t out_branch;
    float* mean;             // [M, columns] of the rows of `out`; null: not wanted
    float* var;              // [M, columns], biased
    float* partial;          // [M, row tiles, column tiles, splits, elements of a tile]; null with one split
    void* tile_sums;         // [M, column tiles, row tiles, columns of a tile] records
    void* group_sums;        // [M, column tiles, groups, columns of a tile]
    uint32_t* arrivals;      // [M, row tiles, column tiles], [M, column tiles, groups], [M, column tiles], all zero
    int32_t rows, columns, inner;
    int32_t image_height, image_width, image_channels;
    int32_t grid_height, grid_width;  // of the pixels
    int32_t kernel_width;             // S
    int32_t stride, pad;
    int32_t filter;        // R·S·C
    int32_t row_tiles;
    int32_t column_tiles;
    int32_t inner_tiles;
    int32_t segments;      // of both terms
    int32_t splits;        // parts into which inner_tiles · segments iterations are divided
    int32_t branches;      // of the result
    int32_t by_pixel;      // the same inner tile of all segments, then the next; else one segment after the other
    int32_t start_half, out_half;
    int32_t kernel_height;                 // R
    // Of the direct kernels alone: what a tile's pixels are.
    int32_t images;                        // N
    int32_t patch_images;                  // of neighbouring images
    int32_t patch_height, patch_width;     // of the pixels of each
    int32_t patches_down, patches_across;  // of an image's grid
    int32_t halo_height, halo_width;       // pixels of the image, of each of the patch's, that are loaded
};
static_assert(sizeof(ConvProduct) == 880);

// `conv2d_fprop_*`
struct ConvParams {
    ConvProduct product;
};
static_assert(sizeof(ConvParams) == 880);

// `conv2d_backward_*`: both gradients or one. A launch has the blocks of both, mixed in proportion: those that read the
// same part of dy run at about the same time.
struct ConvBackwardParams {
    ConvProduct dgrad, wgrad;
    int32_t dgrad_blocks, wgrad_blocks;  // 0 where the same blocks make both: the runs of patches are the splits of wgrad
};
static_assert(sizeof(ConvBackwardParams) == 1768);

// The place of a block among those of a product.
struct ConvPlace {
    uint32_t row_tile, column_tile, split, branch;

    // The number of its tile among those of all branches.
    DEVICE uint32_t tile(const ConvProduct& p) const {
        return (branch * uint32_t(p.row_tiles) + row_tile) * uint32_t(p.column_tiles) + column_tile;
    }
};

// Block number `i` of a product. Tiles of a branch run fastest.
DEVICE ConvPlace conv_place(const ConvProduct& p, uint32_t i) {
    ConvPlace place;
    place.column_tile = i % p.column_tiles;
    i /= p.column_tiles;
    place.row_tile = i % p.row_tiles;
    i /= p.row_tiles;
    const uint32_t inner = p.by_pixel ? p.branches : p.splits;
    const uint32_t fast = i % inner, slow = i / inner;
    place.split = p.by_pixel ? slow : fast;
    place.branch = p.by_pixel ? fast : slow;
    return place;
}

// What an iteration reads: an inner tile of a branch of a term.
struct ConvStep {
    uint32_t inner_tile, branch;
    bool second;
};

DEVICE ConvStep conv_step(const ConvProduct& p, uint32_t result_branch, uint32_t iteration) {
    ConvStep step;
    const uint32_t per = p.by_pixel ? p.segments : p.inner_tiles;
    const uint32_t slow = iteration / per, fast = iteration - slow * per;
    step.inner_tile = p.by_pixel ? slow : fast;
    const uint32_t segment = p.by_pixel ? fast : slow, first = uint32_t(p.terms[0].segments);
    step.second = segment >= first;
    step.branch = result_branch + (step.second ? segment - first : segment);
    return step;
}

// The role of this block: whether it works on the weights' gradient, and which of that product's blocks it is.
DEVICE bool is_wgrad_block(const ConvBackwardParams& p, uint32_t& block) {
    // Of the blocks before this one, and of those with it, the part of the weight gradient's that all have.
    const uint64_t blocks = uint64_t(uint32_t(p.dgrad_blocks)) + uint32_t(p.wgrad_blocks);
    const uint32_t before = uint32_t(uint64_t(blockIdx.x) * uint32_t(p.wgrad_blocks) / blocks);
    const uint32_t with = uint32_t(uint64_t(blockIdx.x + 1) * uint32_t(p.wgrad_blocks) / blocks);
    block = with > before ? before : blockIdx.x - before;
    return with > before;
}
