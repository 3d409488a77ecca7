// The SIMT machine: runs the blocks of a grid one after another on the calling OS thread, a block's threads as fibers.
//
// A warp runs until all its lanes wait at a barrier of the block or have ended, then the next warp runs. Within a warp a
// lane runs until it waits for the others, at a barrier or a collective. Both orders are drawn from the seed, anew in
// each phase between barriers: what lacks a barrier gives different results with different seeds. A thread
// that never waits costs no switch: the next one begins on the same stack.
//
// Needs the C library only, not the C++ runtime.
#include "simt.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "banks.h"
#include "fiber.h"
#include "mma.h"
#include "wgmma.h"

#if defined(MLNT_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

constinit thread_local State state = {};

namespace {

constexpr uint32_t LANES = 32;
constexpr uint32_t MOST_THREADS = 1024;
constexpr size_t MOST_PARAMS = 4096;  // what CUDA takes for a kernel's parameters

constexpr size_t GUARD_BYTES = 1024;
constexpr uint32_t GUARD = 0x7fe5a5a5u;   // a NaN too, but one that no computation gives
constexpr unsigned char POISON = 0xff;  // NaN in floats, -1 in integers

enum class Collective : uint8_t { sync_warp, shuffle, mma, load_matrices, wgmma, wgmma_fence, wgmma_commit, wgmma_wait };

constexpr const char* NAMES[] = {"sync_warp", "shuffle",     "mma",          "load_matrices",
                                 "wgmma",     "wgmma_fence", "wgmma_commit", "wgmma_wait"};

struct Fiber {
    Stack stack;
    Context context;
};

// 16 bytes on their way to shared memory; zeros where `from` is null.
struct Copy {
    void* to;
    const void* from;
    uint32_t group;
};

// The copies that a thread has begun and not waited for, and the groups of them that it has closed.
struct Copies {
    Copy* list;
    size_t count, capacity;
    uint32_t groups;
};

// A collective as a lane calls it.
struct Call {
    Collective kind;
    Site site;

    bool operator==(const Call& other) const {
        return kind == other.kind && site.line == other.site.line && site.file == other.site.file;
    }
};

// A warp. Its lanes stand in a ring, in an order drawn anew in each phase; sets of lanes are bits by place in the ring.
struct Warp {
    Fragments fragments;
    // What lanes show each other, of this collective and of the one before, which some lanes may not have read yet.
    uint32_t shown[2][LANES];
    Fiber* fibers[LANES];           // by lane; null for those that have not begun
    uint32_t first;                 // the thread that is lane 0
    uint32_t ready, parked, ended;  // may run; at the block's barrier; for good. All others wait at `call`.
    uint32_t factor, shift;         // the lane at place p of the ring is p·factor + shift, mod 32
    uint32_t round;                 // collectives completed
    Call call;
    GroupProducts products;
    Touches touches;
    float* accumulators[LANES];  // of the lanes, of the product that they ask for
    uint64_t a, b;               // its descriptors
    bool accumulates;            // and whether it adds to what is there

    uint32_t lane(uint32_t place) const { return (place * factor + shift) % LANES; }
    uint32_t waiting() const { return ~(ready | parked | ended); }
    // A thread of the set, which is not empty.
    uint32_t one_of(uint32_t set) const { return first + lane(static_cast<uint32_t>(__builtin_ctz(set))); }
};

}  // namespace

struct Machine {
    const Kernel* kernel;
    alignas(16) unsigned char params[MOST_PARAMS];
    uint32_t threads, warps;
    uint64_t random;

    // The running lane.
    Warp* warp;
    uint32_t place, lane;
    uint32_t order[LANES], turn;  // of warps
    uint32_t parked, ended;  // threads
    Site barrier;
    Warp all[LANES];

    Copies copies[MOST_THREADS];
    Stores stores;
    BankUse banks[3];  // by `Access`

