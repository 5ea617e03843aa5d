// gemm: activations of a prompt's tokens times the rows of up to 8 weight matrices that share them (spec model.md 2.3, 2.6,
// 2.7, kernels.md c). One source for proj_in, the router, proj_q, proj_oa and proj_ob of the prefill form.
//
//   y_i[t][r] = sum over k of W_i[r][k] * x[t][g][k]     g = r / (rows of W_i / GROUPS), 0 where GROUPS is 1
//
// x BF16, W_i F32, F16, BF16, Q8_0 or FP8 with block scales, each of its own format, exact (dense_tiles.cuh); y_i FP32, or
// rounded to the nearest BF16, as OUT says. Products on the tensor cores, sums in FP32 (gemm_tiles.cuh).
//
// Grid: the units of rows times the tiles of TOKENS tokens, tiles running fastest, so that blocks which run together read the
// same weights and the whole of x comes from L2. Units are counted through matrix 0, matrix 1, ..., within a matrix group by
// group. A tile without live tokens leaves at once. Block 32 kWarps: few warps and many loads on their way for few tokens,
// where weights are what takes time; eight warps for many, and from 128 on two row tiles a warp for one-byte weights, which
// halves what is read of shared memory and of L2 for a product.
//
// Order: gemm_tiles.cuh; it depends on K and the format, so a row on nothing but its own x and the weights.
//
// At the dimensions of V4-Flash and 4096 tokens: proj_in (CSA) 140 GFLOP, proj_q 344, proj_oa and proj_ob 275 each, the
// router 8.6. H200: a block of 256 rows and 128 tokens reads 64 KB of x and weights from L2 for 8.4 MFLOP, 19 bytes a clock and
// multiprocessor at 550 TFLOPS. Of one-byte weights a chunk takes a warp 256 mma in 1180 (FP8) or 1410 (Q8_0) instructions on
// sm_90a (scripts/kernel_instructions.py), so that each of the four schedulers, of two warps, issues for 2360 or 2820 clocks;
// 512 mma take its tensor core 2048 clocks at its peak, 3300 at the 62 % that mma.sync is known for. Estimate, not measured:
// 450 to 550 TFLOPS, so 0.3 ms for proj_in, 0.7 for proj_q, 0.55 for the others. At 8 tokens FP8 takes 4 instructions of a
// thread for a byte of weights, less than the 7 an H200 has: the time of the weights, but for proj_in, whose 130 blocks of
// two warps have little in flight, 10 us rather than 7.
#include "dense_tiles.cuh"
#include "gemm_tiles.cuh"
#include "live_rows.cuh"

#if !defined(K) || !defined(TOKENS) || !defined(STAGES) || !defined(GROUPS) || !defined(ROWS)
#error "K, TOKENS, STAGES, GROUPS and the list ROWS must be defined"
#endif
#if !defined(FORMATS) || !defined(OUT)
#error "the lists FORMATS and OUT must be defined"
#endif

enum Format { f32, f16, bf16, q8_0, fp8_block };
constexpr int kRowsOf[] = {ROWS};
constexpr Format kFormats[] = {FORMATS}, kOuts[] = {OUT};
constexpr int kMatrices = sizeof(kRowsOf) / sizeof(int);
constexpr int kMost = 8;
static_assert(kMatrices <= kMost && sizeof(kFormats) / sizeof(Format) == kMatrices, "a format and a row count each");
static_assert(sizeof(kOuts) / sizeof(Format) == kMatrices, "and the type of the results");
static_assert(GROUPS == 1 || (kMatrices == 1 && kRowsOf[0] % GROUPS == 0), "groups of equal size, of one matrix");

// gemm/plan.py has the same.
constexpr int kWarps = TOKENS >= 64 ? 8 : TOKENS >= 32 ? 4 : 2, kThreads = 32 * kWarps;
constexpr int kResident = TOKENS >= 128 ? 1 : TOKENS >= 64 ? 2 : 4;
__device__ constexpr int deep_of(Format format) { return TOKENS >= 128 && format >= q8_0 ? 2 : 1; }
__device__ constexpr int block_rows(Format format) { return kTileRows * kWarps * deep_of(format); }

