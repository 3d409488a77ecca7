// The versions of the backward: how they divide a problem, their check and their times.
#pragma once

#include "harness.h"

LAB_KERNEL(lab_back0_f32, LabBackParams)
LAB_KERNEL(lab_back1_32_f16, LabBackParams)
LAB_KERNEL(lab_back1_64_f16, LabBackParams)
LAB_KERNEL(lab_back4_f16, LabBackParams)
#if defined(LAB_WGMMA)
LAB_KERNEL(lab_back2_32_f16, LabBackParams)
LAB_KERNEL(lab_back2_64_f16, LabBackParams)
LAB_KERNEL(lab_back3_f16, LabBackParams)
#endif

namespace {
namespace backward {

enum class Blocks { outputs, roles, cell_roles, cell_tile, tile };

struct Version {
    const char* name;
    Blocks blocks;
    const char* kernels[2];  // for at most 32 channels on both sides, for more
    Entry entries[2];

    bool takes(const LabBackParams& p) const {
        const bool narrow = blocks == Blocks::tile || blocks == Blocks::cell_tile;
        return !narrow || std::max(p.channels, p.filters) <= 32;
    }
};
const Version VERSIONS[] = {
    {"b0_reference", Blocks::outputs, ONE(lab_back0_f32)},
    {"b1_roles", Blocks::roles, TWO(lab_back1_32_f16, lab_back1_64_f16)},
#if defined(LAB_WGMMA)
    {"b2_wgmma_roles", Blocks::cell_roles, TWO(lab_back2_32_f16, lab_back2_64_f16)},
    {"b3_wgmma_tile", Blocks::cell_tile, ONE(lab_back3_f16)},
#endif
    {"b4_tile", Blocks::tile, ONE(lab_back4_f16)},
};

// How a version divides a problem.
struct Launch {
    LabBackParams shape;  // with the patches of the version
    const char* kernel;
    Entry entry;
    int64_t dgrad_blocks;  // or those of both
    uint32_t threads;
    size_t shared;    // bytes
    size_t tiles;     // of dw
    size_t partials;  // floats

