// attn_decode: each head's attention over the window and the compressed rows, from raw queries and packed rows (spec
// model.md 2.3 to 2.6, 6.1; kernels.md b.6).
//
//   q'   = rope(q rsqrt(mean(q^2) + eps))
//   s[i] = (q' . row[i]) 512^-0.5                 rows of the window by position, then of the pool by index
//   o    = rope^-1(sum e^(s[i] - m) row[i] / (sum e^(s[i] - m) + e^(sink - m)))         K = V = row, m = max s
//
// A token's rows are cut into tiles of 32, and the tiles into at most 32 spans of as many tiles each. The cut follows
// from the number of rows, which follows from the token's position: neither N_TOK nor the size of the caches shows in a
// result.
//
//   attn_partials  grid (spans, ceil(N_HEADS / 16), n_tok), block 256. A block takes its span's tiles one by one and
//                  leaves m, the sum of e^(s - m) and sum e^(s - m) row. Spans that the token has not reached leave at
//                  once. Warp w owns columns 64 w to 64 w + 63, one block of e4m3 with its scale, or the 64 rotated
//                  ones: it decodes them once and uses them as they are on both sides. Scores are summed over the warps
//                  in shared memory; a warp makes the softmax of two heads, a row a lane, with a running maximum.
//   attn_combine   grid (2, N_HEADS, n_tok), block 256: 256 columns of a head, four threads to four columns. Sum of the
//                  spans in the order 0, 4, 8 .. | 1, 5 .. | 2, 6 .. | 3, 7 .., the sink, the inverse rotation.
//
// Two launches, and no block that arrives last: one block would read up to 32 spans of 32 KB for its 16 heads, 1 MB
// through one multiprocessor, some 9 us (estimate); attn_combine reads them with all multiprocessors. Spans instead of
// blocks of a fixed number of rows: at 8,320 rows blocks of 32 would leave 34 MB of partial sums, spans leave 4 MB at
// most.
//
// Exactness: codes become bf16 without their scale, exactly; the scale, a power of two, multiplies the score and the
// weight in FP32. Queries and weights are split into two bf16 (2^-18 of each remains), products are summed in FP32 by
// two mma. The norm and 512^-0.5 multiply the score. Parts of o below 2^-100 may be lost, as low halves of weights
// become denormal.
// Order: columns by steps of 16 in a warp, its lanes' columns interleaved; warps 0 to 7; tiles in turn; spans as above.
//
// Bytes: 584 a row, from L2 for all but the first of the head groups; q and o 131 KB each a token; partial sums 131 KB
// a span, out and in through L2. Estimates for H200, not measured: 640 rows, one token: 2.5 us of latencies (pos,
// selected, rows), 1 us for the tile, 2 us for attn_combine; 8,320 rows: 9 tiles a block of about 1 us, 13 us. Eight
// tokens: 640 blocks of one tile, two to a multiprocessor, 10 us.
#if !defined(N_HEADS) || !defined(RATIO) || !defined(RING_SLOTS)
#error "N_HEADS, RATIO and RING_SLOTS must be defined"
#endif

#include <math_constants.h>

#include "attn_tile.cuh"

constexpr int kHeads = 16;                             // of a block
constexpr int kScorePitch = kTile + 8;                 // of floats: four heads' pairs touch every bank once
constexpr float kSoftmaxScale = 0.04419417382415922f;  // 512^-0.5
constexpr int kSlice = 256;                            // columns that a block of attn_combine makes
constexpr int kReaders = 4;                            // threads that share the spans of four columns

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocksAtOnce = 1;  // on a multiprocessor: they have 100 KB of shared memory, which two do not fit
#else
constexpr int kBlocksAtOnce = 2;
#endif

