// Rows of weight matrices times the activations of up to 8 tokens on the tensor cores: a weight is decoded once, to BF16,
// for all tokens.
//
//   acc[row][column] = sum over k of W[row][k] * x[column][k],   W exact, x exact, sums in FP32
//
// The weights are the left side of mma.m16n8k16, 16 rows a warp. An activation is the exact sum of three BF16 numbers, cut
// off one after the other, and token t has the columns 3t (the largest), 3t + 1 and 3t + 2; 8 columns are a column tile.
//
// K is cut into blocks of 32 and chunks of 128; the last chunk of a row may have fewer blocks. Lane (g, t) = (lane / 4,
// lane % 4) holds of block b the weights k = 32 b + 8 t .. + 7 of two rows: "top", row g of the mma, and "bottom", row
// g + 8. They are four words of two, w[0] the lowest k; w[0], w[1] make one mma and w[2], w[3] the next, whose columns are
// the activations of the same k: 16 neighbouring bytes of a staged column for both.
//
// A format is a struct, of kCols weights a row, that the tops and the bottoms of a warp may differ in:
//   Raw                     what a lane loads of one row for one chunk
//   kParts                  BF16 numbers that a weight is the sum of: 1, 2 for F16, 3 for F32
//   kScaleBlocks            4: one factor a chunk; 1: one a block
//   kMinima                 whether weights are scale * code - minimum
//   kFactor                 a power of two that results are multiplied by at the end, so that products stay in range
//   kCodeBytes              of a row of the largest plane, for prefetching; codes(row) is where it begins
//   load(row, chunk)        Raw of a row, the lane's own
//   fragment(raw, b, w)     the words of block b of the chunk: part p in w[p]. Without the scale
//   scale(raw, b)           factor of the sum of block b, or of the whole chunk; the same in the four lanes of a row
//   minima(raw)             of kMinima: the integer minima of the halves, 16 weights each, of block t of the chunk
//   minimum_scale(raw)      and its factor in this chunk
// All but the first are of this lane. What a block of a partial chunk that is not there has in Raw, nobody looks at.
//
// Order: the codes' products of a block (kScaleBlocks 1) or of a chunk are summed from zero by the mma, by rising k and, of
// a k, by falling part; then acc = fmaf(scale, sum, acc), and after a chunk acc = fmaf(-minimum_scale, its sum of m x, acc),
// in which the x of a half block are summed first.
// Chunk c belongs to slice c % kSlices, which a warp takes by rising c; slices are added by rising number, and last the
// columns of a token, (3t + 2) + (3t + 1) + 3t. An mma's column does not depend on what the others hold: a token's result
// depends on the formats, kCols and kSlices, not on the other tokens.
//
// Limits: activations, and weights of F32, below 2^-110 are cut at 2^-133, BF16's last place. A NaN makes NaN and an infinity
// an infinity, as in FP32, but for infinite weights of F32 or F16, and infinite activations times F32, F16 or a format with
// minima: those may make NaN.
#pragma once

#include <math_constants.h>

#include "ptx.cuh"
#include "tile.cuh"

constexpr int kBlockCols = 32;
constexpr int kChunkBlocks = 4;
constexpr int kChunkCols = kBlockCols * kChunkBlocks;
constexpr int kTileRows = 16;  // of a warp
constexpr int kActParts = 3;   // columns of a token

__device__ constexpr int chunks_of(int cols) { return (cols + kChunkCols - 1) / kChunkCols; }
// Slices of K. Part of the order of additions: a constant of kCols.
__device__ constexpr int slices_of(int cols) { return cols >= 4096 ? 8 : cols >= 1024 ? 4 : cols >= 256 ? 2 : 1; }
// Blocks of the chunk of a row of kCols; constant where rows are whole chunks.
template <int kCols>
__device__ __forceinline__ constexpr int blocks_in(int chunk) {
  static_assert(kCols % kBlockCols == 0, "rows are whole blocks");
  if constexpr (kCols % kChunkCols == 0) {
    return kChunkBlocks;
  } else {
    return chunk < kCols / kChunkCols ? kChunkBlocks : kCols % kChunkCols / kBlockCols;
  }
}