    void prepare() const { allow(entry, kernel, shared); }
    // `p`: the tensors.
    void run(const LabBackParams& p) const {
        LabBackParams with = shape;
        with.dy = p.dy;
        with.y = p.y;
        with.x = p.x;
        with.w = p.w;
        with.deltas = p.deltas;
        with.norms = p.norms;
        with.dx = p.dx;
        with.dw = p.dw;
        with.partial = p.partial;
        with.arrivals = p.arrivals;
        launch(entry, kernel, with, dgrad_blocks + with.wgrad_blocks, threads, shared);
    }
};

// A part of wgrad's patches is 32 of 128 pixels, as in the library; in small problems two patches.
int32_t splits_of(int64_t patches, int64_t most) { return int32_t(ceil_div(patches, patches >= 2 * most ? most : 2)); }

// Parts of a branch's patches that fill a card of 132 multiprocessors once with so many blocks each; in small problems
// of two patches.
int32_t runs_of(const LabBackParams& p, int64_t blocks) {
    const int64_t of_branch = std::max(int64_t(1), 132 * blocks / p.branches);
    return int32_t(ceil_div(p.patches, std::max(int64_t(2), ceil_div(p.patches, of_branch))));
}

Launch plan(const Version& version, LabBackParams p) {
    const int64_t rows = int64_t(p.branches) * p.images * p.height * p.width;
    const int wide = std::max(p.channels, p.filters) > 32 ? 1 : 0;
    const int64_t width = wide ? 64 : 32, across = ceil_div(p.channels, 32);
    const size_t factors = 16 * size_t(p.filters) + 8 * size_t(p.channels);
    if (version.blocks == Blocks::cell_roles || version.blocks == Blocks::cell_tile) {
        choose_cells(p);
    } else {
        choose_patches(p);
    }
    p.patches = int32_t(patches_of(p));
    p.run = p.splits = 1;
    Launch launch = {p, version.kernels[wide], version.entries[wide], 0, 128, 0, 0, 0};
    LabBackParams& with = launch.shape;
    // Of cells: a part of a line of a halo, its lines, and what halo and pixels are described by.
    const size_t pitch = size_t(p.patch_width) + 2, lines = size_t(p.patch_images * (p.patch_height + 2));
    const auto places = [](int64_t pixels) { return 8 * size_t(ceil_div(pixels, 2) * 2); };
    const size_t aligned = size_t(ceil_div(int64_t(factors), 1024) * 1024), halo_bytes = 64 * size_t(ceil_div(halo_of(p), 8) * 8);
    switch (version.blocks) {
        case Blocks::outputs:
            launch.dgrad_blocks = ceil_div(rows * p.channels, 256);
            with.wgrad_blocks = int32_t(ceil_div(int64_t(p.branches) * p.filters * 9 * p.channels, 256));
            launch.threads = 256;
            break;
        case Blocks::roles:
            with.splits = splits_of(p.patches, 32);
            launch.tiles = size_t(p.branches * ceil_div(p.filters, 32) * across);
            launch.partials = 72 * 128;
            launch.dgrad_blocks = int64_t(p.branches) * p.patches * ceil_div(p.channels, width);
            with.wgrad_blocks = int32_t(launch.tiles) * with.splits;
            launch.shared = std::max(aligned + 3 * 64 * size_t(width) + (p.filters > 32 ? 2 : 1) * halo_bytes,
                                     aligned + 1024 + 2 * (8192 + halo_bytes));
            break;
        case Blocks::tile:
            with.splits = runs_of(p, 2);
            launch.tiles = size_t(p.branches);
            launch.partials = 72 * 128;
            launch.dgrad_blocks = int64_t(p.branches) * with.splits;
            launch.shared = aligned + 1024 + 9 * 2048 + 2 * (8192 + halo_bytes);
            break;
        case Blocks::cell_roles: {
            const int64_t tiles = ceil_div(p.channels, width);
            with.run = int32_t(std::max(int64_t(2), ceil_div(int64_t(p.branches) * p.patches * tiles, 132 * (wide ? 1 : 2))));
            with.splits = splits_of(p.patches, 16);
            launch.tiles = size_t(p.branches * ceil_div(p.filters, width) * across);
            launch.partials = 3 * size_t(width) / 2 * 256;
            launch.dgrad_blocks = int64_t(p.branches) * ceil_div(p.patches, with.run) * tiles;
            with.wgrad_blocks = int32_t(launch.tiles) * with.splits;
            launch.threads = 256;
            const size_t weights = 16 * 9 * size_t(width / 8) * (32 + (wide ? 1 : 2)), halos = 2 * 64 * lines * pitch;
            const size_t delta = 16 * size_t(width / 8) * (256 + (wide ? 1 : 2));
            launch.shared = factors + places(halo_of(p)) + halos +
                            std::max(4 * 256 + (p.filters > 32 ? 2 : 1) * weights, 16 + 8 * 256 + 2 * delta);
            break;
        }
        case Blocks::cell_tile: {
            with.splits = runs_of(p, 1);
            launch.tiles = size_t(p.branches);
            launch.partials = 3 * 32 * 128;
            launch.dgrad_blocks = int64_t(p.branches) * with.splits;
            launch.threads = 256;
            const size_t input_lines = size_t(p.patch_images * (p.patch_height + 1));
            const size_t slots = 2 * 64 * pitch * (lines + input_lines) + 16 * 9 * 4 * 34;
            launch.shared = factors + 4 * 256 + places(halo_of(p)) + places(int64_t(input_lines) * p.patch_width);
            // The sums of a warpgroup take the place of the slots in the end.
            launch.shared += std::max(slots, size_t(4 * 3 * 32 * 128));
        }
    }
    launch.partials *= launch.tiles * size_t(with.splits);
    return launch;
}

// ---- Problems ----

LabBackParams shape(int32_t branches, int32_t images, int32_t height, int32_t width, int32_t channels, int32_t filters) {
    LabBackParams p = {};
    p.branches = branches;
    p.images = images;
    p.height = height;
    p.width = width;
    p.channels = channels;
    p.filters = filters;
    return p;
}

// The stages of PreAct ResNet-32.
const LabBackParams STAGES[] = {shape(10, 128, 32, 32, 32, 32), shape(10, 128, 16, 16, 64, 64), shape(10, 128, 8, 8, 128, 128)};

// dw is not rounded: what is left is the order of sums, and that tensor cores cut off what they add up.
constexpr double SUMS_TOLERANCE = 1e-4;
constexpr float NO_NUMBER = NAN;

struct Problem {
    LabBackParams p;
    std::vector<uint16_t> dy, y, x, w;
    std::vector<LabDeltas> deltas;
    std::vector<LabNorms> norms;

