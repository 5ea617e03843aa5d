// Weights stored as F32, F16 or BF16: 16 bytes of a row, as FP32 values.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "convert.cuh"
#include "ptx.cuh"

template <class T>
struct PlainWeights;

// kCount weights from one 16-byte load. The load and the conversion are apart, so that several loads can be in flight.
template <>
struct PlainWeights<float> {
  static constexpr int kCount = 4;
  __device__ __forceinline__ static void decode(uint4 v, float (&out)[4]) {
    out[0] = __uint_as_float(v.x), out[1] = __uint_as_float(v.y);
    out[2] = __uint_as_float(v.z), out[3] = __uint_as_float(v.w);
  }
};
template <>
struct PlainWeights<__nv_bfloat16> {
  static constexpr int kCount = 8;
  __device__ __forceinline__ static void decode(uint4 v, float (&out)[8]) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = bf16x2_to_f32(words[i]);
      out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
  }
};
template <>
struct PlainWeights<__half> {
  static constexpr int kCount = 8;
  __device__ __forceinline__ static void decode(uint4 v, float (&out)[8]) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = f16_to_f32(words[i] & 0xffffu), out[2 * i + 1] = f16_to_f32(words[i] >> 16);
    }
  }
};