struct __align__(16) Shared {
  unsigned short rows[kWarps][kTile][kRowPitch];  // bf16 without scales, each warp's own columns
  float scores[kWarps][kHeads][kScorePitch];      // q . row over the warp's columns
  float weights[kHeads][kScorePitch];             // e^(score - maximum)
  float squares[kWarps][kHeads];                  // sums of squares of q over the warp's columns
  float factor[kHeads];                           // of scores: the query's norm and 512^-0.5
  float maximum[kHeads];                          // of the scores so far
  float rescale[kHeads];                          // what a larger maximum makes of earlier sums
};
static_assert(sizeof(Shared) == 60608, "op.py launches with as much");

// Scores of the tile over the warp's columns, and its rows to shared memory for `add_rows`. High and low parts have a
// sum each, so that an mma need not wait for the one before it.
__device__ __forceinline__ void score_tile(Shared& shared, const RawTile& raw, const Scales& scales, const Queries& q,
                                           int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  if (warp == kRopeWarp) cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    unsigned words[8];
    raw.decode(i, &shared.rows[warp][0][0], warp, lane, words);
    float high[4] = {}, low[4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const unsigned b[2] = {words[2 * s], words[2 * s + 1]};
      mma_m16n8k16_bf16(high, q.high[s], b);
      mma_m16n8k16_bf16(low, q.low[s], b);
    }
    const float2 scale = scales.of(i);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float even = __fadd_rn(high[2 * h], low[2 * h]), odd = __fadd_rn(high[2 * h + 1], low[2 * h + 1]);
      *reinterpret_cast<float2*>(&shared.scores[warp][g + 8 * h][8 * i + 2 * t]) =
          make_float2(__fmul_rn(even, scale.x), __fmul_rn(odd, scale.y));
    }
  }
}

// What scores of `head` are multiplied with: the query's norm and 512^-0.5.
__device__ __forceinline__ float score_factor(const Shared& shared, float eps, int head) {
  float squares = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) squares = __fadd_rn(squares, shared.squares[w][head]);
  return __fmul_rn(rsqrtf(fmaf(squares, 1.f / kHeadDim, eps)), kSoftmaxScale);
}

// Softmax of two heads a warp, a row a lane; `sum` is the lane's own.
__device__ __forceinline__ void take_scores(Shared& shared, float (&sum)[2], bool exists, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = 2 * warp + i;
    float score = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) score = __fadd_rn(score, shared.scores[w][head][lane]);
    score = exists ? __fmul_rn(score, shared.factor[head]) : -CUDART_INF_F;
    const float before = shared.maximum[head], maximum = fmaxf(before, warp_max(score));
    const float weight = expf(__fsub_rn(score, maximum));
    const float rescale = expf(__fsub_rn(before, maximum));
    sum[i] = fmaf(sum[i], rescale, weight);
    shared.weights[head][lane] = weight;
    __syncwarp();  // all lanes have read the maximum
    if (lane == 0) shared.maximum[head] = maximum, shared.rescale[head] = rescale;
  }
}

// out += weights . rows over the warp's columns, with the rows' scales in the weights.
__device__ __forceinline__ void add_rows(const Shared& shared, const Scales& scales, float (&out)[8][4], int warp,
                                         int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int step = 0; step < kTile / 16; ++step) {
    unsigned high[4], low[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 scale = scales.of(2 * step + i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 weight = *reinterpret_cast<const float2*>(&shared.weights[g + 8 * h][16 * step + 8 * i + 2 * t]);
        split_bf16(__fmul_rn(weight.x, scale.x), __fmul_rn(weight.y, scale.y), high[2 * i + h], low[2 * i + h]);
      }
    }
    const int row = 16 * step + lane % 16, column = lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < 8; n += 4) {
      unsigned b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) ldmatrix_x4_transposed(b[i], &shared.rows[warp][row][8 * (n + 2 * i) + column]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned right[2] = {b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]};
        mma_m16n8k16_bf16(out[n + i], high, right);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned right[2] = {b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]};
        mma_m16n8k16_bf16(out[n + i], low, right);
      }
    }
  }
}

