// Checks every version of the laboratory and, on a card, times it. Compiled by nvcc (-x cu) it runs on a card; by the
// system's compiler, together with the SIMT host machine, on that.
//
//     harness plan              how the versions divide the three stages into blocks, as JSON
//     harness check SEED [spoil]  small shapes against plain loops: a line with shape, version, error and hash of each.
//                               `spoil` changes a weight behind the loops' back, so that all must be wrong
//     harness time              on a card: the stages against version 0, and the time of each version, as JSON
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "lab.cuh"

// Products of warpgroups are for cards of compute capability 9.0 alone.
#if __has_include("v6_wgmma.cu") && !defined(LAB_NO_WGMMA)
#define LAB_WGMMA
#endif

#if defined(__CUDACC__)
using Entry = const void*;
#define LAB_KERNEL(name) extern "C" __global__ void name(const __grid_constant__ LabParams p);
#define LAB_ENTRY(name) reinterpret_cast<const void*>(&name)
#else
using Entry = const simt::Kernel*;
#define LAB_KERNEL(name) extern "C" const simt::Kernel mlnt_simt_##name;
#define LAB_ENTRY(name) &mlnt_simt_##name
#endif

LAB_KERNEL(lab0_f32)
LAB_KERNEL(lab0_norm_f32)
LAB_KERNEL(lab1_f16)
LAB_KERNEL(lab2_32_f16)
LAB_KERNEL(lab2_64_f16)
LAB_KERNEL(lab3_32_f16)
LAB_KERNEL(lab3_64_f16)
LAB_KERNEL(lab4_32_f16)
LAB_KERNEL(lab4_64_f16)
LAB_KERNEL(lab4_norm_f16)
LAB_KERNEL(lab5_32_f16)
LAB_KERNEL(lab5_64_f16)
#if defined(LAB_WGMMA)
LAB_KERNEL(lab6_32_f16)
LAB_KERNEL(lab6_64_f16)
LAB_KERNEL(lab7_32_f16)
LAB_KERNEL(lab7_64_f16)
#endif

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[noreturn]] void fail(const char* what, const char* why) {
    fprintf(stderr, "harness: %s: %s\n", what, why);
    exit(1);
}

// ---- What differs between a card and the host machine: memory and launches ----

uint64_t seed = 1;  // of the host machine

#if defined(__CUDACC__)

void must(cudaError_t error, const char* what) {
    if (error != cudaSuccess) fail(what, cudaGetErrorString(error));
}

