// Which (token, rank) pairs a block of the expert layer serves. A block stands for one pair; tokens that chose the same
// expert are served together, by the block of the first of them, so that its weights are read from memory once.
#pragma once

#include "expert_tiles.cuh"

constexpr int kSlots = TOP_K + 1;  // of a token: its routed experts by rank, then the shared one

// Results go to token * kSlots + slot. member i32 [N_TOK + 1], in shared memory, gets those of all tokens with the
// expert of `pair` (token * TOP_K + rank), by rising token, and at its end the expert; returns their number, or 0 where
// the block of an earlier token serves them. A token that has an expert several times counts once for each: its n-th
// goes with the n-th of other tokens. Every thread calls it; member can be read after a barrier.
__device__ __forceinline__ int find_members(const int* ids, int pair, int* member) {
  const int lane = threadIdx.x % 32, token = pair / TOP_K, expert = ids[pair];
  int earlier = 0;  // ranks of this token with the same expert
#pragma unroll 8
  for (int i = 0; i < TOP_K; ++i) earlier += ids[token * TOP_K + i] == expert && i < pair % TOP_K;
  int rank = -1, seen = 0;  // of token `lane`
#pragma unroll 8
  for (int i = 0; i < TOP_K; ++i) {
    const bool same = lane < N_TOK && ids[lane * TOP_K + i] == expert;
    if (same && seen == earlier) rank = i;
    seen += same;
  }
  const unsigned tokens = __ballot_sync(kAllLanes, rank >= 0);
  if (tokens & ((1u << token) - 1u)) return 0;
  if (threadIdx.x == 0) member[N_TOK] = expert;
  if (threadIdx.x < 32 && rank >= 0) member[__popc(tokens & ((1u << lane) - 1u))] = lane * kSlots + rank;
  return __popc(tokens);
}

// All tokens, in the slot of the shared expert.
__device__ __forceinline__ int all_tokens(int* member) {
  if (threadIdx.x < N_TOK) member[threadIdx.x] = static_cast<int>(threadIdx.x) * kSlots + TOP_K;
  return N_TOK;
}

// The multiplier of a matrix: its own, or where there are any that of the block's expert. Read where it is needed, so
// that it takes no register before.
struct Multiplier {
  float value;
  const float* of_expert;
  const int* member;

  __device__ __forceinline__ float get() const { return of_expert ? of_expert[member[N_TOK]] : value; }
};

// step.run<n>() with the n of the code that serves `count` members: N_TOK, 2 or 5, where that many do, else 8. What a
// member gets does not depend on n.
template <class Step>
__device__ __forceinline__ void for_count(int count, const Step& step) {
  if constexpr (N_TOK <= 2) {
    step.template run<N_TOK>();
  } else if (count <= tokens_of_tiles(1)) {
    step.template run<tokens_of_tiles(1)>();
  } else if (N_TOK <= tokens_of_tiles(2) || count <= tokens_of_tiles(2)) {
    step.template run<tokens_of_tiles(2)>();
  } else {
    if constexpr (N_TOK > tokens_of_tiles(2)) step.template run<tokens_of_tiles(3)>();
  }
}

// Ask for rows first .. first + n_rows - 1 of the shared expert: it is the only one known before the router has run.
template <class Matrix>
__device__ __forceinline__ void prefetch_rows(const Matrix& matrix, int first, int n_rows) {
  const unsigned char* begin = matrix.codes(first);
  for (int i = static_cast<int>(threadIdx.x) * 128; i < n_rows * Matrix::kCodeBytes; i += kThreads * 128)
    prefetch_l2(begin + i);
}