    Context host;
    Fiber fibers[MOST_THREADS];
    int fibers_made;
    Fiber* free_fibers[MOST_THREADS];
    int free_count;

    unsigned char* shared_area;
    size_t shared_capacity, shared_bytes;

    char* error;
    size_t error_size;
    bool failed;
};

namespace {

[[gnu::format(printf, 2, 3)]] void report(Machine& m, const char* format, ...) {
    char what[512];
    va_list list;
    va_start(list, format);
    vsnprintf(what, sizeof what, format, list);
    va_end(list);
    snprintf(m.error, m.error_size, "kernel %s, block (%u, %u, %u): %s", m.kernel->name, state.block.x, state.block.y,
             state.block.z, what);
    m.failed = true;
}

Fiber& running(Machine& m) { return *m.warp->fibers[m.lane]; }

// Ends the launch from within a fiber. The block's fibers are abandoned where they stand.
[[noreturn]] void give_up(Machine& m) {
    change(running(m).context, m.host, true);
    __builtin_unreachable();
}

// splitmix64
uint64_t draw(Machine& m) {
    uint64_t z = m.random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void enter_warp(Machine& m) {
    m.warp = &m.all[m.order[m.turn]];
    m.place = LANES - 1;
    const uint64_t bits = draw(m);
    m.warp->factor = static_cast<uint32_t>(bits % LANES) | 1u;
    m.warp->shift = static_cast<uint32_t>(bits >> 8) % LANES;
}

void begin_phase(Machine& m) {
    for (uint32_t left = m.warps; left > 1; --left) {
        const uint32_t other = static_cast<uint32_t>(draw(m) >> 32) % left;
        const uint32_t warp = m.order[left - 1];
        m.order[left - 1] = m.order[other];
        m.order[other] = warp;
    }
    m.turn = 0;
    enter_warp(m);
}

[[noreturn]] void stuck_warp(Machine& m, const Warp& w) {
    const char* name = NAMES[static_cast<int>(w.call.kind)];
    const Site site = w.call.site;
    const uint32_t waits = w.one_of(w.waiting());
    if (w.parked) {
        report(m, "thread %u waits for its warp at %s (%s:%d), but thread %u at sync_threads (%s:%d)", waits, name,
               site.file, site.line, w.one_of(w.parked), m.barrier.file, m.barrier.line);
    } else {
        report(m, "thread %u waits for its warp at %s (%s:%d), but thread %u has ended", waits, name, site.file,
               site.line, w.one_of(w.ended));
    }
    give_up(m);
}

[[noreturn]] void stuck_block(Machine& m) {
    report(m, "%u of %u threads wait at sync_threads (%s:%d), the others have ended", m.parked, m.threads,
           m.barrier.file, m.barrier.line);
    give_up(m);
}

// Whether the warps of each warpgroup have asked for the same products.
bool same_in_groups(Machine& m) {
    for (uint32_t i = 0; i < m.warps; ++i) {
        if (m.all[i].products.trace == m.all[i / 4 * 4].products.trace) continue;
        report(m, "the warps %u and %u of a warpgroup call wgmma and its fences in different ways", i / 4 * 4, i);
        return false;
    }
    return true;
}

// Goes over to the next warp that can run; false at the end of the block.
bool next_warp(Machine& m) {
    const Warp& w = *m.warp;
    if (w.waiting()) stuck_warp(m, w);
    if (++m.turn < m.warps) {
        enter_warp(m);
        return true;
    }
    for (uint32_t i = 0; i < m.warps; ++i) m.all[i].touches.count_into(m.banks);
    if (!m.parked) return false;
    if (m.ended) stuck_block(m);
    if (!same_in_groups(m)) give_up(m);
    m.stores.barrier(m.threads);
    m.parked = 0;
    for (uint32_t i = 0; i < m.warps; ++i) {
        m.all[i].parked = 0;
        m.all[i].ready = ~0u;
    }
    begin_phase(m);
    return true;
}

// Makes the next lane that can run the running one; false at the end of the block.
inline bool next_lane(Machine& m) {
    if (m.warp->ready == 0 && !next_warp(m)) return false;
    const uint32_t ready = m.warp->ready;
    const uint32_t ahead = ready & (~1u << m.place);
    m.place = static_cast<uint32_t>(__builtin_ctz(ahead ? ahead : ready));
    m.lane = m.warp->lane(m.place);
    state.thread.x = m.warp->first + m.lane;
    return true;
}

// A thread has ended. Returns when another one begins on the same stack.
void end_thread(Machine& m) {
    Fiber& fiber = running(m);
    m.warp->ended |= 1u << m.place;
    m.warp->ready &= ~(1u << m.place);
    ++m.ended;
    const bool more = next_lane(m);
    if (more && !m.warp->fibers[m.lane]) {
        m.warp->fibers[m.lane] = &fiber;
        return;
    }
    m.free_fibers[m.free_count++] = &fiber;
    change(fiber.context, more ? running(m).context : m.host, true);
}

void run_fiber() {
    arrived();
    Machine& m = *state.machine;
    for (;;) {
        m.kernel->body(m.params);
        end_thread(m);
    }
}

// Gives the running thread, which has not begun, a fiber; false when there is no memory for its stack.
bool begin_thread(Machine& m) {
    if (m.free_count == 0) {
        Fiber& made = m.fibers[m.fibers_made];
        if (!made.stack.allocate(static_cast<size_t>(m.fibers_made))) {
            report(m, "no memory for the stacks of %u threads", m.threads);
            return false;
        }
        ++m.fibers_made;
        m.free_fibers[m.free_count++] = &made;
    }
    Fiber* fiber = m.free_fibers[--m.free_count];
    m.warp->fibers[m.lane] = fiber;
    fiber->context.create(fiber->stack, run_fiber);
    return true;
}

// Goes on with other threads until the running one may continue.
void wait(Machine& m) {
    Fiber& from = running(m);
    // The end of the block is no outcome: the running thread has not ended.
    next_lane(m);
    Fiber* to = m.warp->fibers[m.lane];
    if (to == &from) return;
    if (!to) {
        if (!begin_thread(m)) change(from.context, m.host, true);
        to = m.warp->fibers[m.lane];
    }
    change(from.context, to->context);
}

// The running lane calls something else than the warp's last call: right when no lane waits there.
void meet(Machine& m, Warp& w, Call call) {
    if (w.waiting()) {
        report(m, "thread %u is at %s (%s:%d), but thread %u of its warp at %s (%s:%d)", state.thread.x,
               NAMES[static_cast<int>(call.kind)], call.site.file, call.site.line, w.one_of(w.waiting()),
               NAMES[static_cast<int>(w.call.kind)], w.call.site.file, w.call.site.line);
        give_up(m);
    }
    w.call = call;
}

// Enters the running lane at a collective. True for the last lane of the warp, which does not wait.
inline bool join(Machine& m, Warp& w, Call call) {
    if (!(w.call == call)) meet(m, w, call);
    w.ready &= ~(1u << m.place);
    if (w.ready || w.parked || w.ended) return false;
    w.ready = ~0u;
    ++w.round;
    return true;
}

}  // namespace

void sync_threads(Site site) {
    Machine& m = *state.machine;
    if (m.parked == 0) {
        m.barrier = site;
    } else if (m.barrier.line != site.line) {
        report(m, "thread %u is at sync_threads (%s:%d), but another thread at another one (%s:%d)", state.thread.x,
               site.file, site.line, m.barrier.file, m.barrier.line);
        give_up(m);
    }
    m.warp->parked |= 1u << m.place;
    m.warp->ready &= ~(1u << m.place);
    ++m.parked;
    wait(m);
}

void sync_warp(Site site) {
    Machine& m = *state.machine;
    if (!join(m, *m.warp, {Collective::sync_warp, site})) wait(m);
}

uint32_t shuffle_xor(uint32_t bits, int mask, Site site) {
    Machine& m = *state.machine;
    Warp& w = *m.warp;
    const uint32_t lane = m.lane;
    uint32_t* shown = w.shown[w.round % 2];
    shown[lane] = bits;
    if (!join(m, w, {Collective::shuffle, site})) wait(m);
    return shown[lane ^ (static_cast<uint32_t>(mask) % LANES)];
}

void mma(Operands operands, float d[4], const uint32_t a[4], const uint32_t b[2], Site site) {
    Machine& m = *state.machine;
    Warp& w = *m.warp;
    const uint32_t lane = m.lane;
    Fragments& f = w.fragments;
    for (int r = 0; r < 4; ++r) f.a[r][lane] = a[r];
    for (int r = 0; r < 2; ++r) f.b[r][lane] = b[r];
    memcpy(f.d[0][lane], d, 2 * sizeof(float));
    memcpy(f.d[1][lane], d + 2, 2 * sizeof(float));
    if (join(m, w, {Collective::mma, site})) {
        multiply(operands, f);
    } else {
        wait(m);
    }
    memcpy(d, f.d[0][lane], 2 * sizeof(float));
    memcpy(d + 2, f.d[1][lane], 2 * sizeof(float));
}

// Where in shared memory `at` lies, if that and the next 15 bytes are there and aligned; else more than there is.
static size_t aligned_offset(const Machine& m, const void* at) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(m.shared_area + GUARD_BYTES);
    return offset % 16 == 0 && offset <= m.shared_bytes && m.shared_bytes - offset >= 16 ? offset : SIZE_MAX;
}

