// Rows of weight matrices times the activations of many tokens on the tensor cores, for the prefill form: formats of
// mma_rows.cuh, whose weights are exact, times activations in BF16.
//
//   acc[row][token] = sum over k of W[row][k] * x[token][k],   W exact, x BF16, sums in FP32
//
// A block's kWarps warps have kDeep row tiles of 16 rows each, all for the same kTokens tokens: a token is a column of the
// mma's right side. x comes to shared memory by cp.async, a chunk of K at a time, kStages of them at once. The weights of a
// chunk are loaded kAhead chunks before they are decoded, into registers of each lane, one or two blocks at a time; the loads
// that replace them are issued when the last of its blocks are decoded, so that they have the products of those to arrive.
//
// Staged: of each token the 16 units of 16 bytes of a chunk, those of odd tokens with neighbouring blocks exchanged: the
// eight lanes that shared memory serves at a time read four neighbouring units of an even and of an odd token, and find
// them in different banks. Nothing is lost to padding.
//
// Order: the products of a block (kScaleBlocks 1, or more than one part) or of two blocks are summed from zero by the mma, a
// block by rising part and of a part by rising k; then acc = fmaf(scale, sum, acc), blocks by rising number. With minima,
// after a chunk acc = fmaf(-minimum_scale, its sum of m x, acc), in which the x of a half block are summed first and then
// rounded to 16 significant bits. Where top and bottom differ, the finer order is that of both. It depends on the formats and
// on kCols only: not on kTokens, kStages, kWarps, kDeep or kAhead, nor on a token's column, nor on the other tokens.
//
// Limits: as mma_rows.cuh has them for weights; an infinite x may make NaN with formats of several parts or with minima.
//
// Shared memory a multiply-add: 16 bytes of x in a lane serve 2 kDeep mma, so that at kDeep 1 shared memory, 128 bytes a
// clock, binds at 2048 FLOP a clock and multiprocessor, half of what H200's tensor cores have, and at kDeep 2 at 4096.
#pragma once

#include "convert.cuh"
#include "mma_rows.cuh"

// Of rows of kCols.
template <int kColsOf, int kTokensOf, int kStagesOf, int kWarpsOf = 8, int kDeepOf = 1, int kAheadOf = 1>
struct GemmPlan {
  static constexpr int kCols = kColsOf, kTokens = kTokensOf, kStages = kStagesOf;
  static constexpr int kWarps = kWarpsOf, kDeep = kDeepOf, kAhead = kAheadOf;
  static constexpr int kThreads = 32 * kWarps, kTiles = kTokens / 8;
  static constexpr int kRows = kTileRows * kDeep * kWarps;  // of a block
  static constexpr int kChunks = chunks_of(kCols);
  static constexpr int kChunkBytes = 2 * kTokens * kChunkCols;  // staged, of one chunk
  static constexpr int kSumBytes = 32 * kTokens;                // for formats with minima
  static_assert(kTokens % 8 == 0 && kTokens > 0 && kStages >= 2 && kDeep >= 1 && kAhead >= 1, "a tile");
  __device__ static constexpr int bytes(bool minima) { return kStages * kChunkBytes + (minima ? kSumBytes : 0); }
};

// Chunk `chunk` of all tokens to `staged`, one group of copies for each thread.
template <class Plan, class Source>
__device__ __forceinline__ void copy_chunk(const Source& source, int n_tokens, int chunk, unsigned char* staged) {
  constexpr int kUnits = kChunkCols / 8;
  if (chunk < Plan::kChunks) {
    const int thread = static_cast<int>(opaque(threadIdx.x));
    const int n_units = blocks_in<Plan::kCols>(chunk) * (kUnits / kChunkBlocks);
#pragma unroll
    for (int base = 0; base < Plan::kTokens * kUnits; base += Plan::kThreads) {
      const int i = base + thread, t = i / kUnits, unit = i % kUnits;
      if (Plan::kTokens * kUnits % Plan::kThreads != 0 && i >= Plan::kTokens * kUnits) break;
      if (unit >= n_units) break;
      const unsigned short* from = source(min(t, n_tokens - 1)) + chunk * kChunkCols + 8 * unit;
      cp_async<16>(staged + t * (2 * kChunkCols) + (unit ^ (t & 1) << 2) * 16, from);
    }
  }
  cp_async_commit();
}