// `first`: place of the block's first head among the spans of all heads and tokens; the next head's is max_spans on.
__device__ __forceinline__ void store_span(const Shared& shared, const float (&out)[8][4], const float (&sum)[2],
                                           float* partials, float* extremes, int first, int max_spans, int warp,
                                           int lane) {
  const int n_heads = N_HEADS - static_cast<int>(blockIdx.y) * kHeads;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int head = lane / 4 + 8 * h;
    float* columns = partials + static_cast<size_t>(first + head * max_spans) * kHeadDim + warp * kColumns;
    if (head < n_heads) {
#pragma unroll
      for (int n = 0; n < 8; ++n)
        *reinterpret_cast<float2*>(columns + 8 * n + lane % 4 * 2) = make_float2(out[n][2 * h], out[n][2 * h + 1]);
    }
    const int own = 2 * warp + h;
    const float total = warp_sum(sum[h]);
    if (lane == 0 && own < n_heads)
      *reinterpret_cast<float2*>(extremes + static_cast<size_t>(first + own * max_spans) * 2) =
          make_float2(shared.maximum[own], total);
  }
}

// q f32 [n_tok, N_HEADS, 512], cis f32 [n_tok, 32, 2]; ring u8 [RING_SLOTS, 584]; pool u8 [n_entries, 584] or null;
// selected i32 [n_tok, max_pool] or null; pos i32 [1]; partials f32 [n_tok, N_HEADS, max_spans, 512] OUT: the sum of
// e^(s - m) row; extremes f32 [n_tok, N_HEADS, max_spans, 2] OUT: m and the sum of e^(s - m).
extern "C" __global__ void __launch_bounds__(256, kBlocksAtOnce) attn_partials(const float* q, const float* cis, const unsigned char* ring, const unsigned char* pool, const int* selected, const int* pos, float* partials, float* extremes, int max_pool, int max_spans, int window, float eps) {
  extern __shared__ __align__(16) Shared dynamic[];
  Shared& shared = dynamic[0];
  const int span = blockIdx.x, head = blockIdx.y * kHeads, token = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  pdl_launch();
  pdl_wait();
  const int position = pos[0] + token;
  RawQueries raw_queries;
  raw_queries.load(q + static_cast<size_t>(token) * N_HEADS * kHeadDim, head, N_HEADS, warp, lane);
  const VisibleRows visible = visible_rows(position, window, max_pool);
  if (!visible.has_span(span)) return;
  const RowSource source{ring, pool, selected ? selected + token * max_pool : nullptr, visible.first % RING_SLOTS,
                         visible.n_window};
  const int begin = span * visible.tiles_per_span * kTile;
  const int end = min(begin + visible.tiles_per_span * kTile, visible.n_rows);
  unsigned short* rows = &shared.rows[warp][0][0];
  RawTile raw;
  raw.load(source, begin, end, rows, warp, lane);

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float squares = raw_queries.squares(h);
    if (t == 0) shared.squares[warp][g + 8 * h] = squares;
  }
  if (warp == kRopeWarp) raw_queries.rotate(cis + token * kRopeDim, lane);
  const Queries queries(raw_queries);
  float sum[2] = {0.f, 0.f};  // of the weights, of heads 2 warp and the next in the lane's rows
  float out[8][4] = {};
