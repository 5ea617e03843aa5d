// Sums, maxima and argmax over a warp or a block, each in one fixed order: the same inputs in the same lanes give the
// same bits in every launch, in all lanes. The order depends on kWidth and the block's size, on nothing else.
//
// A warp reduces by a butterfly: at each step a lane combines its value with that of lane ^ offset, offset = kWidth / 2
// .. 1. Both partners compute the same bits, as a + b = b + a. A block reduces its warps, and then each of its warps
// reduces their results, lane i holding that of warp i.
#pragma once

#include <math_constants.h>

constexpr unsigned kAllLanes = 0xffffffffu;

struct ArgMax {
  float value;
  int index;
};

namespace reduce {

struct Sum {
  __device__ __forceinline__ static float identity() { return 0.f; }
  __device__ __forceinline__ static float combine(float a, float b) { return a + b; }
};
struct Max {
  __device__ __forceinline__ static float identity() { return -CUDART_INF_F; }
  __device__ __forceinline__ static float combine(float a, float b) { return fmaxf(a, b); }
};
// The larger value; of equal values the lower index. A NaN is never chosen over a number.
struct Best {
  __device__ __forceinline__ static ArgMax identity() { return {-CUDART_INF_F, 0x7fffffff}; }
  __device__ __forceinline__ static ArgMax combine(ArgMax a, ArgMax b) {
    const bool take_b = b.value > a.value || (b.value == a.value && b.index < a.index) ||
                        (a.value != a.value && b.value == b.value);
    return take_b ? b : a;
  }
};

__device__ __forceinline__ float exchange(float v, int offset) { return __shfl_xor_sync(kAllLanes, v, offset); }
__device__ __forceinline__ ArgMax exchange(ArgMax v, int offset) {
  return {__shfl_xor_sync(kAllLanes, v.value, offset), __shfl_xor_sync(kAllLanes, v.index, offset)};
}

template <class Op, int kWidth, class T>
__device__ __forceinline__ T warp(T v) {
  static_assert(kWidth >= 2 && kWidth <= 32 && (kWidth & (kWidth - 1)) == 0, "a width is a power of two up to 32");
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) v = Op::combine(v, exchange(v, offset));
  return v;
}

template <class Op, class T>
__device__ __forceinline__ T block(T v) {
  __shared__ T of_warp[32];
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned n_warps = blockDim.x * blockDim.y * blockDim.z / 32, lane = thread % 32;
  v = warp<Op, 32>(v);
  if (lane == 0) of_warp[thread / 32] = v;
  __syncthreads();
  v = warp<Op, 32>(lane < n_warps ? of_warp[lane] : Op::identity());
  __syncthreads();  // before the next call writes of_warp
  return v;
}

}  // namespace reduce

// Over groups of kWidth neighbouring lanes; all 32 lanes of the warp call it.
template <int kWidth = 32>
__device__ __forceinline__ float warp_sum(float v) {
  return reduce::warp<reduce::Sum, kWidth>(v);
}
template <int kWidth = 32>
__device__ __forceinline__ float warp_max(float v) {
  return reduce::warp<reduce::Max, kWidth>(v);
}
template <int kWidth = 32>
__device__ __forceinline__ ArgMax warp_argmax(float value, int index) {
  return reduce::warp<reduce::Best, kWidth>(ArgMax{value, index});
}

// Over the block, whose size is a multiple of 32; every thread calls it and gets the result. Two __syncthreads each,
// which also order the shared memory that the caller used before.
__device__ __forceinline__ float block_sum(float v) { return reduce::block<reduce::Sum>(v); }
__device__ __forceinline__ float block_max(float v) { return reduce::block<reduce::Max>(v); }
__device__ __forceinline__ ArgMax block_argmax(float value, int index) {
  return reduce::block<reduce::Best>(ArgMax{value, index});
}
