// Fibers: stacks of their own, and the switch between them. Hand-written for x86-64 and aarch64, ucontext elsewhere.
#pragma once

#include <stddef.h>

#if !defined(MLNT_SIMT_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define MLNT_SIMT_UCONTEXT
#endif
#if defined(MLNT_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define MLNT_SIMT_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MLNT_SIMT_ASAN
#endif
#endif

namespace simt {

// The memory of a stack, `low..low + size`; below it lies a page that nobody may touch.
struct Stack {
    char* low = nullptr;
    size_t size = 0;

    // Stack number `index` of an OS thread; false when the system has no memory left. The index shifts the stack's
    // start, so that the hot ends of many stacks do not share the same cache sets.
    bool allocate(size_t index);
    void release();
};

// A suspended flow of control: a fiber's, or that of the OS thread itself.
struct Context {
#if defined(MLNT_SIMT_UCONTEXT)
    ucontext_t machine;
#else
    void* sp = nullptr;
#endif
#if defined(MLNT_SIMT_ASAN)
    const void* low = nullptr;
    size_t size = 0;
    void* fake_stack = nullptr;
#endif

    // Makes this a fiber that will call `entry` on `stack`. `entry` calls `arrived` first and never returns.
    void create(const Stack& stack, void (*entry)());
};

#if !defined(MLNT_SIMT_UCONTEXT)
// Pushes the registers that a call must preserve, stores the stack pointer in `*from`, and undoes the same with `to`.
extern "C" void mlnt_simt_switch(void** from, void* to) __asm__("mlnt_simt_switch");
#endif

// Suspends the running flow into `from` and goes on with `to`. With `last`, `from` is never resumed.
#if defined(MLNT_SIMT_UCONTEXT) || defined(MLNT_SIMT_ASAN)
void change(Context& from, Context& to, bool last = false);
#else
inline void change(Context& from, Context& to, bool = false) { mlnt_simt_switch(&from.sp, to.sp); }
#endif

// The first thing a new fiber does.
void arrived();

}  // namespace simt
