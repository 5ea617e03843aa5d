// route: which experts each token goes to, and with what weight (spec model.md 2.7).
//
//   score[e]  = sqrt(softplus(x . gate[e]))
//   learned   : ids and weights as choice.cuh chooses them
//   hashed    : ids = tid2eid[token], and only their rows are read; weights as there
//
// route_*: grid (ceil(N_EXPERTS / 2)), block 128. A block owns two rows of the gate, two warps a row: warp h of a row
// takes the 16-byte chunks whose index / 32 is h modulo 2, lane-strided, each lane kFlight loads ahead. A row is read
// once for all N_TOK tokens. The block that arrives last (counter, which it sets back to 0) selects, one warp a token.
// A launch that is broken off leaves the counter unusable; the owner zeroes it once, at allocation.
// route_hash_*: grid (TOP_K, N_TOK), block 64: one row for one token; the block that arrives last of a token's TOP_K
// normalises. `tid2eid` is checked when the checkpoint is opened, so ids need no check here.
//
// Order: a row's products by falling chunk distance as above, fmaf throughout, lanes by the butterfly of reduce.cuh, then
// warp 0 + warp 1. Nothing in it depends on N_TOK, on the grid or on arrival, so a token's result does not either.
// Bytes: N_EXPERTS * HIDDEN * sizeof(gate) once, 2.1 MB in BF16; x comes from L2. Latency-bound: 128 blocks, 4 loads in
// flight a lane cover the row in two rounds. Estimate: 3 us on H200, not measured.
#include "choice.cuh"
#include "last_block.cuh"
#include "plain_weights.cuh"

#if !defined(HIDDEN) || !defined(N_TOK)
#error "HIDDEN and N_TOK must be defined"
#endif

constexpr int kRowsPerBlock = 2;
constexpr int kWarpsPerRow = 2;
constexpr int kFlight = 4;
static_assert(N_TOK >= 1 && N_TOK <= 8, "decode form");
static_assert(HIDDEN % 8 == 0, "rows are read 16 bytes at a time");

