// Running sums of integers over a block. Integers, so the order of additions cannot show.
#pragma once

// Sum of `v` over this thread and all before it; `total` becomes the block's sum. Every thread of the block calls it; its
// size is a multiple of 32. Two __syncthreads.
__device__ __forceinline__ unsigned long long block_scan(unsigned long long v, unsigned long long& total) {
  __shared__ unsigned long long of_warp[32];
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
#pragma unroll
  for (unsigned offset = 1; offset < 32; offset *= 2) {
    const unsigned long long before = __shfl_up_sync(0xffffffffu, v, offset);
    if (lane >= offset) v += before;
  }
  if (lane == 31) of_warp[warp] = v;
  __syncthreads();
  unsigned long long sum = 0;
  total = 0;
  for (unsigned w = 0; w < n_warps; ++w) {
    if (w < warp) sum += of_warp[w];
    total += of_warp[w];
  }
  __syncthreads();  // before the next call writes of_warp
  return sum + v;
}
__device__ __forceinline__ unsigned long long block_total(unsigned long long v) {
  unsigned long long total;
  block_scan(v, total);
  return total;
}
