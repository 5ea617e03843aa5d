// NVFP4 and MXFP4 in the form of block_weights.cuh: e2m1 codes, weight 2 j in the low nibble of byte j. 32 weights a chunk.
#pragma once

#include "block_weights.cuh"

// Eight e2m1 codes, the first in the lowest bits, times 2^kShift. The f16 numbers 0 .5 1 1.5 2 3 4 6 have nothing in their
// lower bytes, so that a byte permutation with three bits of each code as selectors looks up the upper ones, four at a
// time. Another one pairs those of two weights, with zeros below them: the replicated sign of a byte that has none. Then
// the signs are put in, two at a time. 16 integer instructions and 8 conversions.
template <int kShift>
__device__ __forceinline__ void e2m1x8_to_f32_by_table(unsigned codes, float (&w)[8]) {
  constexpr unsigned kExponent = kShift << 2;  // in the upper byte of an f16
  constexpr unsigned kLow = 0x3e3c3800u + (kExponent << 8 | kExponent << 16 | kExponent << 24);
  constexpr unsigned kHigh = 0x46444240u + kExponent * 0x01010101u;
  const unsigned first = __byte_perm(kLow, kHigh, codes & 0x7777u);
  const unsigned second = __byte_perm(kLow, kHigh, codes >> 16 & 0x7777u);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned pair = __byte_perm(first, second, 0x0808u | i << 4 | (i + 4) << 12);
    f16x2_to_f32(pair | (codes << (12 - 4 * i) & 0x80008000u), w[i], w[i + 4]);
  }
}

// codes u8 [rows, kCols / 2], scales e4m3 [rows, kCols / 16], whose signs are ignored. A scale becomes an f16 number 2^8
// too small, subnormals included; the codes make up for it.
template <int kCols>
struct Nvfp4Weights {
  static constexpr int kCount = 32, kUnit = 8, kSub = 16;
  static constexpr bool kScaled = true, kShifted = false, kPatterns = false;
  static constexpr int kTokens = 4, kFewTokens = 4, kManyTokens = 2;
  static constexpr int kCodeBytes = padded_row(kCols / 2), kScaleBytes = padded_row(kCols / 16);
  static_assert(kCols % 32 == 0, "rows are whole chunks");
  struct Raw {
    uint4 codes;
    unsigned short scales;
  };
  const unsigned char *values, *scales;

  __device__ __forceinline__ Nvfp4Weights(const PlanePointers& p, const uint2*)
      : values(p.plane[0]), scales(p.plane[1]) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {load_stream16(codes(row) + 16 * chunk),
            reinterpret_cast<const unsigned short*>(scales + row * kScaleBytes)[chunk]};
  }
  __device__ __forceinline__ static int column(int chunk) { return chunk * kCount; }
  __device__ static constexpr int offset(int unit) { return unit * kUnit; }
  __device__ __forceinline__ static void decode(const Raw& raw, int unit, float (&w)[kUnit]) {
    e2m1x8_to_f32_by_table<8>(word_of(raw.codes, unit), w);
  }
  __device__ __forceinline__ static float scale(const Raw& raw, int s) {
    return f16_to_f32((raw.scales >> 8 * s & 0x7fu) << 7);
  }
  __device__ __forceinline__ static float minimum(const Raw&, int) { return 0.f; }
};

// codes u8 [rows, kCols / 2], scales e8m0 [rows, kCols / 32].
template <int kCols>
struct Mxfp4Weights {
  static constexpr int kCount = 32, kUnit = 8, kSub = 32;
  static constexpr bool kScaled = true, kShifted = false, kPatterns = false;
  static constexpr int kTokens = 4, kFewTokens = 4, kManyTokens = 2;
  static constexpr int kCodeBytes = padded_row(kCols / 2), kScaleBytes = padded_row(kCols / 32);
  static_assert(kCols % 32 == 0, "rows are whole blocks");
  struct Raw {
    uint4 codes;
    unsigned char exponent;
  };
  const unsigned char *values, *exponents;

  __device__ __forceinline__ Mxfp4Weights(const PlanePointers& p, const uint2*)
      : values(p.plane[0]), exponents(p.plane[1]) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {load_stream16(codes(row) + 16 * chunk), exponents[row * kScaleBytes + chunk]};
  }
  __device__ __forceinline__ static int column(int chunk) { return chunk * kCount; }
  __device__ static constexpr int offset(int unit) { return unit * kUnit; }
  __device__ __forceinline__ static void decode(const Raw& raw, int unit, float (&w)[kUnit]) {
    e2m1x8_to_f32_by_table<0>(word_of(raw.codes, unit), w);
  }
  __device__ __forceinline__ static float scale(const Raw& raw, int) { return e8m0_to_f32(raw.exponent); }
  __device__ __forceinline__ static float minimum(const Raw&, int) { return 0.f; }
};
