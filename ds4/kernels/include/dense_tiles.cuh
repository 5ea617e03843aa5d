// F32, F16, BF16, Q8_0 and FP8 with block scales as formats of mma_rows.cuh, on the planes of ds4/kernels/packing as they are.
//
// Q8_0: a code's lower seven bits and its sign make two BF16 numbers each, by one LOP3 for two codes; their sum is code / 256,
// so that a product with an activation stays below it. FP8: a code's bits are put where BF16 has its exponent and mantissa,
// which makes it 2^120 too small; one multiplication mends all but 2^9 of it, subnormals too. A code of FP8 that is NaN, 0x7f
// or 0xff, counts 480 with its sign.
//
// Besides what mma_rows.cuh asks for, for walking along a row:
//   At                            where a lane's part of a chunk begins in each plane
//   at(row, chunk), next(at, n)   of a chunk, and of the n-th after it
//   load_at(at, n_blocks)         Raw
#pragma once

#include "convert.cuh"
#include "mma_rows.cuh"

struct At {
  const unsigned char *codes, *scales;
};

// F32, F16 and BF16: values [rows, kCols], a row beginning on 16 bytes.
template <class T, int kCols, int kPartsOf>
struct FloatTile {
  static constexpr int kParts = kPartsOf, kScaleBlocks = kChunkBlocks;
  static constexpr bool kMinima = false;
  static constexpr float kFactor = 1.f;
  static constexpr int kCodeBytes = padded_row(kCols * static_cast<int>(sizeof(T)));
  static constexpr int kQuads = sizeof(T) / 2;  // of 16 bytes in 8 weights
  static constexpr int kBlockBytes = kBlockCols * static_cast<int>(sizeof(T));
  struct Raw {
    uint4 values[kChunkBlocks][kQuads];
  };
  const unsigned char* values;
  int lane_bytes;

  __device__ __forceinline__ explicit FloatTile(const PlanePointers& p)
      : values(p.plane[0]), lane_bytes(threadIdx.x % 4 * 16 * kQuads) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ At at(size_t row, int chunk) const {
    return next({codes(row) + lane_bytes, nullptr}, chunk);
  }
  __device__ __forceinline__ static At next(At at, int n) { return {at.codes + n * (kChunkBlocks * kBlockBytes), nullptr}; }
  __device__ __forceinline__ static Raw load_at(At at, int n_blocks) {
    Raw raw;
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      if (b >= n_blocks) break;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) raw.values[b][i] = load_stream16(at.codes + b * kBlockBytes + 16 * i);
    }
    return raw;
  }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return load_at(at(row, chunk), blocks_in<kCols>(chunk));
  }
  __device__ __forceinline__ void fragment(const Raw& raw, int b, unsigned (&w)[kParts][4]) const {
    if constexpr (kParts == 1) {
      const uint4 v = raw.values[b][0];
      w[0][0] = v.x, w[0][1] = v.y, w[0][2] = v.z, w[0][3] = v.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        unsigned parts[kParts];
        const float2 pair = two_of(raw.values[b], j);
        split_to_bf16x2(pair.x, pair.y, parts);
#pragma unroll
        for (int p = 0; p < kParts; ++p) w[p][j] = parts[p];
      }
    }
  }
  __device__ __forceinline__ float scale(const Raw&, int) const { return 1.f; }

 private:
  // Weights 2 j and 2 j + 1 of F16 or F32.
  __device__ __forceinline__ static float2 two_of(const uint4 (&v)[kQuads], int j) {
    const uint4 quad = v[j * kQuads / 4];
    if constexpr (kQuads == 1) {
      const unsigned word = j == 0 ? quad.x : j == 1 ? quad.y : j == 2 ? quad.z : quad.w;
      return make_float2(f16_to_f32(word & 0xffffu), f16_to_f32(word >> 16));
    } else {
      return j % 2 == 0 ? make_float2(__uint_as_float(quad.x), __uint_as_float(quad.y))
                        : make_float2(__uint_as_float(quad.z), __uint_as_float(quad.w));
    }
  }
};
template <int kCols>
using F32Tile = FloatTile<float, kCols, 3>;
template <int kCols>
using F16Tile = FloatTile<__half, kCols, 2>;
template <int kCols>
using Bf16Tile = FloatTile<__nv_bfloat16, kCols, 1>;

// A lane's eight one-byte codes of each block of a chunk.
__device__ __forceinline__ void load_codes(const unsigned char* from, int n_blocks, uint2 (&codes)[kChunkBlocks]) {
#pragma unroll
  for (int b = 0; b < kChunkBlocks; ++b) {
    if (b >= n_blocks) break;
    codes[b] = load_stream8(from + b * kBlockCols);
  }
}

