// Threads, shared memory and the C entry of a kernel.
#pragma once

#include "runtime.h"

#define warpSize 32
#define threadIdx (cuemu::cuemu_thread->thread_index)
#define blockIdx (cuemu::cuemu_thread->block_index)
#define blockDim (cuemu::cuemu_thread->block_dim)
#define gridDim (cuemu::cuemu_thread->grid_dim)

// Code that reads other lanes' stacks on behalf of a collective: a sanitizer would take it for a data race.
#define CUEMU_UNCHECKED \
  __attribute__((noinline, no_sanitize_thread, no_sanitize_address, no_sanitize_undefined))

namespace cuemu {

// A __shared__ variable: one number per declaration and template instance, as Unique is the type of a lambda there.
template <class T, class Unique>
struct Slot {
  static const int id;
};
template <class T, class Unique>
const int Slot<T, Unique>::id = cuemu_new_slot();

template <class T, size_t Alignment, class Unique>
T& shared(Unique) {
  constexpr size_t alignment = Alignment > alignof(T) ? Alignment : alignof(T);
  return *static_cast<T*>(cuemu_shared(Slot<T, Unique>::id, sizeof(T), alignment));
}

template <class T, size_t Alignment>
T* dynamic_shared() {
  return static_cast<T*>(cuemu_dynamic_shared(Alignment > alignof(T) ? Alignment : alignof(T)));
}

// Calls a kernel with its arguments read from the array of pointers that cuLaunchKernel takes as kernelParams.
template <class Kernel>
struct Call;

template <class... Args>
struct Call<void (*)(Args...)> {
  void (*kernel)(Args...);
  void** arguments;

  template <size_t... I>
  void apply(std::index_sequence<I...>) const {
    kernel(*static_cast<std::remove_const_t<std::remove_reference_t<Args>>*>(arguments[I])...);
  }
  static void run(void* self) { static_cast<Call*>(self)->apply(std::index_sequence_for<Args...>{}); }
};

}  // namespace cuemu

// What the builder appends for every kernel of a file; returns 0, or 1 with the message in cuemu_error(). Unchecked, as
// the launch may be unordered with the next one, which uses the same stack.
#define CUEMU_EXPORT(name)                                                       \
  extern "C" __attribute__((visibility("default"))) CUEMU_UNCHECKED int          \
  name##__cuemu(const cuemu::LaunchConfig* config, void** arguments) {           \
    cuemu::Call<decltype(&name)> call{&name, arguments};                         \
    return cuemu::cuemu_launch(&decltype(call)::run, &call, config);             \
  }

#define CUEMU_TEXT(x) #x
#define CUEMU_LINE(x) CUEMU_TEXT(x)
#define CUEMU_SITE __FILE__ ":" CUEMU_LINE(__LINE__)

#define __syncthreads() ((void)cuemu::cuemu_barrier(0, 0, 0, CUEMU_SITE))
#define __syncthreads_count(p) (cuemu::cuemu_barrier(0, 0, (p) != 0, CUEMU_SITE))
#define __syncthreads_or(p) (cuemu::cuemu_barrier(0, 0, (p) != 0, CUEMU_SITE) != 0)
#define __syncthreads_and(p) (cuemu::cuemu_barrier(0, 0, (p) == 0, CUEMU_SITE) == 0)
#define __trap() cuemu::cuemu_fail("__trap")

inline void __nanosleep(unsigned) { cuemu::cuemu_yield(); }
inline long long clock64() { return cuemu::cuemu_clock(); }
