// Rows of a weight matrix times a few activation vectors: the matrix is streamed once, whatever the number of tokens.
//
//   acc[r][t] = sum over k of W[first + r][k] * x[t][k],   W dequantised exactly to FP32, x FP32
//
// One warp owns kRows neighbouring rows. Lane l takes the 16-byte chunks l, l + 32, l + 64, ... of each row, so that a warp
// reads 512 contiguous bytes; kFlight chunks of all kRows rows are loaded before the first is used. A weight is decoded
// once for all kTok tokens, an activation read once (from L1) for all kRows rows.
//
// Order: a lane adds its chunks by rising index and within a chunk by rising k, fmaf throughout; lanes by the butterfly of
// reduce.cuh. It depends on the format and on kCols alone: not on kRows, kTok, kFlight or the grid.
#pragma once

#include "plain_weights.cuh"
#include "reduce.cuh"

// A matrix [rows, kCols] as planes of ds4/kernels/packing. kCount weights come from 16 bytes, in quads of 4; `Scale` is
// what else a chunk needs.

template <class T, int kCols>
struct PlainMatrix {
  static constexpr int kCount = PlainWeights<T>::kCount;
  static_assert(kCols % kCount == 0, "rows are read 16 bytes at a time");
  struct Scale {};
  const T* values;

  __device__ __forceinline__ uint4 load(int row, int chunk) const {
    return load_stream16(values + static_cast<size_t>(row) * kCols + chunk * kCount);
  }
  __device__ __forceinline__ Scale scale(int, int) const { return {}; }
  __device__ __forceinline__ static void decode(uint4 v, Scale, int quad, float (&w)[4]) {
    float all[kCount];
    PlainWeights<T>::decode(v, all);
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = all[4 * quad + i];
  }
};

// Q8_0: codes i8 [rows, kCols], d f16 [rows, kCols / 32 padded to 8]. d * code has 19 significant bits: exact in FP32.
template <int kCols>
struct Q8Matrix {
  static constexpr int kCount = 16;
  static constexpr int kScaleStride = (kCols / 32 + 7) / 8 * 8;
  static_assert(kCols % 32 == 0, "rows are whole blocks of 32");
  using Scale = float;
  const signed char* codes;
  const __half* d;

  __device__ __forceinline__ uint4 load(int row, int chunk) const {
    return load_stream16(codes + static_cast<size_t>(row) * kCols + chunk * kCount);
  }
  __device__ __forceinline__ Scale scale(int row, int chunk) const {
    return __half2float(d[static_cast<size_t>(row) * kScaleStride + chunk / 2]);
  }
  __device__ __forceinline__ static void decode(uint4 v, Scale d, int quad, float (&w)[4]) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
    const unsigned biased = words[quad] ^ 0x80808080u;  // code + 128, the last byte of the float 2^23 + code + 128
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float code = __fsub_rn(__uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440u + i)), 8388736.f);
      w[i] = __fmul_rn(code, d);
    }
  }
};

// acc of rows first .. first + kRows - 1, the same in all lanes; a row from n_rows on repeats the last one. x f32
// [kTok, kCols], on 16 bytes. All 32 lanes of the warp call it with the same rows.
template <int kCols, int kRows, int kTok, int kFlight, class Matrix>
__device__ __forceinline__ void gemv_rows(const Matrix& matrix, int first, int n_rows, const float* __restrict__ x, int lane,
                                          float (&acc)[kRows][kTok]) {
  constexpr int kChunks = kCols / Matrix::kCount;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kTok; ++t) acc[r][t] = 0.f;
  }
#pragma unroll 1
  for (int base = lane; base < kChunks; base += 32 * kFlight) {
    uint4 raw[kFlight][kRows];
    typename Matrix::Scale scale[kFlight][kRows];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int chunk = min(base + 32 * i, kChunks - 1), row = min(first + r, n_rows - 1);
        raw[i][r] = matrix.load(row, chunk);
        scale[i][r] = matrix.scale(row, chunk);
      }
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int chunk = base + 32 * i;
      if (chunk >= kChunks) break;
#pragma unroll
      for (int quad = 0; quad < Matrix::kCount / 4; ++quad) {
        float w[kRows][4];
#pragma unroll
        for (int r = 0; r < kRows; ++r) Matrix::decode(raw[i][r], scale[i][r], quad, w[r]);
#pragma unroll
        for (int t = 0; t < kTok; ++t) {
          const float4 v = *reinterpret_cast<const float4*>(x + t * kCols + chunk * Matrix::kCount + 4 * quad);
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
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kTok; ++t) acc[r][t] = warp_sum(acc[r][t]);
  }
}