// Notes where a thread stores 16 bytes, or begins to copy them to.
static void touch(Machine& m, Access access, size_t at, Site site) {
    m.stores.store(state.thread.x, at);
    if (m.warp->touches.add(access, site, m.lane, static_cast<uint32_t>(at))) return;
    report(m, "no memory for the stores of thread %u", state.thread.x);
    give_up(m);
}

void copy_async(void* to, const void* from, Site site) {
    Machine& m = *state.machine;
    if (aligned_offset(m, to) == SIZE_MAX || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
        report(m, "thread %u copies (%s:%d) what is not 16 aligned bytes, or not to shared memory", state.thread.x,
               site.file, site.line);
        give_up(m);
    }
    Copies& mine = m.copies[state.thread.x];
    if (mine.count == mine.capacity) {
        const size_t capacity = mine.capacity ? 2 * mine.capacity : 16;
        void* list = realloc(mine.list, capacity * sizeof(Copy));
        if (!list) {
            report(m, "no memory for the copies of thread %u", state.thread.x);
            give_up(m);
        }
        mine.list = static_cast<Copy*>(list);
        mine.capacity = capacity;
    }
    memset(to, POISON, 16);
    touch(m, Access::copies, aligned_offset(m, to), site);
    mine.list[mine.count++] = {to, from, mine.groups};
}

