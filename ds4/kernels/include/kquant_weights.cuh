// Q2_K, Q4_K and Q6_K in the form of block_weights.cuh; blocks of 256 weights, codes in the order of the file.
//
// Codes c of n bits of Q2_K and Q4_K become v = 1 + c / 2^n, two instructions for four of them and one more each: put
// into the mantissa of 1. A sub-block's sum of v x, less its sum of x, is its sum of c x / 2^n; the subtraction costs 2^n
// / c times as much rounding as summing c x would, some 3 at the codes' average. Tests see a relative RMS error of 1e-6.
#pragma once

#include "block_weights.cuh"

// Byte i of `bytes`, whose highest bit is set, as a float from [1, 2): its other bits lead the mantissa.
__device__ __forceinline__ float byte_above_1(unsigned bytes, int i) {
  return __uint_as_float(__byte_perm(bytes, 0x3f000000u, 0x7044u | i << 8));
}

// codes u8 [rows, kCols / 2]: byte 32 p + i of a block holds weight 64 p + i low, 64 p + 32 + i high. scales u8 [rows,
// kCols / 16]: (scale, minimum) of each 32 weights; d f16 [rows, kCols / 128]: (d, dmin) of each block. A chunk is 16 bytes
// of codes: half of a sub-block of 32 in the low nibbles, half of the next one in the high ones.
template <int kCols>
struct Q4KWeights {
  static constexpr int kCount = 32, kUnit = 4, kSub = 16;
  static constexpr bool kScaled = true, kShifted = true, kPatterns = false;
  static constexpr int kTokens = 4, kFewTokens = 3, kManyTokens = 2;
  static constexpr int kCodeBytes = padded_row(kCols / 2), kScaleBytes = padded_row(kCols / 16);
  static constexpr int kDBytes = padded_row(kCols / 64);
  static_assert(kCols % 256 == 0, "rows are whole blocks");
  struct Raw {
    uint4 codes;
    unsigned scales, d;  // two pairs (scale, minimum), one pair (d, dmin)
  };
  const unsigned char *values, *scales, *d;

  __device__ __forceinline__ Q4KWeights(const PlanePointers& p, const uint2*)
      : values(p.plane[0]), scales(p.plane[1]), d(p.plane[2]) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {load_stream16(codes(row) + 16 * chunk),
            reinterpret_cast<const unsigned*>(scales + row * kScaleBytes)[chunk / 2],
            reinterpret_cast<const unsigned*>(d + row * kDBytes)[chunk / 8]};
  }
  __device__ __forceinline__ static int column(int chunk) { return chunk / 2 * 64 + chunk % 2 * 16; }
  __device__ static constexpr int offset(int unit) { return unit / 4 * 32 + unit % 4 * 4; }
  __device__ __forceinline__ static void decode(const Raw& raw, int unit, float (&w)[kUnit]) {
    const unsigned word = word_of(raw.codes, unit % 4);
    const unsigned bytes = ((unit < 4 ? word << 3 : word >> 1) & 0x78787878u) | 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = byte_above_1(bytes, i);
  }
  __device__ __forceinline__ static float scale(const Raw& raw, int s) {
    return __fmul_rn(__fmul_rn(f16_to_f32(raw.d & 0xffffu), 16.f), small_to_f32(raw.scales >> 16 * s & 0xffu));
  }
  __device__ __forceinline__ static float minimum(const Raw& raw, int s) {
    return __fmul_rn(f16_to_f32(raw.d >> 16), small_to_f32(raw.scales >> (16 * s + 8) & 0xffu));
  }
};

// codes u8 [rows, kCols / 4]: byte 32 h + l of a block holds weights 128 h + 32 g + l in bits 2 g and 2 g + 1. scales u8
// [rows, kCols / 16]: scale of each 16 weights low, minimum high; d as above. A chunk is 16 bytes of codes: sub-block g is
// all bits 2 g and 2 g + 1.
template <int kCols>
struct Q2KWeights {
  static constexpr int kCount = 64, kUnit = 4, kSub = 16;
  static constexpr bool kScaled = true, kShifted = true, kPatterns = false;
  static constexpr int kTokens = 2, kFewTokens = 3, kManyTokens = 2;
  static constexpr int kCodeBytes = padded_row(kCols / 4), kScaleBytes = padded_row(kCols / 16);
  static constexpr int kDBytes = padded_row(kCols / 64);
  static_assert(kCols % 256 == 0, "rows are whole blocks");
  struct Raw {
    uint4 codes;
    uint2 scales;  // those of 128 weights; ours are its even or its odd bytes
    unsigned d;
  };
  const unsigned char *values, *scales, *d;
  const int shift;  // of the scales: 8 for odd chunks, which are those of odd lanes