// ---------------------------------------------------------------- activations

__device__ constexpr int column_tiles(int n_tok) { return (kActParts * n_tok + 7) / 8; }
// BF16 numbers from a staged column to the next: 64 bytes more than a multiple of 128, so that the 16 bytes that eight lanes
// read at a time, four neighbours in each of two columns, lie in different banks.
__device__ constexpr int column_pitch(int cols) { return round_up(cols, 64) + 32; }
__device__ constexpr int staged_bytes(int cols, int n_tok) { return 2 * kActParts * n_tok * column_pitch(cols); }

// `count` columns of x, a multiple of 8 and at most kCols, of n_tok tokens to shared memory: staged bf16
// [3 n_tok][column_pitch(kCols)], on 16 bytes. row(t): the first of the `count` floats of token t, on 16 bytes. All kThreads of
// the block call it; a barrier before it where `staged` is in use, and one after it, are the caller's. kAhead units of 8 columns
// are on their way to a thread at a time.
template <int kCols, int kThreads, unsigned kAhead = 2, class Row>
__device__ __forceinline__ void stage_columns(unsigned short* staged, int n_tok, int count, const Row& row) {
  constexpr unsigned kUnits = kCols / 8, kPitch = column_pitch(kCols);
  const unsigned all = n_tok * kUnits;
  const bool full = count == kCols && all % (kAhead * kThreads) == 0;  // in dense_rows.cuh a constant
#pragma unroll 1
  for (unsigned base = 0; base < all; base += kAhead * kThreads) {
    float4 v[kAhead][2];
#pragma unroll
    for (unsigned j = 0; j < kAhead; ++j) {
      const unsigned i = base + j * kThreads + threadIdx.x, column = i % kUnits * 8;
      if (!full && (i >= all || column >= count)) continue;
      const float4* from = reinterpret_cast<const float4*>(row(static_cast<int>(i / kUnits)) + column);
      v[j][0] = from[0], v[j][1] = from[1];
    }
#pragma unroll
    for (unsigned j = 0; j < kAhead; ++j) {
      const unsigned i = base + j * kThreads + threadIdx.x, column = i % kUnits * 8;
      if (!full && (i >= all || column >= count)) continue;
      unsigned words[4][kActParts];
      split_to_bf16x2(v[j][0].x, v[j][0].y, words[0]);
      split_to_bf16x2(v[j][0].z, v[j][0].w, words[1]);
      split_to_bf16x2(v[j][1].x, v[j][1].y, words[2]);
      split_to_bf16x2(v[j][1].z, v[j][1].w, words[3]);
#pragma unroll
      for (int p = 0; p < kActParts; ++p) {
        *reinterpret_cast<uint4*>(staged + (i / kUnits * kActParts + p) * kPitch + column) =
            make_uint4(words[0][p], words[1][p], words[2][p], words[3][p]);
      }
    }
  }
}

// For formats with minima: the sums of 16 columns each, as columns of their own, bf16 [3 n_tok][sum_pitch(kCols)], on 4 bytes.
// Eight lanes' four neighbouring words lie in different banks.
__device__ constexpr int sum_pitch(int cols) { return round_up(cols / 16, 64) + 8; }
__device__ constexpr int summed_bytes(int cols, int n_tok) { return 2 * kActParts * n_tok * sum_pitch(cols); }

// As stage_columns; count is a multiple of 16.
template <int kCols, int kThreads, class Row>
__device__ __forceinline__ void stage_sums(unsigned short* summed, int n_tok, int count, const Row& row) {
  constexpr int kUnits = kCols / 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < n_tok * kUnits; i += kThreads) {
    const int t = i / kUnits, unit = i % kUnits;
    if (16 * unit >= count) continue;
    const float4* from = reinterpret_cast<const float4*>(row(t) + 16 * unit);
    float4 sum = from[0];
#pragma unroll
    for (int j = 1; j < 4; ++j) {
      const float4 v = from[j];
      sum = make_float4(__fadd_rn(sum.x, v.x), __fadd_rn(sum.y, v.y), __fadd_rn(sum.z, v.z), __fadd_rn(sum.w, v.w));
    }
    unsigned parts[kActParts];
    split_to_bf16x2(__fadd_rn(__fadd_rn(sum.x, sum.y), __fadd_rn(sum.z, sum.w)), 0.f, parts);
#pragma unroll
    for (int p = 0; p < kActParts; ++p)
      summed[(kActParts * t + p) * sum_pitch(kCols) + unit] = static_cast<unsigned short>(parts[p]);
  }
}

