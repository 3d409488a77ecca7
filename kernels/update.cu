// What the states of a step become at its end: chains of linear combinations, element by element.
//
// A block works through neighbouring elements of one chain's tensors. A thread loads all operands of an element before it stores any
// result, so that results may lie where operands do, and a result that a later one is made of comes from a register. Terms are added in their
// order, as `lin_comb` adds them: the same bits.

#include "quads.cuh"

constexpr int OPERANDS = 6, RESULTS = 3;

struct UpdateTerm {
    int32_t slot;  // the operand of this number, or the result of this number less OPERANDS
    int32_t coef;  // position among the coefficients
};
static_assert(sizeof(UpdateTerm) == 8);

// What chains have in common whose tensors differ.
struct UpdateForm {
    int32_t loads;          // operands that terms are of
    int32_t links;          // results
    int32_t first;          // position of the first term
    int32_t ends[RESULTS];  // of each result the position behind its last term
    int32_t kept[RESULTS];  // of each result the operand that it is where nothing is taken
    int32_t unused;
};
static_assert(sizeof(UpdateForm) == 40);

// The tensors of one chain, all [len].
struct UpdateSet {
    const float* x[OPERANDS];  // [len] each
    float* y[RESULTS];         // [len] each
    int64_t len;
    int32_t form;
    int32_t unused;
};
static_assert(sizeof(UpdateSet) == 88);

// What one block does.
struct UpdatePiece {
    int32_t set;
    int32_t chunk;
};
static_assert(sizeof(UpdatePiece) == 8);

struct UpdateParams {
    const UpdateSet* sets;      // [chains]
    const UpdateForm* forms;    // [forms]
    const UpdateTerm* terms;    // [terms of all forms]
    const UpdatePiece* pieces;  // [blocks]
    const float* coefs;         // [coefficients]
    const float* guard;         // [1]; null: none
    const float* factor;        // [1], of the guard
};
static_assert(sizeof(UpdateParams) == 56);

constexpr int ROUNDS = 2;  // of 1024 elements for a block

using Slots = float4[OPERANDS + RESULTS];

// Slot `which`, without an array that is indexed at run time and thus no registers.
DEVICE float4 pick(const Slots& slots, int32_t which) {
    float4 v = slots[0];
    UNROLLED
    for (int s = 1; s < OPERANDS + RESULTS; s++) {
        if (which == s) v = slots[s];
    }
    return v;
}

// Nothing is taken: results that lie elsewhere than what they keep are copies of it.
DEVICE void keep(const UpdateSet& set, const UpdateForm& form, int64_t at) {
    float4 v[RESULTS] = {};
    bool elsewhere[RESULTS];
    UNROLLED
    for (int j = 0; j < RESULTS; j++) {
        elsewhere[j] = j < form.links && set.y[j] != set.x[form.kept[j]];
        if (elsewhere[j]) v[j] = load<StoredF32>(set.x[form.kept[j]], at, set.len);
    }
    UNROLLED
    for (int j = 0; j < RESULTS; j++) {
        if (elsewhere[j]) store<StoredF32>(set.y[j], at, set.len, v[j]);
    }
}

DEVICE void take(const UpdateParams& p, const UpdateSet& set, const UpdateForm& form, int64_t at) {
    Slots slots = {};
    UNROLLED
    for (int i = 0; i < OPERANDS; i++) {
        if (i < form.loads) slots[i] = load<StoredF32>(set.x[i], at, set.len);
    }
    int32_t t = form.first;
    UNROLLED
    for (int j = 0; j < RESULTS; j++) {
        if (j >= form.links) continue;
        float4 sum = {};
        ROLLED
        for (; t < form.ends[j]; t++) {
            const UpdateTerm term = p.terms[t];
            const float c = p.coefs[term.coef];
            const float4 v = pick(slots, term.slot);
            sum.x = fmaf(c, v.x, sum.x);
            sum.y = fmaf(c, v.y, sum.y);
            sum.z = fmaf(c, v.z, sum.z);
            sum.w = fmaf(c, v.w, sum.w);
        }
        slots[OPERANDS + j] = sum;
    }
    UNROLLED
    for (int j = 0; j < RESULTS; j++) {
        if (j < form.links) store<StoredF32>(set.y[j], at, set.len, slots[OPERANDS + j]);
    }
}

KERNEL(update_f32, UpdateParams, 256) {
    const UpdatePiece piece = p.pieces[blockIdx.x];
    const UpdateSet& set = p.sets[piece.set];
    const UpdateForm& form = p.forms[set.form];
    const bool held = p.guard != nullptr && *p.factor * *p.guard == 0.0f;
    ROLLED
    for (int q = 0; q < ROUNDS; q++) {
        const int64_t at = (int64_t{piece.chunk} * ROUNDS + q) * 1024 + threadIdx.x * 4;
        if (at >= set.len) return;
        if (held) {
            keep(set, form, at);
        } else {
            take(p, set, form, at);
        }
    }
}
