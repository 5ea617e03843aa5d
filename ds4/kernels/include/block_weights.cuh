// Matrices as planes of ds4/kernels/packing, in the form in which a warp multiplies them (moe/expert_rows.cuh): cut into
// chunks, one of which a lane loads and uses at a time, and into sub-blocks of weights that share a scale. The codes are
// decoded without the scale, which is applied once to the sum of a sub-block.
//
//   Raw                 a chunk as it was loaded
//   kCount              weights of a chunk, kSub of each of its sub-blocks, in this order
//   kUnit               neighbouring weights that are decoded together, 4 or 8
//   kScaled             whether sub-blocks have scales; else weights are what decode gives, and kSub says nothing
//   kPatterns           whether decode uses the table of IQ2_XXS (iq2_weights.cuh)
//   kShifted            decode gives v, and a weight is scale * (v - 1) - minimum; else it is scale * v
//   load(row, chunk)    of rows of kCols weights, by lane chunk % 32
//   column(chunk)       of its first weight; offset(unit) is the distance of a unit from there. A multiple of 4 each, and
//                       the binary digits of the two are apart
//   decode(raw, unit)   kUnit weights; exact, as are scale(raw, s) and minimum(raw, s)
//   kTokens             the most tokens of a pass, 2 or 4: with more of them, registers would spill
//   kFewTokens, kManyTokens   blocks of 256 threads of a multiprocessor that leave each as many registers as two rows times
//                       1 or 2 tokens take, or up to kTokens
//   codes(row)          where the row's largest plane begins, kCodeBytes a row: for prefetching
//
// All are built from four plane pointers and that table, which the others ignore.
#pragma once

#include "plain_weights.cuh"

struct PlanePointers {
  const unsigned char* plane[4];
};

// Bytes of a row of a plane that uses `bytes` of them.
__device__ constexpr int padded_row(int bytes) { return (bytes + 15) / 16 * 16; }

// An integer below 2^23 as a float. Conversion instructions run at a quarter of the rate of others.
__device__ __forceinline__ float small_to_f32(unsigned i) {
  return __fsub_rn(__uint_as_float(0x4b000000u | i), 8388608.f);
}
__device__ __forceinline__ unsigned word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
// Byte i of `bytes` as the last byte of the float 2^23 + byte.
__device__ __forceinline__ float byte_above_2_23(unsigned bytes, int i) {
  return __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440u + i));
}
// f16 values in the lower and upper half of a word, by instructions that take a half as it is.
__device__ __forceinline__ void f16x2_to_f32(unsigned pair, float& low, float& high) {
  const __half2 halves = *reinterpret_cast<const __half2*>(&pair);
  low = __low2float(halves), high = __high2float(halves);
}

template <class T, int kCols>
struct FloatWeights {
  static constexpr int kCount = PlainWeights<T>::kCount, kUnit = 4, kSub = kCount;
  static constexpr bool kScaled = false, kShifted = false, kPatterns = false;
  static constexpr int kTokens = 4, kFewTokens = 4, kManyTokens = 2;
  static constexpr int kCodeBytes = padded_row(kCols * static_cast<int>(sizeof(T)));
  static_assert(kCols % kCount == 0, "rows are whole chunks");
  struct Raw {
    uint4 values;
  };
  const unsigned char* values;

  __device__ __forceinline__ FloatWeights(const PlanePointers& p, const uint2*) : values(p.plane[0]) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const { return {load_stream16(codes(row) + 16 * chunk)}; }
  __device__ __forceinline__ static int column(int chunk) { return chunk * kCount; }
  __device__ static constexpr int offset(int unit) { return unit * kUnit; }
  __device__ __forceinline__ static void decode(const Raw& raw, int unit, float (&w)[kUnit]) {
    float all[kCount];
    PlainWeights<T>::decode(raw.values, all);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) w[i] = all[unit * kUnit + i];
  }
  __device__ __forceinline__ static float scale(const Raw&, int) { return 1.f; }
  __device__ __forceinline__ static float minimum(const Raw&, int) { return 0.f; }
};
template <int kCols>
using F32Weights = FloatWeights<float, kCols>;
template <int kCols>
using F16Weights = FloatWeights<__half, kCols>;
template <int kCols>
using Bf16Weights = FloatWeights<__nv_bfloat16, kCols>;

