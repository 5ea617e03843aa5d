// index_score: scores of the compressed entries of a CSA layer, of a launch's tokens (spec model.md 4, kernels.md b.5).
//
//   q      = FP4(Hadamard(RoPE(q)))                           a power-of-two scale per 32 columns
//   I[t][e] = sum over h of relu(q[t][h] . key[e]) * (weights[t][h] * weight_scale)
//
// for the entries e < (pos + t + 1) / 4 that token t sees, and only where these are more than top_k: otherwise all of them
// are chosen and no score is needed. Other places of `scores` are not written.
//
// Grid (min(ceil(n_entries / 32), 264), ceil(n_tok / 4)), block 256, sized by capacity; blocks without visible entries
// leave at once. A block prepares the queries of its 4 tokens in shared memory, half a warp a head. Then each warp goes its
// own way through tiles of 32 keys, dealt one to each block before a block's next warp gets one: few keys spread over many
// multiprocessors, and many keep all warps busy. A tile comes by cp.async into a place of the warp's own, becomes 64
// registers of operands, and while it meets 4 tokens the next one is on its way. FP4 values times a power of two are exact
// in bf16, so the products are exact and their sums FP32.
//
// Order of a score: the mma's own within 16 columns of a block of 32, eight mma one after another; a lane adds two heads of
// every 8, rising, by fmaf; then lanes in pairs. Tokens pass through the same code one by one, so that neither n_tok nor the
// grid can show.
//
// Bytes: 68 a key once for each 4 tokens, q 32 KB a token from L2 for each block. At 64 heads a token costs 16 kFLOP a key:
// beyond one token, and on H200 from the first, tensor cores bind and not memory. Estimates, not measured, for H200 and one
// token: 4 us at 4,096 keys, 14 us at 262,144 (7 us of mma.sync at 60 % of its peak, 4 us of bytes, 2 us of queries).
#include "key_tile.cuh"
#include "query.cuh"
#include "visible.cuh"

#ifndef N_HEADS
#error "N_HEADS must be defined"
#endif

constexpr int kTogether = N_HEADS > 8 ? 2 : 1;  // eights of heads at a time: four chains of mma that wait for themselves
constexpr int kHeads = (N_HEADS + 8 * kTogether - 1) / (8 * kTogether) * (8 * kTogether);  // the rest: zeros
constexpr int kWarps = 8;
constexpr int kGroup = 4;   // tokens of a block
constexpr int kFlight = 4;  // queries that a half warp has on their way
static_assert(N_HEADS >= 1 && N_HEADS <= 64, "4 tokens of 64 heads take 64 KB of shared memory");

// Queries of `n_tok` tokens as the second operand of an mma: 16 bytes for each [token][block of 32 columns][head][lane % 4].
__device__ __forceinline__ void prepare_queries(const float* q, const float* cis, int n_tok,
                                                uint4* operands) {
  const int half = threadIdx.x / kLanesPerQuery, part = threadIdx.x % kLanesPerQuery, n_rows = n_tok * kHeads;
#pragma unroll 1
  for (int first = half; first < n_rows; first += kFlight * 2 * kWarps) {  // kHeads is even: halves of a warp agree
    float v[kFlight][kPerLane];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int row = first + i * 2 * kWarps, head = row % kHeads;
      const bool real = row < n_rows && head < N_HEADS;
      const float* from = q + (static_cast<size_t>(row / kHeads) * N_HEADS + head) * kKeyDim + part * kPerLane;
#pragma unroll
      for (int j = 0; j < kPerLane; j += 4) {
        const Vec<float, 4> four = real ? load_vec<4>(from + j) : Vec<float, 4>{};
#pragma unroll
        for (int k = 0; k < 4; ++k) v[i][j + k] = four.v[k];
      }
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int row = first + i * 2 * kWarps;
      if (row >= n_rows) break;
      rotate_pairs(v[i], cis + row / kHeads * kQueryRope, part);
      hadamard(v[i], part);
      round_fp4(v[i]);
      operands[((row / kHeads * kKeyBlocks + part / 4) * kHeads + row % kHeads) * 4 + part % 4] = pack_query(v[i]);
    }
  }
}

