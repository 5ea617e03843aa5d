// Rows of one expert's matrices times the activations of the tokens that chose it, by a block of kWarps warps.
//
//   acc[m][r][t] = sum over k of W_m[row_r][k] * x_t[k],   FP32
//
// Every format of block_weights.cuh has one order of additions, which depends on the format and on kCols alone, not on
// the number of rows, matrices or tokens: lane l takes the chunks l, l + 32, ...; the sub-blocks of a chunk in turn; in a
// sub-block the codes times x by rising k, fmaf from zero, then acc = fmaf(scale, sum, acc). Shifted formats:
// acc = fmaf(scale, sum - sum of x, acc), acc = fmaf(-minimum, sum of x, acc). Formats without scales: fmaf into acc.
// Lanes are added by the butterfly of reduce.cuh.
//
// The activations of up to 8192 / tokens columns lie in shared memory, so that every lane can have its own chunk of a few
// dozen columns: 16-byte units stand where swizzle() puts them, and eight lanes with neighbouring chunks find theirs in
// different banks, for each of the formats (two lanes share some for Q2_K, Q4_K and Q6_K). The next chunk of every row is
// on its way while one is used; the first ones are loaded before the block waits for the activations.
#pragma once

#include "block_weights.cuh"
#include "reduce.cuh"

constexpr int kWarps = 8;
constexpr int kStagedFloats = 8192;

template <class A, class B>
struct SameType {
  static constexpr bool value = false;
};
template <class A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

__device__ constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Floats of shared memory that products of rows of kCols with up to kTok tokens need.
__device__ constexpr int staged_floats(int cols, int tokens) {
  const int all = round_up(cols, 2048) * tokens;
  return all < kStagedFloats ? all : kStagedFloats;
}

// Columns that are staged at a time: whole rounds of a warp's lanes.
template <class W>
__device__ constexpr int tile_columns(int cols, int tokens) {
  const int round = 32 * W::kCount, most = kStagedFloats / tokens / round * round, all = round_up(cols, round);
  return most < all ? most : all;
}

// Place of 16-byte unit f: its bits 3 to 6 are added to bits 0 to 2. Linear: swizzle(a ^ b) = swizzle(a) ^ swizzle(b).
__device__ constexpr int swizzle(int f) {
  return f ^ (f >> 3 & 1) ^ (f >> 4 & 1) * 2 ^ (f >> 5 & 1) * 5 ^ (f >> 6 & 1) * 6;
}

// Which rows of x f32 [.., kCols] are multiplied: row member[t] / kPerRow for t = 0 .. count - 1. `member` is shared memory.
template <int kPerRow>
struct Sources {
  const float* x;
  const int* member;
  int count;
};

// Columns first .. first + kTile - 1 of the sources into staged [kTok][kTile]; from `count` on the last of them again,
// whose sums nobody uses.
template <int kCols, int kTile, int kTok, int kPerRow>
__device__ __forceinline__ void stage(const Sources<kPerRow>& from, int first, float* staged) {
  constexpr int kUnits = kTile / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTok * kUnits; i += kWarps * 32) {
    const int t = i / kUnits, unit = i % kUnits, column = first + 4 * unit;
    if (column >= kCols) continue;
    const float* row = from.x + static_cast<size_t>(from.member[min(t, from.count - 1)] / kPerRow) * kCols;
    reinterpret_cast<float4*>(staged)[t * kUnits + swizzle(unit)] = *reinterpret_cast<const float4*>(row + column);
  }
}