#pragma unroll 1
  for (int first = begin;;) {
    const Scales scales(raw.exponents, lane);
    score_tile(shared, raw, scales, queries, warp, lane);
    if (const int ahead = first + kTile + threadIdx.x / 8; ahead < end) {  // 37 bytes apart: no 64 bytes are left out
      const unsigned char* row = source.row(ahead) + threadIdx.x % 8 * 73;
      prefetch_l2(row);
      prefetch_l2(row + 36);
    }
    __syncthreads();
    if (first == begin) {
      if (lane < 2) {
        shared.factor[2 * warp + lane] = score_factor(shared, eps, 2 * warp + lane);
        shared.maximum[2 * warp + lane] = -CUDART_INF_F;
      }
      __syncwarp();
    }
    take_scores(shared, sum, first + lane < end, warp, lane);
    __syncthreads();
    if (first > begin) {
      const float rescale[2] = {shared.rescale[g], shared.rescale[g + 8]};
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] = __fmul_rn(out[n][i], rescale[i / 2]);
      }
    }
    add_rows(shared, scales, out, warp, lane);
    first += kTile;
    if (first >= end) break;
    __syncwarp();  // all lanes have read the rows whose place the next ones take
    raw.load(source, first, end, rows, warp, lane);
  }
  store_span(shared, out, sum, partials, extremes, (token * N_HEADS + head) * max_spans + span, max_spans, warp, lane);
}

// partials and extremes as above; sink f32 [N_HEADS]; o f32 [n_tok, N_HEADS, 512] OUT.
extern "C" __global__ void __launch_bounds__(256, 4) attn_combine(const float* partials, const float* extremes, const float* sink, const float* cis, const int* pos, float* o, int max_pool, int max_spans, int window) {
  __shared__ __align__(16) float4 sums[kReaders][kSlice / 4];
  const int head = blockIdx.y, token = blockIdx.z, lane = threadIdx.x % 32;
  const int reader = threadIdx.x / (kSlice / 4), column = threadIdx.x % (kSlice / 4);
  const int at = blockIdx.x * kSlice + column * 4;
  const size_t row = static_cast<size_t>(token) * N_HEADS + head;
  const float sink_score = sink[head];
  pdl_launch();
  pdl_wait();
  const VisibleRows visible = visible_rows(pos[0] + token, window, max_pool);
  float4 part[kMaxSpans / kReaders];
#pragma unroll
  for (int i = 0; i < kMaxSpans / kReaders; ++i) {
    const int span = i * kReaders + reader;
    part[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (visible.has_span(span))
      part[i] = *reinterpret_cast<const float4*>(partials + (row * max_spans + span) * kHeadDim + at);
  }
  float2 extreme = make_float2(-CUDART_INF_F, 0.f);
  if (visible.has_span(lane)) extreme = *reinterpret_cast<const float2*>(extremes + (row * max_spans + lane) * 2);
  const float maximum = warp_max(extreme.x);
  const float weight = visible.has_span(lane) ? expf(__fsub_rn(extreme.x, maximum)) : 0.f;
  const float denominator = __fadd_rn(warp_sum(__fmul_rn(weight, extreme.y)), expf(__fsub_rn(sink_score, maximum)));
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < kMaxSpans / kReaders; ++i) {
    const float of_span = __shfl_sync(kAllLanes, weight, i * kReaders + reader);
    sum.x = fmaf(of_span, part[i].x, sum.x);
    sum.y = fmaf(of_span, part[i].y, sum.y);
    sum.z = fmaf(of_span, part[i].z, sum.z);
    sum.w = fmaf(of_span, part[i].w, sum.w);
  }
  sums[reader][column] = sum;
  __syncthreads();
  if (reader != 0) return;
#pragma unroll
  for (int i = 1; i < kReaders; ++i) {
    const float4 more = sums[i][column];
    sum.x = __fadd_rn(sum.x, more.x);
    sum.y = __fadd_rn(sum.y, more.y);
    sum.z = __fadd_rn(sum.z, more.z);
    sum.w = __fadd_rn(sum.w, more.w);
  }
  sum = make_float4(sum.x / denominator, sum.y / denominator, sum.z / denominator, sum.w / denominator);
  if (at >= kNopeDim) {
    sum = rotated(sum, *reinterpret_cast<const float4*>(cis + token * kRopeDim + at - kNopeDim), -1.f);
  }
  *reinterpret_cast<float4*>(o + row * kHeadDim + at) = sum;
}
