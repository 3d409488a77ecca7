// Checks every version of the laboratory and, on a card, times it. Compiled by nvcc (-x cu) it runs on a card; by the
// system's compiler, together with the SIMT host machine, on that.
//
//     harness plan              how the versions divide the three stages into blocks, as JSON
//     harness check SEED [spoil]  small shapes against plain loops: a line with shape, version, error and hash of each result.
//                               `spoil` changes operands behind the loops' back, so that all must be wrong
//     harness time              on a card: the stages against version 0, and the time of each version, as JSON
#include "harness_backward.h"
#include "harness_forward.h"

int main(int count, char** arguments) {
    const char *what = count > 1 ? arguments[1] : "", *comma = "";
    if (strcmp(what, "plan") == 0) {
        printf("[");
        forward::print_plan(comma);
        backward::print_plan(comma);
        printf("\n]\n");
        return 0;
    }
    if (strcmp(what, "check") == 0 && count > 2) {
        seed = strtoull(arguments[2], nullptr, 10);
        const bool spoil = count > 3 && strcmp(arguments[3], "spoil") == 0;
        const bool right = forward::check(spoil);
        return backward::check(spoil) && right ? 0 : 1;
    }
#if defined(__CUDACC__)
    if (strcmp(what, "time") == 0) {
        cudaDeviceProp card;
        must(cudaGetDeviceProperties(&card, 0), "cudaGetDeviceProperties");
        printf("{\"card\": \"%s\", \"multiprocessors\": %d, \"rows\": [", card.name, card.multiProcessorCount);
        const bool right = forward::time_all(comma);
        const bool both = backward::time_all(comma) && right;
        printf("\n]}\n");
        return both ? 0 : 1;
    }
#endif
    fprintf(stderr, "harness plan | check SEED [spoil] | time\n");
    return 2;
}
