// embed: the start of a decode step (spec model.md 1.3, 2.0).
//
//   streams[t][s] = E[tokens[t]], s = 0 .. 3        E F32, F16, BF16 or Q8_0, dequantised exactly
//   cis[k][t][i]  = (cos, sin) of fp32(p) * f[i]    the product rounded to FP32
//
// Table k = 0: f = plain, p = pos[0] + t. With f = compressed 1: p = pos[0] + t, 2: p = max(0, pos[0] + t + 1 - 4),
// 3: p = max(0, pos[0] + t + 1 - 128), where the window begins that token t closes in a layer of this ratio.
//
// Grid (ceil(HIDDEN / 512) + 1, n_tok), block 128: four columns of the row a thread, written to all streams; the last
// block of a token has one angle of one table a thread. No sums, so there is no order to keep.
// The angle reaches 10^6 at the longest context. It is reduced by quarter turns in FP64, exactly enough for every FP32
// angle below 2^31, and the series are summed there too: some 25 instructions for 128 threads, where sincosf would keep
// a stack for its slow path. Results are off by 0.51 of a last place at most.
//
// Bytes: 4 HIDDEN * 4 + a row a token. Latency alone: estimate, not measured, 2.5 us.
#include "loads.cuh"
#include "plain_weights.cuh"

#if !defined(HIDDEN)
#error "HIDDEN must be defined"
#endif

constexpr int kStreams = 4;
constexpr int kPairs = 32;  // rotary pairs of a head
constexpr int kTables = 4;
constexpr int kThreads = kTables * kPairs;
static_assert(HIDDEN % 32 == 0, "four columns a thread, blocks of Q8_0");

using Four = Vec<float, 4>;

// Four neighbouring columns of a row; `column` is a multiple of 4.
__device__ __forceinline__ Four decode_four(const float* values, size_t row, int column) {
  return load_vec<4>(values + row * HIDDEN + column);
}
__device__ __forceinline__ Four decode_four(const __nv_bfloat16* values, size_t row, int column) {
  const Vec<unsigned, 2> v = load_vec<2>(reinterpret_cast<const unsigned*>(values + row * HIDDEN + column));
  const float2 a = bf16x2_to_f32(v[0]), b = bf16x2_to_f32(v[1]);
  return Four{a.x, a.y, b.x, b.y};
}
__device__ __forceinline__ Four decode_four(const __half* values, size_t row, int column) {
  const Vec<unsigned, 2> v = load_vec<2>(reinterpret_cast<const unsigned*>(values + row * HIDDEN + column));
  return Four{f16_to_f32(v[0] & 0xffffu), f16_to_f32(v[0] >> 16), f16_to_f32(v[1] & 0xffffu), f16_to_f32(v[1] >> 16)};
}

struct Q8Rows {
  const signed char* codes;
  const __half* d;
};
__device__ __forceinline__ Four decode_four(const Q8Rows& rows, size_t row, int column) {
  constexpr int kScaleStride = (HIDDEN / 32 + 7) / 8 * 8;
  const Vec<signed char, 4> codes = load_vec<4>(rows.codes + row * HIDDEN + column);
  const float d = __half2float(rows.d[row * kScaleStride + column / 32]);
  return Four{__fmul_rn(d, codes[0]), __fmul_rn(d, codes[1]), __fmul_rn(d, codes[2]), __fmul_rn(d, codes[3])};
}

// (cos, sin) of an angle.
__device__ __forceinline__ Vec<float, 2> cos_sin(float angle) {
  const double turns = rint(angle * 0.63661977236758134);  // by 2 / pi
  // pi / 2 in two parts: the first is taken from the angle without a rounding that matters, the second mends the first.
  const double r = fma(-turns, 6.123233995736766e-17, fma(-turns, 1.5707963267948966, static_cast<double>(angle)));
  const double x = r * r;
  double s = fma(x, -1. / 39916800, 1. / 362880);
  double c = fma(x, -1. / 3628800, 1. / 40320);
  s = fma(x, s, -1. / 5040), c = fma(x, c, -1. / 720);
  s = fma(x, s, 1. / 120), c = fma(x, c, 1. / 24);
  s = fma(x, s, -1. / 6), c = fma(x, c, -1. / 2);
  const float sine = static_cast<float>(fma(x * r, s, r)), cosine = static_cast<float>(fma(x, c, 1.));
  const int quarter = static_cast<int>(turns) & 3;
  const float a = quarter & 1 ? sine : cosine, b = quarter & 1 ? cosine : sine;
  return Vec<float, 2>{quarter == 1 || quarter == 2 ? -a : a, quarter & 2 ? -b : b};
}

__device__ __forceinline__ void rotary_tables(const int* pos, const float* plain, const float* compressed, float* cis) {
  const int table = threadIdx.x / kPairs, pair = threadIdx.x % kPairs, token = blockIdx.y;
  const float frequency = (table == 0 ? plain : compressed)[pair];
  pdl_wait();
  int p = pos[0] + token;
  if (table >= 2) p = max(0, p + 1 - (table == 2 ? 4 : 128));
  const size_t at = (static_cast<size_t>(table) * gridDim.y + token) * kPairs + pair;
  store_vec<2>(cis + 2 * at, cos_sin(__fmul_rn(static_cast<float>(p), frequency)));
}

template <class Rows>
__device__ __forceinline__ void embed(const Rows& rows, const int* tokens, const int* pos, const float* plain,
                                      const float* compressed, float* streams, float* cis) {
  pdl_launch();
  if (blockIdx.x == gridDim.x - 1) return rotary_tables(pos, plain, compressed, cis);
  pdl_wait();
  const int column = 4 * (blockIdx.x * kThreads + threadIdx.x);
  if (column >= HIDDEN) return;
  const Four v = decode_four(rows, static_cast<size_t>(tokens[blockIdx.y]), column);
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    store_vec<4>(streams + (static_cast<size_t>(blockIdx.y) * kStreams + s) * HIDDEN + column, v);
  }
}

// tokens i32 [n_tok], pos i32 [1], values [vocab, HIDDEN], plain, compressed f32 [32]; streams f32 [n_tok, 4, HIDDEN]
// OUT, cis f32 [4, n_tok, 32, 2] OUT.
extern "C" __global__ void __launch_bounds__(128) embed_f32(const int* tokens, const int* pos, const float* values, const float* plain, const float* compressed, float* streams, float* cis) {
  embed(values, tokens, pos, plain, compressed, streams, cis);
}
extern "C" __global__ void __launch_bounds__(128) embed_f16(const int* tokens, const int* pos, const __half* values, const float* plain, const float* compressed, float* streams, float* cis) {
  embed(values, tokens, pos, plain, compressed, streams, cis);
}
extern "C" __global__ void __launch_bounds__(128) embed_bf16(const int* tokens, const int* pos, const __nv_bfloat16* values, const float* plain, const float* compressed, float* streams, float* cis) {
  embed(values, tokens, pos, plain, compressed, streams, cis);
}

// The same, with the planes of Q8_0: codes i8 [vocab, HIDDEN], d f16 [vocab, HIDDEN / 32 padded to 8].
extern "C" __global__ void __launch_bounds__(128) embed_q8_0(const int* tokens, const int* pos, const signed char* codes, const __half* d, const float* plain, const float* compressed, float* streams, float* cis) {
  embed(Q8Rows{codes, d}, tokens, pos, plain, compressed, streams, cis);
}