    size_t rows() const { return size_t(p.branches) * size_t(p.images) * size_t(p.height) * size_t(p.width); }
    size_t weights() const { return size_t(p.filters) * 9 * size_t(p.channels); }

    explicit Problem(const LabBackParams& shape) : p(shape) {
        Random random = {uint32_t(p.channels * 7 + p.width)};
        // Large problems repeat a piece of odd length.
        const auto fill = [&](std::vector<uint16_t>& to, size_t size, float scale) {
            const size_t piece = 1000003;
            to.resize(size);
            for (size_t i = 0; i < size; ++i) to[i] = i < piece ? narrow(scale * random.next()) : to[i - piece];
        };
        fill(dy, rows() * size_t(p.filters), 1);
        fill(y, rows() * size_t(p.filters), 2);
        fill(x, rows() * size_t(p.channels), 2);
        fill(w, weights(), 1 / sqrtf(float(p.filters)));
        deltas.resize(size_t(p.filters) / 4);
        for (int k = 0; k < p.filters; ++k) {
            const float g = 1.0f + 0.3f * random.next(), r = 0.8f + 0.1f * random.next(), mean = 0.3f * random.next();
            const float b = 0.3f * random.next(), db = 0.1f * random.next(), dg = 0.1f * random.next();  // both divided by n
            LabDeltas& of = deltas[size_t(k) / 4];
            const float scale = g * r, slope = -scale * r * dg;
            of.scale[k % 4] = scale;
            of.shift[k % 4] = b - mean * scale;
            of.slope[k % 4] = slope;
            of.rest[k % 4] = -scale * db - slope * mean;
        }
        norms.resize(size_t(p.channels) / 4);
        for (int c = 0; c < p.channels; ++c) {
            norms[size_t(c) / 4].scale[c % 4] = 1.0f + 0.3f * random.next();
            norms[size_t(c) / 4].shift[c % 4] = 0.5f * random.next();
        }
    }