// What a lane reads of staged columns: its column in each of kTiles column tiles. From n_columns on the last one again, whose
// sums nobody uses; only the last tile has such, so that the others are a constant apart.
template <int kTiles>
struct Columns {
  const unsigned short *at[kTiles], *sums[kTiles];

  // kCols as in stage_columns and stage_sums; `summed` is not read where no format has minima.
  template <int kCols>
  __device__ __forceinline__ static Columns of(const unsigned short* staged, const unsigned short* summed, int n_columns,
                                               int lane) {
    Columns columns(staged, column_pitch(kCols), n_columns, lane);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      columns.sums[i] = summed + column_of(i, n_columns, lane) * sum_pitch(kCols) + lane % 4 * 2;
    return columns;
  }
  __device__ __forceinline__ Columns(const unsigned short* staged, int pitch, int n_columns, int lane) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) at[i] = staged + column_of(i, n_columns, lane) * pitch + lane % 4 * 8;
  }
  __device__ __forceinline__ static int column_of(int i, int n_columns, int lane) {
    const int column = 8 * i + lane / 4;
    return i + 1 < kTiles ? column : min(column, n_columns - 1);
  }
  // This lane's two sums in the chunk that begins at `column`.
  __device__ __forceinline__ unsigned sums_of_chunk(int i, int column) const {
    return *reinterpret_cast<const unsigned*>(sums[i] + column / 16);
  }
  // This lane's activations of the block that begins at `column`.
  __device__ __forceinline__ uint4 block(int i, int column) const {
    return *reinterpret_cast<const uint4*>(at[i] + column);
  }
};

// ---------------------------------------------------------------- products

template <int kTiles>
__device__ __forceinline__ void set_zero(float (&acc)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) acc[i / 4][i % 4] = 0.f;
}
// acc += a factor for each of the lane's two rows times sum, of one column tile.
__device__ __forceinline__ void add_scaled(float top, float bottom, const float (&sum)[4], float (&acc)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) acc[j] = fmaf(j < 2 ? top : bottom, sum[j], acc[j]);
}

