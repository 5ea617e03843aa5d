// proj: activations of up to 8 tokens times the rows of up to 8 weight matrices that share them (spec model.md 2.3,
// 2.6, kernels.md b.1, b.3). One source for proj_in, proj_q, proj_oa and proj_ob, and for any other single matrix.
//
//   y_i[t][r] = sum over k of W_i[r][k] * x[t][g][k]     g = r / (rows of W_i / GROUPS), 0 where GROUPS is 1
//
// x FP32, W_i F32, F16, BF16, Q8_0 or FP8 with block scales, each of its own format, multiplied exactly (dense_tiles.cuh)
// on the tensor cores (mma_rows.cuh).
//
// Grid: any number of blocks up to that of the units, as many as the device takes at once. Units of rows (dense_rows.cuh) are
// counted through matrix 0, matrix 1, ..., within a matrix group by group, and every block takes an equal run of them; it
// goes on with the x that it has staged until the group changes, where x fits as a whole. Block 256.
// The first weights, 4 KB a warp, are asked for before the wait for the previous launch.
//
// Order: mma_rows.cuh; it depends on K and the format only.
//
// Bytes in flight: 64 KB a multiprocessor at N_TOK 1 and 2 (2 blocks), 32 or 64 KB at more (1 block). Wanted (kernels.md
// b.0): 19 KB on H200, 33 KB on B200. Blocks at the dimensions of V4-Flash at N_TOK 1, 2 / 8, for 132 SMs (H200):
//   proj_in   K 4096: 4160 rows (CSA) 260 / 130, 2560 (HCA) 160 / 80, 1536 (SWA) 96 / 48
//   proj_q    K 1024: 264 / 132          proj_oa   K 4096: 264 / 132          proj_ob   K 8192: 256 / 128
//
// Bytes: the weights once (a CSA layer as shipped: 27.8 MB for proj_in, 42.0 for proj_q, 33.6 for proj_oa and for
// proj_ob), and x once a block and run of units, or once a unit where it does not fit, from L2.
// Thread-instructions for a byte of weights, by scripts/kernel_instructions.py for sm_90a at N_TOK 1 / 2 / 8: FP8 3.3 / 4.1 /
// 5.8, Q8_0 3.0 / 3.7 / 5.7, F16 2.4 / 3.3 / 3.7, BF16 0.6 / 1.6 / 2.0; at K 1024, where sums are handed over more often and
// what is staged stays, FP8 5.1 / 5.1 / 3.7 and Q8_0 4.3 / 4.3 / 3.7. Staging is in it where a unit does it: at N_TOK 8 it is
// two of FP8's 5.8. H200 has about 7 and B200 about 5 for each byte it can stream (estimates of kernels.md b.0).
// Estimates, not measured, for a CSA layer as shipped on H200 at any N_TOK, at 60 to 75 % of copy (4.2 TB/s): proj_in 11 us,
// proj_q 14, proj_oa 11, proj_ob 11; on GB10 at 75 to 88 % (232 GB/s) 160, 213, 164, 164.
#include "dense_rows.cuh"

#if !defined(K) || !defined(N_TOK) || !defined(GROUPS) || !defined(ROWS) || !defined(FORMATS)
#error "K, N_TOK, GROUPS and the lists ROWS and FORMATS must be defined"
#endif

enum Format { f32, f16, bf16, q8_0, fp8_block };
constexpr int kRowsOf[] = {ROWS};
constexpr Format kFormats[] = {FORMATS};
constexpr int kMatrices = sizeof(kRowsOf) / sizeof(int);
constexpr int kMost = 8;
using Plan = RowsPlan<K, N_TOK>;
static_assert(N_TOK >= 1 && N_TOK <= 8, "decode form");
static_assert(kMatrices <= kMost && sizeof(kFormats) / sizeof(Format) == kMatrices, "a format and a row count each");
static_assert(GROUPS == 1 || (kMatrices == 1 && kRowsOf[0] % GROUPS == 0), "groups of equal size, of one matrix");

