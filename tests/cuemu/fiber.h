// Fibers: stacks that run one after another on one CPU thread, and what sanitizers have to be told about them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

// Defined where the program that loads this code was linked with a sanitizer, null elsewhere.
#define CUEMU_WEAK __attribute__((weak))
extern "C" {
CUEMU_WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
CUEMU_WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
CUEMU_WEAK void __asan_poison_memory_region(const volatile void*, size_t);
CUEMU_WEAK void* __tsan_get_current_fiber();
CUEMU_WEAK void* __tsan_create_fiber(unsigned);
CUEMU_WEAK void __tsan_switch_to_fiber(void*, unsigned);
CUEMU_WEAK void __tsan_acquire(void*);
CUEMU_WEAK void __tsan_release(void*);
}

// Pushes the callee-saved registers on the running stack, stores its top in *save, and goes on with the stack at load.
extern "C" __attribute__((visibility("hidden"))) void cuemu_swap(void** save, void* load);
#if defined(__x86_64__)
asm(R"(.text
.globl cuemu_swap
.hidden cuemu_swap
.type cuemu_swap,@function
cuemu_swap:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#elif defined(__aarch64__)
asm(R"(.text
.globl cuemu_swap
.hidden cuemu_swap
.type cuemu_swap,@function
cuemu_swap:
  sub sp, sp, #160
  stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the CPU emulation of kernels knows x86-64 and aarch64"
#endif

namespace cuemu {

// Where execution stands: a program counter and the frame pointer there.
struct Place {
  uintptr_t pc, frame;
};

struct Context {
  static constexpr size_t kStackBytes = 256 << 10;

  void* top = nullptr;  // of the saved stack, while not running
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;

  void allocate_stack() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* map = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (map == MAP_FAILED || mprotect(map, page, PROT_NONE)) abort();  // the guard page makes an overflow a fault
    stack = static_cast<char*>(map) + page;
    stack_bytes = kStackBytes;
  }
  void free_stack() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    if (munmap(stack - page, stack_bytes + page)) abort();
  }

  // The next switch to this context calls `run`, which must not return.
  void start(void (*run)()) {
    void** words = reinterpret_cast<void**>(stack + stack_bytes - 64);
    fake_stack = nullptr;
#if defined(__x86_64__)
    *--words = nullptr;  // keeps the stack 16-byte aligned at the call
    *--words = reinterpret_cast<void*>(run);
    for (int i = 0; i < 6; ++i) *--words = nullptr;
#else
    words -= 20;
    for (int i = 0; i < 20; ++i) words[i] = nullptr;
    words[11] = reinterpret_cast<void*>(run);
#endif
    top = words;
  }

  // Where a context that is not running will go on.
  Place place() const {
    void** words = static_cast<void**>(top);
#if defined(__x86_64__)
    return {reinterpret_cast<uintptr_t>(words[6]) - 1, reinterpret_cast<uintptr_t>(words[5])};
#else
    return {reinterpret_cast<uintptr_t>(words[11]) - 1, reinterpret_cast<uintptr_t>(words[10])};
#endif
  }
};

constexpr unsigned kOrdersNothing = 1;  // ThreadSanitizer's flag for a switch that is no synchronisation

inline void switch_context(Context& from, Context& to, bool from_ends) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, kOrdersNothing);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  cuemu_swap(&from.top, to.top);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// First thing on a new stack. The first fiber of all is entered from the launcher, whose stack only now becomes known.
inline void finish_first_switch(Context& launcher) {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (launcher.stack) return;
  launcher.stack = static_cast<char*>(const_cast<void*>(bottom));
  launcher.stack_bytes = bytes;
}

inline void acquire(void* sync) {
  if (__tsan_acquire && sync) __tsan_acquire(sync);
}
inline void release(void* sync) {
  if (__tsan_release && sync) __tsan_release(sync);
}

}  // namespace cuemu
