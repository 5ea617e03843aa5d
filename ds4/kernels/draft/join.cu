// draft_join, draft_norm: norms that draft heads take of what the trunk gave them (spec model.md 7.1, 7.2).
//
//   draft_join   e[t]     = rms_norm(E[token of t]) enorm         the embedding's row: stream 0 of what `embed` makes
//                hn[t][s] = rms_norm(h[t][s]) hnorm               each of the four streams by itself
//   draft_norm   y[t]     = rms_norm(x[t]) norm
//
// Grid (5, n_tok) or (1, n_tok), block 256: a row a block, s = 4 the embedding's. A thread's columns by fmaf in rising
// order, then block_sum; that depends on HIDDEN only. Bytes: 4 HIDDEN * 13 a token, or * 3. Latency alone: estimate, not
// measured, 2.5 us.
#include "loads.cuh"
#include "reduce.cuh"

#if !defined(HIDDEN)
#error "HIDDEN must be defined"
#endif

constexpr int kStreams = 4;
constexpr int kThreads = 256;
constexpr int kQuads = (HIDDEN / 4 + kThreads - 1) / kThreads;  // of a thread
static_assert(HIDDEN % 4 == 0, "four columns a load");

__device__ __forceinline__ void norm_row(const float* from, const float* norm, float* to, float eps) {
  Vec<float, 4> x[kQuads];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int column = 4 * (i * kThreads + static_cast<int>(threadIdx.x));
    if (column < HIDDEN) {
      x[i] = load_vec<4>(from + column);
#pragma unroll
      for (int j = 0; j < 4; ++j) squares = fmaf(x[i][j], x[i][j], squares);
    }
  }
  const float factor = rsqrtf(fmaf(block_sum(squares), 1.f / HIDDEN, eps));
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int column = 4 * (i * kThreads + static_cast<int>(threadIdx.x));
    if (column < HIDDEN) {
      const Vec<float, 4> gain = load_vec<4>(norm + column);
      Vec<float, 4> y;
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = __fmul_rn(__fmul_rn(x[i][j], factor), gain[j]);
      store_vec<4>(to + column, y);
    }
  }
}

// embedded, h f32 [n_tok, 4, HIDDEN], enorm, hnorm f32 [HIDDEN]; e f32 [n_tok, HIDDEN] and hn f32 [n_tok, 4, HIDDEN] OUT.
extern "C" __global__ void __launch_bounds__(256) draft_join(const float* embedded, const float* h, const float* enorm, const float* hnorm, float* e, float* hn, float eps) {
  const int row = blockIdx.x, token = blockIdx.y;
  const bool embedding = row == kStreams;
  const size_t at = (static_cast<size_t>(token) * kStreams + (embedding ? 0 : row)) * HIDDEN;
  const float* from = (embedding ? embedded : h) + at;
  const float* norm = embedding ? enorm : hnorm;
  float* to = embedding ? e + static_cast<size_t>(token) * HIDDEN : hn + at;
  pdl_launch();
  pdl_wait();
  norm_row(from, norm, to, eps);
}

// x f32 [n_tok, HIDDEN], norm f32 [HIDDEN]; y f32 [n_tok, HIDDEN] OUT.
extern "C" __global__ void __launch_bounds__(256) draft_norm(const float* x, const float* norm, float* y, float eps) {
  const size_t at = static_cast<size_t>(blockIdx.y) * HIDDEN;
  pdl_launch();
  pdl_wait();
  norm_row(x + at, norm, y + at, eps);
}
