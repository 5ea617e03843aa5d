// The first half of mhc_boundary and of hc_head: the new residual streams of a block's columns, and what these columns
// contribute to the mixing logits and to the Gram matrix of the streams (spec model.md 2.2).
//
//   s[k]  = post[k] y + sum over j of comb[j, k] s[j]          where a sublayer's output y is pending; else s as it is
//   dot_r = sum over (n, d) of fn[r, n, d] s[n, d]             kRows of them
//   G_ab  = sum over d of s[a, d] s[b, d]                      the 10 of a symmetric 4 x 4
//
// The trace of G is the sum of squares that the logits are normed with, and p^T G p is the sum of squares of the collapsed
// row sum p_n s[n], so that the second half can norm its columns without seeing the others.
//
// Grid (HIDDEN / 32, ceil(n_tok / 8)), 256 threads. N_TOK is n_tok, or 8 for all its multiples. A block owns 32 columns of up to 8 tokens. Lane l holds stream l / 8,
// columns 4 (l % 8) .. + 3, in both parts:
//   1  warp t makes the streams of token t, keeps them in shared memory for all warps, and sums its products for G;
//   2  warp w has taken its kRows / 8 rows of fn into registers before anything else, and dots them with every token.
// Each weight is read once a block for all tokens, all of them in flight before the wait for the previous kernel.
//
// Order: four columns of a lane by fmaf in rising order, then the butterfly of reduce.cuh over the warp (over its 8 lanes
// of one stream for G); blocks are added up by the second half. It depends on HIDDEN only.
// Races that cannot happen: the streams are updated in place, but a column of a token is read and written by one warp
// alone, whose lanes have all read (__syncwarp) before one writes. Partials have one writer each.
#pragma once

#include "loads.cuh"
#include "plain_weights.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

#if !defined(HIDDEN) || !defined(N_TOK)
#error "HIDDEN and N_TOK must be defined"
#endif

constexpr int kStreams = 4;
constexpr int kColumns = 32;  // of a block
constexpr int kPartialWarps = 8;
constexpr int kTokens = N_TOK < kPartialWarps ? N_TOK : kPartialWarps;  // of a block
constexpr int kChunks = HIDDEN / kColumns;
constexpr int kChunkStride = (kChunks + 3) / 4 * 4;  // floats from one row of partials to the next; 16 bytes a load
constexpr int kGram = 10;  // rows of partials behind the logits: 4 of G_nn, 4 of G_n,n+1 (modulo 4), G_02, G_13
static_assert(HIDDEN % kColumns == 0, "a block owns 32 columns");

// Four values of a lane: from memory as they are stored, so that all loads are issued before one is used.
__device__ __forceinline__ uint4 load_four(const float* p) { return load_stream16(p); }
__device__ __forceinline__ uint4 load_four(const __half* p) {
  const Vec<unsigned, 2> v = load_vec<2>(reinterpret_cast<const unsigned*>(p));
  return make_uint4(v[0], v[1], 0u, 0u);
}
__device__ __forceinline__ float4 decode_four(uint4 v, const float*) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}
__device__ __forceinline__ float4 decode_four(uint4 v, const __half*) {
  return make_float4(f16_to_f32(v.x & 0xffffu), f16_to_f32(v.x >> 16), f16_to_f32(v.y & 0xffffu), f16_to_f32(v.y >> 16));
}

__device__ __forceinline__ float4 load_float4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ void store_float4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
__device__ __forceinline__ float4 scaled(float a, float4 v) {
  return make_float4(__fmul_rn(a, v.x), __fmul_rn(a, v.y), __fmul_rn(a, v.z), __fmul_rn(a, v.w));
}
__device__ __forceinline__ float4 add_scaled(float a, float4 v, float4 sum) {
  return make_float4(fmaf(a, v.x, sum.x), fmaf(a, v.y, sum.y), fmaf(a, v.z, sum.z), fmaf(a, v.w, sum.w));
}
__device__ __forceinline__ float dot4(float4 a, float4 b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, __fmul_rn(a.x, b.x))));
}
// The same columns of another stream, `lanes` / 8 further.
__device__ __forceinline__ float4 of_stream(float4 v, int lanes) {
  const int from = (threadIdx.x + lanes) % 32;
  return make_float4(__shfl_sync(kAllLanes, v.x, from), __shfl_sync(kAllLanes, v.y, from),
                     __shfl_sync(kAllLanes, v.z, from), __shfl_sync(kAllLanes, v.w, from));
}

