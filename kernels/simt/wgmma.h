// What the machine knows of the products of warpgroups: which memory they may read, and what is under way. Rules: `platform.cuh`.
#pragma once

#include "mma.h"

namespace simt {

// What addresses of shared memory begin with, as if the system kept what is before.
constexpr uint32_t SHARED_BASE = 1024;

// Who stored each 16 bytes of shared memory last. Products read what the storing thread has fenced since, before a barrier that all have
// passed since.
class Stores {
public:
    // For a block of so many threads and bytes; false without memory.
    bool begin(uint32_t threads, size_t bytes);
    void store(uint32_t thread, size_t offset) { stamps[offset / 16] = uint64_t(fences[thread] + 1) << 32 | thread; }
    void fence(uint32_t thread) { ++fences[thread]; }
    void barrier(uint32_t threads);
    bool readable(size_t offset) const {
        const uint64_t stamp = stamps[offset / 16];
        return stamp != 0 && at_barrier[static_cast<uint32_t>(stamp)] >= stamp >> 32;
    }
    void release();

private:
    uint64_t* stamps;  // of the storing thread its fences and one, and its number; 0: nobody stored
    size_t capacity;
    uint32_t fences[1024], at_barrier[1024];  // of each thread: its fences till now, and till the last barrier
};

// Shared memory as products see it.
struct SharedView {
    const unsigned char* at;
    size_t bytes;
    const Stores* stores;
};

// The products of one warp: its 16 rows of those of its group.
class GroupProducts {
public:
    void begin();
    void release();

    // All 32 lanes ask for `product`, with these accumulators. False without memory.
    bool add(const GroupProduct& product, float* const lanes[32], Site site);
    void fence(Site site);
    void commit(Site site);
    // Runs all products that were committed. Null, or the place of one that reads what is not in shared memory, or in no way known here.
    const Site* wait(const SharedView& shared, Site site);

    // A hash of all that the warp has asked for.
    uint64_t trace;

private:
    struct Accumulator {
        float* lanes[32];
        int registers;
        bool poisoned;
        float values[64][32];  // by register and lane
    };
    struct Pending {
        GroupProduct product;
        Site site;
        int accumulator;
    };
    static constexpr int ACCUMULATORS = 8;

    Accumulator* accumulators;
    int under_way;  // of the accumulators
    Pending* pending;
    size_t count, capacity, committed;
    bool fenced;

    void note(uint64_t what);
    bool run(const SharedView& shared, const Pending& next);

public:
    uint32_t group_row;  // 16 times the number of the warp in its group
};

}  // namespace simt