// Runs the first `count` copies of the running thread.
static void run_copies(Machine& m, Copies& mine, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        m.stores.store(state.thread.x, aligned_offset(m, mine.list[i].to));
        if (mine.list[i].from) {
            memcpy(mine.list[i].to, mine.list[i].from, 16);
        } else {
            memset(mine.list[i].to, 0, 16);
        }
    }
    mine.count -= count;
    if (mine.count > 0) memmove(mine.list, mine.list + count, mine.count * sizeof(Copy));
}

void copies_commit() { ++state.machine->copies[state.thread.x].groups; }

void copies_pending(uint32_t groups) {
    Copies& mine = state.machine->copies[state.thread.x];
    size_t count = 0;
    while (count < mine.count && mine.list[count].group + groups < mine.groups) ++count;
    run_copies(*state.machine, mine, count);
}

void copies_done() {
    Copies& mine = state.machine->copies[state.thread.x];
    run_copies(*state.machine, mine, mine.count);
}

void load_matrices(uint32_t d[4], const void* row, bool transposed, Site site) {
    Machine& m = *state.machine;
    Warp& w = *m.warp;
    const uint32_t lane = m.lane;
    const unsigned char* from = m.shared_area + GUARD_BYTES;
    const size_t at = aligned_offset(m, row);
    if (at == SIZE_MAX) {
        report(m, "thread %u loads a row of a matrix (%s:%d) that is not 16 aligned bytes of shared memory",
               state.thread.x, site.file, site.line);
        give_up(m);
    }
    uint32_t* rows = w.shown[w.round % 2];
    rows[lane] = static_cast<uint32_t>(at);
    if (join(m, w, {Collective::load_matrices, site})) {
        for (uint32_t i = 0; i < 4; ++i) count_phase(m.banks[uint32_t(Access::matrices)], rows + 8 * i, 8);
        // All lanes read at once, before any goes on.
        for (uint32_t i = 0; i < 4; ++i) {
            for (uint32_t g = 0; g < 8; ++g) {
                for (uint32_t t = 0; t < 4; ++t) {
                    uint16_t pair[2];
                    for (uint32_t e = 0; e < 2; ++e) {
                        const uint32_t line = transposed ? 2 * t + e : g, column = transposed ? g : 2 * t + e;
                        memcpy(&pair[e], from + rows[8 * i + line] + 2 * column, 2);
                    }
                    memcpy(&w.fragments.a[i][4 * g + t], pair, 4);
                }
            }
        }
    } else {
        wait(m);
    }
    for (int i = 0; i < 4; ++i) d[i] = w.fragments.a[i][lane];
}

