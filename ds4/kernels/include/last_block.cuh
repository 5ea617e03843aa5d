// The block that arrives last goes on alone: a reduction over the grid in one launch.
#pragma once

// True in every thread of the last of `n` blocks to come here; what the others wrote before is visible to it, if read past
// L1 (__ldcg, atomics). The counter, zero before the first launch, is zero again afterwards; a launch that is broken off
// leaves it unusable. Every thread of the block calls it.
__device__ __forceinline__ bool last_block(unsigned* counter, unsigned n) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(counter, 1u) == n - 1;
    if (is_last) atomicExch(counter, 0u);
  }
  __syncthreads();
  __threadfence();
  return is_last;
}
