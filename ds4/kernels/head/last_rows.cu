// last_rows: of a chunk's last tokens, what finishes its last sublayer, so that hc_head and lm_head run on them alone.
//
//   y1[i], streams1[i], post1[i], comb1[i] = those of token count - n + i, where that is not negative
//
// Grid (ceil(5 d / 1024), n), block 256: four values a thread, of y and the streams in a row; the first block copies
// post and comb too. Copies: there is no order to keep.
// Bytes: 40 d a token, 164 KB at d 4096. Latency alone: estimate, not measured, 3 us, once a prompt.
#include "live_rows.cuh"
#include "loads.cuh"

constexpr int kThreads = 256;
constexpr int kStreams = 4;

// Values 4 i to 4 i + 3 of row `row` of x, to row `to` of x1.
__device__ __forceinline__ void copy_four(const float* x, int row, float* x1, int to, int width, int i) {
  const Vec<float, 4> v = load_vec<4>(x + static_cast<size_t>(row) * width + 4 * i);
  store_vec<4>(x1 + static_cast<size_t>(to) * width + 4 * i, v);
}

// y f32 [n_rows, d], streams f32 [n_rows, 4, d], post f32 [n_rows, 4], comb f32 [n_rows, 4, 4], count i32 [1] or null;
// y1 f32 [n, d], streams1 f32 [n, 4, d], post1 f32 [n, 4] and comb1 f32 [n, 4, 4] OUT. d is a multiple of 4.
extern "C" __global__ void __launch_bounds__(256) last_rows(const float* y, const float* streams, const float* post, const float* comb, const int* count, float* y1, float* streams1, float* post1, float* comb1, int d, int n_rows) {
  pdl_launch();
  pdl_wait();
  const int n = gridDim.y, to = blockIdx.y, from = live_rows(count, n_rows) - n + to;
  if (from < 0) return;
  const int i = blockIdx.x * kThreads + threadIdx.x, quarter = d / 4;
  if (i < quarter) copy_four(y, from, y1, to, d, i);
  else if (i < (1 + kStreams) * quarter) copy_four(streams, from, streams1, to, kStreams * d, i - quarter);
  if (i == 0) copy_four(post, from, post1, to, kStreams, 0);
  if (i < kStreams) copy_four(comb, from, comb1, to, kStreams * kStreams, i);
}
