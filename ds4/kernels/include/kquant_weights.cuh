// Q2_K, Q4_K and Q6_K as formats of mma_rows.cuh; planes as ds4/kernels/packing makes them, d and scales for 256
// weights.
//
// A code q of n bits becomes BF16 by one LOP3 for two of them: in the last bits of the mantissa of 128 it is 128 + q,
// two bits further up, in that of 32, it is 32 + q. An addition or a multiply-add, both exact, take the power away
// again.
#pragma once

#include "convert.cuh"
#include "mma_rows.cuh"

constexpr unsigned k128 = 0x43004300u;       // twice, as the others
constexpr unsigned kMinus128 = 0xc300c300u;

// Pairs of four-bit codes, pair j in bits 4 j .. 4 j + 3 of both halves.
__device__ __forceinline__ unsigned nibbles_above_128(unsigned codes, int j) {
  return and_or(codes >> 4 * j, 0x000f000fu, k128);
}

// Q4_K. codes u8 [rows, kCols / 2]; scales u8 [rows, kCols / 16]: of a chunk those of its four blocks, then their
// minima; d f16 [rows, kCols / 128]: (d, dmin).
template <int kCols>
struct Q4KTile {
  static constexpr int kParts = 1, kScaleBlocks = 1;
  static constexpr bool kMinima = true;
  static constexpr float kFactor = 1.f;
  static constexpr int kCodeBytes = padded_row(kCols / 2), kScaleBytes = padded_row(kCols / 16);
  static constexpr int kDBytes = padded_row(kCols / 64);
  static_assert(kCols % 256 == 0, "rows are whole blocks");
  struct Raw {
    uint4 codes;
    uint2 scales;
    unsigned d;
  };
  const unsigned char *values, *scales, *d;
  int lane_bytes;
  unsigned ours;  // makes 128 + the minimum of this lane's block

  __device__ __forceinline__ explicit Q4KTile(const PlanePointers& p)
      : values(p.plane[0]),
        scales(p.plane[1]),
        d(p.plane[2]),
        lane_bytes(threadIdx.x % 4 * 16),
        ours(0x5050u + threadIdx.x % 4 * 0x0101u) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {load_stream16(codes(row) + chunk * (kChunkCols / 2) + lane_bytes),
            *reinterpret_cast<const uint2*>(scales + row * kScaleBytes + chunk * (kChunkCols / 16)),
            reinterpret_cast<const unsigned*>(d + row * kDBytes)[chunk / 2]};
  }
  __device__ __forceinline__ void fragment(const Raw& raw, int b, unsigned (&w)[1][4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) w[0][j] = bf16x2_add(nibbles_above_128(word_of(raw.codes, b), j), kMinus128);
  }
  __device__ __forceinline__ float scale(const Raw& raw, int b) const {
    // d (2^23 + scale) - d 2^23, all exact
    const float factor = f16_to_f32(raw.d & 0xffffu);
    const float above = __uint_as_float(__byte_perm(raw.scales.x, 0x4b000000u, 0x7440 + b));
    return fmaf(factor, above, __fmul_rn(factor, -8388608.f));
  }
  __device__ __forceinline__ unsigned minima(const Raw& raw) const {
    return bf16x2_add(__byte_perm(raw.scales.y, k128, ours), kMinus128);
  }
  __device__ __forceinline__ float minimum_scale(const Raw& raw) const { return f16_to_f32(raw.d >> 16); }
};

// Q2_K. codes u8 [rows, kCols / 4], 32 bytes a chunk: a lane's of blocks 0 and 1 in a word, those of 2 and 3 in the
// next. scales u8 [rows, kCols / 16]: of a chunk a word of scales and one of minima, four bits each, for halves of
// blocks; d as in Q4_K. A scale multiplies its codes: a product has six bits.
template <int kCols>
struct Q2KTile {
  static constexpr int kParts = 1, kScaleBlocks = kChunkBlocks;
  static constexpr bool kMinima = true;
  static constexpr float kFactor = 1.f;
  static constexpr int kCodeBytes = padded_row(kCols / 4), kScaleBytes = padded_row(kCols / 16);
  static constexpr int kDBytes = padded_row(kCols / 64);
  static_assert(kCols % 256 == 0, "rows are whole blocks");
  struct Raw {
    uint2 codes, scales;
    unsigned d;
  };
  const unsigned char *values, *scales, *d;
  int lane_bytes, half_shift, lane_shift;  // of scales and of minima

