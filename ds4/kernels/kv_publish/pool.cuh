// A compressor's raw rows, and what is pooled from them (spec model.md 3).
//
//   pooled[j] = sum over the candidates i of softmax_i(score[i][j]) value[i][j]
//
// Rows of earlier launches lie in `state`, addressed by position; those of this launch are read where the projection
// left them: in the decode form another block is storing them in `state` meanwhile. No slot is read and written in the
// same launch: a position that is read and one that is written are less than lookback + n_tok - 1 apart, and there are
// at least so many slots. The prefill form, whose chunks are longer than that, stores in a launch of its own.
//
// Order: candidates by rising position, fmaf; an HCA window as four quarters, each in chunks of kAhead with a running
// maximum, which are then put together in their order. It depends on the ratio only.
#pragma once

#include "finish.cuh"

// kv, gate f32 [n_tok, kWidth], row 0 at position `first`; ape f32 [ratio, kWidth]; state f32 [slots, 2, kWidth], value
// and score.
template <int kWidth>
struct Raw {
  const float *kv, *gate, *ape, *state;
  int first, slots, ratio;
};

// Add the raw row of token `token` of the launch to `state`, which is raw.state; one block.
template <int kWidth, int kThreads>
__device__ __forceinline__ void append(const Raw<kWidth>& raw, int token, float* state) {
  const int p = raw.first + token;
  float* slot = state + static_cast<size_t>(p % raw.slots) * 2 * kWidth;
  constexpr int kLoads = (kWidth / 4 + kThreads - 1) / kThreads;
  Four value[kLoads], gate[kLoads], bias[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int column = 4 * (threadIdx.x + i * kThreads);
    if (column >= kWidth) continue;
    value[i] = load_vec<4>(raw.kv + static_cast<size_t>(token) * kWidth + column);
    gate[i] = load_vec<4>(raw.gate + static_cast<size_t>(token) * kWidth + column);
    bias[i] = load_vec<4>(raw.ape + static_cast<size_t>(p % raw.ratio) * kWidth + column);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int column = 4 * (threadIdx.x + i * kThreads);
    if (column >= kWidth) continue;
    store_vec<4>(slot + column, value[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) gate[i][j] = __fadd_rn(gate[i][j], bias[i][j]);
    store_vec<4>(slot + kWidth + column, gate[i]);
  }
}

// kCount candidates at positions p, p + 1, ..., whose ape rows are ape_row, ape_row + 1, ... and begin again after
// kAlike. Columns column .. + 3; from candidate kAlike on, those of the second half of the row. Candidates before
// `from` and from `to` on are not there: their score is -inf.
template <int kCount, int kAlike, int kWidth>
__device__ __forceinline__ void load_candidates(const Raw<kWidth>& raw, int p, int ape_row, int from, int to,
                                                int column, Four (&value)[kCount], Four (&score)[kCount]) {
  const int base = (p + from) % raw.slots;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int there = min(max(i, from), to - 1);  // loads without a branch can all be in flight
    const bool fresh = p + there >= raw.first;
    const int slot = base + there - from, at = column + (i < kAlike ? 0 : kWidth / 2);
    const float* stored = raw.state + static_cast<size_t>(slot < raw.slots ? slot : slot - raw.slots) * 2 * kWidth;
    const size_t row = static_cast<size_t>(fresh ? p + there - raw.first : 0) * kWidth;
    value[i] = load_vec<4>((fresh ? raw.kv + row : stored) + at);
    score[i] = load_vec<4>((fresh ? raw.gate + row : stored + kWidth) + at);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < from || i >= to) {
      score[i] = four_of(-CUDART_INF_F);
    } else if (p + i >= raw.first) {
      const int at = column + (i < kAlike ? 0 : kWidth / 2);
      const Four bias = load_vec<4>(raw.ape + static_cast<size_t>(ape_row + i % kAlike) * kWidth + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) score[i][j] = __fadd_rn(score[i][j], bias[j]);
    }
  }
}

// A softmax on its way, of four columns: weights are relative to the highest score so far.
struct Pool {
  Four highest = four_of(-CUDART_INF_F), weight = four_of(0.f), weighted = four_of(0.f);

  template <int kCount>
  __device__ __forceinline__ void add(const Four (&value)[kCount], const Four (&score)[kCount]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float top = highest[j];
#pragma unroll
      for (int i = 0; i < kCount; ++i) top = fmaxf(top, score[i][j]);
      const float kept = expf(__fsub_rn(highest[j], top));
      weight[j] = __fmul_rn(weight[j], kept), weighted[j] = __fmul_rn(weighted[j], kept), highest[j] = top;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float e = expf(__fsub_rn(score[i][j], top));
        weight[j] = __fadd_rn(weight[j], e), weighted[j] = fmaf(e, value[i][j], weighted[j]);
      }
    }
  }
  __device__ __forceinline__ void add(const Pool& other) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float top = fmaxf(highest[j], other.highest[j]);
      const float mine = expf(__fsub_rn(highest[j], top)), its = expf(__fsub_rn(other.highest[j], top));
      weight[j] = fmaf(other.weight[j], its, __fmul_rn(weight[j], mine));
      weighted[j] = fmaf(other.weighted[j], its, __fmul_rn(weighted[j], mine));
      highest[j] = top;
    }
  }
  __device__ __forceinline__ Four result() const {
    Four y;
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = weighted[j] / weight[j];
    return y;
  }
};

constexpr int kCsaRatio = 4;

// Columns column .. + 3 of CSA entry `entry`: the first half of the row from the window before, the second from its
// own.
template <int kWidth>
__device__ __forceinline__ Four pool_csa(const Raw<kWidth>& raw, int entry, int column) {
  Four value[2 * kCsaRatio], score[2 * kCsaRatio];
  const int from = entry ? 0 : kCsaRatio;
  load_candidates<2 * kCsaRatio, kCsaRatio>(raw, (entry - 1) * kCsaRatio, 0, from, 2 * kCsaRatio, column, value, score);
  Pool pool;
  pool.add(value, score);
  return pool.result();
}

constexpr int kHcaThreads = 512;  // of a block; kQuarters groups of a row's threads
constexpr int kRowThreads = kHeadDim / 4;
constexpr int kQuarters = kHcaThreads / kRowThreads;

// HCA entry `entry`, columns 4 i .. 4 i + 3 in thread i < kRowThreads, zeros in the others. Every thread of the block
// calls it.
__device__ __forceinline__ Four pool_hca(const Raw<kHeadDim>& raw, int entry) {
  constexpr int kAhead = 8;
  __shared__ Pool of_quarter[kQuarters][kRowThreads];
  const int thread = threadIdx.x % kRowThreads, quarter = threadIdx.x / kRowThreads;
  const int count = raw.ratio / kQuarters, begin = quarter * count;
  Pool pool;
  for (int i = 0; i < count; i += kAhead) {
    Four value[kAhead], score[kAhead];
    const int row = begin + i;
    load_candidates<kAhead, kAhead>(raw, entry * raw.ratio + row, row, 0, count - i, 4 * thread, value, score);
    pool.add(value, score);
  }
  of_quarter[quarter][thread] = pool;
  __syncthreads();
  if (quarter > 0) return four_of(0.f);
#pragma unroll
  for (int q = 1; q < kQuarters; ++q) pool.add(of_quarter[q][thread]);
  return pool.result();
}