// What a lane reads of a staged chunk: its column, token 8 i + lane / 4, of column tile i.
struct StagedChunk {
  const unsigned char* at;
  int odd;  // 64 in the lanes of odd tokens

  __device__ __forceinline__ StagedChunk(const unsigned char* staged, int lane)
      : at(staged + lane / 4 * (2 * kChunkCols) + lane % 4 * 16), odd(lane / 4 % 2 * 64) {}
  // This lane's activations of block b.
  __device__ __forceinline__ uint4 block(int i, int b) const {
    return *reinterpret_cast<const uint4*>(at + i * (8 * 2 * kChunkCols) + b / 2 * 128 + (b % 2 == 0 ? odd : 64 - odd));
  }
};

// The sums of the half blocks of a staged chunk, in two BF16 parts: of token t and block b 8 bytes, those of both halves,
// then their second parts. By an mma whose left side are the tokens and whose right side has ones for half block g in column
// g; the warps share the tokens.
template <class Plan>
__device__ __forceinline__ void sum_halves(const StagedChunk& x, uint2* sums, int lane, int warp) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int i = 2 * warp; i < Plan::kTiles; i += 2 * Plan::kWarps) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      const uint4 first = x.block(i, b);
      const uint4 second = Plan::kTiles > 1 ? x.block(i + 1, b) : make_uint4(0u, 0u, 0u, 0u);
      const unsigned ones = 2 * b + t / 2 == g ? 0x3f803f80u : 0u;
      mma_m16n8k16_bf16(sum, {first.x, second.x, first.y, second.y}, {ones, ones});
      mma_m16n8k16_bf16(sum, {first.z, second.z, first.w, second.w}, {ones, ones});
    }
#pragma unroll
    for (int j = 0; j < (Plan::kTiles > 1 ? 2 : 1); ++j) {
      const float a = sum[2 * j], b = sum[2 * j + 1];
      const unsigned high = f32x2_to_bf16(a, b);
      const float2 of_high = bf16x2_to_f32(high);
      const unsigned low = f32x2_to_bf16(__fsub_rn(a, of_high.x), __fsub_rn(b, of_high.y));
      sums[(8 * (i + j) + g) * 4 + t] = make_uint2(high, low);
    }
  }
}

// kSpan blocks of a lane's rows of one row tile.
template <int kSpan, class Top, class Bottom>
struct Fragments {
  unsigned top[kSpan][Top::kParts][4], bottom[kSpan][Bottom::kParts][4];

  // Part p of words 2 k and 2 k + 1 of block b, as the mma's left side.
  __device__ __forceinline__ void multiply(int b, int p, int k, const uint4& x, float (&sum)[4]) const {
    const bool in_top = p < Top::kParts, in_bottom = p < Bottom::kParts;
    const unsigned(&w)[4] = top[b][in_top ? p : 0];
    const unsigned(&v)[4] = bottom[b][in_bottom ? p : 0];
    const unsigned a[4] = {in_top ? w[2 * k] : 0u, in_bottom ? v[2 * k] : 0u, in_top ? w[2 * k + 1] : 0u,
                           in_bottom ? v[2 * k + 1] : 0u};
    if (k == 0)
      mma_m16n8k16_bf16(sum, a, {x.x, x.y});
    else
      mma_m16n8k16_bf16(sum, a, {x.z, x.w});
  }
};