// One warp: the streams of one token in this block's columns, written where y is pending; this lane's four values.
__device__ __forceinline__ float4 resolve(const float* y, const float* post, const float* comb, float* streams, int token,
                                          int n, int column) {
  float* mine = streams + static_cast<size_t>(token) * kStreams * HIDDEN + column;
  if (y == nullptr) return load_float4(mine + n * HIDDEN);
  float4 old[kStreams];
  float weight[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    old[j] = load_float4(mine + j * HIDDEN);
    weight[j] = comb[(token * kStreams + j) * kStreams + n];
  }
  float4 fresh = scaled(post[token * kStreams + n], load_float4(y + static_cast<size_t>(token) * HIDDEN + column));
#pragma unroll
  for (int j = 0; j < kStreams; ++j) fresh = add_scaled(weight[j], old[j], fresh);
  __syncwarp();
  store_float4(mine + n * HIDDEN, fresh);
  return fresh;
}

// One warp: the 10 sums over this block's columns; `row` is the first of their rows of partials, at this block's place.
__device__ __forceinline__ void write_gram(float4 v, int n, int lane, float* row) {
  const float4 next = of_stream(v, 8), opposite = of_stream(v, 16);
  const float square = warp_sum<8>(dot4(v, v));
  const float with_next = warp_sum<8>(dot4(v, next));
  const float with_opposite = warp_sum<8>(dot4(v, opposite));
  const int which = lane % 8;
  if (which < 2 || (which == 2 && n < 2)) {
    row[(4 * which + n) * kChunkStride] = which == 0 ? square : which == 1 ? with_next : with_opposite;
  }
}

// y f32 [N_TOK, HIDDEN] with post f32 [N_TOK, 4] and comb f32 [N_TOK, 4, 4], or null; streams f32 [N_TOK, 4, HIDDEN] IN OUT;
// fn [kRows, 4 HIDDEN]; partials f32 [N_TOK, kRows + 10, kChunkStride] OUT. Eights of tokens from *count on, where there
// is one, have no token.
template <int kRows, class T>
__device__ __forceinline__ void stream_partials(const float* y, const float* post, const float* comb, float* streams,
                                                const T* fn, float* partials, const int* count = nullptr) {
  constexpr int kRowsPerWarp = (kRows + kPartialWarps - 1) / kPartialWarps;
  __shared__ float4 fresh[kTokens][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = lane / 8;
  const int column = blockIdx.x * kColumns + lane % 8 * 4, first_row = warp * kRowsPerWarp;
  const int first_token = blockIdx.y * kTokens;
  const int n_mine = N_TOK % kTokens == 0 ? kTokens : min(kTokens, N_TOK - first_token);
  uint4 raw[kRowsPerWarp];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int row = first_row + r;
    if (row < kRows) raw[r] = load_four(fn + static_cast<size_t>(row * kStreams + n) * HIDDEN + column);
  }
  pdl_launch();
  pdl_wait();
  if (count != nullptr && first_token >= *count) return;
  const int my_token = first_token + warp;
  if (warp < n_mine) {
    const float4 v = resolve(y, post, comb, streams, my_token, n, column);
    fresh[warp][lane] = v;
    write_gram(v, n, lane, partials + (static_cast<size_t>(my_token) * (kRows + kGram) + kRows) * kChunkStride + blockIdx.x);
  }
  __syncthreads();
  if (first_row >= kRows) return;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= n_mine) break;
    const float4 v = fresh[t][lane];
    float* rows = partials + static_cast<size_t>(first_token + t) * (kRows + kGram) * kChunkStride + blockIdx.x;
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const float sum = warp_sum(dot4(decode_four(raw[r], fn), v));
      if (lane == r) rows[(first_row + r) * kChunkStride] = sum;
    }
  }
}

// For the second half: this lane's part of the sum over all blocks of one row of partials; warp_sum makes the sum of it.
__device__ __forceinline__ float lane_sum_of_chunks(const float* row, int lane) {
  float sum = 0.f;
#pragma unroll
  for (int base = 0; base < kChunkStride; base += 128) {
    const int i = base + 4 * lane;
    if (i < kChunkStride) {
      const float4 v = load_float4(row + i);  // of the last four, those behind kChunks were never written
      sum = __fadd_rn(sum, __fadd_rn(__fadd_rn(v.x, i + 1 < kChunks ? v.y : 0.f),
                                     __fadd_rn(i + 2 < kChunks ? v.z : 0.f, i + 3 < kChunks ? v.w : 0.f)));
    }
  }
  return sum;
}