// Dot product of one row with kTok rows of x, the half of it that belongs to warp `half` of the row; same in all lanes.
template <class T, int kTok>
__device__ __forceinline__ void half_row(const T* __restrict__ row, const float* __restrict__ x, int half, int lane,
                                         float (&acc)[kTok]) {
  using W = PlainWeights<T>;
  constexpr int kChunks = HIDDEN / W::kCount;
#pragma unroll
  for (int t = 0; t < kTok; ++t) acc[t] = 0.f;
  for (int base = half * 32 + lane; base < kChunks; base += kFlight * kWarpsPerRow * 32) {
    uint4 raw[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int chunk = base + i * kWarpsPerRow * 32;
      raw[i] = chunk < kChunks ? load_stream16(row + chunk * W::kCount) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int chunk = base + i * kWarpsPerRow * 32;
      if (chunk >= kChunks) break;
      float w[W::kCount];
      W::decode(raw[i], w);
#pragma unroll
      for (int t = 0; t < kTok; ++t) {
        const float4* values = reinterpret_cast<const float4*>(x + t * HIDDEN + chunk * W::kCount);
#pragma unroll
        for (int j = 0; j < W::kCount / 4; ++j) {
          const float4 v = values[j];
          acc[t] = fmaf(w[4 * j], v.x, acc[t]);
          acc[t] = fmaf(w[4 * j + 1], v.y, acc[t]);
          acc[t] = fmaf(w[4 * j + 2], v.z, acc[t]);
          acc[t] = fmaf(w[4 * j + 3], v.w, acc[t]);
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTok; ++t) acc[t] = warp_sum(acc[t]);
}

// One warp: the choice of one token, from scores that other blocks wrote.
__device__ __forceinline__ void select(const float* scores, const float* __restrict__ bias, int token, int lane,
                                       float route_scale, int* __restrict__ ids, float* __restrict__ weights) {
  float score[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = lane + 32 * j;
    score[j] = e < N_EXPERTS ? __ldcg(scores + token * N_EXPERTS + e) : 0.f;
  }
  choose(score, bias, lane, route_scale, ids + token * TOP_K, weights + token * TOP_K);
}

template <class T>
__device__ __forceinline__ void route_learned(const float* __restrict__ x, const T* __restrict__ gate,
                                              const float* __restrict__ bias, float* scores, unsigned* counter,
                                              int* __restrict__ ids, float* __restrict__ weights, float route_scale) {
  __shared__ float part[kRowsPerBlock * kWarpsPerRow][N_TOK];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int e = blockIdx.x * kRowsPerBlock + warp / kWarpsPerRow;
  float acc[N_TOK] = {};
  if (e < N_EXPERTS) half_row<T, N_TOK>(gate + static_cast<size_t>(e) * HIDDEN, x, warp % kWarpsPerRow, lane, acc);
#pragma unroll
  for (int t = 0; t < N_TOK; ++t) {
    if (lane == 0) part[warp][t] = acc[t];
  }
  __syncthreads();
  if (threadIdx.x < kRowsPerBlock * N_TOK) {
    const int r = threadIdx.x / N_TOK, t = threadIdx.x % N_TOK, row = blockIdx.x * kRowsPerBlock + r;
    const float logit = __fadd_rn(part[2 * r][t], part[2 * r + 1][t]);
    if (row < N_EXPERTS) scores[t * N_EXPERTS + row] = expert_score(logit);
  }
  if (!last_block(counter, gridDim.x)) return;
  for (int token = warp; token < N_TOK; token += blockDim.x / 32) {
    select(scores, bias, token, lane, route_scale, ids, weights);
  }
}

template <class T>
__device__ __forceinline__ void route_hashed(const float* __restrict__ x, const T* __restrict__ gate,
                                             const int* __restrict__ tid2eid, const int* __restrict__ tokens,
                                             float* scores, unsigned* counters, int* __restrict__ ids,
                                             float* __restrict__ weights, float route_scale) {
  __shared__ float part[kWarpsPerRow];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x, token = blockIdx.y;
  const int* chosen = tid2eid + static_cast<size_t>(tokens[token]) * TOP_K;
  float acc[1];
  half_row<T, 1>(gate + static_cast<size_t>(chosen[rank]) * HIDDEN, x + token * HIDDEN, warp, lane, acc);
  if (lane == 0) part[warp] = acc[0];
  __syncthreads();
  if (threadIdx.x == 0) scores[token * N_EXPERTS + rank] = expert_score(__fadd_rn(part[0], part[1]));
  if (!last_block(counters + token, TOP_K) || warp != 0) return;
  const int id = lane < TOP_K ? chosen[lane] : 0;
  const float score = lane < TOP_K ? __ldcg(scores + token * N_EXPERTS + lane) : 0.f;
  write_choice(lane, id, score, route_scale, ids + token * TOP_K, weights + token * TOP_K);
}

// x f32 [N_TOK, HIDDEN], gate [N_EXPERTS, HIDDEN], bias f32 [N_EXPERTS] or null; workspaces scores f32 [N_TOK, N_EXPERTS]
// and counter u32 [8], zero before the first launch; ids i32 [N_TOK, TOP_K] and weights f32 [N_TOK, TOP_K] OUT.
extern "C" __global__ void __launch_bounds__(128) route_f32(const float* x, const float* gate, const float* bias, float* scores, unsigned* counter, int* ids, float* weights, float route_scale) {
  route_learned(x, gate, bias, scores, counter, ids, weights, route_scale);
}
extern "C" __global__ void __launch_bounds__(128) route_f16(const float* x, const __half* gate, const float* bias, float* scores, unsigned* counter, int* ids, float* weights, float route_scale) {
  route_learned(x, gate, bias, scores, counter, ids, weights, route_scale);
}
extern "C" __global__ void __launch_bounds__(128) route_bf16(const float* x, const __nv_bfloat16* gate, const float* bias, float* scores, unsigned* counter, int* ids, float* weights, float route_scale) {
  route_learned(x, gate, bias, scores, counter, ids, weights, route_scale);
}

// The same, with tid2eid i32 [vocab, TOP_K] and tokens i32 [N_TOK] instead of the bias; counters as above, one a token.
extern "C" __global__ void __launch_bounds__(64) route_hash_f32(const float* x, const float* gate, const int* tid2eid, const int* tokens, float* scores, unsigned* counter, int* ids, float* weights, float route_scale) {
  route_hashed(x, gate, tid2eid, tokens, scores, counter, ids, weights, route_scale);
}
extern "C" __global__ void __launch_bounds__(64) route_hash_f16(const float* x, const __half* gate, const int* tid2eid, const int* tokens, float* scores, unsigned* counter, int* ids, float* weights, float route_scale) {
  route_hashed(x, gate, tid2eid, tokens, scores, counter, ids, weights, route_scale);
}
extern "C" __global__ void __launch_bounds__(64) route_hash_bf16(const float* x, const __nv_bfloat16* gate, const int* tid2eid, const int* tokens, float* scores, unsigned* counter, int* ids, float* weights, float route_scale) {
  route_hashed(x, gate, tid2eid, tokens, scores, counter, ids, weights, route_scale);
}
