// Pieces of a tile in the layouts of the tensor cores: 64 columns a warp, which is a row's block of one scale.
//
// Lane (g, t) = (lane / 4, lane % 4) holds columns 16 t .. 16 t + 15 of a piece, of row 8 i + g in its register group i
// and of heads g and g + 8. The products q . row run along columns, whose order in an mma is free as long as both sides
// agree: step s of 16 takes columns 16 t + 4 s .. + 3 of every lane, so that both come straight from 8- and 16-byte
// loads.
#pragma once

#include "attn_rows.cuh"
#include "loads.cuh"
#include "reduce.cuh"
#include "row_values.cuh"

constexpr int kColumns = 64;                    // a warp's
constexpr int kWarps = kHeadDim / kColumns;
constexpr int kRopeWarp = kNopeDim / kColumns;  // the last one, whose columns are rotated and stored in bf16
constexpr int kGroups = kTile / 8;              // of rows in a lane
constexpr int kSteps = kColumns / 16;           // of an mma along the columns
constexpr int kRowPitch = kColumns + 8;         // of bf16 in shared memory: 8 rows of 16 bytes touch every bank once
static_assert(kColumns == kRowBlock && kRopeDim == kColumns, "a warp's columns share one scale");

// x = high + low within 2^-18 of it, both bf16, two values a register.
__device__ __forceinline__ void split_bf16(float x, float y, unsigned& high, unsigned& low) {
  high = f32x2_to_bf16(x, y);
  const float2 rounded = bf16x2_to_f32(high);
  low = f32x2_to_bf16(__fsub_rn(x, rounded.x), __fsub_rn(y, rounded.y));
}

// A lane's part of a tile. Codes wait in registers; what is stored in bf16 is copied to where `decode` would put it.
struct RawTile {
  uint2 codes[kGroups][2];
  unsigned exponents;  // e8m0 of the row of group i in byte i

  // Rows from `last` on do not exist: they have no weight, so any row will do. `rows` is the warp's, 32 of kRowPitch.
  __device__ __forceinline__ void load(const RowSource& source, int first, int last, unsigned short* rows, int warp,
                                       int lane) {
    const int g = lane / 4, t = lane % 4;
    const unsigned char* row[kGroups];  // found before they are read, so that nothing waits in between
#pragma unroll
    for (int i = 0; i < kGroups; ++i) row[i] = source.row(min(first + 8 * i + g, last - 1));
    if (warp == kRopeWarp) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          cp_async<8>(rows + (8 * i + g) * kRowPitch + 16 * t + 4 * j, row[i] + kRowRope + 32 * t + 8 * j);
      }
      cp_async_commit();
      exponents = 0x7f7f7f7fu;
      return;
    }
    exponents = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint2* words = reinterpret_cast<const uint2*>(row[i] + warp * kColumns + 16 * t + 8 * j);
        expect_aligned(words);
        codes[i][j] = *words;
      }
      exponents |= static_cast<unsigned>(row[i][kRowScales + warp]) << 8 * i;
    }
  }

  // The values of group i without their scale, columns 16 t + 2 j and the next in word j, here and in `rows`; for the
  // rotated columns after cp_async_wait.
  __device__ __forceinline__ void decode(int i, unsigned short* rows, int warp, int lane, unsigned (&words)[8]) const {
    uint4* stored = reinterpret_cast<uint4*>(rows + (8 * i + lane / 4) * kRowPitch + 16 * (lane % 4));
    if (warp == kRopeWarp) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint4 four = stored[j];
        words[4 * j] = four.x, words[4 * j + 1] = four.y, words[4 * j + 2] = four.z, words[4 * j + 3] = four.w;
      }
      return;
    }
    // 2^120 twice; as a plain constant it makes the kernel spill on sm_100a
    const unsigned mend = as_word(__bfloat162bfloat162(__ushort_as_bfloat16(0x7b80)));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      e4m3x4_to_bf16(codes[i][j].x, mend, words[4 * j], words[4 * j + 1]);
      e4m3x4_to_bf16(codes[i][j].y, mend, words[4 * j + 2], words[4 * j + 3]);
      stored[j] = make_uint4(words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3]);
    }
  }
};

// The scales of rows 8 i + 2 t and 8 i + 2 t + 1, which stand in this lane's columns of a score and rows of a product.
struct Scales {
  unsigned even, odd;

  __device__ __forceinline__ Scales(unsigned exponents, int lane)
      : even(__shfl_sync(kAllLanes, exponents, lane % 4 * 8)),
        odd(__shfl_sync(kAllLanes, exponents, lane % 4 * 8 + 4)) {}
  __device__ __forceinline__ float2 of(int i) const {
    return make_float2(e8m0_to_f32(even >> 8 * i & 255u), e8m0_to_f32(odd >> 8 * i & 255u));
  }
};

// Two pairs of columns turned by (cos, sin, cos, sin), the other way with sign -1.
__device__ __forceinline__ float4 rotated(float4 v, float4 turn, float sign) {
  const float2 first = rotated(make_float2(v.x, v.y), make_float2(turn.x, turn.y), sign);
  const float2 second = rotated(make_float2(v.z, v.w), make_float2(turn.z, turn.w), sign);
  return make_float4(first.x, first.y, second.x, second.y);
}

// A lane's part of 16 queries in its warp's columns, of heads g and g + 8.
struct RawQueries {
  float4 x[2][kSteps];

  // q f32 [n_heads, 512] of the token; heads from `n_heads` on are zero.
  __device__ __forceinline__ void load(const float* q, int head, int n_heads, int warp, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = head + lane / 4 + 8 * h;
      const float* of_head = q + static_cast<size_t>(at) * kHeadDim + warp * kColumns + 16 * (lane % 4);
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
        x[h][s] = at < n_heads ? *reinterpret_cast<const float4*>(of_head + 4 * s) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  // Over the warp's columns, the same in the four lanes of a head.
  __device__ __forceinline__ float squares(int h) const {
    float sum = 0.f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const float4 v = x[h][s];
      sum = fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
    }
    return warp_sum<4>(sum);
  }
  // cis f32 [32, 2] of the token.
  __device__ __forceinline__ void rotate(const float* cis, int lane) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const float4 turn = *reinterpret_cast<const float4*>(cis + 16 * (lane % 4) + 4 * s);
      x[0][s] = rotated(x[0][s], turn, 1.f);
      x[1][s] = rotated(x[1][s], turn, 1.f);
    }
  }
};

// The same as the left side of an mma.
struct Queries {
  unsigned high[kSteps][4], low[kSteps][4];

  __device__ __forceinline__ explicit Queries(const RawQueries& raw) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        split_bf16(raw.x[h][s].x, raw.x[h][s].y, high[s][h], low[s][h]);
        split_bf16(raw.x[h][s].z, raw.x[h][s].w, high[s][2 + h], low[s][2 + h]);
      }
    }
  }
};
