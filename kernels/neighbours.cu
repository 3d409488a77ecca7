// Nearest neighbours within a batch, and synthetic labels taken from them.

#include "platform.cuh"

struct NearestParams {
    const float* features;  // [M, k, F]
    int32_t* indices;       // [M, k, count]
    int64_t features_branch;
    int64_t indices_branch;
    int32_t samples;
    int32_t dim;
    int32_t count;
    int32_t padding;
};
static_assert(sizeof(NearestParams) == 48, "as in lower/neighbours.rs");

struct TransferParams {
    const int32_t* labels;      // [M, k]
    const int32_t* neighbours;  // [M, k, count]
    const int32_t* ranks;       // [M, k]; negative: the sample keeps its label
    int32_t* out;               // [M, k]
    int64_t labels_branch;
    int64_t neighbours_branch;
    int64_t ranks_branch;
    int32_t samples;
    int32_t count;
};
static_assert(sizeof(TransferParams) == 64, "as in lower/neighbours.rs");

// True where a comes before b: the smaller distance, NaN last, the smaller index on ties.
DEVICE bool nearer(double da, int32_t a, double db, int32_t b) {
    if (da != db) {
        if (da != da || db != db) return db != db && (da == da || a < b);
        return da < db;
    }
    return a < b;
}

// One block per sample and branch: distances to all others in shared memory (double: two samples must not change
// places by rounding), then `count` rounds of looking for the nearest that is left.
KERNEL(nearest_neighbours_f32, NearestParams, 128) {
    const int32_t i = blockIdx.x, m = blockIdx.y, tid = threadIdx.x, threads = blockDim.x;
    double* distance = shared_memory<double>();                     // [k]
    double* best_distance = distance + p.samples;                   // [threads]
    int32_t* best = reinterpret_cast<int32_t*>(best_distance + threads);  // [threads]
    const float* x = p.features + m * p.features_branch;
    const float* own = x + int64_t(i) * p.dim;
    for (int32_t j = tid; j < p.samples; j += threads) {
        const float* other = x + int64_t(j) * p.dim;
        double sum = 0.0;
        for (int32_t f = 0; f < p.dim; ++f) {
            const double d = double(own[f]) - double(other[f]);
            sum += d * d;
        }
        distance[j] = sum;
    }
    sync_threads();
    int32_t* out = p.indices + m * p.indices_branch + int64_t(i) * p.count;
    int32_t last = -1;
    double last_distance = 0.0;
    for (int32_t rank = 0; rank < p.count; ++rank) {
        int32_t mine = -1;
        double my_distance = 0.0;
        for (int32_t j = tid; j < p.samples; j += threads) {
            const bool left = j != i && (last < 0 || nearer(last_distance, last, distance[j], j));
            if (left && (mine < 0 || nearer(distance[j], j, my_distance, mine))) {
                mine = j;
                my_distance = distance[j];
            }
        }
        best[tid] = mine;
        best_distance[tid] = my_distance;
        sync_threads();
        // Every thread comes to the same end: no broadcast is needed.
        last = -1;
        for (int32_t t = 0; t < threads; ++t) {
            if (best[t] >= 0 && (last < 0 || nearer(best_distance[t], best[t], last_distance, last))) {
                last = best[t];
                last_distance = best_distance[t];
            }
        }
        if (tid == 0) out[rank] = last;
        sync_threads();
    }
}

KERNEL(transfer_labels_i32, TransferParams, 128) {
    const int32_t i = blockIdx.x * blockDim.x + threadIdx.x, m = blockIdx.y;
    if (i >= p.samples) return;
    const int32_t rank = p.ranks[m * p.ranks_branch + i];
    int32_t from = i;
    if (rank >= 0 && rank < p.count) from = p.neighbours[m * p.neighbours_branch + int64_t(i) * p.count + rank];
    p.out[int64_t(m) * p.samples + i] = p.labels[m * p.labels_branch + from];
}
