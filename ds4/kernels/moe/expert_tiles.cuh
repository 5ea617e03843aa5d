// A block's rows of one expert's matrices times the activations of the tokens that chose it: mma_rows.cuh for moe_up.cu
// and moe_down.cu, whose order of additions it keeps.
//
// A block's warps are kSlices slices of K times kSide row tiles beside each other; it does that kPasses times.
// Activations are staged once, or where the columns of many tokens do not fit at a time, as often as needed. Twice the
// warps, for more than 2 tokens, let what is staged serve twice the rows. All this but kSlices says only which warp
// does what, when.
//
// Estimates in thread-instructions, of which a multiprocessor of an H200 has some 7 for each byte of weights, for one
// token: staging 5.5 an activation, which are 7 % of what a block does with NVFP4 weights.
#pragma once

#include "matrix.cuh"

#if !defined(N_TOK)
#error "N_TOK must be defined"
#endif
constexpr int kWarps = N_TOK > 2 ? 16 : 8, kThreads = 32 * kWarps;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr bool kUnrolls = false;
#else
constexpr bool kUnrolls = true;
#endif
constexpr int kResident = 16 / kWarps;  // blocks of a multiprocessor, for __launch_bounds__

// Of rows of kCols and up to kTokOf tokens.
template <int kColsOf, int kTokOf>
struct TilePlan {
  static constexpr int kCols = kColsOf, kTok = kTokOf, kTiles = column_tiles(kTok);
  static constexpr int kSlices = slices_of(kCols), kRound = kSlices * kChunkCols;  // columns of a step of all slices
  static constexpr int kSteps = (kCols + kRound - 1) / kRound;
  static constexpr bool kWhole = kCols % kRound == 0;  // every slice has a chunk in every step
  static constexpr int kSide = kWarps / kSlices, kBlockTiles = kSide < 2 ? 2 : kSide;

  static constexpr int kMost = 52 * 1024 / staged_bytes(kRound, kTok) * kRound;  // columns that are staged at a time
  static constexpr int kStage = kCols < kMost ? round_up(kCols, kRound) : kMost;
  static constexpr int kStages = (kCols + kStage - 1) / kStage, kStageSteps = kStage / kRound;
  static constexpr int kPasses = kBlockTiles / kSide;
  static constexpr int kFlight = kSteps % 2 == 0 && kTiles == 1 ? 2 : 1;  // chunks of a warp on their way
  static_assert(kMost > 0, "a step of all slices fits");

  // Sums at the end of a pass lie over what is staged where nobody needs that any more.
  static constexpr int kSumsBytes = 4 * kWarps * sums_of_warp(kTok), kStagedBytes = staged_bytes(kStage, kTok);
  static constexpr int kSumsAt = kPasses > 1 ? kStagedBytes : 0;
  __device__ static constexpr int bytes(bool minima) {
    const int all = kStagedBytes + (kPasses > 1 ? kSumsBytes : 0);
    return (all < kSumsBytes ? kSumsBytes : all) + (minima ? summed_bytes(kStage, kTok) : 0);
  }
};

// Tokens of a launch are served by code for up to 2, 5 or 8 of them: so many have one, two or three column tiles.
__device__ constexpr int tokens_of_tiles(int tiles) { return tiles == 1 ? 2 : tiles == 2 ? 5 : 8; }
template <int kCols>
__device__ constexpr int plan_bytes(int n_tok, bool minima) {
  int most = n_tok == 1 ? TilePlan<kCols, 1>::bytes(minima) : TilePlan<kCols, 2>::bytes(minima);
  if (n_tok > 2 && most < TilePlan<kCols, 5>::bytes(minima)) most = TilePlan<kCols, 5>::bytes(minima);
  if (n_tok > 5 && most < TilePlan<kCols, 8>::bytes(minima)) most = TilePlan<kCols, 8>::bytes(minima);
  return most;
}

// Which rows of x f32 [.., kCols] are multiplied: row member[t] / kPerRow for t = 0 .. count - 1. `member` is shared
// memory.
template <int kPerRow>
struct Sources {
  const float* x;
  const int* member;
  int count;
};

