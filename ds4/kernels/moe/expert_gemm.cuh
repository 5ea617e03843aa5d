// What moe_gemm_up.cu and moe_gemm_down.cu share: a block's rows of one expert's matrices times a tile of the pairs that
// chose it, by gemm_tiles.cuh, whose order of additions it keeps, and the way of the results to memory.
#pragma once

#include "gemm_tiles.cuh"
#include "live_rows.cuh"
#include "matrix.cuh"

#if !defined(TOKENS) || !defined(STAGES) || !defined(SHARED_BYTES)
#error "TOKENS, STAGES and SHARED_BYTES must be defined"
#endif

// How a block multiplies rows of kCols of one matrix or of two. kHalved: two rows of the mma make one result.
// moe/prefill_plan.py has the same.
template <class Top, class Bottom, int kCols, bool kHalved>
struct ExpertGemm {
  // A table of patterns is worth its way to shared memory for eight warps.
  static constexpr bool kPatterned = kNeedsPatterns<Top> || kNeedsPatterns<Bottom>;
  static constexpr int kWarps = TOKENS >= 64 || kPatterned ? 8 : TOKENS >= 32 ? 4 : 2, kThreads = 32 * kWarps;
  // Two row tiles a warp where registers have the room: weights of one part and at most a byte.
  static constexpr bool kWide = Top::kParts > 1 || Bottom::kParts > 1 || Top::kCodeBytes > padded_row(kCols) ||
                                Bottom::kCodeBytes > padded_row(kCols);
  static constexpr int kDeep = TOKENS >= 128 && !kWide ? 2 : 1;
  // Blocks of a multiprocessor, for __launch_bounds__: as many as leave the registers that are wanted.
  static constexpr int kResident = TOKENS >= 128 || (kWide && TOKENS >= 64) ? 1 : kWarps == 8 ? 2 : kWarps == 4 ? 3 : 4;
  // As many chunks ahead as 80 registers hold, up to what there is time for.
  static constexpr int kFit = 320 / static_cast<int>(sizeof(typename RowPair<Top, Bottom>::Raw));
  static constexpr int kWanted = TOKENS >= 64 ? 1 : TOKENS >= 32 || kPatterned ? 2 : 4;
  static constexpr int kAhead = kFit < 1 ? 1 : kFit < kWanted ? kFit : kWanted;
  using Plan = GemmPlan<kCols, TOKENS, STAGES, kWarps, kDeep, kAhead>;

  static constexpr int kResults = Plan::kRows / (kHalved ? 2 : 1);  // rows of a pair's results
  static constexpr int kMemoryAt = kPatterned ? kPatternBytes : 0;
  static constexpr int kMultiplied = kMemoryAt + Plan::bytes(Top::kMinima || Bottom::kMinima);
  static constexpr int kStored = 2 * TOKENS * (kResults + 8);
  static_assert(SHARED_BYTES == (kMultiplied > kStored ? kMultiplied : kStored), "as moe/prefill_plan.py has it");
  static_assert(kThreads >= TOKENS, "a thread a pair");
};

// A block's pairs, in shared memory: where the results go, token * (top_k + 1) + slot; the tokens, the routing weights.
struct Members {
  int slot[TOKENS], token[TOKENS];
  float weight[TOKENS];
};
// The matrix of a block and how many pairs it has, 0 where there is no work.
struct Work {
  int expert, count;
};

// Tile blockIdx.y of `tiles`, or where `order` is null of the tokens, for the shared expert, whose weight is 1. weights: of
// pairs, or null where nobody reads them. Every thread calls it, after pdl_wait; members can be read after a barrier.
__device__ __forceinline__ Work find_work(const int* order, const int* tiles, const int* n_tiles, const int* count,
                                          const float* weights, int n_rows, int top_k, Members& members) {
  const int i = threadIdx.x, tile = blockIdx.y;
  if (order == nullptr) {
    const int first = tile * TOKENS, live = live_rows(count, n_rows);
    if (i < TOKENS) {
      members.token[i] = first + i;
      members.slot[i] = (first + i) * (top_k + 1) + top_k;
      members.weight[i] = 1.f;
    }
    return {0, min(TOKENS, live - first)};
  }
  const int4 entry = reinterpret_cast<const int4*>(tiles)[tile];
  if (tile >= *n_tiles) return {0, 0};
  if (i < entry.z) {
    const int pair = order[entry.y + i], token = pair / top_k;
    members.token[i] = token;
    members.slot[i] = pair + token;
    members.weight[i] = weights ? weights[pair] : 1.f;
  }
  return {entry.x, entry.z};
}

// The multiplier of a matrix: its own, or where there are any that of the expert.
__device__ __forceinline__ float multiplier(float value, const float* of_expert, int expert) {
  return of_expert ? of_expert[expert] : value;
}

// Results of a block, kRows of each pair, on their way: bf16 [TOKENS][kPitch] in shared memory. Pairs of four lanes, two of
// them apart, lie in different banks.
template <int kRows>
struct Results {
  static constexpr int kPitch = kRows + 8;
  unsigned short* at;

  __device__ __forceinline__ void put(int pair, int row, float value) const {
    at[pair * kPitch + row] = static_cast<unsigned short>(f32_to_bf16(value));
  }
  // To `out` bf16 [.., n_rows]: row `row` of pair i to out[slot[i]][first + row]; first and n_rows are multiples of 8. A
  // barrier before it.
  __device__ __forceinline__ void store(const Members& members, int count, int first, int n_rows, __nv_bfloat16* out) const {
    constexpr int kUnits = kRows / 8;
    for (int i = threadIdx.x; i < count * kUnits; i += blockDim.x) {
      const int pair = i / kUnits, row = i % kUnits * 8;
      if (first + row >= n_rows) continue;
      __nv_bfloat16* to = out + static_cast<size_t>(members.slot[pair]) * n_rows + first + row;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(at + pair * kPitch + row);
    }
  }
};
