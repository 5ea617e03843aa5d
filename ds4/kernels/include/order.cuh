// A total order of FP32 values with their indices, as integers: for argmax and selection that must not depend on arrival.
#pragma once

// Rises with x; -0 and +0 have one key, every NaN the highest (torch.argmax takes a NaN for the largest too).
__device__ __forceinline__ unsigned order_key(float x) {
  if (x != x) return 0xffffffffu;
  const unsigned bits = __float_as_uint(__fadd_rn(x, 0.f));  // -0 + 0 = +0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
// The value of a key; a NaN for that of NaN.
__device__ __forceinline__ float order_value(unsigned key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}
constexpr unsigned kKeyOfInfinity = 0xff800000u;
constexpr unsigned kKeyOfMinusInfinity = 0x007fffffu;
__device__ __forceinline__ bool is_finite_key(unsigned key) { return key > kKeyOfMinusInfinity && key < kKeyOfInfinity; }

// (value, index) in one word: larger for the larger value, of equal values for the lower index. Never 0.
__device__ __forceinline__ unsigned long long ranked(unsigned key, int index) {
  return static_cast<unsigned long long>(key) << 32 | ~static_cast<unsigned>(index);
}
__device__ __forceinline__ unsigned ranked_key(unsigned long long r) { return static_cast<unsigned>(r >> 32); }
__device__ __forceinline__ int ranked_index(unsigned long long r) { return static_cast<int>(~static_cast<unsigned>(r)); }

// The largest of the warp's words, in every lane; all 32 lanes call it.
__device__ __forceinline__ unsigned long long warp_highest(unsigned long long r) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) r = max(r, __shfl_xor_sync(0xffffffffu, r, offset));
  return r;
}
