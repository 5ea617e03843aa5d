// attn_prefill: each head's attention over the window and the compressed rows, for the tokens of a prompt, from raw
// queries and packed rows (spec model.md 2.3 to 2.6, 6.1; kernels.md c).
//
//   q'   = rope(q) in bf16;   f = rsqrt(mean(q^2) + eps) 512^-0.5 log2(e)
//   s[i] = f q' . row[i]                                    rows of the window by position, then of the pool by index
//   o    = rope^-1(sum bf16(2^(s[i] - M)) row[i] / (sum 2^(s[i] - M) + 2^(sink log2(e) - M)))           K = V = row
//
// M is an integer that does not grow before a score exceeds it by 8. It changes neither what a weight is rounded to nor
// anything else but where numbers become denormal: a result does not show the tiles in which M was found.
//
// grid (n_rows, ceil(n_heads / heads)), block 256, heads: 64 or 32 of a block. A block has one query, takes its rows in
// tiles of 32 and keeps the sums in registers. Four warps have 32 heads:
//
//   scores    warps 2 i and 2 i + 1 those of 16 heads, the one over columns 0 to 255, the other over the rest; then
//             each is given the other's half of 8 heads
//   weights   each warp those of its 8 heads, a head in four lanes; in bf16 to shared memory
//   sums      each warp 128 columns of 32 heads, so that a fragment of rows serves two mma
//
// Packed rows come by cp.async to slots of the thread that will decode them, 7 times 8 codes and 16 bytes of bf16 of a
// row, while the tile before is decoded and the one before that multiplied. Warps 0 to 3 decode the next tile before
// they multiply, the others afterwards: tensor cores and the rest have work at the same time. A tile has one barrier of
// the block, one of two warps and one of four.
//
// Exactness: e4m3 times its scale is exact in bf16; a scale above 2^7, with which values could exceed 57344, makes NaN.
// Queries are rounded where they were rotated, weights as above; products are summed in FP32 by mma.
// Order: columns of a score by steps of 16 in each half, then the halves; rows of a result by steps of 16. Sums of
// weights: a lane's 8 of a tile, tiles in turn, four lanes. All of it counts from the query's own first row.
//
// FLOPs: 131 k a row and query of 64 heads; bytes: 584 a row, from L2 for all but the first of neighbouring queries.
// Shared memory binds: of a tile, 208 KB are read as fragments and 88 KB for the rest, at 128 bytes a clock 2,400
// clocks, for 4.2 MFLOP, which H200's tensor cores do in 1,024; a warp has some 670 instructions for it, 1,340 clocks.
// Estimate, not measured: 200 to 300 TFLOPS on H200.
#include <math_constants.h>

#include "live_rows.cuh"
#include "prefill_tile.cuh"

constexpr float kSlack = 8.f;  // weights may be as large as 2^8

// The head of a lane, which it shares with the other three of lane / 4.
struct Softmax {
  float factor, maximum, sum;  // of scores; M; of the lane's own weights

  // Scores -> weights, of a tile that has `n_rows`; what a larger M makes of earlier sums.
  __device__ __forceinline__ float take(float2 (&score)[kTile / 8], int n_rows, int lane) {
    float largest = -CUDART_INF_F;
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
      const int row = 8 * i + lane % 4 * 2;
      score[i].x = row < n_rows ? __fmul_rn(score[i].x, factor) : -CUDART_INF_F;
      score[i].y = row + 1 < n_rows ? __fmul_rn(score[i].y, factor) : -CUDART_INF_F;
      largest = fmaxf(largest, fmaxf(score[i].x, score[i].y));
    }
    largest = warp_max<4>(largest);
    float rescale = 1.f;
    if (largest > __fadd_rn(maximum, kSlack)) {
      const float next = ceilf(largest);
      rescale = exp2f(__fsub_rn(maximum, next));
      sum = __fmul_rn(sum, rescale);
      maximum = next;
    }
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
      score[i] = make_float2(exp2f(__fsub_rn(score[i].x, maximum)), exp2f(__fsub_rn(score[i].y, maximum)));
      sum = __fadd_rn(__fadd_rn(sum, score[i].x), score[i].y);
    }
    return rescale;
  }
};