// One token's scores of a tile: that of key lane / 4 + 8 (lane % 4), before its scale.
__device__ __forceinline__ float tile_scores(const unsigned (&a)[2][2 * kKeyBlocks][4], const uint4* operands,
                                             const float* head_weights, int lane) {
  const int t = lane % 4;
  const uint4* mine = operands + lane;
  const float* my_weights = head_weights + 2 * t;
  float sum[4] = {};  // of keys lane / 4 + 8 i
#pragma unroll 1
  for (int head = 0; head < kHeads; head += 8 * kTogether) {
    float d[kTogether][2][4] = {};
#pragma unroll
    for (int block = 0; block < kKeyBlocks; ++block) {
      uint4 b[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) b[j] = mine[(block * kHeads + head + 8 * j) * 4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const unsigned columns[2] = {k ? b[j].z : b[j].x, k ? b[j].w : b[j].y};
#pragma unroll
          for (int m = 0; m < 2; ++m) mma_m16n8k16_bf16(d[j][m], a[m][2 * block + k], columns);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const Vec<float, 2> w = load_vec<2>(my_weights + head + 8 * j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] = fmaf(fmaxf(d[j][i / 2][i % 2 * 2], 0.f), w.v[0], sum[i]);
        sum[i] = fmaf(fmaxf(d[j][i / 2][i % 2 * 2 + 1], 0.f), w.v[1], sum[i]);
      }
    }
  }
  // Four sums in each of four lanes: every exchange halves what a lane keeps.
  const bool odd = t & 1, upper = t & 2;
  const float even_keys = __fadd_rn(odd ? sum[1] : sum[0], __shfl_xor_sync(kAllLanes, odd ? sum[0] : sum[1], 1));
  const float odd_keys = __fadd_rn(odd ? sum[3] : sum[2], __shfl_xor_sync(kAllLanes, odd ? sum[2] : sum[3], 1));
  return __fadd_rn(upper ? odd_keys : even_keys, __shfl_xor_sync(kAllLanes, upper ? even_keys : odd_keys, 2));
}

// q f32 [n_tok, N_HEADS, 128], cis f32 [n_tok, 32, 2], weights f32 [n_tok, N_HEADS], keys u8 [n_entries, 68], pos i32 [1];
// scores f32 [n_tok, n_entries] OUT. Dynamic shared memory: operands, weights, a tile a warp.
extern "C" __global__ void __launch_bounds__(256, 2) index_score(const float* q, const float* cis, const float* weights, const unsigned char* keys, const int* pos, float* scores, float weight_scale, int n_tok, int n_entries, int top_k) {
  extern __shared__ __align__(16) unsigned char memory[];
  pdl_launch();
  pdl_wait();
  const int first = blockIdx.y * kGroup, n_mine = min(n_tok - first, kGroup), start = *pos + first;
  const int most = visible_entries(start + n_mine - 1, n_entries);
  if (most <= top_k || static_cast<int>(blockIdx.x) * kTileKeys >= most) return;
  uint4* operands = reinterpret_cast<uint4*>(memory);
  float* head_weights = reinterpret_cast<float*>(operands + n_mine * kKeyBlocks * kHeads * 4);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char* raw = reinterpret_cast<unsigned char*>(head_weights + n_mine * kHeads) + warp * kTileBytes;
  int entry = (warp * gridDim.x + blockIdx.x) * kTileKeys;
  const int step = kWarps * gridDim.x * kTileKeys;
  copy_tile(raw, keys + static_cast<size_t>(entry) * kKeyBytes, most - entry, lane);
  prepare_queries(q + static_cast<size_t>(first) * N_HEADS * kKeyDim, cis + first * kQueryRope, n_mine, operands);
  for (int i = threadIdx.x; i < n_mine * kHeads; i += kWarps * 32) {
    const int head = i % kHeads, token = first + i / kHeads;
    head_weights[i] = head < N_HEADS ? __fmul_rn(weights[token * N_HEADS + head], weight_scale) : 0.f;
  }
  __syncthreads();
  for (; entry < most; entry += step) {
    unsigned a[2][2 * kKeyBlocks][4];
    cp_async_wait<0>();
    __syncwarp();
    const float scale = e8m0_to_f32(decode_tile(raw, lane, a));
    __syncwarp();
    copy_tile(raw, keys + static_cast<size_t>(entry + step) * kKeyBytes, most - entry - step, lane);
    const int mine = entry + lane / 4 + 8 * (lane % 4);
#pragma unroll 1
    for (int t = 0; t < n_mine; ++t) {
      const int n_visible = visible_entries(start + t, n_entries);
      if (n_visible <= top_k) continue;
      const float score = tile_scores(a, operands + t * kKeyBlocks * kHeads * 4, head_weights + t * kHeads, lane);
      if (mine < n_visible) scores[static_cast<size_t>(first + t) * n_entries + mine] = __fmul_rn(score, scale);
    }
  }
}
