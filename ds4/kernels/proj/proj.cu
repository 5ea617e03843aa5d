// proj: activations of up to 8 tokens times the rows of up to 8 weight matrices that share them (spec model.md 2.3,
// 2.6, kernels.md b.1, b.3). One source for proj_in, proj_q, proj_oa and proj_ob, and for any other single matrix.
//
//   y_i[t][r] = sum over k of W_i[r][k] * x[t][g][k]     g = r / (rows of W_i / GROUPS), 0 where GROUPS is 1
//
// x FP32, W_i F32, F16, BF16, Q8_0 or FP8 with block scales, each of its own format, dequantised to FP32 (matrix.cuh).
//
// Grid: the blocks of matrix 0, then those of matrix 1, ...; within a matrix group by group, so that a block has one
// format and one x. Block 256: a warp owns ROWS_PER_WARP neighbouring rows, a block 8 times as many.
// Before the wait for the previous launch every lane asks for 8 times 16 bytes of weights: the whole of a row of 4 KB
// where a warp owns one. Activations come to shared memory, up to 32 KB at a time, while weights are on their way. They
// are permuted there: 16 one-byte weights a lane ask for float4 that lie 64 bytes apart, which takes 16 wavefronts a
// warp from L1 or from plain shared memory, and 4 as it is.
//
// Order: gemv.cuh. It depends on K and the format only. ROWS_PER_WARP, the tiles and the loads in flight depend on
// N_TOK, but they only say which registers hold what.
//
// Bytes in flight: 4 KB a warp, so 128 KB an SM at N_TOK 1 (4 blocks), 96 KB at 2 where K is 1024, else 64 KB (2
// blocks; 32 where the grid has but one for each SM). Wanted (kernels.md b.0): 19 KB on H200, 33 KB on B200. Blocks at
// the dimensions of V4-Flash at N_TOK 1 / 2 / 8, for 132 SMs (H200) or 148 (B200):
//   proj_in   K 4096: 4160 rows (CSA) 520 / 260 / 130, 2560 (HCA) 320 / 320 / 160, 1536 (SWA) 192 / 192 / 192
//   proj_q    K 1024: 40960 rows (CSA) 1280 each, 32768 rows 1024 each
//   proj_oa   K 4096: 8192 rows 512 / 256 / 256          proj_ob   K 8192: 4096 rows 512 / 256 / 128
//
// Bytes: the weights once (a CSA layer as shipped: 27.8 MB for proj_in, 42.0 for proj_q, 33.6 for proj_oa and for
// proj_ob), and x once a block from L2: 4 N_TOK / (rows of a block) bytes for each weight, 0.5 at N_TOK 1 where a warp
// owns one row, 1 at 8 where it owns four.
// Thread-instructions for a byte of weights, counted in the machine code of the main loop for sm_90a at N_TOK 1 / 2 /
// 8: BF16 and F16 2.0 / 2.5 / 6.7, FP8 5.3 / 6.1 / 13.6, Q8_0 6.0 / 6.8 / 14.3. H200 has about 7 and B200 about 5 for
// each byte it can stream (estimates of kernels.md b.0): one-byte formats are bound by instructions from N_TOK 3 on
// H200 and from 1 or 2 on B200, 8 of them at N_TOK 8 being the multiply-adds themselves.
// Estimates, not measured, for a CSA layer as shipped on H200 at N_TOK 1, at 60 to 75 % of copy (4.2 TB/s): proj_in 11
// us, proj_q 14, proj_oa 11, proj_ob 11; on GB10 at 75 to 88 % (232 GB/s) 160, 213, 164, 164. At N_TOK 8 on H200, from
// the instructions at two thirds of the issue rate: 12, 29, 23, 23.
#include "gemv.cuh"

#if !defined(K) || !defined(N_TOK) || !defined(GROUPS) || !defined(ROWS) || !defined(FORMATS) || !defined(ROWS_PER_WARP)
#error "K, N_TOK, GROUPS, ROWS_PER_WARP and the lists ROWS and FORMATS must be defined"
#endif