// A warp's sums of 32 heads: [m][i] of heads 16 m .. 16 m + 15 and columns 8 i .. 8 i + 7 of the warp's.
struct Sums {
  float of[2][kColumns / 8][4];

  __device__ __forceinline__ void set_zero() {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) of[i / (kColumns / 2)][i / 4 % (kColumns / 8)][i % 4] = 0.f;
  }
  // f32 [32], of each head; a warp has nothing to do where all of a lane's are 1.
  __device__ __forceinline__ void multiply(const float* factor, int lane) {
    float own[4];
#pragma unroll
    for (int h = 0; h < 4; ++h) own[h] = factor[8 * h + lane / 4];
    if (!__any_sync(kAllLanes, own[0] != 1.f || own[1] != 1.f || own[2] != 1.f || own[3] != 1.f)) return;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) of[m][i][j] = __fmul_rn(of[m][i][j], own[2 * m + j / 2]);
      }
    }
  }
  // weights . rows, over the columns from `column` on.
  __device__ __forceinline__ void add(const unsigned short (*weights)[kWeightPitch],
                                      const unsigned short (*rows)[kPitch], int column, int lane) {
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      unsigned a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], &weights[16 * m + lane % 16][16 * step + lane / 16 * 8]);
      const unsigned short* at = &rows[16 * step + lane % 16][column + lane / 16 * 8];
#pragma unroll
      for (int i = 0; i < kColumns / 16; ++i) {
        unsigned b[4];
        ldmatrix_x4_transposed(b, at + 16 * i);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_m16n8k16_bf16(of[m][2 * i], a[m], {b[0], b[1]});
          mma_m16n8k16_bf16(of[m][2 * i + 1], a[m], {b[2], b[3]});
        }
      }
    }
  }
  // To o bf16 [n_heads, 512] of the token, turned back.
  __device__ __forceinline__ void store(const float* cis, __nv_bfloat16* o, int head, int n_heads, int column,
                                        int lane) {
    constexpr int kTurned = (kColumns - kRopeDim) / 8;
    const bool last = column + kColumns == kHeadDim;
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      const int at = column + 8 * i + lane % 4 * 2;
      float2 turn = make_float2(1.f, 0.f);
      if (i >= kTurned && last) turn = *reinterpret_cast<const float2*>(cis + at - kNopeDim);
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const int own = head + 8 * h + lane / 4;
        float2 v = make_float2(of[h / 2][i][h % 2 * 2], of[h / 2][i][h % 2 * 2 + 1]);
        if (i >= kTurned && last) v = rotated(v, turn, -1.f);
        if (own < n_heads)
          *reinterpret_cast<unsigned*>(o + static_cast<size_t>(own) * kHeadDim + at) = f32x2_to_bf16(v.x, v.y);
      }
    }
  }
};

