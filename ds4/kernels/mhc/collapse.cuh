// The second half of mhc_boundary and of hc_head: collapse the streams of a token and norm the result.
//
//   inv  = rsqrt(trace(G) / (4 HIDDEN) + norm_eps)
//   p[n] = sigmoid(dot_n inv scale + base[n]) + hc_eps
//   x    = (sum over n of p[n] s[n]) rsqrt(p^T G p / HIDDEN + norm_eps) norm
//
// 128 threads, 4 columns each, so that a warp owns 128 columns and a quantisation group is within a warp. Every block adds
// up the partials that it needs, in the same order as all others, and needs no value from them.
//
// p^T G p is the sum of squares of the collapsed row. Its rounding error is a few 2^-24 of sum p_a p_b |G_ab|, hence small
// unless the streams cancel in the collapse; tests/kernels/test_mhc_kernel.py compares it with FP64.
#pragma once

#include "math.cuh"
#include "streams.cuh"

constexpr int kCollapseWarps = 4;

// The sums over all blocks of rows row_of(0 .. kCount - 1) of a token's partials, for all threads of a block of 4 warps.
template <int kCount, class RowOf>
__device__ __forceinline__ void add_up(const float* partials, RowOf row_of, float* total) {
  constexpr int kPerWarp = (kCount + kCollapseWarps - 1) / kCollapseWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum[kPerWarp];
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
    const int index = warp + i * kCollapseWarps;
    sum[i] = index < kCount ? lane_sum_of_chunks(partials + row_of(index) * kChunkStride, lane) : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
    const int index = warp + i * kCollapseWarps;
    sum[i] = warp_sum(sum[i]);
    if (lane == 0 && index < kCount) total[index] = sum[i];
  }
  __syncthreads();
}

// rsqrt of the mean square of all streams; `squares` are the G_nn.
__device__ __forceinline__ float streams_norm(const float* squares, float norm_eps) {
  const float sum = __fadd_rn(__fadd_rn(squares[0], squares[1]), __fadd_rn(squares[2], squares[3]));
  return rsqrtf(__fadd_rn(__fmul_rn(sum, 1.f / (kStreams * HIDDEN)), norm_eps));
}

// p^T G p, G in the order of the partials.
__device__ __forceinline__ float collapsed_square(const float (&p)[kStreams], const float* gram) {
  float diagonal = 0.f, cross = 0.f;
#pragma unroll
  for (int n = 0; n < kStreams; ++n) {
    diagonal = fmaf(__fmul_rn(p[n], p[n]), gram[n], diagonal);
    cross = fmaf(__fmul_rn(p[n], p[(n + 1) % kStreams]), gram[kStreams + n], cross);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) cross = fmaf(__fmul_rn(p[n], p[n + 2]), gram[2 * kStreams + n], cross);
  return fmaxf(fmaf(2.f, cross, diagonal), 0.f);  // rounding can make it negative where the streams cancel
}

// Columns column .. column + 3 of the normed x of token blockIdx.y; zeros behind the last column. All threads of the block
// call it. streams f32 [N_TOK, 4, HIDDEN], partials f32 [N_TOK, kRows + 10, kChunkStride], scale f32 [1 or more],
// base f32 [4 or more], norm f32 [HIDDEN].
template <int kRows>
__device__ __forceinline__ float4 collapse(const float* streams, const float* partials, const float* scale,
                                           const float* base, const float* norm, float hc_eps, float norm_eps,
                                           int column) {
  __shared__ float total[kStreams + kGram];
  const int token = blockIdx.y, lane = threadIdx.x % 32;
  const bool inside = column < HIDDEN;
  const float4 zeros = make_float4(0.f, 0.f, 0.f, 0.f), gain = inside ? load_float4(norm + column) : zeros;
  const float my_scale = scale[0], my_base = base[lane % kStreams];
  pdl_launch();
  pdl_wait();
  float4 s[kStreams];
#pragma unroll
  for (int n = 0; n < kStreams; ++n) {
    s[n] = inside ? load_float4(streams + static_cast<size_t>(token * kStreams + n) * HIDDEN + column) : zeros;
  }
  add_up<kStreams + kGram>(
      partials + static_cast<size_t>(token) * (kRows + kGram) * kChunkStride,
      [](int i) { return i < kStreams ? i : kRows - kStreams + i; }, total);
  const float logit = __fmul_rn(total[lane % kStreams], streams_norm(total + kStreams, norm_eps));
  const float my_weight = __fadd_rn(sigmoid(fmaf(logit, my_scale, my_base)), hc_eps);
  float p[kStreams];
#pragma unroll
  for (int n = 0; n < kStreams; ++n) p[n] = __shfl_sync(kAllLanes, my_weight, n);
  const float mean = __fmul_rn(collapsed_square(p, total + kStreams), 1.f / HIDDEN);
  float4 x = scaled(p[0], s[0]);
#pragma unroll
  for (int n = 1; n < kStreams; ++n) x = add_scaled(p[n], s[n], x);
  x = scaled(rsqrtf(__fadd_rn(mean, norm_eps)), x);
  return make_float4(__fmul_rn(x.x, gain.x), __fmul_rn(x.y, gain.y), __fmul_rn(x.z, gain.z), __fmul_rn(x.w, gain.w));
}