enum Format { f32, f16, bf16, q8_0, fp8_block };
constexpr int kRowsOf[] = {ROWS};
constexpr Format kFormats[] = {FORMATS};
constexpr int kMatrices = sizeof(kRowsOf) / sizeof(int);
constexpr int kMost = 8;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = ROWS_PER_WARP;
constexpr int kBlockRows = kWarps * kRows;
constexpr int kLoads = 8;  // of a lane, in flight
constexpr int kBlocks = N_TOK == 1 ? 4 : N_TOK == 2 && K <= 1024 ? 3 : 2;  // of an SM: as many as need no spills
constexpr int kTileMost = 32 * 1024 / (4 * N_TOK) / 1024 * 1024;
constexpr int kTile = K < kTileMost ? K : kTileMost;  // columns of x in shared memory
constexpr int kTileQuads = kTile / 4;
static_assert(N_TOK >= 1 && N_TOK <= 8 && kRows * N_TOK <= 32, "a lane writes one sum");
static_assert(kMatrices <= kMost && sizeof(kFormats) / sizeof(Format) == kMatrices, "a format and a row count each");
static_assert(K % 32 == 0, "whole blocks of Q8_0, and whole groups of 8 quads to permute");
static_assert(GROUPS == 1 || (kMatrices == 1 && kRowsOf[0] % GROUPS == 0), "groups of equal size, of one matrix");

struct Part {  // what a block works on
  const unsigned char *weights, *scales;
  float* y;
  int n_rows;
  Format format;
  int block;  // of those of the matrix
};

__device__ constexpr int blocks_of(int matrix) {
  return GROUPS * ((kRowsOf[matrix] / GROUPS + kBlockRows - 1) / kBlockRows);
}
__device__ constexpr bool has(Format format) {
  for (int i = 0; i < kMatrices; ++i) {
    if (kFormats[i] == format) return true;
  }
  return false;
}

// Where quad j of a token's activations lies in the tile. Neighbouring lanes read every first, second or fourth quad; 8
// of them, which the hardware serves at once, find theirs in different banks. The same permutation of every 32 quads.
__device__ __forceinline__ int permuted(int j) { return j ^ (j >> 3 & 3); }

