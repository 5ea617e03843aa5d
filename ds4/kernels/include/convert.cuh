// Number formats: e4m3, e2m1 and their power-of-two scales, bf16 and f16 from and to FP32. Bit for bit what
// ds4/weights/formats/block_scale.py computes. Codes are in the low bits of an unsigned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

// ---------------------------------------------------------------- power-of-two scales: an e8m0 byte e is 2^(e - 127)

__device__ __forceinline__ float e8m0_to_f32(unsigned e) {
  return __uint_as_float(e ? e << 23 : 0x00400000u);  // 2^-127 is a denormal of FP32
}
// 2^(127 - e), by which a block is multiplied before rounding; e up to 254. Exact, so it equals the division.
__device__ __forceinline__ float e8m0_reciprocal(unsigned e) { return e8m0_to_f32(254u - e); }

// e of the smallest power of two >= amax * fp32(1 / grid_max), found on the bits.
__device__ __forceinline__ unsigned pow2_ceil_exponent(float amax, float reciprocal_of_grid_max) {
  return (__float_as_uint(__fmul_rn(amax, reciprocal_of_grid_max)) + 0x7fffffu) >> 23;
}
// The scale of a block of e4m3 or e2m1 values with this largest magnitude (model.md 5.1, 5.2).
__device__ __forceinline__ unsigned e4m3_block_exponent(float amax) {
  return pow2_ceil_exponent(fmaxf(amax, 1e-4f), 1.f / 448.f);
}
__device__ __forceinline__ unsigned e2m1_block_exponent(float amax) {
  return pow2_ceil_exponent(fmaxf(amax, 6.f * 1.17549435e-38f), 1.f / 6.f);
}

// ---------------------------------------------------------------- e4m3 (fn: no infinities, 0x7f and 0xff are NaN)

// Nearest code, ties to even; beyond 448 that is 448 with the sign, NaN gives 0x7f.
__device__ __forceinline__ unsigned f32_to_e4m3(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
#else
  const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  if (magnitude > 0x7f800000u) return 0x7fu;
  unsigned code;
  if (magnitude < 0x3c800000u)  // below 2^-6 codes count 2^-9, the last place of 2^14
    code = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.f)) - 0x46800000u;
  else  // drop 20 bits of the mantissa, then from FP32's exponent bias to e4m3's
    code = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
  return sign | (code < 0x7eu ? code : 0x7eu);
#endif
}

// Value of a code; 0x7f and 0xff, which ds4 never stores, give +-480. The seven bits are put where FP32 has its
// exponent and mantissa, and one multiplication mends the bias and normalises exactly.
__device__ __forceinline__ float e4m3_to_f32(unsigned code) {
  return __fmul_rn(__uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20), 1.3292279957849159e36f);  // 2^120
}
__device__ __forceinline__ void e4m3x4_to_f32(unsigned codes, float (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = e4m3_to_f32(codes >> 8 * i & 0xffu);
}

// ---------------------------------------------------------------- e2m1: 0 .5 1 1.5 2 3 4 6, bit 3 is the sign

// Nearest code, ties to the even code; magnitudes above 6 become 6, NaN becomes 0 with its sign.
__device__ __forceinline__ unsigned f32_to_e2m1(float x) {
  const float a = fabsf(x);
  const unsigned code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.f);
  return code | (__float_as_uint(x) >> 28 & 8u);
}
__device__ __forceinline__ float e2m1_to_f32(unsigned code) {
  return __fmul_rn(__uint_as_float((code & 8u) << 28 | (code & 7u) << 22), 8.507059173023462e37f);  // 2^126
}
// Eight codes, the first in the lowest bits.
__device__ __forceinline__ void e2m1x8_to_f32(unsigned codes, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = e2m1_to_f32(codes >> 4 * i & 15u);
}

// ---------------------------------------------------------------- bf16 and f16 by their bits, the first of two low

__device__ __forceinline__ float bf16_to_f32(unsigned bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ unsigned f32_to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ float2 bf16x2_to_f32(unsigned bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
__device__ __forceinline__ unsigned f32x2_to_bf16(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);  // one instruction, faster than that for one value
  return reinterpret_cast<const unsigned&>(pair);
}
__device__ __forceinline__ float f16_to_f32(unsigned bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ __forceinline__ unsigned f32_to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
