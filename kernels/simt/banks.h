// How accesses of 16 bytes meet in the 32 banks of shared memory, 4 bytes wide. The model: a warp's go in phases of eight neighbouring
// lanes, and a phase takes as many wavefronts as there are different 16 bytes that it wants of the same four banks.
#pragma once

#include <stdlib.h>

#include "simt.h"

namespace simt {

// Counts a phase; `at`: the offsets in shared memory that its lanes want. Lanes that want the same share it.
inline void count_phase(BankUse& use, const uint32_t* at, uint32_t lanes) {
    if (lanes == 0) return;
    uint32_t wanted[8] = {}, most = 0;  // of eight places of 16 bytes, each four banks
    for (uint32_t i = 0; i < lanes; ++i) {
        const uint32_t place = at[i] / 16 % 8;
        bool shared = false;
        for (uint32_t j = 0; wanted[place] != 0 && j < i; ++j) shared |= at[j] == at[i];
        if (shared) continue;
        ++wanted[place];
        if (wanted[place] > most) most = wanted[place];
    }
    ++use.phases;
    use.conflicts += most - 1;
    if (most > use.most) use.most = most;
}

// An instruction of a warp that stores or copies: which of its lanes have come to it, and what they want.
struct Touch {
    Site site;
    uint32_t access;  // `Access`
    uint32_t lanes;   // bits
    uint32_t at[32];
};

// The stores and copies of a warp between two barriers. Lanes run one after the other here: the n-th time that a lane comes to a
// place in the source belongs to the n-th time of the others.
class Touches {
public:
    // False without memory.
    bool add(Access access, Site site, uint32_t lane, uint32_t at) {
        // In step with those before it, a lane comes to the next of the list.
        uint32_t i = out_of_step >> lane & 1 ? 0 : done[lane];
        if (i < count && !is(list[i], access, site, lane)) {
            out_of_step |= 1u << lane;
            i = 0;
        }
        while (i < count && !is(list[i], access, site, lane)) ++i;
        if (i == count && !more(access, site)) return false;
        list[i].lanes |= 1u << lane;
        list[i].at[lane] = at;
        ++done[lane];
        return true;
    }
    // Counts them, and forgets them.
    void count_into(BankUse* use) {
        for (uint32_t i = 0; i < count; ++i) {
            for (uint32_t phase = 0; phase < 32; phase += 8) {
                uint32_t at[8], lanes = 0;
                for (uint32_t lane = phase; lane < phase + 8; ++lane) {
                    if (list[i].lanes >> lane & 1) at[lanes++] = list[i].at[lane];
                }
                count_phase(use[list[i].access], at, lanes);
            }
        }
        begin();
    }
    void begin() {
        count = out_of_step = 0;
        for (uint32_t& of_lane : done) of_lane = 0;
    }
    void release() { free(list); }

private:
    Touch* list;
    uint32_t count, capacity;
    uint32_t done[32], out_of_step;  // by lane

    static bool is(const Touch& touch, Access access, Site site, uint32_t lane) {
        return touch.site.line == site.line && touch.site.file == site.file && touch.access == uint32_t(access) &&
               !(touch.lanes >> lane & 1);
    }
    bool more(Access access, Site site) {
        if (count == capacity) {
            const uint32_t wanted = capacity ? 2 * capacity : 16;
            void* memory = realloc(list, wanted * sizeof(Touch));
            if (!memory) return false;
            list = static_cast<Touch*>(memory);
            capacity = wanted;
        }
        list[count++] = {site, uint32_t(access), 0, {}};
        return true;
    }
};

}  // namespace simt
