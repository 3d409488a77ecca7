#include "wgmma.h"

#include <stdlib.h>
#include <string.h>

namespace simt {
namespace {

constexpr uint32_t POISON = 0xffffffffu;

// Bits of a descriptor that hold anything here: address, leading and stride offset. Swizzles are unknown.
constexpr uint64_t KNOWN_BITS = 0x00003fff3fff3fffu;

struct Matrix {
    size_t start, along_k, along_lines;

    explicit Matrix(uint64_t d) {
        const auto field = [&](int shift) { return static_cast<size_t>(d >> shift & 0x3fffu) << 4; };
        start = field(0);
        along_k = field(16);
        along_lines = field(32);
    }
};

// Matrix [8 lines, 8 along k] of an operand, a line per four words; poison where products may not read. False: not in shared memory.
bool read_matrix(const SharedView& shared, const Matrix& m, size_t line, size_t k, bool transposed, uint16_t to[8][8]) {
    for (size_t row = 0; row < 8; ++row) {
        const size_t address = m.start + line * m.along_lines + k * m.along_k + 16 * row;
        const size_t offset = address - SHARED_BASE;
        if (address < SHARED_BASE || shared.bytes < 16 || offset > shared.bytes - 16) return false;
        uint16_t elements[8];
        memcpy(elements, shared.at + offset, 16);
        if (!shared.stores->readable(offset)) memset(elements, 0xff, sizeof elements);
        for (size_t i = 0; i < 8; ++i) (transposed ? to[i][row] : to[row][i]) = elements[i];
    }
    return true;
}

}  // namespace

bool Stores::begin(uint32_t threads, size_t bytes) {
    const size_t needed = bytes / 16 + 1;
    if (capacity < needed) {
        free(stamps);
        stamps = static_cast<uint64_t*>(malloc(needed * sizeof(uint64_t)));
        capacity = stamps ? needed : 0;
        if (!stamps) return false;
    }
    memset(stamps, 0, needed * sizeof(uint64_t));
    memset(fences, 0, threads * sizeof fences[0]);
    memset(at_barrier, 0, threads * sizeof at_barrier[0]);
    return true;
}

void Stores::barrier(uint32_t threads) { memcpy(at_barrier, fences, threads * sizeof fences[0]); }

void Stores::release() { free(stamps); }

void GroupProducts::begin() {
    trace = 0;
    under_way = 0;
    count = committed = 0;
    fenced = false;
}

void GroupProducts::release() {
    free(accumulators);
    free(pending);
}

// FNV-1a, a word at a time.
void GroupProducts::note(uint64_t what) { trace = (trace ^ what) * 0x100000001b3u + 1; }

bool GroupProducts::add(const GroupProduct& product, float* const lanes[32], Site site) {
    if (!accumulators) accumulators = static_cast<Accumulator*>(malloc(ACCUMULATORS * sizeof(Accumulator)));
    if (count == capacity) {
        const size_t more = capacity ? 2 * capacity : 64;
        void* list = realloc(pending, more * sizeof(Pending));
        if (!list) return false;
        pending = static_cast<Pending*>(list);
        capacity = more;
    }
    if (!accumulators) return false;
    note(product.a);
    note(product.b);
    note(static_cast<uint64_t>(site.line) << 1 | product.accumulates);
    int found = 0;
    while (found < under_way && accumulators[found].lanes[0] != lanes[0]) ++found;
    if (found == ACCUMULATORS) return false;
    Accumulator& mine = accumulators[found];
    if (found == under_way) {
        ++under_way;
        memcpy(mine.lanes, lanes, sizeof mine.lanes);
        mine.registers = product.registers;
        mine.poisoned = !fenced;
        for (int lane = 0; lane < 32; ++lane) {
            for (int r = 0; r < mine.registers; ++r) {
                mine.values[r][lane] = lanes[lane][r];
                memcpy(&lanes[lane][r], &POISON, sizeof POISON);
            }
        }
    }
    mine.poisoned |= mine.registers != product.registers;
    pending[count++] = {product, site, found};
    return true;
}

void GroupProducts::fence(Site site) {
    note(static_cast<uint64_t>(site.line));
    fenced = true;
}

void GroupProducts::commit(Site site) {
    note(static_cast<uint64_t>(site.line));
    committed = count;
}

bool GroupProducts::run(const SharedView& shared, const Pending& next) {
    const GroupProduct& product = next.product;
    if ((product.a | product.b) & ~KNOWN_BITS) return false;
    Accumulator& mine = accumulators[next.accumulator];
    const Matrix a(product.a), b(product.b);
    Fragments f;
    uint16_t matrix[8][8];
    for (size_t r = 0; r < 4; ++r) {
        if (!read_matrix(shared, a, group_row / 8 + r % 2, r / 2, product.a_transposed, matrix)) return false;
        memcpy(f.a[r], matrix, sizeof matrix);
    }
    for (size_t j = 0; j < static_cast<size_t>(mine.registers / 4); ++j) {
        for (size_t r = 0; r < 2; ++r) {
            if (!read_matrix(shared, b, j, r, product.b_transposed, matrix)) return false;
            memcpy(f.b[r], matrix, sizeof matrix);
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) f.d[i / 2][lane][i % 2] = product.accumulates ? mine.values[4 * j + i][lane] : 0.0f;
        }
        multiply(product.operands, f);
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) mine.values[4 * j + i][lane] = f.d[i / 2][lane][i % 2];
        }
    }
    return true;
}

const Site* GroupProducts::wait(const SharedView& shared, Site site) {
    note(static_cast<uint64_t>(site.line));
    fenced = false;
    for (size_t i = 0; i < committed; ++i) {
        if (!run(shared, pending[i])) return &pending[i].site;
    }
    // What was not committed stays under way, and with it its accumulators.
    bool busy[ACCUMULATORS] = {};
    count -= committed;
    if (count > 0) memmove(pending, pending + committed, count * sizeof(Pending));
    committed = 0;
    for (size_t i = 0; i < count; ++i) busy[pending[i].accumulator] = true;
    int kept = 0, moved[ACCUMULATORS] = {};
    for (int n = 0; n < under_way; ++n) {
        Accumulator& done = accumulators[n];
        if (busy[n]) {
            moved[n] = kept;
            if (kept != n) accumulators[kept] = done;
            ++kept;
            continue;
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int r = 0; r < done.registers; ++r) {
                const bool changed = memcmp(&done.lanes[lane][r], &POISON, sizeof POISON) != 0;
                const void* from = changed || done.poisoned ? static_cast<const void*>(&POISON) : &done.values[r][lane];
                memcpy(&done.lanes[lane][r], from, sizeof(float));
            }
        }
    }
    under_way = kept;
    for (size_t i = 0; i < count; ++i) pending[i].accumulator = moved[pending[i].accumulator];
    return nullptr;
}

}  // namespace simt