// Q8_0: codes i8 [rows, kCols], d f16 [rows, kCols / 32]. A chunk is half a block.
template <int kCols>
struct Q8Weights {
  static constexpr int kCount = 16, kUnit = 4, kSub = 16;
  static constexpr bool kScaled = true, kShifted = false, kPatterns = false;
  static constexpr int kTokens = 4, kFewTokens = 4, kManyTokens = 2;
  static constexpr int kCodeBytes = padded_row(kCols), kScaleBytes = padded_row(kCols / 16);
  static_assert(kCols % 32 == 0, "rows are whole blocks");
  struct Raw {
    uint4 codes;
    unsigned short d;
  };
  const unsigned char *values, *d;

  __device__ __forceinline__ Q8Weights(const PlanePointers& p, const uint2*) : values(p.plane[0]), d(p.plane[1]) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {load_stream16(codes(row) + 16 * chunk),
            reinterpret_cast<const unsigned short*>(d + row * kScaleBytes)[chunk / 2]};
  }
  __device__ __forceinline__ static int column(int chunk) { return chunk * kCount; }
  __device__ static constexpr int offset(int unit) { return unit * kUnit; }
  __device__ __forceinline__ static void decode(const Raw& raw, int unit, float (&w)[kUnit]) {
    const unsigned biased = word_of(raw.codes, unit) ^ 0x80808080u;  // code + 128
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = __fsub_rn(byte_above_2_23(biased, i), 8388736.f);
  }
  __device__ __forceinline__ static float scale(const Raw& raw, int) { return f16_to_f32(raw.d); }
  __device__ __forceinline__ static float minimum(const Raw&, int) { return 0.f; }
};

// FP8 with a scale for 128 x 128 weights: codes e4m3 [rows, kCols], scales f32 [rows / 128, kCols / 128]. Matrices that
// share the planes, as experts do, begin on multiples of 128 rows. The codes become f16 numbers 2^8 too small, so that one
// f16 conversion handles subnormals as well; the scale makes up for it.
template <int kCols>
struct Fp8Weights {
  static constexpr int kCount = 16, kUnit = 4, kSub = 16;
  static constexpr bool kScaled = true, kShifted = false, kPatterns = false;
  static constexpr int kTokens = 4, kFewTokens = 4, kManyTokens = 2;
  static constexpr int kCodeBytes = padded_row(kCols), kScaleBytes = padded_row((kCols + 127) / 128 * 4);
  static_assert(kCols % 16 == 0, "rows are whole chunks");
  struct Raw {
    uint4 codes;
    float scale;
  };
  const unsigned char *values, *scales;

  __device__ __forceinline__ Fp8Weights(const PlanePointers& p, const uint2*)
      : values(p.plane[0]), scales(p.plane[1]) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {load_stream16(codes(row) + 16 * chunk),
            reinterpret_cast<const float*>(scales + row / 128 * kScaleBytes)[chunk / 8]};
  }
  __device__ __forceinline__ static int column(int chunk) { return chunk * kCount; }
  __device__ static constexpr int offset(int unit) { return unit * kUnit; }
  __device__ __forceinline__ static void decode(const Raw& raw, int unit, float (&w)[kUnit]) {
    const unsigned word = word_of(raw.codes, unit), even = word << 8;  // codes 0, 2 and 1, 3 in upper bytes
    f16x2_to_f32((even & 0x80008000u) | (even >> 1 & 0x3f803f80u), w[0], w[2]);
    f16x2_to_f32((word & 0x80008000u) | (word >> 1 & 0x3f803f80u), w[1], w[3]);
  }
  __device__ __forceinline__ static float scale(const Raw& raw, int) { return __fmul_rn(raw.scale, 256.f); }
  __device__ __forceinline__ static float minimum(const Raw&, int) { return 0.f; }
};
