// Loads and stores with cache hints. A GPU faults on an address that is not a multiple of the access's size.
#pragma once

#include "core.h"

namespace cuemu {

template <class T>
void check_aligned(const T* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) cuemu_fail(what);
}
template <class T>
T load(const T* p) {
  check_aligned(p, "misaligned load");
  return *p;
}
template <class T>
void store(T* p, T value) {
  check_aligned(p, "misaligned store");
  *p = value;
}

}  // namespace cuemu

#define CUEMU_LOAD(name) \
  template <class T>     \
  T name(const T* p) {   \
    return cuemu::load(p); \
  }
#define CUEMU_STORE(name)                               \
  template <class T>                                    \
  void name(T* p, std::common_type_t<T> value) {        \
    cuemu::store(p, static_cast<T>(value));             \
  }
CUEMU_LOAD(__ldg)
CUEMU_LOAD(__ldca)
CUEMU_LOAD(__ldcg)
CUEMU_LOAD(__ldcs)
CUEMU_LOAD(__ldlu)
CUEMU_LOAD(__ldcv)
CUEMU_STORE(__stwb)
CUEMU_STORE(__stcg)
CUEMU_STORE(__stcs)
CUEMU_STORE(__stwt)
#undef CUEMU_LOAD
#undef CUEMU_STORE