// Row tiles 0 .. n_tiles - 1 of one expert, at most kBlockTiles. rows(tile): the lane's RowPair of a tile. finish(tile,
// sums), a barrier before it: tiles tile .. tile + kSide - 1 are done as far as there are, `sums` those of the first's
// slice 0 for sum_of_slices(), the others' kSlices sums_of_warp() further on each. memory: shared, on 16 bytes,
// Plan::bytes(). Every thread of the block calls it; kAllTiles: n_tiles is always kBlockTiles. Weights are asked for
// before it waits for the previous launch.
template <class Plan, bool kAllTiles, class Top, class Bottom, class Rows, int kPerRow, class Finish>
__device__ __forceinline__ void multiply_tiles(const Top& top, const Bottom& bottom, int n_tiles,
                                               const Rows& rows, const Sources<kPerRow>& from,
                                               unsigned char* memory, const Finish& finish) {
  constexpr int kFlight = Plan::kFlight, kSteps = Plan::kSteps, kSlices = Plan::kSlices;
  constexpr int kTiles = Plan::kTiles, kChunks = chunks_of(Plan::kCols);
  constexpr bool kMinima = Top::kMinima || Bottom::kMinima;
  // Unrolled, addresses are constants apart: 5 % fewer instructions, which sm_120 has to spare, and where it would
  // spill.
  constexpr int kUnrolled = kUnrolls && Plan::kStages == 1 && kSteps <= 4 ? kSteps / kFlight : 1;
  using Raw = typename RowPair<Top, Bottom>::Raw;
  unsigned short* const staged = reinterpret_cast<unsigned short*>(memory);
  float* const sums = reinterpret_cast<float*>(memory + Plan::kSumsAt);
  unsigned short* const summed = reinterpret_cast<unsigned short*>(memory + Plan::bytes(false));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = warp % kSlices, side = warp / kSlices;

  const auto is_there = [&](int pass, int chunk) {
    return (kAllTiles || pass * Plan::kSide + side < n_tiles) && (Plan::kWhole || chunk < kChunks);
  };
  const auto load = [&](int pass, int step, Raw& raw) {
    const int chunk = step * kSlices + slice;
    if (is_there(pass, chunk)) raw = rows(pass * Plan::kSide + side).load(chunk);
  };
  const auto stage = [&](int first) {
    __syncthreads();  // what was staged before is used up, and the members are known
    const int count = min(Plan::kStage, Plan::kCols - first);
    const auto row = [&](int t) {
      return from.x + static_cast<size_t>(from.member[t] / kPerRow) * Plan::kCols + first;
    };
    stage_columns<Plan::kStage, kThreads, kTiles == 1 ? 2 : 1>(staged, from.count, count, row);
    if constexpr (kMinima) stage_sums<Plan::kStage, kThreads>(summed, from.count, count, row);
    __syncthreads();
  };

  Raw raw[kFlight];
#pragma unroll
  for (int i = 0; i < kFlight; ++i) load(0, i, raw[i]);
  pdl_wait();
  if constexpr (Plan::kStages == 1) stage(0);
  const auto columns = Columns<kTiles>::template of<Plan::kStage>(staged, summed, kActParts * from.count, lane);
#pragma unroll 1
  for (int pass = 0; pass < Plan::kPasses; ++pass) {
    float acc[kTiles][4];
    set_zero(acc);
#pragma unroll kUnrolled
    for (int base = 0; base < kSteps; base += kFlight) {
      const bool last = base + kFlight >= kSteps;
#pragma unroll
      for (int i = 0; i < kFlight; ++i) {
        const int step = base + i, in_stage = step % Plan::kStageSteps, chunk = step * kSlices + slice;
        if constexpr (Plan::kStages > 1) {
          if (in_stage == 0) stage(step * Plan::kRound);
        }
        if (is_there(pass, chunk)) {
          multiply_chunk(top, raw[i].top, bottom, raw[i].bottom, columns, (in_stage * kSlices + slice) * kChunkCols,
                         blocks_in<Plan::kCols>(chunk), acc);
        }
        if (!last || pass + 1 < Plan::kPasses) load(last ? pass + 1 : pass, last ? i : step + kFlight, raw[i]);
      }
    }
    __syncthreads();  // what is staged, or the sums before these, are used up
    store_sums(acc, sums + warp * sums_of_warp(Plan::kTok), lane);
    __syncthreads();
    finish(pass * Plan::kSide, sums);
  }
}
