// route_select: the router's choice for a chunk of up to n_rows tokens, from logits that a matrix product made (spec
// model.md 2.7).
//
//   score[e] = sqrt(softplus(logits[e])); route_select: ids and weights as choice.cuh chooses them
//   route_select_hash: ids = tid2eid[token], weights of their scores, the others are not read
//
// Grid (ceil(n_rows / 8)), block 256: a warp a token, each on its own; those of tokens from `count` on leave at once.
// `tid2eid` is checked when the checkpoint is opened, so ids need no check here.
//
// Order: choice.cuh, as in the decode form: equal logits give equal bits. A token sees neither the others nor the grid.
// Bytes: 4 N_EXPERTS a token and 8 TOP_K; 4.4 MB for 4096 tokens of 256 experts, from L2 where the product left them.
// Of each token's TOP_K rounds some 100 instructions a lane: estimate, not measured, 5 us on H200 for 4096 tokens.
#include "choice.cuh"
#include "live_rows.cuh"
#include "ptx.cuh"

constexpr int kWarps = 8;

__device__ __forceinline__ int token_of_warp() { return blockIdx.x * kWarps + threadIdx.x / 32; }

// logits f32 [n_rows, N_EXPERTS], bias f32 [N_EXPERTS] or null, count i32 [1] or null; ids i32 [n_rows, TOP_K] and
// weights f32 [n_rows, TOP_K] OUT, of which rows from count on are not written.
extern "C" __global__ void __launch_bounds__(256) route_select(const float* logits, const float* bias, const int* count, int* ids, float* weights, float route_scale, int n_rows) {
  pdl_launch();
  const int token = token_of_warp(), lane = threadIdx.x % 32;
  pdl_wait();
  if (token >= live_rows(count, n_rows)) return;
  const float* row = logits + static_cast<size_t>(token) * N_EXPERTS;
  float score[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = lane + 32 * j;
    score[j] = e < N_EXPERTS ? expert_score(row[e]) : 0.f;
  }
  const size_t first = static_cast<size_t>(token) * TOP_K;
  choose(score, bias, lane, route_scale, ids + first, weights + first);
}

// The same, with tid2eid i32 [vocab, TOP_K] and tokens i32 [n_rows] instead of the bias.
extern "C" __global__ void __launch_bounds__(256) route_select_hash(const float* logits, const int* tid2eid, const int* tokens, const int* count, int* ids, float* weights, float route_scale, int n_rows) {
  pdl_launch();
  const int token = token_of_warp(), lane = threadIdx.x % 32;
  pdl_wait();
  if (token >= live_rows(count, n_rows)) return;
  int id = 0;
  float score = 0.f;
  if (lane < TOP_K) {
    id = tid2eid[static_cast<size_t>(tokens[token]) * TOP_K + lane];
    score = expert_score(logits[static_cast<size_t>(token) * N_EXPERTS + id]);
  }
  const size_t first = static_cast<size_t>(token) * TOP_K;
  write_choice(lane, id, score, route_scale, ids + first, weights + first);
}
