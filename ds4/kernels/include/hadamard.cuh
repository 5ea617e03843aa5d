// The Hadamard rotation of 128 columns, y = x H / sqrt(128) in Sylvester order (spec model.md 5.3), by one warp.
#pragma once

#include "reduce.cuh"

// Lane l holds columns 4 l .. 4 l + 3 before and after. Butterflies by rising stride, FP32, then one product: the order
// is the same for every caller, so that equal columns give equal bits. All 32 lanes call it.
__device__ __forceinline__ void warp_hadamard128(float (&v)[4]) {
#pragma unroll
  for (int stride = 1; stride < 4; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & stride) continue;
      const float a = v[i], b = v[i + stride];
      v[i] = __fadd_rn(a, b), v[i + stride] = __fsub_rn(a, b);
    }
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const bool upper = threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, v[i], offset);
      v[i] = upper ? __fsub_rn(other, v[i]) : __fadd_rn(v[i], other);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = __fmul_rn(v[i], 0.08838834764831845f);
}