    // The results by plain loops.
    void reference(std::vector<float>& dx, std::vector<float>& dw) const {
        const size_t channels = size_t(p.channels), filters = size_t(p.filters);
        std::vector<float> h(x.size()), delta(dy.size());
        for (size_t i = 0; i < x.size(); ++i) {
            const LabNorms& of = norms[i % channels / 4];
            h[i] = widen(narrow(std::max(0.0f, fmaf(widen(x[i]), of.scale[i % 4], of.shift[i % 4]))));
        }
        for (size_t i = 0; i < dy.size(); ++i) {
            const LabDeltas& of = deltas[i % filters / 4];
            const float v = widen(y[i]), passes = fmaf(v, of.scale[i % 4], of.shift[i % 4]) > 0 ? widen(dy[i]) : 0.0f;
            delta[i] = widen(narrow(fmaf(of.slope[i % 4], v, fmaf(of.scale[i % 4], passes, of.rest[i % 4]))));
        }
        std::vector<double> input(x.size()), sums(weights() * size_t(p.branches));
        for (int n = 0; n < p.branches * p.images; ++n)
            for (int i = 0; i < p.height; ++i)
                for (int j = 0; j < p.width; ++j)
                    for (int tap = 0; tap < 9; ++tap) {
                        const int a = i + tap / 3 - 1, b = j + tap % 3 - 1;
                        if (a < 0 || a >= p.height || b < 0 || b >= p.width) continue;
                        const size_t at = ((size_t(n) * size_t(p.height) + size_t(i)) * size_t(p.width) + size_t(j)) * filters;
                        const size_t of = ((size_t(n) * size_t(p.height) + size_t(a)) * size_t(p.width) + size_t(b)) * channels;
                        double* sum = sums.data() + size_t(n / p.images) * weights();
                        for (size_t k = 0; k < filters; ++k)
                            for (size_t c = 0; c < channels; ++c) {
                                const size_t weight = (k * 9 + size_t(tap)) * channels + c;
                                input[of + c] += double(delta[at + k]) * double(widen(w[weight]));
                                sum[weight] += double(delta[at + k]) * double(h[of + c]);
                            }
                    }
        dx.assign(input.begin(), input.end());
        dw.assign(sums.begin(), sums.end());
    }
};

bool check(bool spoil) {
    // Images of odd sizes, slices that are not full, tiles of pixels and of channels that are not; half of them for one
    // tile.
    const LabBackParams shapes[] = {shape(2, 2, 32, 32, 32, 32), shape(1, 2, 16, 16, 64, 64), shape(1, 3, 8, 8, 128, 128),
                                    shape(2, 3, 15, 11, 40, 24), shape(2, 3, 7, 5, 8, 72),    shape(1, 2, 1, 130, 72, 40),
                                    shape(3, 1, 40, 1, 16, 8),   shape(2, 3, 15, 11, 24, 32), shape(1, 7, 7, 5, 32, 16),
                                    shape(2, 1, 1, 130, 8, 24),  shape(1, 3, 19, 35, 32, 8)};
    bool right = true;
    for (const LabBackParams& small : shapes) {
        Problem problem(small);
        std::vector<float> dx, dw;
        problem.reference(dx, dw);
        if (spoil) {
            problem.w[problem.w.size() / 2] ^= 0x8000;
            for (auto& v : problem.x) v ^= 0x8000;
            for (auto& v : problem.dy) v ^= 0x8000;
        }
        const Array<uint16_t> of_dy(problem.dy), of_y(problem.y), of_x(problem.x), of_w(problem.w);
        const Array<LabDeltas> deltas(problem.deltas);
        const Array<LabNorms> norms(problem.norms);
        for (const Version& version : VERSIONS) {
            if (!version.takes(small)) continue;
            const Launch launch = plan(version, small);
            const Array<uint16_t> of_dx(std::vector<uint16_t>(dx.size() + 2 * GUARD, POISON));
            const Array<float> of_dw(std::vector<float>(dw.size() + 2 * GUARD, NO_NUMBER));
            const Array<float> partial(std::vector<float>(launch.partials + 1, NO_NUMBER));
            const Array<uint32_t> arrivals(std::vector<uint32_t>(launch.tiles + 1));
            LabBackParams p = small;
            p.dy = of_dy.at;
            p.y = of_y.at;
            p.x = of_x.at;
            p.w = of_w.at;
            p.deltas = deltas.at;
            p.norms = norms.at;
            p.dx = of_dx.at + GUARD;
            p.dw = of_dw.at + GUARD;
            p.partial = partial.at;
            p.arrivals = arrivals.at;
            launch.prepare();
            launch.run(p);
            const Found founds[] = {found_in(of_dx.read(), POISON, dx), found_in(of_dw.read(), NO_NUMBER, dw)};
            for (int i = 0; i < 2; ++i) {
                right &= founds[i].error <= (i == 0 ? TOLERANCE : SUMS_TOLERANCE);
                printf("%d x %d x %d x %d x %d <- %d, %s %s: %.3e %016llx\n", p.branches, p.images, p.height, p.width, p.channels,
                       p.filters, version.name, i == 0 ? "dx" : "dw", founds[i].error, founds[i].hash);
            }
        }
    }
    return right;
}

// Rows of the plan; `comma`: before the next.
void print_plan(const char*& comma) {
    for (int stage = 0; stage < 3; ++stage) {
        for (const Version& version : VERSIONS) {
            if (!version.takes(STAGES[stage])) continue;
            const Launch launch = plan(version, STAGES[stage]);
            const LabBackParams& p = launch.shape;
            printf("%s\n {\"stage\": %d, \"version\": \"%s\", \"kernel\": \"%s\", \"dgrad_blocks\": %lld, \"wgrad_blocks\": %d, "
                   "\"threads\": %u, \"shared\": %zu, \"branches\": %d, \"images\": %d, \"height\": %d, \"width\": %d, "
                   "\"channels\": %d, \"filters\": %d, \"patch\": [%d, %d, %d], \"halo\": %d, \"patches\": %d, \"run\": %d, "
                   "\"splits\": %d}",
                   comma, stage + 1, version.name, launch.kernel, static_cast<long long>(launch.dgrad_blocks), p.wgrad_blocks,
                   launch.threads, launch.shared, p.branches, p.images, p.height, p.width, p.channels, p.filters, p.patch_images,
                   p.patch_height, p.patch_width, halo_of(p), p.patches, p.run, p.splits);
            comma = ",";
        }
    }
}

#if defined(__CUDACC__)

// Rows of times; whether all were right, by version 0.
bool time_all(const char*& comma) {
    bool right = true;
    for (int stage = 0; stage < 3; ++stage) {
        const Problem problem(STAGES[stage]);
        const size_t inputs = problem.rows() * size_t(problem.p.channels), sums = problem.weights() * size_t(problem.p.branches);
        std::vector<Array<uint16_t>> dy, y, x, dx;
        for (int set = 0; set < SETS; ++set) {
            dy.emplace_back(problem.dy);
            y.emplace_back(problem.y);
            x.emplace_back(problem.x);
            dx.emplace_back(std::vector<uint16_t>(inputs, POISON));
        }
        const Array<uint16_t> w(problem.w);
        const Array<LabDeltas> deltas(problem.deltas);
        const Array<LabNorms> norms(problem.norms);
        const Array<float> dw(std::vector<float>(sums, NO_NUMBER));
        std::vector<float> expected[2];  // dx and dw of version 0
        for (const Version& version : VERSIONS) {
            if (!version.takes(problem.p)) continue;
            const Launch launch = plan(version, problem.p);
            const bool reference = version.blocks == Blocks::outputs;
            const Array<float> partial(std::vector<float>(launch.partials + 1, NO_NUMBER));
            const Array<uint32_t> arrivals(std::vector<uint32_t>(launch.tiles + 1));
            const auto run = [&](int set) {
                LabBackParams p = problem.p;
                p.dy = dy[set].at;
                p.y = y[set].at;
                p.x = x[set].at;
                p.w = w.at;
                p.deltas = deltas.at;
                p.norms = norms.at;
                p.dx = dx[set].at;
                p.dw = dw.at;
                p.partial = partial.at;
                p.arrivals = arrivals.at;
                launch.run(p);
            };
            launch.prepare();
            must(cudaMemset(dx[0].at, 0xff, inputs * 2), "cudaMemset");
            must(cudaMemset(dw.at, 0xff, sums * 4), "cudaMemset");
            run(0);
            must(cudaDeviceSynchronize(), launch.kernel);
            const std::vector<uint16_t> got = dx[0].read();
            const std::vector<float> got_sums = dw.read();
            if (reference) {
                for (const uint16_t v : got) expected[0].push_back(widen(v));
                expected[1] = got_sums;
            }
            const double errors[] = {error_of(got.data(), expected[0]), error_of(got_sums.data(), expected[1])};
            right &= errors[0] <= TOLERANCE && errors[1] <= SUMS_TOLERANCE;
            const Times times = times_of(launch.kernel, reference ? 3 : REPEATS, reference ? 1 : ROUNDS, run);
            printf("%s\n {\"stage\": %d, \"version\": \"%s\", \"kernel\": \"%s\", \"error\": %.3e, \"error_of_dw\": %.3e, "
                   "\"microseconds\": %.3f, \"first_quartile\": %.3f, \"third_quartile\": %.3f}",
                   comma, stage + 1, version.name, launch.kernel, errors[0], errors[1], times.median, times.first, times.third);
            comma = ",";
        }
    }
    return right;
}

#endif

}  // namespace backward
}  // namespace
