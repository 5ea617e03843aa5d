// NVFP4 and MXFP4 as formats of mma_rows.cuh; planes as ds4/kernels/packing makes them, 64 bytes of codes a chunk.
//
// An e2m1 code has the bits sign, exponent (2), mantissa. Put at BF16's sign and at [8:6], where its exponent ends and
// its mantissa begins, it is 2^126 too small, subnormals too; a multiplication mends that. A word has eight codes so
// that one rotation and one LOP3 put two of them into place: of pairs 0, 1 and 2 the magnitudes are at [2:0], [6:4],
// [12:10] of a half and the signs as far above as in BF16, 9, 13 and (in the other half) 3. What that leaves, [8:7],
// [14] and [15], has pair 3.
#pragma once

#include "mma_rows.cuh"

// The numbers of a word's eight codes, times 2^-126, in order.
__device__ __forceinline__ void e2m1x8_to_bf16(unsigned codes, unsigned (&w)[4]) {
  constexpr unsigned kPlaces = 0x81c081c0u;
  w[0] = codes << 6 & kPlaces;
  w[1] = codes << 2 & kPlaces;
  w[2] = __funnelshift_r(codes, codes, 4) & kPlaces;
  w[3] = (codes & 0x81808180u) | (codes >> 8 & 0x00400040u);
}

template <int kCols>
struct Fp4Codes {
  static constexpr int kCodeBytes = chunks_of(kCols) * kChunkCols / 2;
  const unsigned char* values;
  int lane_bytes;

  __device__ __forceinline__ explicit Fp4Codes(const unsigned char* plane)
      : values(plane), lane_bytes(threadIdx.x % 4 * 16) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  // Word b is that of block b.
  __device__ __forceinline__ uint4 load(size_t row, int chunk) const {
    return load_stream16(codes(row) + chunk * (kChunkCols / 2) + lane_bytes);
  }
};

// NVFP4: scales e4m3 [rows, kCols / 16], whose signs are ignored; 0x7f counts 480. They multiply the codes: a product
// has six significant bits.
template <int kCols>
struct Nvfp4Tile : Fp4Codes<kCols> {
  static constexpr int kParts = 1, kScaleBlocks = kChunkBlocks;
  static constexpr bool kMinima = false;
  static constexpr float kFactor = 256.f;
  static constexpr int kScaleBytes = padded_row(kCols / 16);
  struct Raw {
    uint4 codes;
    uint2 scales;
  };
  const unsigned char* scales;
  unsigned ours;  // selects the scales of this lane's half of each block

  __device__ __forceinline__ explicit Nvfp4Tile(const PlanePointers& p)
      : Fp4Codes<kCols>(p.plane[0]), scales(p.plane[1]), ours(threadIdx.x % 4 < 2 ? 0x6420u : 0x7531u) {}
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {Fp4Codes<kCols>::load(row, chunk),
            *reinterpret_cast<const uint2*>(scales + row * kScaleBytes + chunk * (kChunkCols / 16))};
  }
  __device__ __forceinline__ void fragment(const Raw& raw, int b, unsigned (&w)[1][4]) const {
    e2m1x8_to_bf16(word_of(raw.codes, b), w[0]);
    const unsigned bytes = __byte_perm(raw.scales.x, raw.scales.y, ours);
    // Blocks 0 and 2, or 1 and 3: as BF16, 2^120 too small; then 2^118 times the scales.
    unsigned two = (b % 2 == 0 ? bytes << 4 : bytes >> 4) & 0x07f007f0u;
    two = bf16x2_mul(bf16x2_mul(two, bf16x2_power(127)), bf16x2_power(111));
    const unsigned factor = __byte_perm(two, 0u, b < 2 ? 0x1010 : 0x3232);
#pragma unroll
    for (int j = 0; j < 4; ++j) w[0][j] = bf16x2_mul(w[0][j], factor);
  }
  __device__ __forceinline__ float scale(const Raw&, int) const { return 1.f; }
};

// MXFP4: scales e8m0 [rows, kCols / 32], which reach as far as FP32 does and are applied there.
template <int kCols>
struct Mxfp4Tile : Fp4Codes<kCols> {
  static constexpr int kParts = 1, kScaleBlocks = 1;
  static constexpr bool kMinima = false;
  static constexpr float kFactor = 1.f;
  static constexpr int kScaleBytes = padded_row(kCols / 32);
  struct Raw {
    uint4 codes;
    unsigned exponents;
  };
  const unsigned char* exponents;

  __device__ __forceinline__ explicit Mxfp4Tile(const PlanePointers& p)
      : Fp4Codes<kCols>(p.plane[0]), exponents(p.plane[1]) {}
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {Fp4Codes<kCols>::load(row, chunk),
            reinterpret_cast<const unsigned*>(exponents + row * kScaleBytes)[chunk]};
  }
  __device__ __forceinline__ void fragment(const Raw& raw, int b, unsigned (&w)[1][4]) const {
    e2m1x8_to_bf16(word_of(raw.codes, b), w[0]);
#pragma unroll
    for (int j = 0; j < 4; ++j) w[0][j] = bf16x2_mul(w[0][j], bf16x2_power(126));
  }
  __device__ __forceinline__ float scale(const Raw& raw, int b) const {
    const unsigned e = raw.exponents;
    const unsigned bits = (b == 0 ? e << 23 : b == 1 ? e << 15 : b == 2 ? e << 7 : e >> 1) & 0x7f800000u;
    return __uint_as_float(max(bits, 0x00400000u));  // byte 0 is 2^-127, a subnormal
  }
};
