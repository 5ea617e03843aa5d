// draft_tap, draft_mean, draft_pairs: what a head starts from at the last positions, in a ring addressed by position
// (spec model.md 7.1, 7.2).
//
//   draft_tap     tail[(pos + t) % slots] = streams[t], ids[(pos + t) % slots] = tokens[t]
//   draft_mean    tail[(pos + t) % slots][first ..] = ((s0 + s1) + (s2 + s3)) / 4 of the streams s of t, ids likewise
//   draft_pairs   with first = pos - n_pairs: h[i] = tail[(first + i) % slots], tokens[i] = ids[(first + i + 1) % slots],
//                 the last of them the step's first token, which no launch has processed; and the drafting words
//
// Grid (ceil(width / 1024), rows), block 256: four values of a row a thread. Copies: there is no order to keep.
// Bytes: 8 width a row, 131 KB for V4-Flash's four streams; means 20 of their width, 82 KB. Latency alone: estimate, not measured, 2 us.
#include "loads.cuh"
#include "words.cuh"

constexpr int kThreads = 256;

__device__ __forceinline__ void copy_row(const float* from, float* to, int width) {
  const int column = 4 * (blockIdx.x * kThreads + threadIdx.x);
  if (column < width) store_vec<4>(to + column, load_vec<4>(from + column));
}

// streams f32 [n_tok, width], words i32 [64]; tail f32 [slots, width] IN OUT, ids i64 [slots] IN OUT.
extern "C" __global__ void __launch_bounds__(256) draft_tap(const float* streams, const int* words, float* tail, long long* ids, int width, int slots) {
  pdl_launch();
  pdl_wait();
  const int t = blockIdx.y, slot = (words[kPos] + t) % slots;
  copy_row(streams + static_cast<size_t>(t) * width, tail + static_cast<size_t>(slot) * width, width);
  if (blockIdx.x == 0 && threadIdx.x == 0) ids[slot] = words[kTokens + t];
}

// streams f32 [n_tok, 4, width], words i32 [64]; tail f32 [slots, pitch] IN OUT: columns first to first + width - 1; ids
// i64 [slots] IN OUT.
extern "C" __global__ void __launch_bounds__(256) draft_mean(const float* streams, const int* words, float* tail, long long* ids, int width, int slots, int pitch, int first) {
  pdl_launch();
  pdl_wait();
  const int t = blockIdx.y, slot = (words[kPos] + t) % slots;
  const int column = 4 * (blockIdx.x * kThreads + threadIdx.x);
  if (column < width) {
    const float* from = streams + 4 * static_cast<size_t>(t) * width + column;
    Vec<float, 4> s[4], mean;
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = load_vec<4>(from + static_cast<size_t>(i) * width);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      mean[j] = __fmul_rn(0.25f, __fadd_rn(__fadd_rn(s[0][j], s[1][j]), __fadd_rn(s[2][j], s[3][j])));
    store_vec<4>(tail + static_cast<size_t>(slot) * pitch + first + column, mean);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) ids[slot] = words[kTokens + t];
}

// tail f32 [slots, width], ids i64 [slots]; words i32 [64] IN OUT; h f32 [n_pairs, width], tokens i32 [n_pairs] OUT.
extern "C" __global__ void __launch_bounds__(256) draft_pairs(const float* tail, const long long* ids, int* words, float* h, int* tokens, int width, int slots) {
  pdl_launch();
  pdl_wait();
  const int i = blockIdx.y, n_pairs = gridDim.y, position = words[kPos], pair = position - n_pairs + i;
  copy_row(tail + static_cast<size_t>(pair % slots) * width, h + static_cast<size_t>(i) * width, width);
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  tokens[i] = i == n_pairs - 1 ? words[kTokens] : static_cast<int>(ids[(pair + 1) % slots]);
  if (i == 0) words[kPair] = pair, words[kLast] = position - 1, words[kDrafted] = 0;  // nobody reads these here
}
