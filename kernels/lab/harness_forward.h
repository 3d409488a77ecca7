// The versions of the forward convolution: how they divide a problem, their check and their times.
#pragma once

#include "harness.h"

LAB_KERNEL(lab0_f32, LabParams)
LAB_KERNEL(lab0_norm_f32, LabParams)
LAB_KERNEL(lab1_f16, LabParams)
LAB_KERNEL(lab2_32_f16, LabParams)
LAB_KERNEL(lab2_64_f16, LabParams)
LAB_KERNEL(lab3_32_f16, LabParams)
LAB_KERNEL(lab3_64_f16, LabParams)
LAB_KERNEL(lab4_32_f16, LabParams)
LAB_KERNEL(lab4_64_f16, LabParams)
LAB_KERNEL(lab4_norm_f16, LabParams)
LAB_KERNEL(lab5_32_f16, LabParams)
LAB_KERNEL(lab5_64_f16, LabParams)
#if defined(LAB_WGMMA)
LAB_KERNEL(lab6_32_f16, LabParams)
LAB_KERNEL(lab6_64_f16, LabParams)
LAB_KERNEL(lab7_32_f16, LabParams)
LAB_KERNEL(lab7_64_f16, LabParams)
#endif

namespace {
namespace forward {

// ---- The versions ----

enum class Blocks { outputs, tiles, patches, runs, cells, eights };

struct Version {
    const char* name;
    Blocks blocks;
    bool norm;
    const char* kernels[2];  // for at most 32 output channels, for more
    Entry entries[2];
};
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

bool check(bool spoil) {
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
            const Found found = found_in(y.read(), POISON, want);
            right &= found.error <= TOLERANCE;
            printf("%d x %d x %d x %d -> %d, %s: %.3e %016llx\n", p.images, p.height, p.width, p.channels, p.filters,
                   version.name, found.error, found.hash);
        }
    }
    return right;
}

// Rows of the plan; `comma`: before the next.
void print_plan(const char*& comma) {
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
}

#if defined(__CUDACC__)

// Rows of times; whether all were right.
bool time_all(const char*& comma) {
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
            const auto run = [&](int set) { launch.run(params(set)); };
            const Times times = times_of(launch.kernel, reference ? 3 : REPEATS, reference ? 1 : ROUNDS, run);
            printf("%s\n {\"stage\": %d, \"version\": \"%s\", \"kernel\": \"%s\", \"error\": %.3e, \"microseconds\": %.3f, "
                   "\"first_quartile\": %.3f, \"third_quartile\": %.3f}",
                   comma, stage + 1, version.name, launch.kernel, error, times.median, times.first, times.third);
            comma = ",";
        }
    }
    return right;
}

#endif

}  // namespace forward
}  // namespace
