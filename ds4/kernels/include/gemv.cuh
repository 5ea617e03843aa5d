// Rows of a weight matrix times a few activation vectors: the matrix is streamed once, whatever the number of tokens.
//
//   acc[r][t] = sum over k of W[first + r][k] * x[t][k],   W dequantised exactly to FP32, x FP32
//
// One warp owns kRows neighbouring rows. Lane l takes the 16-byte chunks l, l + 32, l + 64, ... of each row, so that a
// warp reads 512 contiguous bytes; kFlight chunks of all kRows rows are loaded before the first is used. A weight is
// decoded once for all kTok tokens, an activation read once for all kRows rows.
//
// Order: a lane adds its chunks by rising index and within a chunk by rising k, fmaf throughout; lanes by the butterfly
// of reduce.cuh. It depends on the format and on kCols alone: not on kRows, kTok, kFlight or the grid.
#pragma once

#include "matrix.cuh"
#include "reduce.cuh"

// A chunk of kQuads quads without its first one.
template <int kQuads>
__device__ __forceinline__ uint4 next_quad(uint4 v) {
  return kQuads == 4 ? make_uint4(v.y, v.z, v.w, 0u) : make_uint4(v.z, v.w, 0u, 0u);
}

// What a warp has in flight: chunks base, base + 32, ... of kRows rows, base being the lane and a multiple of 32
// kFlight.
template <int kCols, int kRows, int kFlight, class Matrix>
struct RowChunks {
  static constexpr int kChunks = kCols / Matrix::kCount;
  uint4 raw[kFlight][kRows];
  typename Matrix::Scale scale[kFlight][kRows];

  // Rows first .. first + kRows - 1; a row from n_rows on repeats the last one. kAligned: `first` is a multiple of
  // kRows.
  template <bool kAligned>
  __device__ __forceinline__ void load(const Matrix& matrix, int first, int n_rows, int base) {
    constexpr bool kOneScale = kAligned && Matrix::kScaleRows % kRows == 0;
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int chunk = min(base + 32 * i, kChunks - 1), row = min(first + r, n_rows - 1);
        raw[i][r] = matrix.load(row, chunk);
        scale[i][r] = kOneScale && r > 0 ? scale[i][0] : matrix.scale(row, chunk);
      }
    }
  }

  // Add the products. `x(t, i, quad)` gives four activations of token t: those of quad `quad` of chunk base + 32 i. The
  // chunks are used up.
  template <int kTok, class Activations>
  __device__ __forceinline__ void use(int base, const Activations& x, float (&acc)[kRows][kTok]) {
    // Unrolled where there are few sums; where there are many, ptxas would decode far ahead and run out of registers.
    constexpr int kQuads = Matrix::kCount / 4, kUnroll = kRows * kTok >= 16 ? 1 : kQuads;
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (base + 32 * i >= kChunks) break;
#pragma unroll kUnroll
      for (int quad = 0; quad < kQuads; ++quad) {
        float w[kRows][4];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          Matrix::decode(raw[i][r], scale[i][r], w[r]);
          raw[i][r] = next_quad<kQuads>(raw[i][r]);
        }
#pragma unroll
        for (int t = 0; t < kTok; ++t) {
          const float4 v = x(t, i, quad);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            acc[r][t] = fmaf(w[r][0], v.x, acc[r][t]);
            acc[r][t] = fmaf(w[r][1], v.y, acc[r][t]);
            acc[r][t] = fmaf(w[r][2], v.z, acc[r][t]);
            acc[r][t] = fmaf(w[r][3], v.w, acc[r][t]);
          }
        }
      }
    }
  }
};

template <int kRows, int kTok>
__device__ __forceinline__ void set_zero(float (&acc)[kRows][kTok]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kTok; ++t) acc[r][t] = 0.f;
  }
}

// acc of rows first .. first + kRows - 1, the same in all lanes; a row from n_rows on repeats the last one. x f32
// [kTok, kCols], on 16 bytes. All 32 lanes of the warp call it with the same rows.
template <int kCols, int kRows, int kTok, int kFlight, class Matrix>
__device__ __forceinline__ void gemv_rows(const Matrix& matrix, int first, int n_rows, const float* __restrict__ x,
                                          int lane, float (&acc)[kRows][kTok]) {
  set_zero(acc);
#pragma unroll 1
  for (int base = lane; base < kCols / Matrix::kCount; base += 32 * kFlight) {
    RowChunks<kCols, kRows, kFlight, Matrix> chunks;
    chunks.template load<false>(matrix, first, n_rows, base);
    chunks.use(base, [&](int t, int i, int quad) {
      return *reinterpret_cast<const float4*>(x + t * kCols + (base + 32 * i) * Matrix::kCount + 4 * quad);
    }, acc);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kTok; ++t) acc[r][t] = warp_sum(acc[r][t]);
  }
}

// Sums of v[0] .. v[kCount - 1] over the warp, each bit for bit that of warp_sum; a lane gets one of them, and in
// `index` which one, or -1 where another lane has the same. At each step of the butterfly a lane goes on with half of
// the values and leaves the others to its partner: kCount shuffles or a few more, where warp_sum needs 5 kCount.
template <int kCount, int kOffset = 16>
__device__ __forceinline__ float warp_sums(const float (&v)[kCount], int lane, int& index) {
  static_assert(kCount <= 2 * kOffset, "one value is left at the end");
  constexpr int kHalf = (kCount + 1) / 2;
  const bool upper = lane & kOffset;
  float kept[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const int other = i + kHalf < kCount ? i + kHalf : i;
    kept[i] = __fadd_rn(upper ? v[other] : v[i], reduce::exchange(upper ? v[i] : v[other], kOffset));
  }
  float sum;
  if constexpr (kOffset > 1) {
    sum = warp_sums<kHalf, kOffset / 2>(kept, lane, index);
  } else {
    sum = kept[0];
    index = 0;
  }
  if (upper && index >= 0) index = index + kHalf < kCount ? index + kHalf : -1;
  return sum;
}
