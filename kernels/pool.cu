// Max-pooling as a choice of positions, and what moves values along the chosen positions.
//
// All images are [H, W, C] (pooled ones [P, Q, C]) of fewer than 2^31 elements, so that positions inside one fit 32
// bits; a block works on neighbouring elements of one image of the result.

#include "storage.cuh"

// A pooling window, as in src/ops/pool.rs.
struct PoolWindow {
    int32_t h, w;  // image
    int32_t p, q;  // pooled image
    int32_t c;     // channels of both
    int32_t size, stride, pad;
};
static_assert(sizeof(PoolWindow) == 32);

struct MaxPoolIndexParams {
    const void* x;    // [images, H, W, C]
    int32_t* index;   // [images, P, Q, C], h·W + w
    int64_t images;   // all branches
    PoolWindow window;
};
static_assert(sizeof(MaxPoolIndexParams) == 56);

struct PoolMoveParams {
    const void* x;          // gather: [M or 1, samples, H, W, C]; scatter: [M or 1, samples, P, Q, C]
    const int32_t* index;   // [M or 1, samples, P, Q, C]
    void* y;                // gather: [branches, samples, P, Q, C]; scatter: [branches, samples, H, W, C]
    int64_t x_branch;       // elements of a branch, or 0 where shared
    int64_t index_branch;   // elements of a branch, or 0 where shared
    int64_t images;         // branches of the result · samples, fewer than 2^31
    int32_t samples;
    int32_t summed;         // branches that a shared result sums over, else 1
    int32_t half_x;         // whether x takes 16 bits
    int32_t half_y;         // whether y takes 16 bits
    PoolWindow window;
};
static_assert(sizeof(PoolMoveParams) == 96);

// Coordinates of this thread's element in an image with `columns` columns.
struct Pixel {
    int32_t row, column, channel;
};

DEVICE Pixel pixel(int32_t element, int32_t columns, int32_t channels) {
    const int32_t place = element / channels;
    return {place / columns, place % columns, element % channels};
}

DEVICE int32_t element_of_thread() { return static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x); }

DEVICE int32_t lower(int32_t a, int32_t b) { return a < b ? a : b; }
DEVICE int32_t higher(int32_t a, int32_t b) { return a > b ? a : b; }

// Position of each window's maximum: the first on ties, and the last NaN if there is one, so that it is seen.
template <class T>
DEVICE void max_pool_index(const MaxPoolIndexParams& p) {
    const PoolWindow& k = p.window;
    const int32_t e = element_of_thread(), pooled = k.p * k.q * k.c;
    if (e >= pooled) return;
    const Pixel at = pixel(e, k.q, k.c);
    const int32_t top = at.row * k.stride - k.pad, left = at.column * k.stride - k.pad;
    const int32_t bottom = lower(top + k.size, k.h), right = lower(left + k.size, k.w);
    for (int64_t image = blockIdx.y; image < p.images; image += gridDim.y) {
        const typename T::Element* x =
            static_cast<const typename T::Element*>(p.x) + image * k.h * k.w * k.c + at.channel;
        int32_t best = -1;
        float most = 0.0f;
        for (int32_t h = higher(top, 0); h < bottom; h++) {
            for (int32_t w = higher(left, 0); w < right; w++) {
                const int32_t here = h * k.w + w;
                const float v = T::widen(x[static_cast<int64_t>(here) * k.c]);
                if (best < 0 || v > most || v != v) {
                    best = here;
                    most = v;
                }
            }
        }
        p.index[image * pooled + e] = higher(best, 0);
    }
}

KERNEL(max_pool_index_f32, MaxPoolIndexParams, 256) { max_pool_index<StoredF32>(p); }
KERNEL(max_pool_index_f16, MaxPoolIndexParams, 256) { max_pool_index<StoredF16>(p); }
KERNEL(max_pool_index_bf16, MaxPoolIndexParams, 256) { max_pool_index<StoredBf16>(p); }

// Element `i` of a tensor of 16 bits, stored as T, or of 32.
template <class T>
DEVICE float get(const void* x, bool half, int64_t i) {
    if (half) return T::widen(static_cast<const typename T::Element*>(x)[i]);
    return static_cast<const float*>(x)[i];
}

template <class T>
DEVICE void put(void* y, bool half, int64_t i, float v) {
    if (half) {
        static_cast<typename T::Element*>(y)[i] = T::narrow(v);
    } else {
        static_cast<float*>(y)[i] = v;
    }
}

