// Dense matrices times the activations of up to 8 tokens, by blocks that each take a run of units of rows: mma_rows.cuh for
// proj.cu and lm_head.cu.
//
// A block's 8 warps are kSlices slices of K times kSide row tiles beside each other; a warp has kDeep row tiles below each
// other, so that what a block stages, and what a lane reads of it, serves more rows where there are many tokens. Weights are
// loaded ahead of their use, beyond the end of a unit too: two steps of one-byte weights, or one where a step has two row
// tiles or two bytes a weight; so 4 KB a warp, and 8 KB of two row tiles of two-byte weights.
// All this but kSlices says only which warp and which register hold what, when.
#pragma once

#include "dense_tiles.cuh"

template <int kColsOf, int kTokOf>
struct RowsPlan {
  static constexpr int kCols = kColsOf, kTok = kTokOf;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kSlices = slices_of(kCols), kRound = kSlices * kChunkCols;  // columns of a step of all slices
  static constexpr int kSteps = (kCols + kRound - 1) / kRound;
  static constexpr int kTiles = column_tiles(kTok);

  // Columns that are staged at a time: two blocks of up to 2 tokens, or one of more, fit into 100 KB.
  static constexpr int kMost = (kTok > 2 ? 52 : 26) * 1024 / staged_bytes(kRound, kTok) * kRound;
  static constexpr int kStage = kCols < kMost ? round_up(kCols, kRound) : kMost;
  static constexpr int kStages = (kCols + kStage - 1) / kStage, kStageSteps = kStage / kRound;
  static_assert(kMost > 0, "a step of all slices fits");

  static constexpr int kSide = kWarps / kSlices, kDeep = kTok > 2 ? 2 : 1;
  static constexpr int kPhaseRows = kTileRows * kSide, kUnitRows = kPhaseRows * kDeep;
  static constexpr int kBlocks = kDeep > 1 ? 1 : 2;  // of a multiprocessor, for __launch_bounds__: as many as need no spills

  static constexpr int kStagedBytes = staged_bytes(kStage, kTok);
  static constexpr int kSums = kWarps * sums_of_warp(kTok);  // floats, twice
  static constexpr int kSharedBytes = kStagedBytes + 2 * 4 * kSums;
};

// Rows of a matrix in n_groups equal parts, each of which has its own x: x f32 [kTok][n_groups][kCols].
struct RowGroups {
  int rows, n_groups;  // of a group
};

template <class Plan>
__device__ constexpr int units_of(int rows, int n_groups) {
  return n_groups * ((rows + Plan::kUnitRows - 1) / Plan::kUnitRows);
}

template <class Plan>
class DenseRows {
 public:
  // memory: Plan::kSharedBytes of shared memory, on 16 bytes.
  __device__ __forceinline__ DenseRows(const float* x, unsigned char* memory)
      : x_(x),
        staged_(reinterpret_cast<unsigned short*>(memory)),
        sums_(reinterpret_cast<float*>(memory + Plan::kStagedBytes)),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32) {}

  // Units begin .. end - 1, at least one, of a matrix. emit(i, row, token, value) is called once for every row there is and
  // token, by thread (row, token) % kThreads; i counts a thread's calls of one phase and is a constant. Every thread of the
  // block calls it. Waits for the previous launch after the first weights are asked for.
  template <class Matrix, class Emit>
  __device__ __forceinline__ void run(const Matrix& matrix, RowGroups groups, int begin, int end, const Emit& emit);

 private:
  static constexpr int kDeep = Plan::kDeep, kTiles = Plan::kTiles, kSlices = Plan::kSlices, kSteps = Plan::kSteps;
  static constexpr bool kWhole = Plan::kCols % Plan::kRound == 0;  // every slice has a chunk in every step

  struct Unit {
    int group, first;  // row of the unit's first, within the group
  };
  __device__ __forceinline__ static Unit unit(RowGroups groups, int index) {
    if (groups.n_groups == 1) return {0, index * Plan::kUnitRows};
    const int of_group = units_of<Plan>(groups.rows, 1);
    return {index / of_group, index % of_group * Plan::kUnitRows};
  }
  __device__ __forceinline__ void stage(RowGroups groups, int group, int stage);

  const float* x_;
  unsigned short* staged_;
  float* sums_;
  int lane_, warp_;
  int staged_group_ = -1;  // whose x is staged as a whole
  int phase_ = 0;          // of the two buffers of sums, the next one
};

template <class Plan>
__device__ __forceinline__ void DenseRows<Plan>::stage(RowGroups groups, int group, int stage) {
  staged_group_ = group;
  pdl_wait();
  __syncthreads();  // what was staged before is used up
  const int first = stage * Plan::kStage;
  const int count = Plan::kCols % Plan::kStage == 0 ? Plan::kStage : min(Plan::kStage, Plan::kCols - first);
  const float* x = x_ + group * Plan::kCols + first;
  stage_columns<Plan::kStage, Plan::kThreads>(staged_, Plan::kTok, count, [&](int t) {
    return x + static_cast<size_t>(t) * groups.n_groups * Plan::kCols;
  });
  __syncthreads();
}