// As many chunks ahead as 80 registers hold, up to four.
template <class Matrix>
__device__ constexpr int ahead_of() {
  constexpr int kFit = 320 / static_cast<int>(sizeof(typename RowPair<Matrix, Matrix>::Raw));
  constexpr int kWanted = TOKENS >= 64 ? 1 : TOKENS >= 32 ? 2 : 4;
  return kFit < 1 ? 1 : kFit < kWanted ? kFit : kWanted;
}

struct Part {  // a matrix, and its units among those of all
  const unsigned char *weights, *scales;
  unsigned char* y;
  int n_rows;
  Format format, out;
  int begin;
};

__device__ constexpr int units(int matrix) {
  const int rows = kRowsOf[matrix] / GROUPS, of_block = block_rows(kFormats[matrix]);
  return GROUPS * ((rows + of_block - 1) / of_block);
}
__device__ constexpr bool has(Format format) {
  for (int i = 0; i < kMatrices; ++i) {
    if (kFormats[i] == format) return true;
  }
  return false;
}

// One token's results of rows `row` and row + 1 of a part, of which the second one may not be there.
__device__ __forceinline__ void store(const Part& part, int token, int row, bool two, float first, float second) {
  const size_t at = static_cast<size_t>(token) * part.n_rows + row;
  const bool pair = two && part.n_rows % 2 == 0;  // so that pairs begin on their size
  if (part.out == bf16) {
    unsigned short* y = reinterpret_cast<unsigned short*>(part.y) + at;
    const unsigned words = f32x2_to_bf16(first, second);
    if (pair) {
      *reinterpret_cast<unsigned*>(y) = words;
    } else {
      y[0] = static_cast<unsigned short>(words);
      if (two) y[1] = static_cast<unsigned short>(words >> 16);
    }
  } else {
    float* y = reinterpret_cast<float*>(part.y) + at;
    if (pair) {
      *reinterpret_cast<float2*>(y) = make_float2(first, second);
    } else {
      y[0] = first;
      if (two) y[1] = second;
    }
  }
}

// Unit `unit` of a part, times the tokens from `token` on.
template <class Matrix, Format kFormat>
__device__ __forceinline__ void multiply(const Part& part, int unit, const unsigned short* x, const int* count, int n_rows,
                                         int token, unsigned char* memory) {
  using Plan = GemmPlan<K, TOKENS, STAGES, kWarps, deep_of(kFormat), ahead_of<Matrix>()>;
  static_assert(Plan::kRows == block_rows(kFormat) && !Matrix::kMinima, "as the grid has it");
  const Matrix matrix(PlanePointers{{part.weights, part.scales, nullptr, nullptr}});
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int of_group = part.n_rows / GROUPS, in_group = (of_group + Plan::kRows - 1) / Plan::kRows;
  const int group = unit / in_group, begin = group * of_group, end = begin + of_group;
  // Of row tile d; the mma's rows g and g + 8 are neighbours, so that a lane writes both at once.
  const auto row_of = [&](int d) {
    return begin + unit % in_group * Plan::kRows + (d * kWarps + warp) * kTileRows + lane / 4 * 2;
  };
  const auto rows = [&](int d) -> RowPair<Matrix, Matrix> {
    const int row = row_of(d);
    return {matrix, matrix, static_cast<size_t>(min(row, end - 1)), static_cast<size_t>(min(row + 1, end - 1))};
  };
#pragma unroll
  for (int d = 0; d < Plan::kDeep; ++d) {
    if (lane % 4 < 2) prefetch_l2(matrix.codes(min(row_of(d) + lane % 4, end - 1)));
  }
  pdl_wait();
  const int n_tokens = min(TOKENS, live_rows(count, n_rows) - token);
  if (n_tokens <= 0) return;
  float acc[Plan::kDeep][Plan::kTiles][4];
  const unsigned short* first = x + (static_cast<size_t>(token) * GROUPS + group) * K;
  gemm_tile<Plan>(matrix, matrix, rows, [&](int t) { return first + static_cast<size_t>(t) * (GROUPS * K); }, n_tokens,
                  memory, acc);
#pragma unroll
  for (int d = 0; d < Plan::kDeep; ++d) {
    const int row = row_of(d);
    if (row >= end) continue;
#pragma unroll
    for (int i = 0; i < Plan::kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int t = 8 * i + lane % 4 * 2 + j;
        if (t < n_tokens) store(part, token + t, row, row + 1 < end, acc[d][i][j], acc[d][i][j + 2]);
      }
    }
  }
}

