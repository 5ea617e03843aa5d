// mhc_boundary: everything between two sublayers (spec model.md 2.2, 2.1): finish the previous one, mix the streams, derive
// the weights of the next one, collapse, norm, quantise.
//
//   mhc_partials   streams.cuh with the 24 rows of fn: 4 of the weights of the collapse, 4 of post, 16 of comb.
//                  Grid (HIDDEN / 32, ceil(N_TOK / 8)), block 256.
//   mhc_finalise   grid (1 + ceil(HIDDEN / 512), N_TOK), block 128. Block 0 makes post and comb (sinkhorn.cuh) of its
//                  token, and comes first as it takes longest; the others collapse, norm and quantise 512 columns each
//                  (collapse.cuh, act.cuh). All of them add up the partials they need for themselves.
//
// Any N_TOK; a token's results depend neither on it nor on the neighbours. No counters, no atomics: a replay is clean.
// The first kernel writes the streams and partials and nothing else, the second all the rest, so that new and old post and
// comb may be the same memory.
//
// Bytes at HIDDEN 4096, one token: fn 1.57 MB (F16 0.79), streams 64 KB in and out and 64 KB again from L2, partials 17 KB
// out and 92 KB in from L2. Estimate, not measured: 2.5 us + 3 us on H200, of which fn at copy bandwidth is 0.4 us and the
// Sinkhorn rounds 1.4 us (40 chains of some 65 cycles); 10 us on GB10, where fn takes 6.8 us (F16 3.4).
#include "act.cuh"
#include "collapse.cuh"
#include "sinkhorn.cuh"

constexpr int kRows = (2 + kStreams) * kStreams;

// post and comb of token blockIdx.y, by the whole block; its warp 0 writes.
__device__ __forceinline__ void mixing_weights(const float* partials, const float* scale, const float* base, float* post,
                                               float* comb, int iters, float hc_eps, float norm_eps) {
  constexpr int kPost = kStreams, kComb = 2 * kStreams;  // rows; behind those of comb stand the G_nn
  __shared__ float total[kRows];
  const int token = blockIdx.y, lane = threadIdx.x % 32, entry = lane % 16, n = lane % kStreams;
  const float post_scale = scale[1], comb_scale = scale[2], post_base = base[kPost + n], comb_base = base[kComb + entry];
  pdl_launch();
  pdl_wait();
  add_up<kRows>(partials + static_cast<size_t>(token) * (kRows + kGram) * kChunkStride,
                [](int i) { return kPost + i; }, total);
  if (threadIdx.x >= 32) return;
  const float inv = streams_norm(total + kRows - kStreams, norm_eps);
  const float gate = sigmoid(fmaf(__fmul_rn(total[n], inv), post_scale, post_base));
  if (lane < kStreams) post[token * kStreams + lane] = __fmul_rn(2.f, gate);
  const float logit = fmaf(__fmul_rn(total[kComb - kPost + entry], inv), comb_scale, comb_base);
  const float mixed = sinkhorn(logit, lane, iters, hc_eps);
  if (lane < 16) comb[token * 16 + lane] = mixed;
}

// y f32 [N_TOK, HIDDEN], post f32 [N_TOK, 4] and comb f32 [N_TOK, 4, 4] of the previous sublayer, or three null pointers;
// streams f32 [N_TOK, 4, HIDDEN] IN OUT; fn [24, 4 HIDDEN]; partials f32 [N_TOK, 34, kChunkStride] OUT; count i32 [1]
// or null: tokens that there are, all by default.
extern "C" __global__ void __launch_bounds__(256) mhc_partials_f32(const float* y, const float* post, const float* comb, float* streams, const float* fn, float* partials, const int* count) {
  stream_partials<kRows>(y, post, comb, streams, fn, partials, count);
}
extern "C" __global__ void __launch_bounds__(256) mhc_partials_f16(const float* y, const float* post, const float* comb, float* streams, const __half* fn, float* partials, const int* count) {
  stream_partials<kRows>(y, post, comb, streams, fn, partials, count);
}

