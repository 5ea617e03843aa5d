// Values of stored rows in bf16, and the rotation of the last columns.
#pragma once

#include "convert.cuh"
#include "tile.cuh"

// Four e4m3 codes times a power of two -> bf16, exact unless below 2^-126. As bf16's upper bits a code counts 2^-120 of
// its value, subnormals too: `mend` is 2^120 times the power, twice.
__device__ __forceinline__ void e4m3x4_to_bf16(unsigned codes, unsigned mend, unsigned& first, unsigned& second) {
  unsigned pair[2] = {__byte_perm(codes, 0, 0x1404), __byte_perm(codes, 0, 0x3424)};
#pragma unroll
  for (int i = 0; i < 2; ++i) pair[i] = bf16x2_mul((pair[i] & 0x80008000u) | (pair[i] >> 4 & 0x07f007f0u), mend);
  first = pair[0], second = pair[1];
}

// A pair of columns turned by (cos, sin), the other way with sign -1.
__device__ __forceinline__ float2 rotated(float2 v, float2 turn, float sign) {
  const float sine = sign * turn.y;
  return make_float2(fmaf(v.x, turn.x, -__fmul_rn(v.y, sine)), fmaf(v.x, sine, __fmul_rn(v.y, turn.x)));
}
