// The mixing matrix of a token: softmax and Sinkhorn rounds on a 4 x 4 (spec model.md 2.2).
//
// A round divides rows, then columns, by their sums (+ eps): every matrix on the way is r_j K_jk c_k with K what follows
// the softmax, so only the eight factors change:
//
//   row round     r_j <- r_j / (r_j sum over k of K_jk c_k + eps)
//   column round  c_k <- c_k / (c_k sum over j of K_jk r_j + eps)
//
// A thread keeps all of it in registers. Divisions of entries and exchanges between lanes are gone: a half round is a
// chain of 5 fmaf and one division, 4 of them side by side. It is as close to FP64 as dividing the entries is (2e-7 both,
// logits of size 6, tests/kernels/test_mhc_kernel.py). All lanes compute the same.
#pragma once

#include "reduce.cuh"

// a / b, correctly rounded but for rare cases half a last place off, without the branch to the general routine that keeps
// divisions from overlapping; b and the quotient are normal numbers here: eps <= b < 2^126.
__device__ __forceinline__ float divide_normal(float a, float b) {
  const float inverse = __fdividef(1.f, b), quotient = __fmul_rn(a, inverse);
  return fmaf(fmaf(-b, quotient, a), inverse, quotient);
}

__device__ __forceinline__ float dot_of_4(float a0, float a1, float a2, float a3, const float (&b)[4]) {
  return fmaf(a3, b[3], fmaf(a2, b[2], fmaf(a1, b[1], __fmul_rn(a0, b[0]))));
}

// One warp: `logit` of lane l is entry l % 16, row (l % 16) / 4; returns that entry of the matrix.
__device__ __forceinline__ float sinkhorn(float logit, int lane, int iters, float eps) {
  const float e = expf(__fadd_rn(logit, -warp_max<4>(logit)));
  const float mine = __fadd_rn(e / warp_sum<4>(e), eps);
  float k[16], r[4] = {1.f, 1.f, 1.f, 1.f}, c[4] = {1.f, 1.f, 1.f, 1.f};
#pragma unroll
  for (int i = 0; i < 16; ++i) k[i] = __shfl_sync(kAllLanes, mine, i);
#pragma unroll 1
  for (int round = 0; round < iters; ++round) {
    if (round > 0) {  // the softmax was the first row round
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float sum = dot_of_4(k[4 * j], k[4 * j + 1], k[4 * j + 2], k[4 * j + 3], c);
        r[j] = divide_normal(r[j], fmaf(r[j], sum, eps));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float sum = dot_of_4(k[i], k[4 + i], k[8 + i], k[12 + i], r);
      c[i] = divide_normal(c[i], fmaf(c[i], sum, eps));
    }
  }
  float row = 0.f, column = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    row = lane / 4 % 4 == i ? r[i] : row;
    column = lane % 4 == i ? c[i] : column;
  }
  return __fmul_rn(__fmul_rn(row, mine), column);
}
