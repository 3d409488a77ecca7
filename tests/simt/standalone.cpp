// Runs one kernel of `bounds.cu` or `waiting.cu` on buffers of exactly the size it may touch, for AddressSanitizer.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "simt.h"

#include "buffers.h"

extern "C" const simt::Kernel mlnt_simt_pairs_right_f32, mlnt_simt_pairs_reads_behind_f32, mlnt_simt_rounds_right_f32,
    mlnt_simt_shared_writes_behind_f32, mlnt_simt_sum_right_f32, mlnt_simt_barrier_divergent_f32;

int main(int count, char** arguments) {
    const simt::Kernel* all[] = {&mlnt_simt_pairs_right_f32,          &mlnt_simt_pairs_reads_behind_f32,
                                 &mlnt_simt_rounds_right_f32,         &mlnt_simt_sum_right_f32,
                                 &mlnt_simt_shared_writes_behind_f32, &mlnt_simt_barrier_divergent_f32};
    const size_t n = 256;
    float* x = static_cast<float*>(malloc(n * sizeof(float)));
    float* y = static_cast<float*>(malloc(n * sizeof(float)));
    for (size_t i = 0; i < n; ++i) x[i] = 1.0f;
    const Buffers p = {x, nullptr, y, static_cast<int64_t>(n)};
    const uint32_t grid[3] = {1, 1, 1};
    int code = 2;
    for (int i = 1; i < count; ++i) {
        for (const simt::Kernel* kernel : all) {
            if (strcmp(kernel->name, arguments[i]) != 0) continue;
            char error[512] = "";
            code = mlnt_simt_launch(kernel, &p, sizeof p, grid, n, n * sizeof(float), 0, 1, 1, error, sizeof error);
            printf("%s: %d %s %g\n", kernel->name, code, error, y[0]);
        }
    }
    free(x);
    free(y);
    return code;
}