void wgmma(const GroupProduct& product, float* d, Site site) {
    Machine& m = *state.machine;
    Warp& w = *m.warp;
    if (w.first / 128 * 128 + 128 > m.threads) {
        report(m, "thread %u calls wgmma (%s:%d), but belongs to no whole warpgroup", state.thread.x, site.file, site.line);
        give_up(m);
    }
    if (w.waiting() == 0) {
        w.a = product.a;
        w.b = product.b;
        w.accumulates = product.accumulates;
    } else if (w.a != product.a || w.b != product.b || w.accumulates != product.accumulates) {
        report(m, "thread %u calls wgmma (%s:%d) with other operands than its warp", state.thread.x, site.file, site.line);
        give_up(m);
    }
    w.accumulators[m.lane] = d;
    if (!join(m, w, {Collective::wgmma, site})) return wait(m);
    if (!w.products.add(product, w.accumulators, site)) {
        report(m, "no memory or too many accumulators for wgmma (%s:%d)", site.file, site.line);
        give_up(m);
    }
}

void wgmma_fence(Site site) {
    Machine& m = *state.machine;
    if (!join(m, *m.warp, {Collective::wgmma_fence, site})) return wait(m);
    m.warp->products.fence(site);
}

void wgmma_commit(Site site) {
    Machine& m = *state.machine;
    if (!join(m, *m.warp, {Collective::wgmma_commit, site})) return wait(m);
    m.warp->products.commit(site);
}

void wgmma_wait(Site site) {
    Machine& m = *state.machine;
    if (!join(m, *m.warp, {Collective::wgmma_wait, site})) return wait(m);
    const Site* fault = m.warp->products.wait({m.shared_area + GUARD_BYTES, m.shared_bytes, &m.stores}, site);
    if (!fault) return;
    report(m, "a wgmma (%s:%d) reads what is not in shared memory, or laid out in a way unknown here", fault->file,
           fault->line);
    give_up(m);
}

uint32_t shared_address(const void* at) {
    const Machine& m = *state.machine;
    const uintptr_t offset = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(m.shared_area + GUARD_BYTES);
    return static_cast<uint32_t>(offset) + SHARED_BASE;
}