  __device__ __forceinline__ Q2KWeights(const PlanePointers& p, const uint2*)
      : values(p.plane[0]), scales(p.plane[1]), d(p.plane[2]), shift(static_cast<int>(threadIdx.x) % 2 * 8) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {load_stream16(codes(row) + 16 * chunk),
            reinterpret_cast<const uint2*>(scales + row * kScaleBytes)[chunk / 2],
            reinterpret_cast<const unsigned*>(d + row * kDBytes)[chunk / 4]};
  }
  __device__ __forceinline__ static int column(int chunk) { return chunk / 2 * 128 + chunk % 2 * 16; }
  __device__ static constexpr int offset(int unit) { return unit / 4 * 32 + unit % 4 * 4; }
  __device__ __forceinline__ static void decode(const Raw& raw, int unit, float (&w)[kUnit]) {
    const unsigned word = word_of(raw.codes, unit % 4);
    const int g = unit / 4;
    const unsigned moved = g == 0 ? word << 5 : g == 1 ? word << 3 : g == 2 ? word << 1 : word >> 1;
    const unsigned bytes = (moved & 0x60606060u) | 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = byte_above_1(bytes, i);
  }
  __device__ __forceinline__ unsigned fields(const Raw& raw, int s) const {
    return (s < 2 ? raw.scales.x : raw.scales.y) >> (shift + s % 2 * 16);
  }
  __device__ __forceinline__ float scale(const Raw& raw, int s) const {
    return __fmul_rn(__fmul_rn(f16_to_f32(raw.d & 0xffffu), 4.f), small_to_f32(fields(raw, s) & 15u));
  }
  __device__ __forceinline__ float minimum(const Raw& raw, int s) const {
    return __fmul_rn(f16_to_f32(raw.d >> 16), small_to_f32(fields(raw, s) >> 4 & 15u));
  }
};

// low u8 [rows, kCols / 2], high u8 [rows, kCols / 4], scales i8 [rows, kCols / 16], d f16 [rows, kCols / 256]. Weight 128 h
// + 32 g + l of a block has its low four bits in byte 64 h + 32 (g & 1) + l of low, in the low nibble for g < 2, its high
// two in byte 32 h + l of high, from bit 2 g on. A chunk is 16 bytes of low: two sub-blocks, 64 weights apart.
template <int kCols>
struct Q6KWeights {
  static constexpr int kCount = 32, kUnit = 4, kSub = 16;
  static constexpr bool kScaled = true, kShifted = false, kPatterns = false;
  static constexpr int kTokens = 4, kFewTokens = 2, kManyTokens = 2;
  static constexpr int kCodeBytes = padded_row(kCols / 2), kHighBytes = padded_row(kCols / 4);
  static constexpr int kScaleBytes = padded_row(kCols / 16), kDBytes = padded_row(kCols / 128);
  static_assert(kCols % 256 == 0, "rows are whole blocks");
  struct Raw {
    uint4 low, high;
    signed char scale[2];
    unsigned short d;
    int shift;  // of the high bits: 0 or 2
  };
  const unsigned char *values, *high, *scales, *d;

  __device__ __forceinline__ Q6KWeights(const PlanePointers& p, const uint2*)
      : values(p.plane[0]), high(p.plane[1]), scales(p.plane[2]), d(p.plane[3]) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    const int half = chunk / 4, part = chunk % 4;  // part: g & 1 and l / 16
    const signed char* s = reinterpret_cast<const signed char*>(scales + row * kScaleBytes) + 8 * half + part;
    return {load_stream16(codes(row) + 16 * chunk),
            *reinterpret_cast<const uint4*>(high + row * kHighBytes + 32 * half + part % 2 * 16),
            {s[0], s[4]},
            reinterpret_cast<const unsigned short*>(d + row * kDBytes)[chunk / 8],
            part / 2 * 2};
  }
  __device__ __forceinline__ static int column(int chunk) { return chunk / 4 * 128 + chunk % 4 * 16; }
  __device__ static constexpr int offset(int unit) { return unit / 4 * 64 + unit % 4 * 4; }
  __device__ __forceinline__ static void decode(const Raw& raw, int unit, float (&w)[kUnit]) {
    const unsigned low = word_of(raw.low, unit % 4) >> unit / 4 * 4 & 0x0f0f0f0fu;
    const unsigned high = word_of(raw.high, unit % 4) >> (raw.shift + unit / 4 * 4) << 4 & 0x30303030u;
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = __fsub_rn(byte_above_2_23(low | high, i), 8388640.f);
  }
  __device__ __forceinline__ static float scale(const Raw& raw, int s) {
    return __fmul_rn(f16_to_f32(raw.d), static_cast<float>(raw.scale[s]));
  }
  __device__ __forceinline__ static float minimum(const Raw&, int) { return 0.f; }
};