// The products of this warp's kDeep row tiles with n_tokens tokens, 1 .. kTokens, over all of K; acc as an mma leaves it
// (ptx.cuh): columns 2t, 2t + 1 of row g in [0], [1], of row g + 8 in [2], [3]; columns from n_tokens on are not results.
// rows(d): the lane's RowPair of row tile d. source(t): x of token t < n_tokens, bf16 [kCols] on 16 bytes; called for every
// chunk, so it should be cheap. memory: shared, on 16 bytes, Plan::bytes(). Every thread of the block calls it, after pdl_wait;
// a barrier is due before memory is used again.
template <class Plan, class Top, class Bottom, class Rows, class Source>
__device__ __forceinline__ void gemm_tile(const Top& top, const Bottom& bottom, const Rows& rows, const Source& source,
                                          int n_tokens, unsigned char* memory,
                                          float (&acc)[Plan::kDeep][Plan::kTiles][4]) {
  constexpr int kDeep = Plan::kDeep, kTiles = Plan::kTiles, kAhead = Plan::kAhead, kChunks = Plan::kChunks;
  constexpr int kParts = Top::kParts > Bottom::kParts ? Top::kParts : Bottom::kParts;
  constexpr bool kByBlock = Top::kScaleBlocks == 1 || Bottom::kScaleBlocks == 1 || kParts > 1;
  constexpr bool kMinima = Top::kMinima || Bottom::kMinima;
  constexpr int kSpan = kByBlock && kDeep > 1 ? 1 : 2, kSpans = kChunkBlocks / kSpan;  // blocks decoded at a time
  constexpr int kMost = kDeep == 1 && kTiles > 8 ? 4 : 2;
  constexpr int kGroup = kTiles < kMost ? kTiles : kMost;  // column tiles side by side
  static_assert(kTiles % kGroup == 0 && (!kMinima || Plan::kCols % kChunkCols == 0), "whole groups and chunks");
  using Raw = typename RowPair<Top, Bottom>::Raw;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint2* const sums = reinterpret_cast<uint2*>(memory + Plan::kStages * Plan::kChunkBytes);

  Raw raw[kAhead][kDeep];
  unsigned row[kDeep][2];
#pragma unroll
  for (int d = 0; d < kDeep; ++d) {
    const RowPair<Top, Bottom> pair = rows(d);
    row[d][0] = static_cast<unsigned>(pair.top_row), row[d][1] = static_cast<unsigned>(pair.bottom_row);
  }
  const auto load = [&](int chunk, Raw(&into)[kDeep]) {
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      const size_t top_row = opaque(row[d][0]), bottom_row = opaque(row[d][1]);
      into[d] = {top.load(top_row, chunk), bottom.load(bottom_row, chunk)};
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < kChunks) load(i, raw[i]);
  }
#pragma unroll
  for (int i = 0; i + 1 < Plan::kStages; ++i)
    copy_chunk<Plan>(source, n_tokens, i, memory + i * Plan::kChunkBytes);
