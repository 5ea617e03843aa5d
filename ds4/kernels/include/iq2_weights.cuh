// IQ2_XXS in the form of block_weights.cuh: patterns of eight magnitudes and their signs. 32 weights a chunk.
#pragma once

#include "block_weights.cuh"

// numbers u8 [rows, kCols / 8], words u32 [rows, kCols / 32], d f16 [rows, kCols / 256].
//
// Magnitudes are 8, 25 and 43, bf16 numbers of two bytes each, so that one byte permutation makes two weights out of six
// constants. `table`, in shared memory, has its selectors: [pattern] of four 16-bit halves, half i for weights i and i + 4.
template <int kCols>
struct Iq2Weights {
  static constexpr int kCount = 32, kUnit = 8, kSub = 32;
  static constexpr bool kScaled = true, kShifted = false, kPatterns = true;
  static constexpr int kTokens = 4, kFewTokens = 4, kManyTokens = 2;
  static constexpr int kCodeBytes = padded_row(kCols / 8), kWordBytes = padded_row(kCols / 8);
  static constexpr int kDBytes = padded_row(kCols / 128);
  static_assert(kCols % 256 == 0, "rows are whole blocks");
  struct Raw {
    unsigned numbers, word;
    unsigned short d;
  };
  const unsigned char *values, *words, *d;
  const uint2* table;

  __device__ __forceinline__ Iq2Weights(const PlanePointers& p, const uint2* patterns)
      : values(p.plane[0]), words(p.plane[1]), d(p.plane[2]), table(patterns) {}
  __device__ __forceinline__ const unsigned char* codes(size_t row) const { return values + row * kCodeBytes; }
  __device__ __forceinline__ Raw load(size_t row, int chunk) const {
    return {reinterpret_cast<const unsigned*>(codes(row))[chunk],
            reinterpret_cast<const unsigned*>(words + row * kWordBytes)[chunk],
            reinterpret_cast<const unsigned short*>(d + row * kDBytes)[chunk / 8]};
  }
  __device__ __forceinline__ static int column(int chunk) { return chunk * kCount; }
  __device__ static constexpr int offset(int unit) { return unit * kUnit; }
  __device__ __forceinline__ void decode(const Raw& raw, int unit, float (&w)[kUnit]) const {
    const uint2 selectors = table[raw.numbers >> 8 * unit & 255u];
    const unsigned seven = raw.word >> 7 * unit & 127u;
    // The eighth sign makes their number even; parity is the lowest bit of the count, higher ones are not used.
    const unsigned signs = (seven | static_cast<unsigned>(__popc(seven)) << 7) * 0x1001u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned selector = (i < 2 ? selectors.x : selectors.y) >> i % 2 * 16;
      const unsigned pair = __byte_perm(0x002cc800u, 0x00424141u, selector) ^ (signs << (15 - i) & 0x80008000u);
      const float2 both = bf16x2_to_f32(pair);
      w[i] = both.x, w[i + 4] = both.y;
    }
  }
  __device__ __forceinline__ static float scale(const Raw& raw, int) {
    return __fmul_rn(f16_to_f32(raw.d), __fmul_rn(__fadd_rn(small_to_f32(raw.word >> 28), 0.5f), 0.25f));
  }
  __device__ __forceinline__ static float minimum(const Raw&, int) { return 0.f; }
};