// Columns `first` to first + kTile - 1, as far as there are, of all tokens into the tile; the whole block calls it.
__device__ __forceinline__ void stage(float4* tile, const float* x, int first) {
  constexpr bool kFull = K % kTile == 0 && kTileQuads % kThreads == 0;  // every thread copies as much as another
  const int n_quads = min(kTile, K - first) / 4, mine = permuted(threadIdx.x);
  const float* from = x + first + 4 * threadIdx.x;
#pragma unroll
  for (int t = 0; t < N_TOK; ++t) {
#pragma unroll
    for (int base = 0; base < kTileQuads; base += kThreads) {
      if (!kFull && base + static_cast<int>(threadIdx.x) >= n_quads) break;
      cp_async<16>(tile + t * kTileQuads + base + mine, from + static_cast<size_t>(t) * GROUPS * K + 4 * base);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
}

template <class Matrix>
__device__ __forceinline__ void multiply(const Matrix& matrix, const Part& part, const float* x, float4* tile) {
  constexpr int kQuads = Matrix::kCount / 4, kSteps = (K / Matrix::kCount + 31) / 32;  // a step: a chunk of every lane
  constexpr int kTileSteps = (kTile / Matrix::kCount + 31) / 32;
  constexpr int kFlight = kLoads / kRows < kTileSteps ? kLoads / kRows : kTileSteps;
  static_assert(kTile == K || kTileSteps % kFlight == 0, "what is in flight needs one tile only");
  constexpr bool kAligned = kRowsOf[0] / GROUPS % kRows == 0 || GROUPS == 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group_rows = part.n_rows / GROUPS, group_blocks = (group_rows + kBlockRows - 1) / kBlockRows;
  const int group = GROUPS == 1 ? 0 : part.block / group_blocks, block = part.block - group * group_blocks;
  const int first = group * group_rows + block * kBlockRows + warp * kRows, end = (group + 1) * group_rows;

  RowChunks<K, kRows, kFlight, Matrix> chunks;
  chunks.template load<kAligned>(matrix, first, end, lane);
  const int at = permuted(lane * kQuads);  // of this lane's first quad; permuted(j + quad) is permuted(j) ^ quad here
  float acc[kRows][N_TOK];
  set_zero(acc);
  pdl_wait();
#pragma unroll 1
  for (int step = 0; step < kSteps; step += kFlight) {
    if (step > 0) chunks.template load<kAligned>(matrix, first, end, lane + 32 * step);
    const int in_tile = step % kTileSteps;
    if (in_tile == 0) {
      if (step > 0) __syncthreads();  // the tile before is used up
      stage(tile, x + group * K, step * 32 * Matrix::kCount);
      __syncthreads();
    }
    const float4* of_step = tile + in_tile * 32 * kQuads;
    chunks.use(lane + 32 * step, [&](int t, int i, int quad) {
      return (of_step + (at ^ quad))[t * kTileQuads + i * 32 * kQuads];
    }, acc);
  }

  float sums[kRows * N_TOK];
#pragma unroll
  for (int i = 0; i < kRows * N_TOK; ++i) sums[i] = acc[i / N_TOK][i % N_TOK];
  int index;
  const float sum = warp_sums(sums, lane, index);
  const int row = first + index / N_TOK;
  if (index >= 0 && row < end) part.y[static_cast<size_t>(index % N_TOK) * part.n_rows + row] = sum;
}

// x f32 [N_TOK, GROUPS, K]; w_i and s_i the planes of matrix i: values [rows, K], or codes and scales; y_i f32
// [N_TOK, rows] OUT. Null pointers for the matrices there are not, and for scales that a format has not.
extern "C" __global__ void __launch_bounds__(256, kBlocks) proj(
    const float* x, const unsigned char* w0, const unsigned char* s0, float* y0, const unsigned char* w1,
    const unsigned char* s1, float* y1, const unsigned char* w2, const unsigned char* s2, float* y2,
    const unsigned char* w3, const unsigned char* s3, float* y3, const unsigned char* w4, const unsigned char* s4,
    float* y4, const unsigned char* w5, const unsigned char* s5, float* y5, const unsigned char* w6,
    const unsigned char* s6, float* y6, const unsigned char* w7, const unsigned char* s7, float* y7) {
  __shared__ __align__(16) float4 tile[N_TOK * kTileQuads];
  pdl_launch();
  const unsigned char* const w[kMost] = {w0, w1, w2, w3, w4, w5, w6, w7};
  const unsigned char* const s[kMost] = {s0, s1, s2, s3, s4, s5, s6, s7};
  float* const y[kMost] = {y0, y1, y2, y3, y4, y5, y6, y7};
  Part part{w[0], s[0], y[0], kRowsOf[0], kFormats[0], static_cast<int>(blockIdx.x)};
#pragma unroll
  for (int i = 1, before = blocks_of(0); i < kMatrices; before += blocks_of(i), ++i) {
    const int block = static_cast<int>(blockIdx.x) - before;
    if (block >= 0) part = {w[i], s[i], y[i], kRowsOf[i], kFormats[i], block};
  }
  const void *weights = part.weights, *scales = part.scales;
  if constexpr (has(f32)) {
    if (part.format == f32) multiply(PlainMatrix<float, K>{static_cast<const float*>(weights)}, part, x, tile);
  }
  if constexpr (has(f16)) {
    if (part.format == f16) multiply(PlainMatrix<__half, K>{static_cast<const __half*>(weights)}, part, x, tile);
  }
  if constexpr (has(bf16)) {
    using T = __nv_bfloat16;
    if (part.format == bf16) multiply(PlainMatrix<T, K>{static_cast<const T*>(weights)}, part, x, tile);
  }
  if constexpr (has(q8_0)) {
    const Q8Matrix<K> matrix{static_cast<const signed char*>(weights), static_cast<const __half*>(scales)};
    if (part.format == q8_0) multiply(matrix, part, x, tile);
  }
  if constexpr (has(fp8_block)) {
    const Fp8Matrix<K> matrix{part.weights, static_cast<const float*>(scales)};
    if (part.format == fp8_block) multiply(matrix, part, x, tile);
  }
}