// Q8_0: codes i8 [rows, kCols], d f16 [rows, kCols / 32], rows of both on 16 bytes.
template <int kCols>
struct Q8Tile {
  static constexpr int kParts = 1, kScaleBlocks = 1;
  static constexpr bool kMinima = false;
  static constexpr float kFactor = 256.f;
  static constexpr int kCodeBytes = padded_row(kCols), kScaleBytes = padded_row(kCols / 16);
  struct Raw {
    uint2 codes[kChunkBlocks];
    uint2 d;  // f16 of block b in half b
  };
  const unsigned char *values, *d;
  int lane_bytes;

  __device__ __forceinline__ explicit Q8Tile(const PlanePointers& p)
      : values(p.plane[0]), d(p.plane[1]), lane_bytes(threadIdx.x % 4 * 8) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ At at(size_t row, int chunk) const {
    return next({codes(row) + lane_bytes, d + row * kScaleBytes}, chunk);
  }
  __device__ __forceinline__ static At next(At at, int n) {
    return {at.codes + n * kChunkCols, at.scales + n * (2 * kChunkBlocks)};
  }
  __device__ __forceinline__ static Raw load_at(At at, int n_blocks) {
    Raw raw;
    load_codes(at.codes, n_blocks, raw.codes);
    raw.d = *reinterpret_cast<const uint2*>(at.scales);
    return raw;
  }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return load_at(at(row, chunk), blocks_in<kCols>(chunk));
  }
  __device__ __forceinline__ void fragment(const Raw& raw, int b, unsigned (&w)[1][4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned word = j < 2 ? raw.codes[b].x : raw.codes[b].y;
      const unsigned two = __byte_perm(word, 0u, j % 2 == 0 ? 0x4140 : 0x4342);
      // (1 + low / 128) / 2 and -(1 + sign) / 2, where code = low - 128 sign
      w[0][j] = bf16x2_add(and_or(two, 0x007f007fu, 0x3f003f00u), and_or(two, 0x00800080u, 0xbf00bf00u));
    }
  }
  __device__ __forceinline__ float scale(const Raw& raw, int b) const {
    const __half2 two = reinterpret_cast<const __half2&>(b < 2 ? raw.d.x : raw.d.y);
    return b % 2 == 0 ? __low2float(two) : __high2float(two);
  }
};

// FP8 with a scale for 128 x 128 weights: codes e4m3 [rows, kCols], scales f32 [rows / 128, kCols / 128], rows of both on 16
// bytes. Matrices that share the planes, as experts do, begin on multiples of 128 rows.
template <int kCols>
struct Fp8Tile {
  static constexpr int kParts = 1, kScaleBlocks = kChunkBlocks;
  static constexpr bool kMinima = false;
  static constexpr float kFactor = 512.f;
  static constexpr int kCodeBytes = padded_row(kCols), kScaleBytes = padded_row(chunks_of(kCols) * 4);
  struct Raw {
    uint2 codes[kChunkBlocks];
    float scale;
  };
  const unsigned char *values, *scales;
  int lane_bytes;

  __device__ __forceinline__ explicit Fp8Tile(const PlanePointers& p)
      : values(p.plane[0]), scales(p.plane[1]), lane_bytes(threadIdx.x % 4 * 8) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ At at(size_t row, int chunk) const {
    return next({codes(row) + lane_bytes, scales + row / 128 * kScaleBytes}, chunk);
  }
  __device__ __forceinline__ static At next(At at, int n) { return {at.codes + n * kChunkCols, at.scales + n * 4}; }
  __device__ __forceinline__ static Raw load_at(At at, int n_blocks) {
    Raw raw;
    load_codes(at.codes, n_blocks, raw.codes);
    raw.scale = *reinterpret_cast<const float*>(at.scales);
    return raw;
  }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return load_at(at(row, chunk), blocks_in<kCols>(chunk));
  }
  __device__ __forceinline__ void fragment(const Raw& raw, int b, unsigned (&w)[1][4]) const {
    constexpr unsigned kMend = bf16x2_power(111);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned word = j < 2 ? raw.codes[b].x : raw.codes[b].y;
      const unsigned two = __byte_perm(word, 0u, j % 2 == 0 ? 0x1404 : 0x3424);
      w[0][j] = bf16x2_mul((two & 0x80008000u) | (two >> 4 & 0x07f007f0u), kMend);
    }
  }
  __device__ __forceinline__ float scale(const Raw& raw, int) const { return raw.scale; }
};
