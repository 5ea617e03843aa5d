// What the formats of mma_rows.cuh share: planes of a packed matrix, and pairs of BF16 numbers, the first in the lower half.
#pragma once

#include <cuda_bf16.h>

// The planes of ds4/kernels/packing, in their order; null where a format has fewer.
struct PlanePointers {
  const unsigned char* plane[4];
};

__device__ constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
// Bytes of a row of a plane that uses `bytes` of them.
__device__ constexpr int padded_row(int bytes) { return round_up(bytes, 16); }

__device__ __forceinline__ unsigned word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ __nv_bfloat162 as_bf16x2(unsigned word) { return reinterpret_cast<const __nv_bfloat162&>(word); }
__device__ __forceinline__ unsigned as_word(const __nv_bfloat162& pair) { return reinterpret_cast<const unsigned&>(pair); }
__device__ __forceinline__ unsigned bf16x2_mul(unsigned a, unsigned b) {
  return as_word(__hmul2(as_bf16x2(a), as_bf16x2(b)));
}
__device__ __forceinline__ unsigned bf16x2_add(unsigned a, unsigned b) {
  return as_word(__hadd2(as_bf16x2(a), as_bf16x2(b)));
}
__device__ __forceinline__ unsigned bf16x2_fma(unsigned a, unsigned b, unsigned c) {
  return as_word(__hfma2(as_bf16x2(a), as_bf16x2(b), as_bf16x2(c)));
}
// 2^exponent twice.
__device__ constexpr unsigned bf16x2_power(int exponent) { return static_cast<unsigned>(exponent + 127) * 0x00800080u; }

// The upper halves of two FP32 numbers: cut to 8 significant bits.
__device__ __forceinline__ unsigned cut_to_bf16x2(float first, float second) {
  return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
}
// What is left of it; exact.
__device__ __forceinline__ float cut_off(float x) {
  return __fsub_rn(x, __uint_as_float(__float_as_uint(x) & 0xffff0000u));
}
// Two FP32 numbers as sums of kParts BF16 numbers each, the largest first, all of the sign of their number. Exact for up to
// 8 kParts significant bits as long as BF16 has numbers that small, 2^-133; an infinity becomes an infinity and NaN.
template <int kParts>
__device__ __forceinline__ void split_to_bf16x2(float first, float second, unsigned (&parts)[kParts]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    parts[p] = cut_to_bf16x2(first, second);
    if (p + 1 < kParts) first = cut_off(first), second = cut_off(second);
  }
}