// An array on the device.
template <class T>
struct Array {
    T* at = nullptr;
    size_t size;
    explicit Array(const std::vector<T>& from) : size(from.size()) {
        must(cudaMalloc(&at, size * sizeof(T)), "cudaMalloc");
        must(cudaMemcpy(at, from.data(), size * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    Array(const Array&) = delete;
    Array(Array&& other) : at(other.at), size(other.size) { other.at = nullptr; }
    ~Array() { cudaFree(at); }
    std::vector<T> read() const {
        std::vector<T> to(size);
        must(cudaMemcpy(to.data(), at, size * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return to;
    }
};

// Lets a kernel have so much shared memory.
void allow(Entry entry, const char* name, size_t shared) {
    must(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
}

void launch(Entry entry, const char* name, const LabParams& p, int64_t blocks, uint32_t threads, size_t shared) {
    LabParams copy = p;
    void* arguments[] = {&copy};
    must(cudaLaunchKernel(entry, dim3(unsigned(blocks)), dim3(threads), arguments, shared, nullptr), name);
}

#else

template <class T>
struct Array {
    std::vector<T> all;
    T* at;
    explicit Array(const std::vector<T>& from) : all(from), at(all.data()) {}
    Array(const Array&) = delete;
    std::vector<T> read() const { return all; }
};

void allow(Entry, const char*, size_t) {}

void launch(Entry entry, const char* name, const LabParams& p, int64_t blocks, uint32_t threads, size_t shared) {
    const uint32_t grid[3] = {uint32_t(blocks), 1, 1};
    char error[512] = "";
    if (mlnt_simt_launch(entry, &p, sizeof p, grid, threads, shared, 0, uint64_t(blocks), seed, error, sizeof error)) {
        fail(name, error);
    }
}

#endif

// ---- The versions ----

enum class Blocks { outputs, tiles, patches, runs, cells, eights };

struct Version {
    const char* name;
    Blocks blocks;
    bool norm;
    const char* kernels[2];  // for at most 32 output channels, for more
    Entry entries[2];
};
#define ONE(name) {#name, #name}, {LAB_ENTRY(name), LAB_ENTRY(name)}
#define TWO(a, b) {#a, #b}, {LAB_ENTRY(a), LAB_ENTRY(b)}
const Version VERSIONS[] = {
    {"v0_reference", Blocks::outputs, false, ONE(lab0_f32)},
    {"v0_reference with norm", Blocks::outputs, true, ONE(lab0_norm_f32)},
    {"v1_gathered", Blocks::tiles, false, ONE(lab1_f16)},
    {"v2_halo", Blocks::patches, false, TWO(lab2_32_f16, lab2_64_f16)},
    {"v3_pipelined", Blocks::patches, false, TWO(lab3_32_f16, lab3_64_f16)},
    {"v4_norm", Blocks::patches, true, TWO(lab4_32_f16, lab4_64_f16)},
    {"v5_runs", Blocks::runs, true, TWO(lab5_32_f16, lab5_64_f16)},
#if defined(LAB_WGMMA)
    {"v6_wgmma", Blocks::cells, true, TWO(lab6_32_f16, lab6_64_f16)},
    {"v7_wgmma_once", Blocks::cells, true, TWO(lab7_32_f16, lab7_64_f16)},
#endif
    {"v4_norm alone", Blocks::eights, true, ONE(lab4_norm_f16)},
};

// How a version divides a problem.
struct Launch {
    LabParams shape;  // with the patches of the version
    const char* kernel;
    Entry entry;
    int64_t blocks;
    uint32_t threads;
    size_t shared;  // bytes

    void prepare() const { allow(entry, kernel, shared); }
    void run(const LabParams& p) const {
        LabParams with = shape;
        with.x = p.x;
        with.w = p.w;
        with.y = p.y;
        with.scale = p.scale;
        with.shift = p.shift;
        launch(entry, kernel, with, blocks, threads, shared);
    }
};

int32_t halo_of(const LabParams& p) { return p.patch_images * (p.patch_height + 2) * (p.patch_width + 2); }

int64_t patches_of(const LabParams& p) {
    return ceil_div(p.images, p.patch_images) * ceil_div(p.height, p.patch_height) * ceil_div(p.width, p.patch_width);
}

// Patches with the least to compute and to load; of equals the widest, which reads the longest runs of memory.
void choose_patches(LabParams& p) {
    int64_t best = INT64_MAX;
    for (int32_t width = std::min(p.width, 128); width >= 1; --width) {
        LabParams with = p;
        with.patch_width = width;
        const int64_t most = std::min(128 / width, p.height);
        with.patch_height = int32_t(ceil_div(p.height, ceil_div(p.height, most)));
        const bool whole = with.patch_height == p.height && width == p.width;
        with.patch_images = whole ? std::min(128 / (with.patch_height * width), p.images) : 1;
        // Fewer images where their halos are too large together.
        while (with.patch_images > 1 && halo_of(with) > 288) --with.patch_images;
        const int64_t cost = patches_of(with) * (2 * 128 + halo_of(with));
        if (halo_of(with) <= 288 && cost < best) {
            best = cost;
            p = with;
        }
    }
    if (best == INT64_MAX) fail("patches", "none fits");
}

// Patches of four cells of 8 × 8 pixels, or of fewer where the images have no more.
void choose_cells(LabParams& p) {
    const int32_t down = int32_t(ceil_div(p.height, 8)), across = int32_t(ceil_div(p.width, 8));
    p.patch_width = 8 * std::min(across, 2);
    p.patch_height = 8 * std::min(down, 32 / p.patch_width);
    if (down == 1 && across > 2) p.patch_width = 8 * std::min(across, 4);
    const bool whole = p.patch_height == 8 * down && p.patch_width == 8 * across;
    p.patch_images = whole ? std::min(256 / (p.patch_height * p.patch_width), p.images) : 1;
}

// Runs of patches that fill a card of 132 multiprocessors once with so many blocks each; in small problems three patches.
void choose_runs(LabParams& p, int64_t column_tiles, int64_t blocks) {
    p.patches = int32_t(patches_of(p));
    p.run = int32_t(std::max(int64_t(3), ceil_div(p.patches * column_tiles, 132 * blocks)));
}

Launch plan(const Version& version, LabParams p) {
    const int64_t rows = int64_t(p.images) * p.height * p.width, outputs = rows * p.filters;
    const int wide = p.filters > 32 ? 1 : 0, width = wide ? 64 : 32;
    const int64_t column_tiles = ceil_div(p.filters, width);
    if (version.blocks == Blocks::cells) choose_cells(p);
    choose_runs(p, column_tiles, version.blocks != Blocks::cells ? 3 : wide ? 1 : 2);
    Launch launch = {p, version.kernels[wide], version.entries[wide], 0, 128, 0};
    switch (version.blocks) {
        case Blocks::outputs:
            launch.blocks = ceil_div(outputs, 256);
            launch.threads = 256;
            break;
        case Blocks::eights:
            launch.blocks = ceil_div(rows * p.channels, 256 * 8);
            launch.threads = 256;
            break;
        case Blocks::tiles:
            launch.blocks = ceil_div(rows, 64) * ceil_div(p.filters, 64);
            launch.shared = 22528;
            break;
        case Blocks::patches:
        case Blocks::runs: {
            // Places for weights and for halos.
            const bool runs = version.blocks == Blocks::runs, slice = p.channels <= 32, once = version.name[1] == '2';
            const size_t weights = once ? 1 : runs && slice ? 9 : 2, halos = once || (slice && !runs) ? 1 : 2;
            launch.blocks = ceil_div(p.patches, runs ? p.run : 1) * column_tiles;
            launch.shared = 80 * (weights * size_t(width) + halos * size_t(halo_of(p)));
            if (version.norm) launch.shared += 8 * size_t(ceil_div(p.channels, 2) * 2);
            break;
        }
        case Blocks::cells: {
            const size_t pitch = size_t(ceil_div(p.patch_width, 8) * 8 + 2);
            const size_t lines = size_t(p.patch_images * (p.patch_height + 2));
            launch.blocks = ceil_div(p.patches, p.run) * column_tiles;
            launch.threads = 256;
            launch.shared = 64 * ((p.channels <= 32 ? 1 : 2) * 9 * size_t(width + 2) + 2 * lines * pitch);
            launch.shared += 8 * size_t(ceil_div(p.channels, 2) * 2);
            // Where its pixels are, and those of its halo.
            if (version.name[1] == '7') launch.shared += 4 * 256 + 8 * size_t(ceil_div(halo_of(p), 2) * 2);
        }
    }
    return launch;
}

// ---- Problems ----

LabParams shape(int32_t images, int32_t height, int32_t width, int32_t channels, int32_t filters) {
    LabParams p = {};
    p.images = images;
    p.height = height;
    p.width = width;
    p.channels = channels;
    p.filters = filters;
    choose_patches(p);
    return p;
}

// The stages of PreAct ResNet-32: k = 128 images in M = 10 branches.
const LabParams STAGES[] = {shape(1280, 32, 32, 32, 32), shape(1280, 16, 16, 64, 64), shape(1280, 8, 8, 128, 128)};

// f16 conversions of normal numbers and zero on the host, for either compiler.
float widen(uint16_t h) {
    const uint32_t size = h & 0x7fffu, bits = (h & 0x8000u) << 16 | (size ? (size << 13) + 0x38000000u : 0u);
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
uint16_t narrow(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const uint32_t size = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    if (size < 0x38800000u) return uint16_t(sign);
    return uint16_t(sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13));
}

// Numbers of about normal distribution, all normal in f16.
struct Random {
    uint32_t state;
    float next() {
        float sum = 0;
        for (int i = 0; i < 4; ++i) {
            state = state * 1664525u + 1013904223u;
            sum += float(state >> 8) / float(1 << 24) - 0.5f;
        }
        return fabsf(sum) < 1e-3f ? 1e-3f : sum;
    }
};

constexpr size_t GUARD = 64;            // elements before and behind y
constexpr uint16_t POISON = 0xffff;     // not a number
constexpr double TOLERANCE = 0.000489;  // half of f16's last place, and a little for the order of sums

struct Problem {
    LabParams p;
    std::vector<uint16_t> x, w;
    std::vector<float> scale, shift;

    size_t rows() const { return size_t(p.images) * p.height * p.width; }

    explicit Problem(const LabParams& shape) : p(shape) {
        Random random = {uint32_t(p.channels * 7 + p.width)};
        // Large problems repeat a piece of odd length.
        const size_t piece = 1000003;
        x.resize(rows() * p.channels);
        for (size_t i = 0; i < x.size(); ++i) x[i] = i < piece ? narrow(2 * random.next()) : x[i - piece];
        w.resize(size_t(p.filters) * 9 * p.channels);
        for (auto& v : w) v = narrow(random.next() / sqrtf(float(p.channels)));
        for (int c = 0; c < p.channels; ++c) {
            scale.push_back(1.0f + 0.3f * random.next());
            shift.push_back(0.5f * random.next());
        }
    }

    // What enters the convolution.
    std::vector<float> operand(bool norm) const {
        std::vector<float> h(x.size());
        for (size_t i = 0; i < x.size(); ++i) {
            const float v = widen(x[i]);
            const size_t c = i % size_t(p.channels);
            h[i] = norm ? widen(narrow(std::max(0.0f, fmaf(v, scale[c], shift[c])))) : v;
        }
        return h;
    }

    // The result by plain loops.
    std::vector<float> reference(bool norm) const {
        const std::vector<float> h = operand(norm);
        std::vector<float> y;
        for (int n = 0; n < p.images; ++n)
            for (int i = 0; i < p.height; ++i)
                for (int j = 0; j < p.width; ++j)
                    for (int k = 0; k < p.filters; ++k) {
                        double sum = 0;
                        for (int r = 0; r < 3; ++r)
                            for (int s = 0; s < 3; ++s) {
                                const int a = i + r - 1, b = j + s - 1;
                                if (a < 0 || a >= p.height || b < 0 || b >= p.width) continue;
                                const size_t at = ((size_t(n) * p.height + a) * p.width + b) * p.channels;
                                const size_t from = ((size_t(k) * 3 + r) * 3 + s) * p.channels;
                                for (int c = 0; c < p.channels; ++c) sum += double(h[at + c]) * widen(w[from + c]);
                            }
                        y.push_back(float(sum));
                    }
        return y;
    }
};

// Relative error in the Euclidean norm; infinite where something is not a number.
double error_of(const uint16_t* y, const std::vector<float>& want) {
    double wrong = 0, all = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        if ((y[i] & 0x7c00u) == 0x7c00u) return INFINITY;
        const double d = double(widen(y[i])) - want[i];
        wrong += d * d;
        all += double(want[i]) * want[i];
    }
    return sqrt(wrong / all);
}

int check(bool spoil) {
    // Images of odd sizes, slices that are not full, tiles of pixels and of output channels that are not.
    const LabParams shapes[] = {shape(2, 32, 32, 32, 32), shape(2, 16, 16, 64, 64), shape(3, 8, 8, 128, 128),
                                shape(3, 15, 11, 40, 24), shape(5, 7, 5, 8, 72),    shape(2, 1, 130, 72, 40),
                                shape(1, 40, 1, 16, 8)};
    bool right = true;
    for (const LabParams& small : shapes) {
        Problem problem(small);
        const std::vector<float> plain = problem.reference(false), normed = problem.reference(true);
        const std::vector<float> operand = problem.operand(true);
        if (spoil) {
            problem.w[problem.w.size() / 2] ^= 0x8000;
            for (auto& v : problem.x) v ^= 0x8000;
        }
        const Array<uint16_t> x(problem.x), w(problem.w);
        const Array<float> scale(problem.scale), shift(problem.shift);
        for (const Version& version : VERSIONS) {
            const bool pass = version.blocks == Blocks::eights;
            const std::vector<float>& want = pass ? operand : version.norm ? normed : plain;
            const Array<uint16_t> y(std::vector<uint16_t>(want.size() + 2 * GUARD, POISON));
            LabParams p = problem.p;
            p.x = x.at;
            p.w = w.at;
            p.y = y.at + GUARD;
            p.scale = scale.at;
            p.shift = shift.at;
            const Launch launch = plan(version, p);
            launch.prepare();
            launch.run(p);
            const std::vector<uint16_t> got = y.read();
            uint64_t hash = 0xcbf29ce484222325u;
            for (const uint16_t v : got) hash = (hash ^ v) * 0x100000001b3u;
            bool guarded = true;
            for (size_t i = 0; i < GUARD; ++i) guarded &= got[i] == POISON && got[got.size() - 1 - i] == POISON;
            const double error = guarded ? error_of(got.data() + GUARD, want) : INFINITY;
            right &= error <= TOLERANCE;
            printf("%d x %d x %d x %d -> %d, %s: %.3e %016llx\n", p.images, p.height, p.width, p.channels, p.filters,
                   version.name, error, static_cast<unsigned long long>(hash));
        }
    }
    return right ? 0 : 1;
}

int print_plan() {
    printf("[");
    const char* comma = "";
    for (int stage = 0; stage < 3; ++stage) {
        for (const Version& version : VERSIONS) {
            const Launch launch = plan(version, STAGES[stage]);
            const LabParams& p = launch.shape;
            const bool runs = version.blocks == Blocks::runs || version.blocks == Blocks::cells;
            printf("%s\n {\"stage\": %d, \"version\": \"%s\", \"kernel\": \"%s\", \"blocks\": %lld, \"threads\": %u, "
                   "\"shared\": %zu, \"images\": %d, \"height\": %d, \"width\": %d, \"channels\": %d, \"filters\": %d, "
                   "\"patch\": [%d, %d, %d], \"halo\": %d, \"run\": %d}",
                   comma, stage + 1, version.name, launch.kernel, static_cast<long long>(launch.blocks),
                   launch.threads, launch.shared, p.images, p.height, p.width, p.channels, p.filters, p.patch_images,
                   p.patch_height, p.patch_width, halo_of(p), runs ? p.run : 1);
            comma = ",";
        }
    }
    printf("\n]\n");
    return 0;
}

#if defined(__CUDACC__)

constexpr int SETS = 4;      // of x and y in turn: more than the L2 cache holds
constexpr int REPEATS = 31;  // times that are taken, each of ROUNDS launches on each set
constexpr int ROUNDS = 5;    // so many that the first launch's way to the card does not count

int time_all() {
    cudaDeviceProp card;
    must(cudaGetDeviceProperties(&card, 0), "cudaGetDeviceProperties");
    printf("{\"card\": \"%s\", \"multiprocessors\": %d, \"rows\": [", card.name, card.multiProcessorCount);
    cudaEvent_t start, stop;
    must(cudaEventCreate(&start), "cudaEventCreate");
    must(cudaEventCreate(&stop), "cudaEventCreate");
    const char* comma = "";
    bool right = true;
    for (int stage = 0; stage < 3; ++stage) {
        Problem problem(STAGES[stage]);
        const size_t outputs = problem.rows() * size_t(problem.p.filters);
        std::vector<Array<uint16_t>> x, y;
        for (int set = 0; set < SETS; ++set) {
            x.emplace_back(problem.x);
            y.emplace_back(std::vector<uint16_t>(outputs, POISON));
        }
        const Array<uint16_t> w(problem.w);
        const Array<float> scale(problem.scale), shift(problem.shift);
        const auto params = [&](int set) {
            LabParams p = problem.p;
            p.x = x[set].at;
            p.w = w.at;
            p.y = y[set].at;
            p.scale = scale.at;
            p.shift = shift.at;
            return p;
        };
        std::vector<float> expected[2];  // without and with norm, of version 0
        for (const Version& version : VERSIONS) {
            const Launch launch = plan(version, problem.p);
            const bool pass = version.blocks == Blocks::eights, reference = version.blocks == Blocks::outputs;
            launch.prepare();
            must(cudaMemset(y[0].at, 0xff, outputs * 2), "cudaMemset");
            launch.run(params(0));
            must(cudaDeviceSynchronize(), launch.kernel);
            const std::vector<uint16_t> got = y[0].read();
            std::vector<float>& of_reference = expected[version.norm];
            if (reference) {
                of_reference.clear();
                for (const uint16_t v : got) of_reference.push_back(widen(v));
            }
            const double error = error_of(got.data(), pass ? problem.operand(true) : of_reference);
            right &= error <= TOLERANCE;
            const int rounds = reference ? 1 : ROUNDS;
            std::vector<float> times;
            for (int repeat = 0; repeat < (reference ? 3 : REPEATS) + 1; ++repeat) {
                must(cudaEventRecord(start), "cudaEventRecord");
                for (int i = 0; i < rounds * SETS; ++i) launch.run(params(i % SETS));
                must(cudaEventRecord(stop), "cudaEventRecord");
                must(cudaEventSynchronize(stop), launch.kernel);
                float milliseconds = 0;
                must(cudaEventElapsedTime(&milliseconds, start, stop), "cudaEventElapsedTime");
                if (repeat > 0) times.push_back(1e3f * milliseconds / float(rounds * SETS));
            }
            std::sort(times.begin(), times.end());
            const size_t n = times.size();
            printf("%s\n {\"stage\": %d, \"version\": \"%s\", \"kernel\": \"%s\", \"error\": %.3e, \"microseconds\": %.3f, "
                   "\"first_quartile\": %.3f, \"third_quartile\": %.3f}",
                   comma, stage + 1, version.name, launch.kernel, error, times[n / 2], times[n / 4], times[3 * n / 4]);
            comma = ",";
        }
    }
    printf("\n]}\n");
    return right ? 0 : 1;
}

#endif

}  // namespace

int main(int count, char** arguments) {
    const char* what = count > 1 ? arguments[1] : "";
    if (strcmp(what, "plan") == 0) return print_plan();
    if (strcmp(what, "check") == 0 && count > 2) {
        seed = strtoull(arguments[2], nullptr, 10);
        return check(count > 3 && strcmp(arguments[3], "spoil") == 0);
    }
#if defined(__CUDACC__)
    if (strcmp(what, "time") == 0) return time_all();
#endif
    fprintf(stderr, "harness plan | check SEED [spoil] | time\n");
    return 2;
}
