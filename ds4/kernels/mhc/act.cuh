// Activations for the projections of quantised weights, from a warp that holds 128 columns, 4 of a lane. The torch twins
// are ds4/kernels/mhc/act.py (int8) and ds4.weights.formats.block_scale.quantize_e4m3 (fp8), and agree bit for bit.
#pragma once

#include "convert.cuh"
#include "reduce.cuh"

__device__ __forceinline__ float largest_magnitude(float4 x) {
  return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

// e4m3 with a power-of-two scale per 128 (spec model.md 5.1): four codes of this lane, and the e8m0 byte of the warp.
__device__ __forceinline__ unsigned quantize_fp8(float4 x, unsigned& exponent) {
  exponent = e4m3_block_exponent(warp_max(largest_magnitude(x)));
  const float inverse = e8m0_reciprocal(exponent);
  return f32_to_e4m3(__fmul_rn(x.x, inverse)) | f32_to_e4m3(__fmul_rn(x.y, inverse)) << 8 |
         f32_to_e4m3(__fmul_rn(x.z, inverse)) << 16 | f32_to_e4m3(__fmul_rn(x.w, inverse)) << 24;
}

// int8 with an FP32 scale per 32: code = rint(x * (127 / amax)), ties to even, scale = amax * fp32(1 / 127); a block with
// amax below 2^-100 is zeros with scale 0. `sum` is that of the codes of 16 columns, four lanes, for weights with minima.
__device__ __forceinline__ unsigned quantize_int8(float4 x, float& scale, int& sum) {
  const float amax = warp_max<8>(largest_magnitude(x));
  const bool zero = amax < 7.888609052210118e-31f;
  const float inverse = zero ? 0.f : 127.f / amax;
  scale = zero ? 0.f : __fmul_rn(amax, 1.f / 127.f);
  const int q[4] = {__float2int_rn(__fmul_rn(x.x, inverse)), __float2int_rn(__fmul_rn(x.y, inverse)),
                    __float2int_rn(__fmul_rn(x.z, inverse)), __float2int_rn(__fmul_rn(x.w, inverse))};
  sum = q[0] + q[1] + q[2] + q[3];
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  return (q[0] & 0xffu) | (q[1] & 0xffu) << 8 | (q[2] & 0xffu) << 16 | (q[3] & 0xffu) << 24;
}
