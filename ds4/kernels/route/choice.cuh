// Which experts a token goes to, given its scores, and with what weight (spec model.md 2.7): a warp a token, expert e
// in lane e % 32.
//
//   ids       the TOP_K largest score + bias, falling, ties to the lower id: TOP_K rounds of an argmax over the warp
//   weight[i] = route_scale * score[ids[i]] / sum over the chosen of score, summed by rank
#pragma once

#include "math.cuh"
#include "reduce.cuh"

#if !defined(N_EXPERTS) || !defined(TOP_K)
#error "N_EXPERTS and TOP_K must be defined"
#endif

constexpr int kPerLane = (N_EXPERTS + 31) / 32;
static_assert(TOP_K >= 1 && TOP_K <= 32 && TOP_K <= N_EXPERTS, "a warp keeps one chosen expert a lane");
static_assert(N_EXPERTS <= 1024, "a lane marks its experts in one word");

__device__ __forceinline__ float expert_score(float logit) { return sqrtf(softplus(logit)); }

// The weights of one token's chosen experts: lane i < TOP_K has rank i's id and score. ids i32 [TOP_K], weights f32
// [TOP_K].
__device__ __forceinline__ void write_choice(int lane, int id, float score, float route_scale, int* __restrict__ ids,
                                             float* __restrict__ weights) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < TOP_K; ++i) sum = __fadd_rn(sum, __shfl_sync(kAllLanes, score, i));
  if (lane < TOP_K) {
    ids[lane] = id;
    weights[lane] = __fmul_rn(score / sum, route_scale);
  }
}

// The choice of one token: score[j] is that of expert lane + 32 j, any number behind the last. bias f32 [N_EXPERTS] or
// null; ids and weights as above.
__device__ __forceinline__ void choose(const float (&score)[kPerLane], const float* __restrict__ bias, int lane,
                                       float route_scale, int* __restrict__ ids, float* __restrict__ weights) {
  float biased[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = lane + 32 * j;
    biased[j] = e < N_EXPERTS ? __fadd_rn(score[j], bias ? bias[e] : 0.f) : 0.f;
  }
  unsigned taken = 0;
  int my_id = 0;
  float my_score = 0.f;
#pragma unroll 1
  for (int rank = 0; rank < TOP_K; ++rank) {
    ArgMax best = reduce::Best::identity();
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = lane + 32 * j;
      if (e < N_EXPERTS && !(taken >> j & 1u)) best = reduce::Best::combine(best, ArgMax{biased[j], e});
    }
    best = warp_argmax(best.value, best.index);
    const int id = min(best.index, N_EXPERTS - 1);  // not-a-number everywhere must not become an address
    float chosen = 0.f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (id == lane + 32 * j) taken |= 1u << j, chosen = score[j];
    }
    chosen = __shfl_sync(kAllLanes, chosen, id % 32);
    if (lane == rank) my_id = id, my_score = chosen;
  }
  write_choice(lane, my_id, my_score, route_scale, ids, weights);
}