// q bf16 [n_rows, n_heads, 512], cis f32 [n_rows, 32, 2], sink f32 [n_heads]; rows u8 [window + n_rows, 584]: position
// pos - window + i in row i; pool u8 [max_pool or more, 584] or null; selected i32 [n_rows, max_pool] or null; pos
// i32 [1]; count i32 [1] or null; o bf16 [n_rows, n_heads, 512] OUT. ratio: 0 without a pool; heads: of a block, 64 or
// 32.
extern "C" __global__ void __launch_bounds__(kThreads, 1) attn_prefill(const __nv_bfloat16* q, const float* cis, const float* sink, const unsigned char* rows, const unsigned char* pool, const int* selected, const int* pos, const int* count, __nv_bfloat16* o, int n_rows, int n_heads, int heads, int max_pool, int window, int ratio, float eps) {
  extern __shared__ __align__(16) Shared dynamic[];
  Shared& shared = dynamic[0];
  const int token = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp / 4, first_head = blockIdx.y * heads + group * kGroup;
  const bool active = group * kGroup < heads && first_head < n_heads;  // the others only decode
  const int part = warp % 2, own = warp % 4 * 8 + lane / 4;            // half of a score's columns; the lane's head
  const int pair_barrier = 1 + warp / 2, group_barrier = 1 + kWarps / 2 + group;
  pdl_launch();
  pdl_wait();
  if (token >= live_rows(count, n_rows)) return;
  const int position = pos[0] + token;
  const int n_window = min(position + 1, window);
  const int n_pool = ratio ? min((position + 1) / ratio, max_pool) : 0;
  const int oldest = window + token + 1 - n_window, list = token * max_pool;
  const Attended attended{rows, pool, selected, oldest, n_window, n_window + n_pool, list};
  const int row = threadIdx.x / kLanes;
  int place = attended.place(row);
  const auto copy = [&](int tile) {
    copy_tile(shared, tile % 2, attended, tile * kTile, place);
    place = attended.place((tile + 1) * kTile + row);
  };
  copy(0);

  q += static_cast<size_t>(token) * n_heads * kHeadDim;
  cis += token * kRopeDim;
  Queries queries;
  Softmax softmax = {0.f, -CUDART_INF_F, 0.f};
  if (active) {
    queries.load(q, first_head + warp % 4 / 2 * 16, n_heads, part * kHalf, lane);
    const float squares[2] = {queries.squares(0), queries.squares(1)};
    float* mine = &shared.halves[warp][0][0].x;
    if (lane % 4 == 0) mine[lane / 4] = squares[0], mine[lane / 4 + 8] = squares[1];
    named_barrier_sync(pair_barrier, 64);
    const float other = (&shared.halves[warp ^ 1][0][0].x)[lane / 4 + 8 * part];
    const float mean = __fmul_rn(__fadd_rn(part ? squares[1] : squares[0], other), 1.f / kHeadDim);
    softmax.factor = __fmul_rn(rsqrtf(__fadd_rn(mean, eps)), kSoftmaxScale * kLog2E);
    if (part) queries.rotate(cis, lane);
  }
  decode_tile(shared, 0);
  copy(1);
  Sums sums;
  sums.set_zero();
  __syncthreads();
#pragma unroll 1
  for (int tile = 0; tile * kTile < attended.n_rows; ++tile) {
    const bool more = (tile + 1) * kTile < attended.n_rows;
    if (more && group == 0) {
      decode_tile(shared, (tile + 1) % 2);
      copy(tile + 2);
    }
    if (active) {
      const unsigned short(*values)[kPitch] = shared.rows[tile % 2];
      float half[kTile / 8][4];
      half_scores(values, queries, part * kHalf, lane, half);
      float2 score[kTile / 8];
#pragma unroll
      for (int i = 0; i < kTile / 8; ++i) {
        const float2 first = make_float2(half[i][0], half[i][1]), second = make_float2(half[i][2], half[i][3]);
        shared.halves[warp][i][lane] = part ? first : second;
        score[i] = part ? second : first;
      }
      named_barrier_sync(pair_barrier, 64);
#pragma unroll
      for (int i = 0; i < kTile / 8; ++i) {
        const float2 other = shared.halves[warp ^ 1][i][lane];
        score[i] = make_float2(__fadd_rn(score[i].x, other.x), __fadd_rn(score[i].y, other.y));
      }
      const float rescale = softmax.take(score, attended.n_rows - tile * kTile, lane);
      if (lane % 4 == 0) shared.factor[group][own] = rescale;
#pragma unroll
      for (int i = 0; i < kTile / 8; ++i)
        *reinterpret_cast<unsigned*>(&shared.weights[group][own][8 * i + lane % 4 * 2]) =
            f32x2_to_bf16(score[i].x, score[i].y);
      named_barrier_sync(group_barrier, 128);
      sums.multiply(shared.factor[group], lane);
      sums.add(shared.weights[group], values, warp % 4 * kColumns, lane);
    }
    if (more && group != 0) {
      decode_tile(shared, (tile + 1) % 2);
      copy(tile + 2);
    }
    __syncthreads();
  }
  if (!active) return;
  const float sink_score = __fmul_rn(sink[min(first_head + own, n_heads - 1)], kLog2E);
  const float denominator = __fadd_rn(warp_sum<4>(softmax.sum), exp2f(__fsub_rn(sink_score, softmax.maximum)));
  if (lane % 4 == 0) shared.factor[group][own] = 1.f / denominator;
  named_barrier_sync(group_barrier, 128);
  sums.multiply(shared.factor[group], lane);
  o += static_cast<size_t>(token) * n_heads * kHeadDim;
  sums.store(cis, o, first_head, n_heads, warp % 4 * kColumns, lane);
}
