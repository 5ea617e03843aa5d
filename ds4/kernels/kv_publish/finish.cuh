// From raw columns to stored bytes: RMS norm, RoPE, and the grid of a KV row or of an indexer key (spec model.md 2.1,
// 1.3, 5.1 - 5.3). A thread holds four neighbouring columns.
#pragma once

#include "convert.cuh"
#include "hadamard.cuh"
#include "kv_rows.cuh"
#include "loads.cuh"

using Four = Vec<float, 4>;

__device__ __forceinline__ Four four_of(float v) { return Four{v, v, v, v}; }
__device__ __forceinline__ float sum_of_squares(const Four& v, float sum = 0.f) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum = fmaf(v[i], v[i], sum);
  return sum;
}
__device__ __forceinline__ float largest_magnitude(const Four& v) {
  return fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
}

// v times the reciprocal root of the mean square of kColumns columns, times the gain.
template <int kColumns>
__device__ __forceinline__ Four normed(const Four& v, float squares, float eps, const Four& gain) {
  const float inv = rsqrtf(__fadd_rn(__fmul_rn(squares, 1.f / kColumns), eps));
  Four y;
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] = __fmul_rn(__fmul_rn(v[i], inv), gain[i]);
  return y;
}

// Two interleaved pairs turned by (cos, sin, cos, sin). Rounded as the reference rounds: two products, then their sum.
__device__ __forceinline__ Four rotated(const Four& v, const Four& turn) {
  Four y;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    y[i] = __fsub_rn(__fmul_rn(v[i], turn[i]), __fmul_rn(v[i + 1], turn[i + 1]));
    y[i + 1] = __fadd_rn(__fmul_rn(v[i], turn[i + 1]), __fmul_rn(v[i + 1], turn[i]));
  }
  return y;
}

// The turn of columns column .. + 3 of kColumns, of which the last kRopeDim turn; cis f32 [32, 2].
template <int kColumns>
__device__ __forceinline__ Four load_turn(const float* cis, int column) {
  constexpr int kFirst = kColumns - kRopeDim;
  return column >= kFirst && column < kColumns ? load_vec<4>(cis + column - kFirst) : four_of(0.f);
}

// Norm, turn and store a KV row: thread i holds columns 4 i .. 4 i + 3, threads behind the last column hold zeros.
// Every thread of the block calls it; the block's size is a multiple of 128. row u8 [584] OUT.
__device__ __forceinline__ void finish_row(Four v, const Four& gain, const Four& turn, float eps, unsigned char* row) {
  const int column = 4 * threadIdx.x;
  v = normed<kHeadDim>(v, block_sum(sum_of_squares(v)), eps, gain);
  if (column >= kHeadDim) return;
  const float largest = warp_max<kRowBlock / 4>(largest_magnitude(v));
  if (column >= kNopeDim) {
    v = rotated(v, turn);
    const Vec<unsigned, 2> words{f32x2_to_bf16(v[0], v[1]), f32x2_to_bf16(v[2], v[3])};
    store_vec<2>(reinterpret_cast<unsigned*>(row + kRowRope) + (column - kNopeDim) / 2, words);
    if (column == kNopeDim) row[kRowRope - 1] = 0;
    return;
  }
  const unsigned exponent = e4m3_block_exponent(largest);
  unsigned codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) codes |= f32_to_e4m3(__fmul_rn(v[i], e8m0_reciprocal(exponent))) << 8 * i;
  reinterpret_cast<unsigned*>(row)[column / 4] = codes;
  if (column % kRowBlock == 0) row[kRowScales + column / kRowBlock] = static_cast<unsigned char>(exponent);
}

// Norm, turn, rotate and store an indexer key: the first warp of a block, thread i with columns 4 i .. 4 i + 3. key u8
// [68] OUT.
__device__ __forceinline__ void finish_key(Four v, const Four& gain, const Four& turn, float eps, unsigned char* key) {
  const int lane = threadIdx.x;
  v = normed<kKeyDim>(v, warp_sum(sum_of_squares(v)), eps, gain);
  if (4 * lane >= kKeyDim - kRopeDim) v = rotated(v, turn);
  warp_hadamard128(v.v);
  const unsigned exponent = e2m1_block_exponent(warp_max<kKeyBlock / 4>(largest_magnitude(v)));
  unsigned codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) codes |= f32_to_e2m1(__fmul_rn(v[i], e8m0_reciprocal(exponent))) << 4 * i;
  const unsigned next = __shfl_down_sync(kAllLanes, codes, 1);
  if (lane % 2 == 0) reinterpret_cast<unsigned*>(key)[lane / 2] = codes | next << 16;
  if (lane % 8 == 0) key[kKeyScales + lane / 8] = static_cast<unsigned char>(exponent);
}