#pragma unroll
  for (int d = 0; d < kDeep; ++d) set_zero(acc[d]);

  int stage = 0, free = Plan::kStages - 1;
  const auto step = [&](int chunk, Raw(&of)[kDeep]) {
    cp_async_wait<Plan::kStages - 2>();
    __syncthreads();  // the chunk is there, and the one before it used up
    copy_chunk<Plan>(source, n_tokens, chunk + Plan::kStages - 1, memory + free * Plan::kChunkBytes);
    const StagedChunk x(memory + stage * Plan::kChunkBytes, lane);
    free = stage;
    stage = stage + 1 == Plan::kStages ? 0 : stage + 1;
    if constexpr (kMinima) sum_halves<Plan>(x, sums, lane, warp);

    const int n_blocks = blocks_in<Plan::kCols>(chunk);
    float scale[kDeep][kSpan][2], factor[kDeep][2];  // of blocks and rows; of minima
    unsigned low[kDeep][2];
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
      if (kSpan * span >= n_blocks) break;
      Fragments<kSpan, Top, Bottom> w[kDeep];
#pragma unroll
      for (int d = 0; d < kDeep; ++d) {
#pragma unroll
        for (int b = 0; b < kSpan; ++b) {
          if (kSpan * span + b >= n_blocks) break;
          top.fragment(of[d].top, kSpan * span + b, w[d].top[b]);
          bottom.fragment(of[d].bottom, kSpan * span + b, w[d].bottom[b]);
          if (kByBlock || (span == 0 && b == 0)) {
            scale[d][b][0] = top.scale(of[d].top, kSpan * span + b);
            scale[d][b][1] = bottom.scale(of[d].bottom, kSpan * span + b);
          }
        }
        if (kMinima && span + 1 == kSpans) {
          low[d][0] = low[d][1] = 0u, factor[d][0] = factor[d][1] = 0.f;
          if constexpr (Top::kMinima)
            low[d][0] = top.minima(of[d].top), factor[d][0] = -top.minimum_scale(of[d].top);
          if constexpr (Bottom::kMinima)
            low[d][1] = bottom.minima(of[d].bottom), factor[d][1] = -bottom.minimum_scale(of[d].bottom);
        }
      }
      if (span + 1 == kSpans && chunk + kAhead < kChunks) load(chunk + kAhead, of);  // a partial chunk is the last one
#pragma unroll
      for (int first = 0; first < kTiles; first += kGroup) {
        if (first > 0 && 8 * first >= n_tokens) break;
        float sum[kDeep][kGroup][4];
#pragma unroll
        for (int d = 0; d < kDeep; ++d) set_zero(sum[d]);
#pragma unroll
        for (int b = 0; b < kSpan; ++b) {
          if (kSpan * span + b >= n_blocks) break;
          uint4 act[kGroup];
#pragma unroll
          for (int i = 0; i < kGroup; ++i) act[i] = x.block(first + i, kSpan * span + b);
#pragma unroll
          for (int p = 0; p < kParts; ++p) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
#pragma unroll
              for (int i = 0; i < kGroup; ++i) {
#pragma unroll
                for (int d = 0; d < kDeep; ++d) w[d].multiply(b, p, k, act[i], sum[d][i]);
              }
            }
          }
          if constexpr (kByBlock) {
#pragma unroll
            for (int d = 0; d < kDeep; ++d) {
#pragma unroll
              for (int i = 0; i < kGroup; ++i) add_scaled(scale[d][b][0], scale[d][b][1], sum[d][i], acc[d][first + i]);
              set_zero(sum[d]);
            }
          }
        }
        if constexpr (!kByBlock) {
#pragma unroll
          for (int d = 0; d < kDeep; ++d) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) add_scaled(scale[d][0][0], scale[d][0][1], sum[d][i], acc[d][first + i]);
          }
        }
      }
    }
    if constexpr (kMinima) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint2 parts = sums[(8 * i + lane / 4) * 4 + lane % 4];
#pragma unroll
        for (int d = 0; d < kDeep; ++d) {
          float sum[4] = {0.f, 0.f, 0.f, 0.f};
          mma_m16n8k16_bf16(sum, {low[d][0], low[d][1], low[d][0], low[d][1]}, {parts.x, parts.y});
          add_scaled(factor[d][0], factor[d][1], sum, acc[d][i]);
        }
      }
    }
  };
#pragma unroll 1
  for (int base = 0; base < kChunks; base += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (kChunks % kAhead == 0 || base + i < kChunks) step(base + i, raw[i]);
    }
  }
  constexpr float kTop = Top::kFactor, kBottom = Bottom::kFactor;
#pragma unroll
  for (int d = 0; d < kDeep; ++d) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) acc[d][i / 4][i % 4] = __fmul_rn(acc[d][i / 4][i % 4], i % 4 < 2 ? kTop : kBottom);
  }
}