// A lane's way through the weights of its rows, unit after unit, ahead of their use: its first row, and how far the others
// lie from it, which takes fewer registers than pointers to all.
template <class Plan, class Matrix>
struct Ahead {
  static constexpr int kRows = 2 * Plan::kDeep;  // top and bottom of each row tile
  using Raw = typename RowPair<Matrix, Matrix>::Raw;
  At first;
  int codes[kRows], scales[kRows];
  int chunk;  // where rows are not whole steps

  // The unit whose row tiles of this warp begin at `row` of the n_rows at `begin`; from n_rows on the last row again.
  __device__ __forceinline__ void enter(const Matrix& matrix, int begin, int row, int n_rows, int slice, int lane) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int of_lane = min(row + i / 2 * Plan::kPhaseRows + i % 2 * 8 + lane / 4, n_rows - 1);
      const At at = matrix.at(static_cast<size_t>(begin + of_lane), slice);
      if (i == 0) first = at;
      codes[i] = static_cast<int>(at.codes - first.codes), scales[i] = static_cast<int>(at.scales - first.scales);
    }
    chunk = slice;
  }
  // The next step's weights.
  __device__ __forceinline__ void load(Raw (&raw)[Plan::kDeep]) {
    if (Plan::kCols % Plan::kRound == 0 || chunk < chunks_of(Plan::kCols)) {
#pragma unroll
      for (int d = 0; d < Plan::kDeep; ++d) raw[d] = {load_row(2 * d), load_row(2 * d + 1)};
    }
    first = Matrix::next(first, Plan::kSlices);
    chunk += Plan::kSlices;
  }
  __device__ __forceinline__ typename Matrix::Raw load_row(int i) const {
    return Matrix::load_at({first.codes + codes[i], first.scales + scales[i]}, blocks_in<Plan::kCols>(chunk));
  }
};

template <class Plan>
template <class Matrix, class Emit>
__device__ __forceinline__ void DenseRows<Plan>::run(const Matrix& matrix, RowGroups groups, int begin, int end,
                                                     const Emit& emit) {
  using Raw = typename RowPair<Matrix, Matrix>::Raw;
  constexpr int kFlight = kSteps % 2 == 0 && kDeep == 1 && sizeof(Raw) < 128 ? 2 : 1;  // steps
  const int slice = warp_ % kSlices;
  Raw raw[kFlight][kDeep];
  Ahead<Plan, Matrix> ahead;
  const auto enter = [&](const Unit& of) {
    ahead.enter(matrix, of.group * groups.rows, of.first + warp_ / kSlices * kTileRows, groups.rows, slice, lane_);
  };
  Unit here = unit(groups, begin);
  enter(here);
#pragma unroll
  for (int i = 0; i < kFlight; ++i) ahead.load(raw[i]);
  const Columns<kTiles> columns(staged_ + slice * kChunkCols, column_pitch(Plan::kStage), kActParts * Plan::kTok, lane_);
#pragma unroll 1
  for (int index = begin; index < end; ++index) {
    const Unit next = unit(groups, index + 1);
    float acc[kDeep][kTiles][4];
#pragma unroll
    for (int d = 0; d < kDeep; ++d) set_zero(acc[d]);
    if (Plan::kStages == 1 && here.group != staged_group_) stage(groups, here.group, 0);
#pragma unroll 1
    for (int base = 0; base < kSteps; base += kFlight) {
#pragma unroll
      for (int i = 0; i < kFlight; ++i) {
        const int step = base + i;
        if (Plan::kStages > 1 && step % Plan::kStageSteps == 0) stage(groups, here.group, step / Plan::kStageSteps);
        const int chunk = step * kSlices + slice;
        if (kWhole || chunk < chunks_of(Plan::kCols)) {
#pragma unroll
          for (int d = 0; d < kDeep; ++d) {
            const auto& of = raw[i % kFlight][d];
            multiply_chunk(matrix, of.top, matrix, of.bottom, columns, step % Plan::kStageSteps * Plan::kRound,
                           blocks_in<Plan::kCols>(chunk), acc[d]);
          }
        }
        if (step + kFlight == kSteps && index + 1 < end) enter(next);
        if (step + kFlight < kSteps || index + 1 < end) ahead.load(raw[i % kFlight]);
      }
    }
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      // The barrier between two uses of a buffer is that of the other one.
      float* const sums = sums_ + phase_ * Plan::kSums;
      phase_ ^= 1;
      store_sums(acc[d], sums + warp_ * sums_of_warp(Plan::kTok), lane_);
      __syncthreads();
      constexpr int kResults = Plan::kPhaseRows * Plan::kTok;
#pragma unroll
      for (int i = 0; i < (kResults + Plan::kThreads - 1) / Plan::kThreads; ++i) {
        const int result = threadIdx.x + i * Plan::kThreads;
        const int row = result % Plan::kPhaseRows, token = result / Plan::kPhaseRows;
        const int in_group = here.first + d * Plan::kPhaseRows + row;
        if (result < kResults && in_group < groups.rows) {
          const float* of_tile = sums + row / kTileRows * kSlices * sums_of_warp(Plan::kTok);
          const float value = sum_of_slices<kSlices, kTiles>(of_tile, row % kTileRows, token);
          emit(i, here.group * groups.rows + in_group, token, __fmul_rn(value, Matrix::kFactor));
        }
      }
    }
    here = next;
  }
}
