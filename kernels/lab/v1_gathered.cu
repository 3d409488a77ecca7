// Version 1: a matrix product of gathered tiles on tensor cores.
//
// Rows are pixels, columns output channels, and the inner dimension runs over taps and input channels. A block makes 64 × 64
// outputs in steps of 32 inner indices, whose operands its threads gather into shared memory one element at a time. A
// pixel and a tap are both positions, and add up: tables of them spare the gathering its divisions.
#include "lab.cuh"

constexpr int TILE = 64, DEPTH = 32, PITCH = DEPTH + 8, THREADS = 128;
constexpr int HELD = TILE * DEPTH / THREADS;  // elements of a tile that a thread gathers: inner index `lane` of 16 lines

// A pixel's place in x, or a tap's displacement from it.
struct alignas(16) Position {
    uint32_t offset;
    int32_t h, w;
    uint32_t weight;  // of the tap, in a filter
};
constexpr int32_t OUTSIDE = 1 << 20;  // of every image, whatever is added

struct Shared {
    Position pixels[TILE];
    Position taps[2][DEPTH];
    uint16_t rows[2][TILE * PITCH];
    uint16_t columns[2][TILE * PITCH];
};
static_assert(sizeof(Shared) == 22528);

DEVICE Position pixel(const LabParams& p, uint32_t i) {
    const uint32_t width = uint32_t(p.width), height = uint32_t(p.height);
    if (i >= uint32_t(p.images) * height * width) return {0, OUTSIDE, 0, 0};
    return {i * uint32_t(p.channels), int32_t(i / width % height), int32_t(i % width), 0};
}

DEVICE Position tap(const LabParams& p, uint32_t i) {
    const uint32_t channels = uint32_t(p.channels);
    if (i >= 9 * channels) return {0, OUTSIDE, 0, NOWHERE};
    const uint32_t number = i / channels;
    const int32_t h = int32_t(number) / 3 - 1, w = int32_t(number) % 3 - 1;
    return {uint32_t(h * p.width + w) * channels + i % channels, h, w, i};
}

struct Gather {
    const LabParams& p;
    Shared& shared;
    uint32_t column;
    uint16_t x[HELD], w[HELD];

    DEVICE void load(int slot) {
        const int lane = int(threadIdx.x) % 32, first = int(threadIdx.x) / 32 * HELD;
        const Position at = shared.taps[slot][lane];
        for (int i = 0; i < HELD; ++i) {
            const Position from = shared.pixels[first + i];
            const bool inside = uint32_t(from.h + at.h) < uint32_t(p.height) && uint32_t(from.w + at.w) < uint32_t(p.width);
            x[i] = inside ? p.x[from.offset + at.offset] : uint16_t(0);
        }
        for (int i = 0; i < HELD; ++i) {
            const uint32_t k = column + first + i;
            const bool inside = k < uint32_t(p.filters) && at.weight != NOWHERE;
            w[i] = inside ? p.w[k * 9 * uint32_t(p.channels) + at.weight] : uint16_t(0);
        }
    }
    DEVICE void store(int slot) {
        const int lane = int(threadIdx.x) % 32, first = int(threadIdx.x) / 32 * HELD;
        for (int i = 0; i < HELD; ++i) shared.rows[slot][(first + i) * PITCH + lane] = x[i];
        for (int i = 0; i < HELD; ++i) shared.columns[slot][(first + i) * PITCH + lane] = w[i];
    }
};

// The four warps have a quarter each, 32 × 32. Fragments as `platform.cuh` has them, read one word at a time.
DEVICE void multiply(float d[2][4][4], const uint16_t* rows, const uint16_t* columns) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
    const uint32_t* row = reinterpret_cast<const uint32_t*>(rows) + (warp % 2 * 32 + g) * (PITCH / 2) + t;
    const uint32_t* column = reinterpret_cast<const uint32_t*>(columns) + (warp / 2 * 32 + g) * (PITCH / 2) + t;
    for (int k = 0; k < DEPTH / 2; k += 8) {
        uint32_t a[2][4], b[4][2];
        for (int m = 0; m < 2; ++m) {
            for (int i = 0; i < 4; ++i) a[m][i] = row[(16 * m + 8 * (i % 2)) * (PITCH / 2) + k + 4 * (i / 2)];
        }
        for (int n = 0; n < 4; ++n) {
            for (int i = 0; i < 2; ++i) b[n][i] = column[8 * n * (PITCH / 2) + k + 4 * i];
        }
        for (int m = 0; m < 2; ++m) {
            for (int n = 0; n < 4; ++n) mma_m16n8k16_f16(d[m][n], a[m], b[n]);
        }
    }
}

DEVICE void conv(const LabParams& p) {
    auto& shared = *shared_memory<Shared>();
    const uint32_t tiles = uint32_t(p.filters + TILE - 1) / TILE;
    const uint32_t column = blockIdx.x % tiles * TILE, row = blockIdx.x / tiles * TILE;
    const uint32_t thread = threadIdx.x, count = uint32_t(9 * p.channels + DEPTH - 1) / DEPTH;
    if (thread < TILE) shared.pixels[thread] = pixel(p, row + thread);
    if (thread < DEPTH) shared.taps[0][thread] = tap(p, thread);
    if (thread < DEPTH) shared.taps[1][thread] = tap(p, DEPTH + thread);
    sync_threads();

    Gather gather{p, shared, column, {}, {}};
    gather.load(0);
    gather.store(0);
    sync_threads();
    float d[2][4][4] = {};
    // One barrier a step: it separates the work on a slot from the writes to it, one step later.
    for (uint32_t i = 0; i < count; ++i) {
        const int slot = int(i % 2);
        if (i + 1 < count) gather.load(1 - slot);
        if (thread < DEPTH) shared.taps[slot][thread] = tap(p, (i + 2) * DEPTH + thread);
        multiply(d, shared.rows[slot], shared.columns[slot]);
        if (i + 1 < count) gather.store(1 - slot);
        sync_threads();
    }
    const uint32_t rows = uint32_t(p.images) * uint32_t(p.height) * uint32_t(p.width);
    const uint32_t first_row = row + thread / 32 % 2 * 32 + thread % 32 / 4;
    const uint32_t first_column = column + thread / 64 * 32 + thread % 4 * 2;
    for (int m = 0; m < 2; ++m) {
        for (int half = 0; half < 2; ++half) {
            const uint32_t at = first_row + 16 * m + 8 * half;
            if (at >= rows) continue;
            for (int n = 0; n < 4; ++n) {
                const uint32_t k = first_column + 8 * n;
                const uint32_t pair = floats_to_f16x2(d[m][n][2 * half], d[m][n][2 * half + 1]);
                if (k < uint32_t(p.filters)) *reinterpret_cast<uint32_t*>(p.y + at * uint32_t(p.filters) + k) = pair;
            }
        }
    }
}

KERNEL(lab1_f16, LabParams, 128) { conv(p); }
