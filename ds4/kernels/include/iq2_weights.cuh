// IQ2_XXS as a format of mma_rows.cuh: patterns of eight magnitudes and their signs, as ds4/kernels/packing/iq2_xxs.py
// has them.
//
// The 256 patterns are 16 bytes each, eight BF16 numbers, in shared memory; so that the eight lanes of a quarter of a
// warp, which it serves at a time, always find theirs in different banks, the table is there eight times, lane l
// reading copy l % 8.
#pragma once

#include "convert.cuh"
#include "mma_rows.cuh"
#include "reduce.cuh"

constexpr int kPatterns = 256, kPatternCopies = 8;
constexpr int kPatternBytes = kPatterns * kPatternCopies * 16;

// The table, bf16 [256][8], to shared memory, bf16 [256][8][8]; it can be read after a barrier. All kThreads of the
// block call it.
template <int kThreads>
__device__ __forceinline__ void load_patterns(const void* table, uint4* patterns) {
#pragma unroll
  for (int i = threadIdx.x; i < kPatterns; i += kThreads) {
    const uint4 entry = static_cast<const uint4*>(table)[i];
#pragma unroll
    for (int j = 0; j < kPatternCopies; ++j) patterns[i * kPatternCopies + (i + j) % kPatternCopies] = entry;
  }
}

// codes u32 [rows, kCols / 16]: of a chunk each lane's pattern numbers and its word of signs and scales; d f16 [rows,
// kCols / 256].
template <int kCols>
struct Iq2Tile {
  static constexpr int kParts = 1, kScaleBlocks = 1;
  static constexpr bool kMinima = false;
  static constexpr float kFactor = 0.25f;
  static constexpr int kCodeBytes = padded_row(kCols / 4), kDBytes = padded_row(kCols / 128);
  static_assert(kCols % 256 == 0, "rows are whole blocks");
  struct Raw {
    uint2 codes;
    unsigned short d;
  };
  const unsigned char *values, *d;
  const unsigned char* patterns;
  unsigned copy;  // this lane's, in bytes
  int lane_bytes;

  __device__ __forceinline__ Iq2Tile(const PlanePointers& p, const uint4* table)
      : values(p.plane[0]),
        d(p.plane[1]),
        patterns(reinterpret_cast<const unsigned char*>(table)),
        copy(threadIdx.x % kPatternCopies * 16),
        lane_bytes(threadIdx.x % 4 * 8) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {load_stream8(codes(row) + chunk * (kChunkCols / 4) + lane_bytes),
            reinterpret_cast<const unsigned short*>(d + row * kDBytes)[chunk / 2]};
  }
  __device__ __forceinline__ void fragment(const Raw& raw, int b, unsigned (&w)[1][4]) const {
    constexpr int kEntryShift = 7;  // 16 bytes in 8 copies
    constexpr unsigned kEntries = 255u << kEntryShift;
    const unsigned n = raw.codes.x;
    const unsigned at = and_or(b == 0 ? n << kEntryShift : n >> (8 * b - kEntryShift), kEntries, copy);
    const uint4 entry = *reinterpret_cast<const uint4*>(patterns + at);
    const unsigned signs = raw.codes.y ^ __funnelshift_r(raw.codes.y, raw.codes.y, 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) w[0][j] = word_of(entry, j) ^ (signs << (15 - b - 4 * j) & 0x80008000u);
  }
  // d (s + 1/2), where lane b of the row has the s of block b. 16 + s is a float with s on top of its mantissa.
  __device__ __forceinline__ float scale(const Raw& raw, int b) const {
    const float s = __uint_as_float(and_or(raw.codes.y >> 9, 0x00780000u, 0x41800000u));
    return __shfl_sync(kAllLanes, __fmul_rn(f16_to_f32(raw.d), __fsub_rn(s, 15.5f)), b, 4);
  }
};
