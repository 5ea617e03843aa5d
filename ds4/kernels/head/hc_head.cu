// hc_head: the input of the language-model head (spec model.md 2.2, 2.1): finish the last sublayer, weigh the four streams,
// collapse, norm. The resolved streams stay for the draft block.
//
//   hc_head_partials   ../mhc/streams.cuh with the 4 rows of fn. Grid (HIDDEN / 32, ceil(N_TOK / 8)), block 256.
//   hc_head_finalise   ../mhc/collapse.cuh. Grid (ceil(HIDDEN / 512), N_TOK), block 128.
//
// Any N_TOK; a token's results depend neither on it nor on the neighbours. No counters, no atomics: a replay is clean.
// Bytes at HIDDEN 4096, one token: fn 262 KB, streams 64 KB in and out. Estimate, not measured: 4 us on H200, once a step.
#include "../mhc/collapse.cuh"

constexpr int kRows = kStreams;

// y f32 [N_TOK, HIDDEN], post f32 [N_TOK, 4] and comb f32 [N_TOK, 4, 4] of the last sublayer, or three null pointers;
// streams f32 [N_TOK, 4, HIDDEN] IN OUT; fn [4, 4 HIDDEN]; partials f32 [N_TOK, 14, kChunkStride] OUT.
extern "C" __global__ void __launch_bounds__(256) hc_head_partials_f32(const float* y, const float* post, const float* comb, float* streams, const float* fn, float* partials) {
  stream_partials<kRows>(y, post, comb, streams, fn, partials);
}
extern "C" __global__ void __launch_bounds__(256) hc_head_partials_f16(const float* y, const float* post, const float* comb, float* streams, const __half* fn, float* partials) {
  stream_partials<kRows>(y, post, comb, streams, fn, partials);
}

// streams and partials as above; scale f32 [1], base f32 [4], norm f32 [HIDDEN]; x f32 [N_TOK, HIDDEN] OUT.
extern "C" __global__ void __launch_bounds__(128) hc_head_finalise(const float* streams, const float* partials, const float* scale, const float* base, const float* norm, float* x, float hc_eps, float norm_eps) {
  const int column = blockIdx.x * 512 + threadIdx.x * 4;
  const float4 v = collapse<kRows>(streams, partials, scale, base, norm, hc_eps, norm_eps, column);
  if (column < HIDDEN) store_float4(x + static_cast<size_t>(blockIdx.y) * HIDDEN + column, v);
}
