#include "fiber.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(MLNT_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t STACK_BYTES = 64 << 10;
// Stacks start 17 cache lines apart in a window of 16 KiB.
constexpr size_t WINDOW_BYTES = 16 << 10;
constexpr size_t SHIFT_BYTES = 17 * 64;

size_t page_bytes() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

#if defined(MLNT_SIMT_ASAN)
thread_local Context* came_from = nullptr;
#endif

}  // namespace

bool Stack::allocate(size_t index) {
    const size_t page = page_bytes();
    void* at = mmap(nullptr, page + STACK_BYTES + WINDOW_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (at == MAP_FAILED) return false;
    // The system limits the number of mappings; past that limit a stack does without its forbidden page.
    (void)mprotect(at, page, PROT_NONE);
    low = static_cast<char*>(at) + page;
    size = STACK_BYTES + WINDOW_BYTES - (index * SHIFT_BYTES) % WINDOW_BYTES;
    return true;
}

void Stack::release() {
    const size_t page = page_bytes();
    munmap(low - page, page + STACK_BYTES + WINDOW_BYTES);
    low = nullptr;
}

#if defined(MLNT_SIMT_UCONTEXT)

static void make(Context& context, const Stack& stack, void (*entry)()) {
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = stack.low;
    context.machine.uc_stack.ss_size = stack.size;
    context.machine.uc_link = nullptr;
    makecontext(&context.machine, entry, 0);
}

[[maybe_unused]] static void jump(Context& from, Context& to) { swapcontext(&from.machine, &to.machine); }

#else

#if defined(__x86_64__)

// The jump at the end instead of a return keeps the processor's prediction of returns out of it.
__asm__(
    ".text\n"
    ".p2align 4\n"
    ".globl mlnt_simt_switch\n"
    "mlnt_simt_switch:\n"
    "    pushq %rbp\n"
    "    pushq %rbx\n"
    "    pushq %r12\n"
    "    pushq %r13\n"
    "    pushq %r14\n"
    "    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n"
    "    popq %r14\n"
    "    popq %r13\n"
    "    popq %r12\n"
    "    popq %rbx\n"
    "    popq %rbp\n"
    "    popq %rcx\n"
    "    jmp *%rcx\n");

// Words on a new stack: six registers, the entry, and a return address that nobody uses, for the alignment of a call.
constexpr size_t FRAME_WORDS = 8;
constexpr size_t ENTRY_WORD = 6;

#elif defined(__aarch64__)

__asm__(
    ".text\n"
    ".p2align 4\n"
    ".globl mlnt_simt_switch\n"
    "mlnt_simt_switch:\n"
    "    sub sp, sp, #160\n"
    "    stp x19, x20, [sp, #0]\n"
    "    stp x21, x22, [sp, #16]\n"
    "    stp x23, x24, [sp, #32]\n"
    "    stp x25, x26, [sp, #48]\n"
    "    stp x27, x28, [sp, #64]\n"
    "    stp x29, x30, [sp, #80]\n"
    "    stp d8, d9, [sp, #96]\n"
    "    stp d10, d11, [sp, #112]\n"
    "    stp d12, d13, [sp, #128]\n"
    "    stp d14, d15, [sp, #144]\n"
    "    mov x9, sp\n"
    "    str x9, [x0]\n"
    "    mov sp, x1\n"
    "    ldp x19, x20, [sp, #0]\n"
    "    ldp x21, x22, [sp, #16]\n"
    "    ldp x23, x24, [sp, #32]\n"
    "    ldp x25, x26, [sp, #48]\n"
    "    ldp x27, x28, [sp, #64]\n"
    "    ldp x29, x30, [sp, #80]\n"
    "    ldp d8, d9, [sp, #96]\n"
    "    ldp d10, d11, [sp, #112]\n"
    "    ldp d12, d13, [sp, #128]\n"
    "    ldp d14, d15, [sp, #144]\n"
    "    add sp, sp, #160\n"
    "    ret\n");

// Words on a new stack: twelve general registers, of which x30 is the entry, and eight of floating point.
constexpr size_t FRAME_WORDS = 20;
constexpr size_t ENTRY_WORD = 11;

#endif

static void make(Context& context, const Stack& stack, void (*entry)()) {
    const uintptr_t top = (reinterpret_cast<uintptr_t>(stack.low) + stack.size) & ~static_cast<uintptr_t>(15);
    void** frame = reinterpret_cast<void**>(top) - FRAME_WORDS;
    memset(frame, 0, FRAME_WORDS * sizeof(void*));
    frame[ENTRY_WORD] = reinterpret_cast<void*>(entry);
    context.sp = frame;
}

[[maybe_unused]] static void jump(Context& from, Context& to) { mlnt_simt_switch(&from.sp, to.sp); }

#endif

void Context::create(const Stack& stack, void (*entry)()) {
#if defined(MLNT_SIMT_ASAN)
    __asan_unpoison_memory_region(stack.low, stack.size);
    low = stack.low;
    size = stack.size;
    fake_stack = nullptr;
#endif
    make(*this, stack, entry);
}

#if defined(MLNT_SIMT_ASAN)
void change(Context& from, Context& to, bool last) {
    came_from = &from;
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.low, to.size);
    jump(from, to);
    __sanitizer_finish_switch_fiber(from.fake_stack, &came_from->low, &came_from->size);
}
#elif defined(MLNT_SIMT_UCONTEXT)
void change(Context& from, Context& to, bool) { jump(from, to); }
#endif

void arrived() {
#if defined(MLNT_SIMT_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &came_from->low, &came_from->size);
#endif
}

}  // namespace simt