void store_operand(void* to, const uint4& v, Site site) {
    Machine& m = *state.machine;
    const size_t at = aligned_offset(m, to);
    if (at == SIZE_MAX) {
        report(m, "thread %u stores an operand (%s:%d) that is not 16 aligned bytes of shared memory", state.thread.x,
               site.file, site.line);
        give_up(m);
    }
    memcpy(to, &v, sizeof v);
    touch(m, Access::stores, at, site);
}

void fence_operands() { state.machine->stores.fence(state.thread.x); }

namespace {

// The OS thread's machine, made at its first launch and freed when the thread ends; null without memory.
Machine* this_machine() {
    static pthread_key_t key;
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (state.machine) return state.machine;
    pthread_once(&once, [] {
        pthread_key_create(&key, [](void* value) {
            Machine* m = static_cast<Machine*>(value);
            for (int i = 0; i < m->fibers_made; ++i) m->fibers[i].stack.release();
            for (Copies& copies : m->copies) free(copies.list);
            for (Warp& warp : m->all) {
                warp.products.release();
                warp.touches.release();
            }
            m->stores.release();
            free(m->shared_area);
            free(m);
        });
    });
    void* memory = nullptr;
    if (posix_memalign(&memory, alignof(Machine), sizeof(Machine)) != 0) return nullptr;
    memset(memory, 0, sizeof(Machine));
    pthread_setspecific(key, memory);
    return state.machine = static_cast<Machine*>(memory);
}

#if defined(MLNT_SIMT_ASAN)
#define MLNT_SIMT_FORBID(at, bytes) __asan_poison_memory_region(at, bytes)
#define MLNT_SIMT_ALLOW(at, bytes) __asan_unpoison_memory_region(at, bytes)
#else
#define MLNT_SIMT_FORBID(at, bytes) (void)0
#define MLNT_SIMT_ALLOW(at, bytes) (void)0
#endif

void fill_guard(unsigned char* guard) {
    for (size_t i = 0; i < GUARD_BYTES; i += sizeof GUARD) memcpy(guard + i, &GUARD, sizeof GUARD);
}

// Shared memory of the launch: guard, area, guard. The area starts a multiple of 64 bytes.
bool reserve_shared(Machine& m, size_t bytes) {
    const size_t needed = bytes + 2 * GUARD_BYTES;
    if (m.shared_capacity < needed) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, needed) != 0) return false;
        if (m.shared_area) MLNT_SIMT_ALLOW(m.shared_area, m.shared_capacity);
        free(m.shared_area);
        m.shared_area = static_cast<unsigned char*>(memory);
        m.shared_capacity = needed;
    }
    MLNT_SIMT_ALLOW(m.shared_area, m.shared_capacity);
    fill_guard(m.shared_area);
    fill_guard(m.shared_area + GUARD_BYTES + bytes);
    MLNT_SIMT_FORBID(m.shared_area, GUARD_BYTES);
    MLNT_SIMT_FORBID(m.shared_area + GUARD_BYTES + bytes, GUARD_BYTES);
    m.shared_bytes = bytes;
    state.shared = m.shared_area + GUARD_BYTES;
    return true;
}

#if !defined(MLNT_SIMT_ASAN)
bool intact(const unsigned char* guard) {
    return memcmp(guard, &GUARD, sizeof GUARD) == 0 &&
           memcmp(guard, guard + sizeof GUARD, GUARD_BYTES - sizeof GUARD) == 0;
}
#endif

void check_shared([[maybe_unused]] Machine& m) {
#if !defined(MLNT_SIMT_ASAN)
    const bool before = intact(m.shared_area);
    if (before && intact(m.shared_area + GUARD_BYTES + m.shared_bytes)) return;
    report(m, "a thread wrote %s its %zu bytes of shared memory", before ? "behind" : "before", m.shared_bytes);
#endif
}

