// Which (token, rank) pairs a block of the expert layer serves. A block stands for one pair; tokens that chose the same
// expert are served together, by the block of the first of them, so that its weights are read from memory once.
#pragma once

#include "expert_rows.cuh"

constexpr int kSlots = TOP_K + 1;  // of a token: its routed experts by rank, then the shared one

// Results go to token * kSlots + slot. member i32 [N_TOK], in shared memory, gets those of all tokens with the expert of
// `pair` (token * TOP_K + rank), by rising token; returns their number, or 0 where the block of an earlier token serves
// them. A token that has an expert several times counts once for each: its n-th goes with the n-th of other tokens.
// Every thread calls it; member can be read after a barrier.
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
  if (threadIdx.x < 32 && rank >= 0) member[__popc(tokens & ((1u << lane) - 1u))] = lane * kSlots + rank;
  return __popc(tokens);
}

// All tokens, in the slot of the shared expert.
__device__ __forceinline__ int all_tokens(int* member) {
  if (threadIdx.x < N_TOK) member[threadIdx.x] = static_cast<int>(threadIdx.x) * kSlots + TOP_K;
  return N_TOK;
}

// Calls step.run<n>(first, count) for members first .. first + count - 1 of `total`, count at most n, until all are served:
// n is 1, 2 or kMost; kMost only where kAll says that `total` is N_TOK in every launch. A token's sums do not depend on n.
// A pass decodes a weight once for its members; further passes read the weights again, from L2. Passes of 8 spill, and
// would save little: reading the activations of 8 from shared memory takes as long as decoding twice, by count.
template <int kMost, bool kAll, class Step>
__device__ __forceinline__ void in_groups(int total, const Step& step) {
  constexpr int kLargest = N_TOK < kMost ? N_TOK : kMost;
#pragma unroll 1
  for (int first = 0; first < total; first += kLargest) {
    const int count = min(total - first, kLargest);
    if (!kAll && kLargest > 1 && count == 1) {
      if constexpr (!kAll) step.template run<1>(first, count);
    } else if (!kAll && kLargest > 2 && count == 2) {
      if constexpr (!kAll && kLargest > 2) step.template run<2>(first, count);
    } else {
      step.template run<kLargest>(first, count);
    }
  }
}

// Ask for this block's rows of the shared expert: it is the only one that is known before the router has run.
template <int kRows, class W>
__device__ __forceinline__ void prefetch_rows(const W& matrix, int first) {
  const unsigned char* begin = matrix.codes(first);
  for (int i = static_cast<int>(threadIdx.x) * 128; i < kRows * W::kCodeBytes; i += kWarps * 32 * 128) prefetch_l2(begin + i);
}

// Blocks of a multiprocessor, for __launch_bounds__: what the format with the fewest allows.
template <class First, class... Others>
__device__ constexpr int resident_blocks() {
  const int here = N_TOK > 2 ? First::kManyTokens : First::kFewTokens;
  if constexpr (sizeof...(Others) == 0) {
    return here;
  } else {
    return here < resident_blocks<Others...>() ? here : resident_blocks<Others...>();
  }
}
// Entries of the table of IQ2_XXS (iq2_weights.cuh) that kernels of these matrices need: all or none.
template <class... Matrices>
__device__ constexpr int pattern_entries() {
  return (... || Matrices::kPatterns) ? 256 : 0;
}
// That table, u64 [kEntries], to shared memory; it can be read after a barrier.
template <int kEntries>
__device__ __forceinline__ void load_patterns(const unsigned long long* table, uint2* patterns) {
  for (int i = threadIdx.x; i < kEntries; i += kWarps * 32) {
    const unsigned long long entry = table[i];
    patterns[i] = make_uint2(static_cast<unsigned>(entry), static_cast<unsigned>(entry >> 32));
  }
}
