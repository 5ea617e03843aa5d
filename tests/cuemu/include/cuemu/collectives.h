// Warp collectives: shuffles, votes, reductions, matches. Only __syncwarp orders memory, as in the programming model.
#pragma once

#include "core.h"

namespace cuemu {

template <class T>
struct ShuffleIn {
  T value;
  int source;
};

template <class T>
CUEMU_UNCHECKED void resolve_shuffle(Lane* lanes, unsigned mask) {
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const int source = static_cast<ShuffleIn<T>*>(lanes[i].in)->source;
    if (!(mask >> source & 1)) {
      char text[80];
      snprintf(text, sizeof text, "lane %d shuffles from lane %d, which is not in mask %x", i, source, mask);
      cuemu_fail(text);
    }
    *static_cast<T*>(lanes[i].out) = static_cast<ShuffleIn<T>*>(lanes[source].in)->value;
  }
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* name) {
  static_assert(sizeof(T) <= 8, "a shuffle takes at most 64 bits");
  ShuffleIn<T> in{value, source};
  T out;
  cuemu_collective(mask, &in, &out, &resolve_shuffle<T>, name, 0);
  return out;
}

// Every lane gives a T; lane i of the result is what `Combine` makes of all of them, in lane order, for lane i.
template <class T, class R, class Combine>
CUEMU_UNCHECKED void resolve_all(Lane* lanes, unsigned mask) {
  T values[32];
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) values[i] = *static_cast<T*>(lanes[i].in);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) *static_cast<R*>(lanes[i].out) = Combine()(values, mask, i);
}

template <class R, class Combine, class T>
R collective(unsigned mask, T value, const char* name) {
  R out;
  cuemu_collective(mask, &value, &out, &resolve_all<T, R, Combine>, name, 0);
  return out;
}

struct Ballot {
  unsigned operator()(const bool* values, unsigned mask, int) const {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1 && values[i]) result |= 1u << i;
    return result;
  }
};

struct MatchAny {
  template <class T>
  unsigned operator()(const T* values, unsigned mask, int lane) const {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1 && values[i] == values[lane]) result |= 1u << i;
    return result;
  }
};

template <class T, class Op>
struct Fold {
  T operator()(const T* values, unsigned mask, int) const {
    const int first = __builtin_ctz(mask);
    T result = values[first];
    for (int i = first + 1; i < 32; ++i)
      if (mask >> i & 1) result = Op()(result, values[i]);
    return result;
  }
};

struct Add {
  unsigned operator()(unsigned a, unsigned b) const { return a + b; }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const { return b < a ? b : a; }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const { return a < b ? b : a; }
};
struct And {
  unsigned operator()(unsigned a, unsigned b) const { return a & b; }
};
struct Or {
  unsigned operator()(unsigned a, unsigned b) const { return a | b; }
};
struct Xor {
  unsigned operator()(unsigned a, unsigned b) const { return a ^ b; }
};

}  // namespace cuemu

inline void __syncwarp(unsigned mask = cuemu::kFullWarp) {
  cuemu::cuemu_collective(mask, nullptr, nullptr, nullptr, "__syncwarp", 1);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = cuemu::cuemu_thread->lane;
  return cuemu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = cuemu::cuemu_thread->lane, source = lane ^ lane_mask;
  const bool beyond = (source | (width - 1)) > (lane | (width - 1));
  return cuemu::shuffle(mask, value, beyond ? lane : source, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuemu::cuemu_thread->lane;
  const bool beyond = (lane & (width - 1)) + static_cast<int>(delta) >= width;
  return cuemu::shuffle(mask, value, beyond ? lane : lane + static_cast<int>(delta), "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuemu::cuemu_thread->lane;
  const bool beyond = (lane & (width - 1)) < static_cast<int>(delta);
  return cuemu::shuffle(mask, value, beyond ? lane : lane - static_cast<int>(delta), "__shfl_up_sync");
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuemu::collective<unsigned, cuemu::Ballot>(mask, predicate != 0, "__ballot_sync");
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return cuemu::collective<unsigned, cuemu::MatchAny>(mask, value, "__match_any_sync");
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return cuemu::collective<unsigned, cuemu::Fold<unsigned, cuemu::Add>>(mask, value, "__reduce_add_sync");
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return cuemu::collective<T, cuemu::Fold<T, cuemu::Min>>(mask, value, "__reduce_min_sync");
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return cuemu::collective<T, cuemu::Fold<T, cuemu::Max>>(mask, value, "__reduce_max_sync");
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return cuemu::collective<unsigned, cuemu::Fold<unsigned, cuemu::And>>(mask, value, "__reduce_and_sync");
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return cuemu::collective<unsigned, cuemu::Fold<unsigned, cuemu::Or>>(mask, value, "__reduce_or_sync");
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return cuemu::collective<unsigned, cuemu::Fold<unsigned, cuemu::Xor>>(mask, value, "__reduce_xor_sync");
}