// x bf16 [n_rows, GROUPS, K]; count i32 [1] or null; w_i and s_i the planes of matrix i: values [rows, K], or codes and
// scales; y_i f32 or bf16 [n_rows, rows] OUT. Null pointers for the matrices there are not, and for scales that a format has
// not. Dynamic shared memory: GemmPlan::bytes(false).
extern "C" __global__ void __launch_bounds__(kThreads, kResident) gemm(
    const __nv_bfloat16* x, const int* count, const unsigned char* w0, const unsigned char* s0, unsigned char* y0,
    const unsigned char* w1, const unsigned char* s1, unsigned char* y1, const unsigned char* w2, const unsigned char* s2,
    unsigned char* y2, const unsigned char* w3, const unsigned char* s3, unsigned char* y3, const unsigned char* w4,
    const unsigned char* s4, unsigned char* y4, const unsigned char* w5, const unsigned char* s5, unsigned char* y5,
    const unsigned char* w6, const unsigned char* s6, unsigned char* y6, const unsigned char* w7, const unsigned char* s7,
    unsigned char* y7, int n_rows) {
  extern __shared__ __align__(16) unsigned char memory[];
  pdl_launch();
  const unsigned char* const w[kMost] = {w0, w1, w2, w3, w4, w5, w6, w7};
  const unsigned char* const s[kMost] = {s0, s1, s2, s3, s4, s5, s6, s7};
  unsigned char* const y[kMost] = {y0, y1, y2, y3, y4, y5, y6, y7};
  const int n_tiles = (n_rows + TOKENS - 1) / TOKENS, index = blockIdx.x;
  const int token = index % n_tiles * TOKENS, of_all = index / n_tiles;
  Part part{w[0], s[0], y[0], kRowsOf[0], kFormats[0], kOuts[0], 0};
#pragma unroll
  for (int i = 1, before = units(0); i < kMatrices; before += units(i), ++i) {
    if (of_all >= before) part = {w[i], s[i], y[i], kRowsOf[i], kFormats[i], kOuts[i], before};
  }
  const int unit = of_all - part.begin;
  const unsigned short* values = reinterpret_cast<const unsigned short*>(x);
  if constexpr (has(f32)) {
    if (part.format == f32) multiply<F32Tile<K>, f32>(part, unit, values, count, n_rows, token, memory);
  }
  if constexpr (has(f16)) {
    if (part.format == f16) multiply<F16Tile<K>, f16>(part, unit, values, count, n_rows, token, memory);
  }
  if constexpr (has(bf16)) {
    if (part.format == bf16) multiply<Bf16Tile<K>, bf16>(part, unit, values, count, n_rows, token, memory);
  }
  if constexpr (has(q8_0)) {
    if (part.format == q8_0) multiply<Q8Tile<K>, q8_0>(part, unit, values, count, n_rows, token, memory);
  }
  if constexpr (has(fp8_block)) {
    if (part.format == fp8_block) multiply<Fp8Tile<K>, fp8_block>(part, unit, values, count, n_rows, token, memory);
  }
}