struct Part {  // a matrix, and its units among those of all
  const unsigned char *weights, *scales;
  float* y;
  int n_rows;
  Format format;
  int begin, end;
};

__device__ constexpr int units(int matrix) { return units_of<Plan>(kRowsOf[matrix] / GROUPS, GROUPS); }
__device__ constexpr int all_units() {
  int sum = 0;
  for (int i = 0; i < kMatrices; ++i) sum += units(i);
  return sum;
}
__device__ constexpr bool has(Format format) {
  for (int i = 0; i < kMatrices; ++i) {
    if (kFormats[i] == format) return true;
  }
  return false;
}

template <class Matrix>
__device__ __forceinline__ void multiply(DenseRows<Plan>& rows, const Part& part, int begin, int end) {
  const Matrix matrix(PlanePointers{{part.weights, part.scales, nullptr, nullptr}});
  rows.run(matrix, {part.n_rows / GROUPS, GROUPS}, begin, end, [&](int, int row, int token, float value) {
    part.y[static_cast<size_t>(token) * part.n_rows + row] = value;
  });
}

// x f32 [N_TOK, GROUPS, K]; w_i and s_i the planes of matrix i: values [rows, K], or codes and scales; y_i f32
// [N_TOK, rows] OUT. Null pointers for the matrices there are not, and for scales that a format has not.
extern "C" __global__ void __launch_bounds__(256, Plan::kBlocks) proj(
    const float* x, const unsigned char* w0, const unsigned char* s0, float* y0, const unsigned char* w1,
    const unsigned char* s1, float* y1, const unsigned char* w2, const unsigned char* s2, float* y2,
    const unsigned char* w3, const unsigned char* s3, float* y3, const unsigned char* w4, const unsigned char* s4,
    float* y4, const unsigned char* w5, const unsigned char* s5, float* y5, const unsigned char* w6,
    const unsigned char* s6, float* y6, const unsigned char* w7, const unsigned char* s7, float* y7) {
  extern __shared__ __align__(16) unsigned char memory[];
  pdl_launch();
  const unsigned char* const w[kMost] = {w0, w1, w2, w3, w4, w5, w6, w7};
  const unsigned char* const s[kMost] = {s0, s1, s2, s3, s4, s5, s6, s7};
  float* const y[kMost] = {y0, y1, y2, y3, y4, y5, y6, y7};
  DenseRows<Plan> rows(x, memory);
  const long long block = blockIdx.x;
  const int end = static_cast<int>((block + 1) * all_units() / gridDim.x);
#pragma unroll 1
  for (int unit = static_cast<int>(block * all_units() / gridDim.x); unit < end;) {
    Part part{w[0], s[0], y[0], kRowsOf[0], kFormats[0], 0, units(0)};
#pragma unroll
    for (int i = 1, before = units(0); i < kMatrices; before += units(i), ++i) {
      if (unit >= before) part = {w[i], s[i], y[i], kRowsOf[i], kFormats[i], before, before + units(i)};
    }
    const int first = unit - part.begin, last = min(end, part.end) - part.begin;
    if constexpr (has(f32)) {
      if (part.format == f32) multiply<F32Tile<K>>(rows, part, first, last);
    }
    if constexpr (has(f16)) {
      if (part.format == f16) multiply<F16Tile<K>>(rows, part, first, last);
    }
    if constexpr (has(bf16)) {
      if (part.format == bf16) multiply<Bf16Tile<K>>(rows, part, first, last);
    }
    if constexpr (has(q8_0)) {
      if (part.format == q8_0) multiply<Q8Tile<K>>(rows, part, first, last);
    }
    if constexpr (has(fp8_block)) {
      if (part.format == fp8_block) multiply<Fp8Tile<K>>(rows, part, first, last);
    }
    unit = part.begin + last;
  }
}
