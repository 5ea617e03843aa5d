// Indexer keys, 32 of them a warp, as the first operand of an mma.
#pragma once

#include <cuda_bf16.h>

#include "convert.cuh"
#include "kv_rows.cuh"
#include "ptx.cuh"

constexpr int kTileKeys = 32;
constexpr int kTileBytes = kTileKeys * kKeyBytes;
constexpr int kKeyWords = kKeyBytes / 4;
constexpr int kKeyBlocks = kKeyDim / kKeyBlock;
static_assert(kTileBytes % 16 == 0 && kKeyBytes % 4 == 0, "a tile starts on 16 bytes, a key on 4");

// Begin to copy the first `n` keys of a tile, one warp; `n` may be 0 or negative.
__device__ __forceinline__ void copy_tile(unsigned char* shared, const unsigned char* keys, int n, int lane) {
  const int bytes = n * kKeyBytes;
#pragma unroll
  for (int i = 0; i < (kTileBytes / 16 + 31) / 32; ++i) {
    const int at = (i * 32 + lane) * 16;
    if (at + 16 <= min(bytes, kTileBytes)) cp_async<16>(shared + at, keys + at);
  }
  const int at = bytes / 16 * 16 + lane * 4;
  if (n < kTileKeys && at < bytes) cp_async<4>(shared + at, keys + at);
  cp_async_commit();
}

// Eight e2m1 codes times a power of two, in bf16, exactly: pair i holds columns i and i + 4. The three bits of a magnitude
// are put where bf16 has its lowest two exponent bits and its highest mantissa bit, which makes 2^-126 of the value.
__device__ __forceinline__ void decode_key(unsigned codes, __nv_bfloat162 factor, unsigned (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned sign = codes << (12 - 4 * i) & 0x80008000u;
    const unsigned magnitude = (i < 2 ? codes << (6 - 4 * i) : codes >> (4 * i - 6)) & 0x01c001c0u;
    const unsigned bits = sign | magnitude;
    const __nv_bfloat162 value = __hmul2(reinterpret_cast<const __nv_bfloat162&>(bits), factor);
    pairs[i] = reinterpret_cast<const unsigned&>(value);
  }
}

// bf16 of 2^(126 + exponent - largest), twice; of 0 where that is none: a block 2^253 below the key's largest scale.
__device__ __forceinline__ __nv_bfloat162 block_factor(int exponent, int largest) {
  const unsigned bits = static_cast<unsigned>(max(253 + exponent - largest, 0)) << 7;
  const unsigned both = bits | bits << 16;
  return reinterpret_cast<const __nv_bfloat162&>(both);
}

// The warp's tile of raw keys as operands: a[m][k] holds columns of keys 16 m + lane / 4 and 8 more. A key is divided by
// its largest block scale, so that no factor overflows; returns the exponent byte of that scale of key
// lane / 4 + 8 (lane % 4).
__device__ __forceinline__ unsigned decode_tile(const unsigned char* shared, int lane, unsigned (&a)[2][2 * kKeyBlocks][4]) {
  const int g = lane / 4, t = lane % 4;
  const unsigned* key = reinterpret_cast<const unsigned*>(shared) + g * kKeyWords;  // then constants away
  const unsigned* codes = key + t;
  unsigned mine = 0;
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    const unsigned scales = key[8 * row * kKeyWords + kKeyWords - 1];
    unsigned largest = 0;
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) largest = max(largest, scales >> 8 * block & 255u);
    if (t == row) mine = largest;
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) {
      unsigned pairs[4];
      decode_key(codes[8 * row * kKeyWords + 4 * block], block_factor(scales >> 8 * block & 255u, largest), pairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[row / 2][2 * block + i / 2][row % 2 + i % 2 * 2] = pairs[i];
    }
  }
  return mine;
}
