// Sums over rows of channels, and their transpose: channel sums, biases, global average pooling.
//
// A tensor is seen as [summed, groups, rows, channels]. A block takes a tile of at most 256 channels and a slice of
// the rows of one group: neighbouring threads hold neighbouring channels and, where the channels are few, rows below
// one another, so that a block reads consecutive memory. The end of a kernel's name says how the tensor with rows lies in memory. A thread adds few values in f32, in four sums; everything from
// there on is added in double precision. What is added to what depends on the shapes alone.

#include "storage.cuh"

struct RowSumParams {
    const void* x;     // [summed, groups, rows, channels]
    float* y;          // [groups, channels]; null where there are several slices
    double* partial;   // [groups, slices, channels] where there are several slices
    int64_t groups;
    int64_t rows;
    int64_t slice;     // rows of a slice
    int32_t slices;
    int32_t summed;    // outermost extent, added up as well
    int32_t channels;
    int32_t width;     // channels of a tile
    float factor;      // multiplied to the sums
    int32_t padding;
};
static_assert(sizeof(RowSumParams) == 72);

struct RowSumFinishParams {
    const double* partial;  // [groups, slices, channels]
    float* y;               // [groups, channels]
    int64_t groups;
    int64_t slices;
    int32_t channels;
    float factor;           // multiplied to the sums
};
static_assert(sizeof(RowSumFinishParams) == 40);

struct RowBroadcastParams {
    const float* x;    // [summed, groups, channels]
    void* y;           // [groups, rows, channels]
    int64_t groups;
    int64_t rows;
    int64_t slice;     // rows of a slice
    int32_t slices;
    int32_t summed;    // outermost extent, added up
    int32_t channels;
    int32_t width;     // channels of a tile
    float factor;      // multiplied to the sums
    int32_t padding;
};
static_assert(sizeof(RowBroadcastParams) == 64);

// What a thread works on: every `step`-th row of from..to in one channel.
struct Lines {
    int64_t from, to;
    int slice, channel, row, step;
    bool live;
};

template <class Params>
DEVICE Lines lines_of_thread(const Params& p) {
    const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    const int tile = block / p.slices, slice = block % p.slices;
    Lines l;
    l.slice = slice;
    l.step = static_cast<int>(blockDim.x) / p.width;
    l.row = thread / p.width;
    l.channel = tile * p.width + thread % p.width;
    l.live = l.row < l.step && l.channel < p.channels;
    l.from = slice * p.slice + l.row;
    const int64_t end = (slice + 1) * p.slice;
    l.to = end < p.rows ? end : p.rows;
    return l;
}

template <class T>
DEVICE void row_sum(const RowSumParams& p) {
    double* sums = shared_memory<double>();  // [threads]
    const Lines l = lines_of_thread(p);
    for (int64_t group = blockIdx.y; group < p.groups; group += gridDim.y) {
        double sum = 0.0;
        for (int64_t s = 0; s < p.summed && l.live; s++) {
            const typename T::Element* x = static_cast<const typename T::Element*>(p.x) +
                                           (s * p.groups + group) * p.rows * p.channels + l.channel;
            float part[4] = {};
            int64_t row = l.from;
            for (; row + 3 * l.step < l.to; row += 4 * l.step) {
                for (int i = 0; i < 4; i++) part[i] += T::widen(x[(row + i * l.step) * p.channels]);
            }
            for (int i = 0; i < 3; i++) {
                if (row + i * l.step < l.to) part[i] += T::widen(x[(row + i * l.step) * p.channels]);
            }
            sum += (static_cast<double>(part[0]) + part[1]) + (static_cast<double>(part[2]) + part[3]);
        }
        sums[threadIdx.x] = sum;
        sync_threads();
        if (l.live && l.row == 0) {
            for (int row = 1; row < l.step; row++) sum += sums[row * p.width + threadIdx.x];
            if (p.partial) {
                p.partial[(group * p.slices + l.slice) * p.channels + l.channel] = sum;
            } else {
                p.y[group * p.channels + l.channel] = static_cast<float>(sum * p.factor);
            }
        }
        sync_threads();
    }
}

KERNEL(row_sum_f32, RowSumParams, 256) { row_sum<StoredF32>(p); }
KERNEL(row_sum_f16, RowSumParams, 256) { row_sum<StoredF16>(p); }
KERNEL(row_sum_bf16, RowSumParams, 256) { row_sum<StoredBf16>(p); }

// Adds up the slices: a block takes 32 channels, each of its warps every eighth slice.
KERNEL(row_sum_finish_f32, RowSumFinishParams, 256) {
    double* sums = shared_memory<double>();  // [8, 32]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * 32 + lane;
    for (int64_t group = blockIdx.y; group < p.groups; group += gridDim.y) {
        double sum = 0.0;
        for (int64_t slice = warp; slice < p.slices && channel < p.channels; slice += 8) {
            sum += p.partial[(group * p.slices + slice) * p.channels + channel];
        }
        sums[threadIdx.x] = sum;
        sync_threads();
        if (warp == 0 && channel < p.channels) {
            for (int other = 1; other < 8; other++) sum += sums[other * 32 + lane];
            p.y[group * p.channels + channel] = static_cast<float>(sum * p.factor);
        }
        sync_threads();
    }
}

template <class T>
DEVICE void row_broadcast(const RowBroadcastParams& p) {
    const Lines l = lines_of_thread(p);
    if (!l.live) return;
    for (int64_t group = blockIdx.y; group < p.groups; group += gridDim.y) {
        float sum = 0.0f;
        for (int64_t s = 0; s < p.summed; s++) sum += p.x[(s * p.groups + group) * p.channels + l.channel];
        sum *= p.factor;
        typename T::Element* y = static_cast<typename T::Element*>(p.y) + group * p.rows * p.channels + l.channel;
        const typename T::Element value = T::narrow(sum);
        for (int64_t row = l.from; row < l.to; row += l.step) y[row * p.channels] = value;
    }
}

KERNEL(row_broadcast_f32, RowBroadcastParams, 256) { row_broadcast<StoredF32>(p); }
KERNEL(row_broadcast_f16, RowBroadcastParams, 256) { row_broadcast<StoredF16>(p); }
KERNEL(row_broadcast_bf16, RowBroadcastParams, 256) { row_broadcast<StoredBf16>(p); }