// One chunk of all rows. `at`: place of the chunk's first unit in `staged`.
template <int kTile, int kMats, int kRows, int kTok, class W>
__device__ __forceinline__ void multiply_chunk(const W (&matrix)[kMats], const typename W::Raw (&raw)[kMats][kRows],
                                               const float* staged, int at, float (&acc)[kMats][kRows][kTok]) {
  constexpr int kSubs = W::kCount / W::kSub, kUnits = W::kSub / W::kUnit;
#pragma unroll
  for (int s = 0; s < kSubs; ++s) {
    float sum[kMats][kRows][kTok], sum_x[kTok];
#pragma unroll
    for (int t = 0; t < kTok; ++t) {
      sum_x[t] = 0.f;
#pragma unroll
      for (int i = 0; i < kMats * kRows; ++i) sum[i / kRows][i % kRows][t] = W::kScaled ? 0.f : acc[i / kRows][i % kRows][t];
    }
#pragma unroll
    for (int u = s * kUnits; u < (s + 1) * kUnits; ++u) {
      float w[kMats][kRows][W::kUnit];
#pragma unroll
      for (int i = 0; i < kMats * kRows; ++i) matrix[i / kRows].decode(raw[i / kRows][i % kRows], u, w[i / kRows][i % kRows]);
#pragma unroll
      for (int t = 0; t < kTok; ++t) {
#pragma unroll
        for (int q = 0; q < W::kUnit / 4; ++q) {
          const float4 v = reinterpret_cast<const float4*>(staged)[t * (kTile / 4) + (at ^ swizzle(W::offset(u) / 4 + q))];
          const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (W::kShifted) sum_x[t] = __fadd_rn(sum_x[t], x[k]);
#pragma unroll
            for (int i = 0; i < kMats * kRows; ++i) {
              float& total = sum[i / kRows][i % kRows][t];
              total = fmaf(w[i / kRows][i % kRows][4 * q + k], x[k], total);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kMats * kRows; ++i) {
      const float scale = matrix[i / kRows].scale(raw[i / kRows][i % kRows], s);
      const float minimum = matrix[i / kRows].minimum(raw[i / kRows][i % kRows], s);
#pragma unroll
      for (int t = 0; t < kTok; ++t) {
        float& total = acc[i / kRows][i % kRows][t];
        const float part = sum[i / kRows][i % kRows][t];
        if (W::kShifted) {
          total = fmaf(scale, __fsub_rn(part, sum_x[t]), total);
          total = fmaf(-minimum, sum_x[t], total);
        } else {
          total = W::kScaled ? fmaf(scale, part, total) : part;
        }
      }
    }
  }
}

// acc, the same in all lanes: rows row .. row + kRows - 1 of each of the matrices, a warp's own. At most kTok sources; acc beyond their
// number says nothing. staged: shared memory on 16 bytes, staged_floats(). Every thread of the block calls it with the same
// sources; it begins with a barrier, so that `member` may have been written just before.
template <int kCols, int kMats, int kRows, int kTok, class W, int kPerRow>
__device__ __forceinline__ void multiply_rows(const W (&matrix)[kMats], size_t row,
                                              const Sources<kPerRow>& from, float* staged,
                                              float (&acc)[kMats][kRows][kTok]) {
  constexpr int kChunks = kCols / W::kCount, kTile = tile_columns<W>(kCols, kTok), kTileChunks = kTile / W::kCount;
  static_assert(kTile > 0 && kTile % 32 == 0, "a round of all lanes fits");
  const int lane = threadIdx.x % 32;
  typename W::Raw next[kMats][kRows];
  if (lane < kChunks) {
#pragma unroll
    for (int i = 0; i < kMats * kRows; ++i) next[i / kRows][i % kRows] = matrix[i / kRows].load(row + i % kRows, lane);
  }
#pragma unroll
  for (int i = 0; i < kMats * kRows * kTok; ++i) acc[i / kTok / kRows][i / kTok % kRows][i % kTok] = 0.f;
#pragma unroll 1
  for (int first = 0; first < kChunks; first += kTileChunks) {
    __syncthreads();  // what was staged before has been used, and the members are known
    stage<kCols, kTile, kTok>(from, first * W::kCount, staged);
    __syncthreads();
    const int end = min(first + kTileChunks, kChunks);
    int at = swizzle(W::column(lane) / 4);
#pragma unroll 1
    for (int chunk = first + lane; chunk < end; chunk += 32) {
      typename W::Raw raw[kMats][kRows];
#pragma unroll
      for (int i = 0; i < kMats * kRows; ++i) {
        raw[i / kRows][i % kRows] = next[i / kRows][i % kRows];
        if (chunk + 32 < kChunks) next[i / kRows][i % kRows] = matrix[i / kRows].load(row + i % kRows, chunk + 32);
      }
      multiply_chunk<kTile>(matrix, raw, staged, at, acc);
      // A lane's next chunk is 8 kCount units on; where that is a multiple of 128, swizzle() leaves the sum as it is.
      at = 8 * W::kCount % 128 ? swizzle((W::column(chunk + 32) - first * W::kCount) / 4) : at + 8 * W::kCount;
    }
  }
#pragma unroll
  for (int i = 0; i < kMats * kRows * kTok; ++i) {
    float& total = acc[i / kTok / kRows][i / kTok % kRows][i % kTok];
    total = warp_sum(total);
  }
}