  __device__ __forceinline__ explicit Q2KTile(const PlanePointers& p)
      : values(p.plane[0]),
        scales(p.plane[1]),
        d(p.plane[2]),
        lane_bytes(threadIdx.x % 4 * 8),
        half_shift(threadIdx.x % 4 / 2 * 8),
        lane_shift(threadIdx.x % 4 * 4) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {load_stream8(codes(row) + chunk * (kChunkCols / 4) + lane_bytes),
            *reinterpret_cast<const uint2*>(scales + row * kScaleBytes + chunk * (kChunkCols / 16)),
            reinterpret_cast<const unsigned*>(d + row * kDBytes)[chunk / 2]};
  }
  __device__ __forceinline__ void fragment(const Raw& raw, int b, unsigned (&w)[1][4]) const {
    const unsigned two = bf16x2_add(nibbles_above_128(raw.scales.x >> half_shift, b / 2), kMinus128);
    const unsigned factor = __byte_perm(two, 0u, b % 2 == 0 ? 0x1010 : 0x3232);
    // A pair's field, 0 .. 2, and the shift that brings it there: to 128 + q, 32 + q or 8 + q.
    const unsigned word = b < 2 ? raw.codes.x : raw.codes.y;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int field = j < 3 ? j : b % 2, shift = j == 3 ? 12 : b % 2 * 6;
      const unsigned above = and_or(word >> shift, 0x00030003u << 2 * field, k128 - 0x01000100u * field);
      w[0][j] = bf16x2_fma(above, factor, bf16x2_mul(factor, kMinus128 - 0x01000100u * field));
    }
  }
  __device__ __forceinline__ float scale(const Raw& raw, int) const { return f16_to_f32(raw.d & 0xffffu); }
  __device__ __forceinline__ unsigned minima(const Raw& raw) const {
    return bf16x2_add(nibbles_above_128(raw.scales.y >> lane_shift, 0), kMinus128);
  }
  __device__ __forceinline__ float minimum_scale(const Raw& raw) const { return f16_to_f32(raw.d >> 16); }
};

// Q6_K. low u8 [rows, kCols / 2], high u8 [rows, kCols / 4], scales i8 [rows, kCols / 16], d f16 [rows, kCols / 256]. A
// scale times a code has too many bits for BF16: the scale is 16 a + b, a and b from -8 to 8, and a weight the sum of
// two parts, whose products with code - 32 are at most 256.
template <int kCols>
struct Q6KTile {
  static constexpr int kParts = 2, kScaleBlocks = kChunkBlocks;
  static constexpr bool kMinima = false;
  static constexpr float kFactor = 1.f;
  static constexpr int kCodeBytes = padded_row(kCols / 2), kHighBytes = padded_row(kCols / 4);
  static constexpr int kScaleBytes = padded_row(kCols / 16), kDBytes = padded_row(kCols / 128);
  static_assert(kCols % 256 == 0, "rows are whole blocks");
  struct Raw {
    uint4 low;
    uint2 high, scales;
    unsigned short d;
  };
  const unsigned char *values, *high, *scales, *d;
  int lane;  // 0 .. 3 of a row

  __device__ __forceinline__ explicit Q6KTile(const PlanePointers& p)
      : values(p.plane[0]), high(p.plane[1]), scales(p.plane[2]), d(p.plane[3]), lane(threadIdx.x % 4) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {load_stream16(codes(row) + chunk * (kChunkCols / 2) + 16 * lane),
            load_stream8(high + row * kHighBytes + chunk * (kChunkCols / 4) + 8 * lane),
            *reinterpret_cast<const uint2*>(scales + row * kScaleBytes + chunk * (kChunkCols / 16)),
            reinterpret_cast<const unsigned short*>(d + row * kDBytes)[chunk / 2]};
  }
  __device__ __forceinline__ void fragment(const Raw& raw, int b, unsigned (&w)[2][4]) const {
    constexpr unsigned kMinus136 = 0xc308c308u, kMinus160 = 0xc320c320u, k16 = 0x41804180u;
    // Byte 2 b + lane / 2, plus 128 + 8: 16 (a + 8) + b + 8.
    const unsigned byte = ((b < 2 ? raw.scales.x : raw.scales.y) >> (b % 2 * 16 + lane / 2 * 8) & 0xffu) ^ 0x80u;
    const unsigned twice = (byte + 8u) * 0x00010001u;
    const unsigned a = bf16x2_mul(bf16x2_add(and_or(twice >> 4, 0x001f001fu, k128), kMinus136), k16);
    const unsigned rest = bf16x2_add(nibbles_above_128(twice, 0), kMinus136);
    const unsigned high = b < 2 ? raw.high.x : raw.high.y;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int bit = 2 * (j + b % 2 * 4);
      const unsigned top = bit < 4 ? high << (4 - bit) : high >> (bit - 4);
      const unsigned above = and_or(top, 0x00300030u, nibbles_above_128(word_of(raw.low, b), j));
      const unsigned code = bf16x2_add(above, kMinus160);
      w[0][j] = bf16x2_mul(code, a);
      w[1][j] = bf16x2_mul(code, rest);
    }
  }
  __device__ __forceinline__ float scale(const Raw& raw, int) const { return f16_to_f32(raw.d); }
};