void run_block(Machine& m, uint64_t seed, uint64_t block) {
    m.random = seed * 0xd1342543de82ef95u + block;
    m.parked = m.ended = 0;
    for (uint32_t i = 0; i < m.threads; ++i) m.copies[i].count = m.copies[i].groups = 0;
    for (uint32_t i = 0; i < m.warps; ++i) {
        m.order[i] = i;
        m.all[i].first = i * LANES;
        m.all[i].ready = ~0u;
        m.all[i].parked = m.all[i].ended = 0;
        memset(m.all[i].fibers, 0, sizeof m.all[i].fibers);
        m.all[i].products.begin();
        m.all[i].products.group_row = i % 4 * 16;
        m.all[i].touches.begin();
    }
    memset(m.shared_area + GUARD_BYTES, POISON, m.shared_bytes);
    m.stores.begin(m.threads, m.shared_bytes);
    begin_phase(m);
    next_lane(m);
    if (!begin_thread(m)) return;
    change(m.host, running(m).context);
    if (!m.failed && same_in_groups(m)) check_shared(m);
}

}  // namespace
}  // namespace simt

extern "C" int mlnt_simt_launch(const simt::Kernel* kernel, const void* params, size_t params_size,
                                const uint32_t grid[3], uint32_t threads, size_t shared_bytes, uint64_t block_from,
                                uint64_t block_to, uint64_t seed, char* error, size_t error_size) {
    using namespace simt;
    const auto refuse = [&](const char* what, size_t given, size_t limit) {
        snprintf(error, error_size, "kernel %s: %s: %zu given, %zu allowed", kernel->name, what, given, limit);
        return 1;
    };
    if (params_size != kernel->params_size) return refuse("bytes of parameters", params_size, kernel->params_size);
    if (params_size > MOST_PARAMS) return refuse("bytes of parameters", params_size, MOST_PARAMS);
    const uint32_t most = kernel->most_threads < MOST_THREADS ? kernel->most_threads : MOST_THREADS;
    if (threads > most) return refuse("threads per block", threads, most);
    if (threads == 0 || threads % LANES != 0) return refuse("threads, not whole warps", threads, most);
    const uint64_t blocks = static_cast<uint64_t>(grid[0]) * grid[1] * grid[2];
    if (block_to > blocks) return refuse("blocks", block_to, blocks);

    Machine* m = this_machine();
    if (!m || !reserve_shared(*m, shared_bytes) || !m->stores.begin(threads, shared_bytes)) {
        snprintf(error, error_size, "kernel %s: no memory for the machine", kernel->name);
        return 1;
    }
    m->kernel = kernel;
    if (params_size > 0) memcpy(m->params, params, params_size);
    m->threads = threads;
    m->warps = threads / LANES;
    m->error = error;
    m->error_size = error_size;
    m->failed = false;
    state.block_size = {threads, 1, 1};
    state.grid_size = {grid[0], grid[1], grid[2]};
    for (uint64_t i = block_from; i < block_to; ++i) {
        // Half of the seeds take the blocks from the last to the first.
        const uint64_t block = seed % 2 ? block_from + (block_to - 1 - i) : i;
        state.block = {static_cast<uint32_t>(block % grid[0]), static_cast<uint32_t>(block / grid[0] % grid[1]),
                       static_cast<uint32_t>(block / grid[0] / grid[1])};
        run_block(*m, seed, block);
        if (m->failed) {
            m->free_count = 0;
            for (int fiber = 0; fiber < m->fibers_made; ++fiber) {
                m->free_fibers[m->free_count++] = &m->fibers[fiber];
            }
            return 1;
        }
    }
    return 0;
}

extern "C" void mlnt_simt_banks(simt::BankUse use[3]) {
    using namespace simt;
    Machine* m = this_machine();
    for (int i = 0; i < 3; ++i) use[i] = m ? m->banks[i] : BankUse{};
    if (m) memset(m->banks, 0, sizeof m->banks);
}
