// Indexer queries as operands of an mma: RoPE, Hadamard rotation, rounding to FP4, in bf16 (spec model.md 4, 5.2, 5.3).
#pragma once

#include "convert.cuh"
#include "kv_rows.cuh"
#include "loads.cuh"
#include "reduce.cuh"

constexpr int kQueryRope = 64;  // the last columns
constexpr int kLanesPerQuery = 16;
constexpr int kPerLane = kKeyDim / kLanesPerQuery;
static_assert(kKeyDim == 128 && kKeyBlock == 32 && kPerLane == 8, "four lanes hold a block of the FP4 rounding");

// One half of a warp: lane `part` holds columns 8 part .. 8 part + 7 of a query. cis f32 [32, 2].
__device__ __forceinline__ void rotate_pairs(float (&v)[kPerLane], const float* cis, int part) {
  constexpr int kFirst = (kKeyDim - kQueryRope) / kPerLane;
  if (part < kFirst) return;
  const float* mine = cis + (part - kFirst) * kPerLane;
#pragma unroll
  for (int half = 0; half < kPerLane; half += 4) {
    const Vec<float, 4> c = load_vec<4>(mine + half);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float re = v[half + i], im = v[half + i + 1];
      v[half + i] = fmaf(re, c.v[i], -__fmul_rn(im, c.v[i + 1]));
      v[half + i + 1] = fmaf(re, c.v[i + 1], __fmul_rn(im, c.v[i]));
    }
  }
}

// y = x H / sqrt(128), Sylvester order; butterflies by rising stride, in the lane and then between lanes. Not the
// warp_hadamard128 of the keys: half a warp a query takes half of its shuffles, and every block prepares all queries.
__device__ __forceinline__ void hadamard(float (&v)[kPerLane], int part) {
#pragma unroll
  for (int stride = 1; stride < kPerLane; stride *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i & stride) continue;
      const float a = v[i], b = v[i + stride];
      v[i] = __fadd_rn(a, b), v[i + stride] = __fsub_rn(a, b);
    }
  }
#pragma unroll
  for (int offset = 1; offset < kLanesPerQuery; offset *= 2) {
    const float sign = part & offset ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) v[i] = fmaf(v[i], sign, __shfl_xor_sync(kAllLanes, v[i], offset));
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) v[i] = __fmul_rn(v[i], 0.08838834764831845f);
}

// Rounds to FP4 with a power-of-two scale for each 32 columns, ties to the even code; what stays are FP32 values that bf16
// holds exactly. Codes are half a power of two apart, and .5 below 1: adding 1.5 * 2^23 steps leaves whole steps.
__device__ __forceinline__ void round_fp4(float (&v)[kPerLane]) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) amax = fmaxf(amax, fabsf(v[i]));
  amax = warp_max<kKeyBlock / kPerLane>(amax);
  const unsigned exponent = e2m1_block_exponent(amax);
  const float scale = e8m0_to_f32(exponent), reciprocal = e8m0_reciprocal(exponent);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float x = __fmul_rn(v[i], reciprocal);
    const float power = fmaxf(__uint_as_float(__float_as_uint(x) & 0x7f800000u), 1.f);
    const float magic = __fmul_rn(power, 0.75f * 8388608.f);
    v[i] = __fmul_rn(__fsub_rn(__fadd_rn(x, magic), magic), scale);
  }
}

// Columns i and i + 4 of a lane in one word, the order in which decode_key gives the columns of a key.
__device__ __forceinline__ uint4 pack_query(const float (&v)[kPerLane]) {
  unsigned word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) word[i] = __byte_perm(__float_as_uint(v[i]), __float_as_uint(v[i + 4]), 0x7632);
  return make_uint4(word[0], word[1], word[2], word[3]);
}