// One chunk of 16 rows: n_blocks of it, whose activations are staged from `column` on. acc as an mma leaves it (ptx.cuh):
// columns 2t, 2t + 1 of row g in [0], [1], of row g + 8 in [2], [3].
template <int kTiles, class Top, class Bottom>
__device__ __forceinline__ void multiply_chunk(const Top& top, const typename Top::Raw& top_raw, const Bottom& bottom,
                                               const typename Bottom::Raw& bottom_raw, const Columns<kTiles>& x,
                                               int column, int n_blocks, float (&acc)[kTiles][4]) {
  constexpr int kParts = Top::kParts > Bottom::kParts ? Top::kParts : Bottom::kParts;
  constexpr bool kByBlock = Top::kScaleBlocks == 1 || Bottom::kScaleBlocks == 1;
  float sum[kTiles][4];
  set_zero(sum);
#pragma unroll
  for (int b = 0; b < kChunkBlocks; ++b) {
    if (b >= n_blocks) break;
    unsigned w[Top::kParts][4], v[Bottom::kParts][4];
    top.fragment(top_raw, b, w);
    bottom.fragment(bottom_raw, b, v);
    const float scale[2] = {kByBlock ? top.scale(top_raw, b) : 0.f, kByBlock ? bottom.scale(bottom_raw, b) : 0.f};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4 act = x.block(i, column + kBlockCols * b);
      const unsigned first[2] = {act.x, act.y}, second[2] = {act.z, act.w};
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        unsigned a[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[2 * j] = p < Top::kParts ? w[p < Top::kParts ? p : 0][j] : 0u;
          a[2 * j + 1] = p < Bottom::kParts ? v[p < Bottom::kParts ? p : 0][j] : 0u;
        }
        mma_m16n8k16_bf16(sum[i], {a[0], a[1], a[2], a[3]}, first);
        mma_m16n8k16_bf16(sum[i], {a[4], a[5], a[6], a[7]}, second);
      }
      if constexpr (kByBlock) {
        add_scaled(scale[0], scale[1], sum[i], acc[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = 0.f;
      }
    }
  }
  if constexpr (!kByBlock) {
    const float scale[2] = {top.scale(top_raw, 0), bottom.scale(bottom_raw, 0)};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) add_scaled(scale[0], scale[1], sum[i], acc[i]);
  }
  if constexpr (Top::kMinima || Bottom::kMinima) {
    unsigned low[2] = {0u, 0u};
    float factor[2] = {0.f, 0.f};
    if constexpr (Top::kMinima) low[0] = top.minima(top_raw), factor[0] = -top.minimum_scale(top_raw);
    if constexpr (Bottom::kMinima) low[1] = bottom.minima(bottom_raw), factor[1] = -bottom.minimum_scale(bottom_raw);
    set_zero(sum);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      mma_m16n8k16_bf16(sum[i], {low[0], low[1], 0u, 0u}, {x.sums_of_chunk(i, column), 0u});
      add_scaled(factor[0], factor[1], sum[i], acc[i]);
    }
  }
}

// A lane's two rows: of one matrix, or of two.
template <class Top, class Bottom>
struct RowPair {
  struct Raw {
    typename Top::Raw top;
    typename Bottom::Raw bottom;
  };
  const Top& top;
  const Bottom& bottom;
  size_t top_row, bottom_row;

  __device__ __forceinline__ Raw load(int chunk) const { return {top.load(top_row, chunk), bottom.load(bottom_row, chunk)}; }
};
// Rows first .. first + 15 of the n_rows that begin at row `begin` of one matrix; from n_rows on the last one again.
template <class Matrix>
__device__ __forceinline__ RowPair<Matrix, Matrix> tile_rows(const Matrix& matrix, int begin, int first, int n_rows,
                                                             int lane) {
  const int row = first + lane / 4;
  return {matrix, matrix, static_cast<size_t>(begin + min(row, n_rows - 1)),
          static_cast<size_t>(begin + min(row + 8, n_rows - 1))};
}

// ---------------------------------------------------------------- the end

// Floats of a warp's sums in shared memory: f32 [16][8 kTiles].
__device__ constexpr int sums_of_warp(int n_tok) { return kTileRows * 8 * column_tiles(n_tok); }

// acc to `mine`, this warp's; a barrier follows.
template <int kTiles>
__device__ __forceinline__ void store_sums(const float (&acc)[kTiles][4], float* mine, int lane) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    float2* at = reinterpret_cast<float2*>(mine + lane / 4 * 8 * kTiles + 8 * i + lane % 4 * 2);
    at[0] = make_float2(acc[i][0], acc[i][1]);
    at[8 * 4 * kTiles] = make_float2(acc[i][2], acc[i][3]);
  }
}
// The result of a row and a token. `sums`: those of the warp with slice 0 of the row, the other slices' follow.
template <int kSlices, int kTiles>
__device__ __forceinline__ float sum_of_slices(const float* sums, int row, int token) {
  const float* at = sums + row * 8 * kTiles + kActParts * token;
  float part[kActParts];
#pragma unroll
  for (int p = 0; p < kActParts; ++p) {
    part[p] = at[p];
#pragma unroll
    for (int s = 1; s < kSlices; ++s) part[p] = __fadd_rn(part[p], at[s * kTileRows * 8 * kTiles + p]);
  }
  // An infinite activation has NaN in its other columns.
  const bool finite = fabsf(part[0]) <= CUDART_MAX_NORMAL_F;
  return finite ? __fadd_rn(__fadd_rn(part[2], part[1]), part[0]) : part[0];
}