template <class T>
DEVICE void pool_gather(const PoolMoveParams& p) {
    const PoolWindow& k = p.window;
    const int32_t e = element_of_thread(), pooled = k.p * k.q * k.c;
    if (e >= pooled) return;
    const int32_t channel = e % k.c;
    for (int64_t image = blockIdx.y; image < p.images; image += gridDim.y) {
        const int32_t branch = static_cast<int32_t>(image) / p.samples;
        const int64_t sample = static_cast<int32_t>(image) % p.samples;
        float sum = 0.0f;
        for (int64_t m = branch; m < branch + p.summed; m++) {
            const int64_t place = p.index[m * p.index_branch + sample * pooled + e];
            sum += get<T>(p.x, p.half_x, m * p.x_branch + (sample * k.h * k.w + place) * k.c + channel);
        }
        put<T>(p.y, p.half_y, image * pooled + e, sum);
    }
}

KERNEL(pool_gather_f32, PoolMoveParams, 256) { pool_gather<StoredF32>(p); }
KERNEL(pool_gather_f16, PoolMoveParams, 256) { pool_gather<StoredF16>(p); }
KERNEL(pool_gather_bf16, PoolMoveParams, 256) { pool_gather<StoredBf16>(p); }

// Adds each value at its position, seen from there: a pixel asks all windows that cover it, in order, whether they
// chose it.
// The windows that cover a pixel: rows and columns, the last ones included.
struct PoolCover {
    int32_t rows_from, rows_to, columns_from, columns_to;
};

// What the windows that chose pixel `here` give it, for x stored as S.
template <class S>
DEVICE float pool_chosen(const PoolMoveParams& p, const PoolCover& cover, int32_t here, int32_t channel, int32_t image) {
    const PoolWindow& k = p.window;
    const int64_t first = static_cast<int64_t>(image % p.samples) * k.p * k.q * k.c + channel;
    const int32_t branch = image / p.samples;
    const typename S::Element* x = static_cast<const typename S::Element*>(p.x);
    float sum = 0.0f;
    for (int32_t row = cover.rows_from; row <= cover.rows_to; row++) {
        for (int32_t column = cover.columns_from; column <= cover.columns_to; column++) {
            const int64_t window = first + (row * k.q + column) * k.c;
            for (int32_t m = branch; m < branch + p.summed; m++) {
                if (p.index[m * p.index_branch + window] == here) sum += S::widen(x[m * p.x_branch + window]);
            }
        }
    }
    return sum;
}

// x stored as S, y as T if it takes 16 bits.
template <class T, class S>
DEVICE void pool_scatter_from(const PoolMoveParams& p) {
    const PoolWindow& k = p.window;
    const int32_t e = element_of_thread(), area = k.h * k.w * k.c;
    if (e >= area) return;
    const Pixel at = pixel(e, k.w, k.c);
    const int32_t here = at.row * k.w + at.column;
    // Window o begins at o·stride - pad: the first that reaches a pixel, and the last that begins at or before it.
    const PoolCover cover = {higher(at.row + k.pad - k.size + k.stride, 0) / k.stride,
                             lower((at.row + k.pad) / k.stride, k.p - 1),
                             higher(at.column + k.pad - k.size + k.stride, 0) / k.stride,
                             lower((at.column + k.pad) / k.stride, k.q - 1)};
    for (int64_t image = blockIdx.y; image < p.images; image += gridDim.y) {
        const int32_t of = static_cast<int32_t>(image);
        put<T>(p.y, p.half_y, image * area + e, pool_chosen<S>(p, cover, here, at.channel, of));
    }
}

template <class T>
DEVICE void pool_scatter(const PoolMoveParams& p) {
    if (sizeof(typename T::Element) == 2 && !p.half_x) {
        pool_scatter_from<T, StoredF32>(p);
    } else {
        pool_scatter_from<T, T>(p);
    }
}

KERNEL(pool_scatter_f32, PoolMoveParams, 256) { pool_scatter<StoredF32>(p); }
KERNEL(pool_scatter_f16, PoolMoveParams, 256) { pool_scatter<StoredF16>(p); }
KERNEL(pool_scatter_bf16, PoolMoveParams, 256) { pool_scatter<StoredBf16>(p); }
