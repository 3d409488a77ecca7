// Reads and writes within and beyond global and shared memory.
#include "platform.cuh"

#include "buffers.h"

DEVICE int64_t element() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

KERNEL(double_right_f32, Buffers, 256) {
    const int64_t i = element();
    if (i < p.n) p.y[i] = 2.0f * p.x[i];
}
KERNEL(double_writes_behind_f32, Buffers, 256) {
    const int64_t i = element();
    if (i <= p.n) p.y[i] = 2.0f * p.x[i < p.n ? i : 0];
}
KERNEL(double_writes_before_f32, Buffers, 256) {
    const int64_t i = element();
    if (i < p.n) p.y[i - 1] = 2.0f * p.x[i];
}
KERNEL(double_forgets_last_f32, Buffers, 256) {
    const int64_t i = element();
    if (i + 1 < p.n) p.y[i] = 2.0f * p.x[i];
}

// y[i] = x[i] + x[i + 1], and x[n] counts as 0.
KERNEL(pairs_right_f32, Buffers, 256) {
    const int64_t i = element();
    if (i < p.n) p.y[i] = p.x[i] + (i + 1 < p.n ? p.x[i + 1] : 0.0f);
}
KERNEL(pairs_reads_behind_f32, Buffers, 256) {
    const int64_t i = element();
    if (i < p.n) p.y[i] = p.x[i] + p.x[i + 1];
}

// Shared memory of blockDim.x floats.
KERNEL(shared_right_f32, Buffers, 256) {
    float* s = shared_memory<float>();
    s[threadIdx.x] = p.x[threadIdx.x];
    p.y[threadIdx.x] = s[threadIdx.x];
}
KERNEL(shared_writes_behind_f32, Buffers, 256) {
    float* s = shared_memory<float>();
    s[threadIdx.x + 1] = p.x[threadIdx.x];
    p.y[threadIdx.x] = s[threadIdx.x + 1];
}
KERNEL(shared_writes_before_f32, Buffers, 256) {
    float* s = shared_memory<float>();
    s[static_cast<int>(threadIdx.x) - 1] = p.x[threadIdx.x];
    p.y[threadIdx.x] = p.x[threadIdx.x];
}
// Shared memory is not what the block before left there.
KERNEL(shared_unwritten_f32, Buffers, 256) {
    float* s = shared_memory<float>();
    p.y[element()] = s[threadIdx.x];
    s[threadIdx.x] = 1.0f;
}

// The number of elements seen by all blocks, and the largest index: atomics between OS threads.
KERNEL(count_u32, Buffers, 256) {
    uint32_t* count = reinterpret_cast<uint32_t*>(p.y);
    const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    atomic_add(count, 1u);
    atomic_max(count + 1, block * blockDim.x + threadIdx.x);
}