// streams and partials as above; scale f32 [3], base f32 [24], norm f32 [HIDDEN]; x f32 [N_TOK, HIDDEN] OUT,
// post f32 [N_TOK, 4] OUT, comb f32 [N_TOK, 4, 4] OUT.
extern "C" __global__ void __launch_bounds__(128) mhc_finalise(const float* streams, const float* partials, const float* scale, const float* base, const float* norm, float* x, float* post, float* comb, int iters, float hc_eps, float norm_eps) {
  if (blockIdx.x == 0) return mixing_weights(partials, scale, base, post, comb, iters, hc_eps, norm_eps);
  const int column = (blockIdx.x - 1) * 512 + threadIdx.x * 4;
  const float4 v = collapse<kRows>(streams, partials, scale, base, norm, hc_eps, norm_eps, column);
  if (column < HIDDEN) store_float4(x + static_cast<size_t>(blockIdx.y) * HIDDEN + column, v);
}

// The same and rounded bf16 [N_TOK, HIDDEN] OUT, what products of the prefill form take; count as above.
extern "C" __global__ void __launch_bounds__(128) mhc_finalise_bf16(const float* streams, const float* partials, const float* scale, const float* base, const float* norm, float* x, float* post, float* comb, __nv_bfloat16* rounded, const int* count, int iters, float hc_eps, float norm_eps) {
  if (count != nullptr) {
    pdl_launch();
    pdl_wait();
    if (static_cast<int>(blockIdx.y) >= *count) return;
  }
  if (blockIdx.x == 0) return mixing_weights(partials, scale, base, post, comb, iters, hc_eps, norm_eps);
  const int column = (blockIdx.x - 1) * 512 + threadIdx.x * 4;
  const float4 v = collapse<kRows>(streams, partials, scale, base, norm, hc_eps, norm_eps, column);
  if (column >= HIDDEN) return;
  const size_t at = static_cast<size_t>(blockIdx.y) * HIDDEN + column;
  store_float4(x + at, v);
  *reinterpret_cast<uint2*>(rounded + at) = make_uint2(f32x2_to_bf16(v.x, v.y), f32x2_to_bf16(v.z, v.w));
}

// The same and codes e4m3 [N_TOK, HIDDEN] OUT, exponents e8m0 [N_TOK, HIDDEN / 128] OUT; HIDDEN a multiple of 128.
extern "C" __global__ void __launch_bounds__(128) mhc_finalise_fp8(const float* streams, const float* partials, const float* scale, const float* base, const float* norm, float* x, float* post, float* comb, unsigned char* codes, unsigned char* exponents, int iters, float hc_eps, float norm_eps) {
  if (blockIdx.x == 0) return mixing_weights(partials, scale, base, post, comb, iters, hc_eps, norm_eps);
  const int column = (blockIdx.x - 1) * 512 + threadIdx.x * 4;
  const float4 v = collapse<kRows>(streams, partials, scale, base, norm, hc_eps, norm_eps, column);
  unsigned exponent;
  const unsigned code = quantize_fp8(v, exponent);
  if (column >= HIDDEN) return;
  const size_t at = static_cast<size_t>(blockIdx.y) * HIDDEN + column;
  store_float4(x + at, v);
  *reinterpret_cast<unsigned*>(codes + at) = code;
  if (threadIdx.x % 32 == 0) exponents[at / 128] = static_cast<unsigned char>(exponent);
}

// The same and codes i8 [N_TOK, HIDDEN] OUT, scales f32 [N_TOK, HIDDEN / 32] OUT, sums i32 [N_TOK, HIDDEN / 16] OUT.
extern "C" __global__ void __launch_bounds__(128) mhc_finalise_int8(const float* streams, const float* partials, const float* scale, const float* base, const float* norm, float* x, float* post, float* comb, signed char* codes, float* scales, int* sums, int iters, float hc_eps, float norm_eps) {
  if (blockIdx.x == 0) return mixing_weights(partials, scale, base, post, comb, iters, hc_eps, norm_eps);
  const int column = (blockIdx.x - 1) * 512 + threadIdx.x * 4;
  const float4 v = collapse<kRows>(streams, partials, scale, base, norm, hc_eps, norm_eps, column);
  float block_scale;
  int sum;
  const unsigned code = quantize_int8(v, block_scale, sum);
  if (column >= HIDDEN) return;
  const size_t at = static_cast<size_t>(blockIdx.y) * HIDDEN + column;
  store_float4(x + at, v);
  *reinterpret_cast<unsigned*>(codes + at) = code;
  if (threadIdx.x % 8 == 0) scales[at / 32] = block_scale;
  if (threadIdx.x % 4 == 0) sums[at / 16] = sum;
}
