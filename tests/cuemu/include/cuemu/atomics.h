// Atomic operations: relaxed, as CUDA's are. __threadfence makes them order memory between blocks.
#pragma once

#include "core.h"

namespace cuemu {

template <class T, class F>
T read_modify_write(T* at, F f) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) cuemu_fail("misaligned atomic");
  cuemu_atomic();
  T old, next;
  __atomic_load(at, &old, __ATOMIC_RELAXED);
  do next = f(old);
  while (!__atomic_compare_exchange(at, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

// Keeps the operand out of template deduction: atomicAdd(float*, int) converts, as CUDA's overloads do.
template <class T>
using Same = std::common_type_t<T>;

}  // namespace cuemu

inline void __threadfence() { cuemu::cuemu_fence(); }
inline void __threadfence_system() { cuemu::cuemu_fence(); }
inline void __threadfence_block() {}

template <class T>
T atomicAdd(T* at, cuemu::Same<T> value) {
  if constexpr (std::is_same_v<T, int>)
    return cuemu::read_modify_write(at, [=](T old) { return static_cast<T>(static_cast<unsigned>(old) + value); });
  else
    return cuemu::read_modify_write(at, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* at, cuemu::Same<T> value) {
  return cuemu::read_modify_write(at, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMin(T* at, cuemu::Same<T> value) {
  return cuemu::read_modify_write(at, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* at, cuemu::Same<T> value) {
  return cuemu::read_modify_write(at, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicAnd(T* at, cuemu::Same<T> value) {
  return cuemu::read_modify_write(at, [=](T old) { return old & value; });
}
template <class T>
T atomicOr(T* at, cuemu::Same<T> value) {
  return cuemu::read_modify_write(at, [=](T old) { return old | value; });
}
template <class T>
T atomicXor(T* at, cuemu::Same<T> value) {
  return cuemu::read_modify_write(at, [=](T old) { return old ^ value; });
}
template <class T>
T atomicExch(T* at, cuemu::Same<T> value) {
  return cuemu::read_modify_write(at, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* at, cuemu::Same<T> expected, cuemu::Same<T> value) {
  return cuemu::read_modify_write(at, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* at, unsigned bound) {
  return cuemu::read_modify_write(at, [=](unsigned old) { return old >= bound ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* at, unsigned bound) {
  return cuemu::read_modify_write(at, [=](unsigned old) { return old == 0 || old > bound ? bound : old - 1; });
}
