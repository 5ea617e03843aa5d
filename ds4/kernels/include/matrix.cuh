// A weight matrix [rows, kCols] in the planes of ds4/kernels/packing, as gemv.cuh reads it.
//
// kCount weights come from one 16-byte load, the chunk, and are decoded exactly to FP32, the first 4 at a time; `Scale`
// is what else a chunk needs, the same one for kScaleRows rows from a multiple of it on. Loads and decoding are apart,
// so that many loads can be in flight. Instructions a weight, counted from the source: F32 0, BF16 1, F16 1, Q8_0 3.25,
// FP8 2.75 with the conversion of sm_89 and later and 5.25 without; the decoded weight serves all tokens.
#pragma once

#include "plain_weights.cuh"

template <class T, int kCols>
struct PlainMatrix {
  static constexpr int kCount = PlainWeights<T>::kCount;
  static constexpr int kScaleRows = 1;
  static_assert(kCols % kCount == 0, "rows are read 16 bytes at a time");
  struct Scale {};
  const T* values;

  __device__ __forceinline__ uint4 load(int row, int chunk) const {
    return load_stream16(values + static_cast<size_t>(row) * kCols + chunk * kCount);
  }
  __device__ __forceinline__ Scale scale(int, int) const { return {}; }
  __device__ __forceinline__ static void decode(uint4 v, Scale, float (&w)[4]) {
    float all[kCount];
    PlainWeights<T>::decode(v, all);
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = all[i];
  }
};

// Q8_0: codes i8 [rows, kCols], d f16 [rows, kCols / 32 padded to 8]. d * code has 19 significant bits: exact in FP32.
template <int kCols>
struct Q8Matrix {
  static constexpr int kCount = 16;
  static constexpr int kScaleRows = 1;
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
  __device__ __forceinline__ static void decode(uint4 v, Scale d, float (&w)[4]) {
    const unsigned biased = v.x ^ 0x80808080u;  // code + 128, the last byte of the float 2^23 + code + 128
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float code = __fsub_rn(__uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440u + i)), 8388736.f);
      w[i] = __fmul_rn(code, d);
    }
  }
};

// FP8 with block scales: codes e4m3 [rows, kCols], scales f32 [rows / 128 rounded up, kCols / 128 rounded up and padded
// to 4]. The product is rounded once where the scale is no power of two, as fp8_block.py does it.
template <int kCols>
struct Fp8Matrix {
  static constexpr int kCount = 16;
  static constexpr int kScaleRows = 128;
  static constexpr int kScaleStride = ((kCols + 127) / 128 + 3) / 4 * 4;
  static_assert(kCols % 16 == 0, "rows are read 16 bytes at a time");
  using Scale = float;
  const unsigned char* codes;
  const float* scales;

  __device__ __forceinline__ uint4 load(int row, int chunk) const {
    return load_stream16(codes + static_cast<size_t>(row) * kCols + chunk * kCount);
  }
  __device__ __forceinline__ Scale scale(int row, int chunk) const {
    return scales[static_cast<size_t>(row / kScaleRows) * kScaleStride + chunk / (kScaleRows / kCount)];
  }
  __device__ __forceinline__ static void decode(uint4 v, Scale scale, float (&w)[4]) {
    float values[4];
    e4m3x4_weights(v.x, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = __fmul_rn(values[i], scale);
  }
};
