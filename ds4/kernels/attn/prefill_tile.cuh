// Tiles of rows and the queries of attn_prefill: how rows come to shared memory and become bf16, and q . row.
#pragma once

#include "kv_rows.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "row_values.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroup = 32;                              // heads of four warps
constexpr int kGroups = kWarps / 4;
constexpr int kTile = 32;                               // rows
constexpr int kHalf = kHeadDim / 2;                     // columns of a warp in scores
constexpr int kSteps = kHalf / 16;                      // of an mma along them
constexpr int kColumns = kHeadDim / 4;                  // of a warp in sums
constexpr int kWeightPitch = kTile + 8;                 // of bf16
constexpr int kPitch = kHeadDim + 8;                    // of bf16: 8 rows of 16 bytes touch every bank once
constexpr int kLanes = kThreads / kTile;                // that share a row when it is copied and decoded
constexpr int kCodeSlots = kNopeDim / (8 * kLanes);     // of 8 bytes, of a thread
constexpr int kRopeSlots = 2 * kRopeDim / (8 * kLanes);
constexpr float kSoftmaxScale = 0.04419417382415922f;   // 512^-0.5
constexpr float kLog2E = 1.4426950408889634f;
static_assert(kCodeSlots * kRowBlock == kNopeDim && 8 * kLanes == kRowBlock, "a slot's codes of a row share one scale");

struct __align__(16) Shared {
  unsigned short rows[2][kTile][kPitch];            // bf16; the first of the 8 spare values hold the row's scales
  uint2 packed[kCodeSlots + kRopeSlots][kThreads];  // on the way, each thread's own
  float2 halves[kWarps][kTile / 8][32];             // scores of the other warp's heads over this one's columns
  unsigned short weights[kGroups][kGroup][kWeightPitch];
  float factor[kGroups][kGroup];                    // of earlier sums; at the end, of all
};
static_assert(sizeof(Shared) == 98560, "prefill_op.py launches with as much; sm_86, sm_89 and sm_120 have 101376");

// The rows that a query attends to, by number. `rows`, `pool` and `selected` are the kernel's arguments.
struct Attended {
  const unsigned char *rows, *pool;
  const int* selected;
  int first, n_window, n_rows;  // the window's oldest row in `rows`; rows of the window, and with those of the pool
  int list;                     // where the token's begins in `selected`

  // Of row `r`, or the last one: its place in `rows` or `pool`. Read ahead, as a copy needs it.
  __device__ __forceinline__ int place(int r) const {
    r = min(r, n_rows - 1);
    if (r < n_window) return first + r;
    return selected ? selected[list + r - n_window] : r - n_window;
  }
  // Its bytes from `lane` times 8 on.
  __device__ __forceinline__ const uint2* row(int r, int place, int lane) const {
    const unsigned char* from = min(r, n_rows - 1) < n_window ? rows : pool;
    return reinterpret_cast<const uint2*>(from) + (place * (kRowBytes / 8) + lane);
  }
};

// The thread's part of the tile that begins at row `first`, where there is one. Rows from n_rows on have no weight, so
// the last one will do.
__device__ __forceinline__ void copy_tile(Shared& shared, int buffer, const Attended& attended, int first, int place) {
  if (first >= attended.n_rows) return;
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const uint2* from = attended.row(first + row, place, lane);
  if (lane == 0) cp_async<8>(&shared.rows[buffer][row][kHeadDim], from + kRowScales / 8);
#pragma unroll
  for (int i = 0; i < kCodeSlots; ++i) cp_async<8>(&shared.packed[i][threadIdx.x], from + i * kLanes);
#pragma unroll
  for (int i = 0; i < kRopeSlots; ++i)
    cp_async<8>(&shared.packed[kCodeSlots + i][threadIdx.x], from + kRowRope / 8 + i * kLanes);
  cp_async_commit();
}

// What copy_tile has brought.
__device__ __forceinline__ void decode_tile(Shared& shared, int buffer) {
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  unsigned short* to = shared.rows[buffer][row];
  cp_async_wait<0>();
  __syncwarp();  // the scales are another lane's copy
  const uint2 scales = *reinterpret_cast<const uint2*>(to + kHeadDim);
#pragma unroll
  for (int i = 0; i < kCodeSlots; ++i) {
    const uint2 codes = shared.packed[i][threadIdx.x];
    const unsigned scale = (i < 4 ? scales.x : scales.y) >> i % 4 * 8 & 255u;
    const unsigned mend = min(scale + 120u, 255u) * 0x00800080u;  // 2^(scale - 127 + 120) twice
    uint4 words;
    e4m3x4_to_bf16(codes.x, mend, words.x, words.y);
    e4m3x4_to_bf16(codes.y, mend, words.z, words.w);
    *reinterpret_cast<uint4*>(to + i * kRowBlock + 8 * lane) = words;
  }
#pragma unroll
  for (int i = 0; i < kRopeSlots; ++i)
    *reinterpret_cast<uint2*>(to + kNopeDim + 4 * (lane + i * kLanes)) = shared.packed[kCodeSlots + i][threadIdx.x];
}

// A warp's 16 queries in its columns, as the left side of an mma.
struct Queries {
  unsigned words[kSteps][4];

  // q bf16 [n_heads, 512] of the token; heads from `n_heads` on are zero.
  __device__ __forceinline__ void load(const __nv_bfloat16* q, int head, int n_heads, int column, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = head + lane / 4 + 8 * h;
      const __nv_bfloat16* from = q + static_cast<size_t>(at) * kHeadDim + column + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i)
        words[i / 2][i % 2 * 2 + h] = at < n_heads ? *reinterpret_cast<const unsigned*>(from + 8 * i) : 0u;
    }
  }
  // Over the warp's columns, the same in the four lanes of a head.
  __device__ __forceinline__ float squares(int h) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const float2 v = bf16x2_to_f32(words[i / 2][i % 2 * 2 + h]);
      sum = fmaf(v.y, v.y, fmaf(v.x, v.x, sum));
    }
    return warp_sum<4>(sum);
  }
  // Of the warp with the last columns; cis f32 [32, 2] of the token.
  __device__ __forceinline__ void rotate(const float* cis, int lane) {
    constexpr int kFirst = 2 * kSteps - kRopeDim / 8;
#pragma unroll
    for (int i = kFirst; i < 2 * kSteps; ++i) {
      const float2 turn = *reinterpret_cast<const float2*>(cis + 8 * (i - kFirst) + lane % 4 * 2);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        unsigned& word = words[i / 2][i % 2 * 2 + h];
        const float2 v = rotated(bf16x2_to_f32(word), turn, 1.f);
        word = f32x2_to_bf16(v.x, v.y);
      }
    }
  }
};

// q' . row over the warp's columns, for the rows of a tile: score[i] has rows 8 i .. 8 i + 7.
__device__ __forceinline__ void half_scores(const unsigned short (*rows)[kPitch], const Queries& q, int column,
                                            int lane, float (&score)[kTile / 8][4]) {
  const unsigned short* at = &rows[lane / 16 * 8 + lane % 8][column + lane / 8 % 2 * 8];
#pragma unroll
  for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) score[i][j] = 0.f;
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
      unsigned b[4];
      ldmatrix_x4(b, at + i * 16 * kPitch + step * 16);
      mma_m16n8k16_bf16(score[2 * i], q.words[step], {b[0], b[1]});
      mma_m16n8k16_bf16(score[2 * i + 1], q.words[step], {b[2], b[3]});
    }
  }
}
