// Work that the last of several blocks to arrive does for all of them, in the launch in which they made its operands.
#pragma once

#include "platform.cuh"

// Whether the block is the last of `blocks` to come here, the same in all its threads, which all take part. What the others wrote
// before they came can be read then. The counter, a word of `Lowering::counters`, is 0 before and after. The first word of shared
// memory is overwritten.
DEVICE bool last_to_arrive(uint32_t* counter, uint32_t blocks) {
    thread_fence();
    sync_threads();
    uint32_t* last = shared_memory<uint32_t>();
    if (threadIdx.x == 0) {
        *last = atomic_add(counter, 1) + 1 == blocks;
        if (*last) *counter = 0;
    }
    sync_threads();
    const bool mine = *last != 0;
    sync_threads();
    if (mine) thread_fence();
    return mine;
}
