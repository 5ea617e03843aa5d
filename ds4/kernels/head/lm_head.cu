// lm_head: logits of up to 8 tokens, and the greedy token of each (spec model.md 2.0, kernels.md b.9).
//
//   logits[t][v] = sum over k of W[v][k] * x[t][k]       x normed, FP32; W F32, F16, BF16 or Q8_0, dequantised exactly
//   token[t]     = the v with the largest logit, the lowest v on ties, the first NaN where there is one
//   status[t]    = 1 where that logit is not finite, else 0; the host may read it any time before the next launch
//
// Grid ceil(VOCAB / 32), block 256: a warp owns 4 rows (gemv.cuh), a block 32. Rows are read once for all N_TOK tokens, 8
// loads of 16 bytes in flight a lane. All VOCAB rows take part: rows beyond the tokenizer's are the model's own affair, as
// in ds4/sampling.py.
// Argmax: (logit, row) become one integer (order.cuh), whose maximum is taken over the block in shared memory and over the
// grid by atomicMax; the block that arrives last turns it into the results and sets it back to 0. A maximum of integers
// does not depend on the order of arrival, and a logit's sum does not depend on N_TOK, so neither do the results.
// `best` and `counter` are zeroed by their owner once, at allocation.
//
// Bytes: the head once, VOCAB * HIDDEN * sizeof(weight): 1.06 GB in BF16, 0.56 GB in Q8_0; logits 0.5 MB a token; x from L1.
// Estimates, not measured, at 88 % of copy: BF16 5.2 ms on GB10, 0.29 ms on H200; Q8_0 2.8 ms and 0.15 ms.
// Q8_0 costs 3 + N_TOK instructions a weight. With activations rounded to int8, dp4a would take N_TOK / 4 and one more for
// 32 weights: nothing on GB10 (64 instructions a byte to spare), but on H200 (7 to spare) FP32 activations bind from
// about N_TOK = 4 on. They stay FP32: the logits decide about tokens, and a rounded activation would show there first.
#include "gemv.cuh"
#include "last_block.cuh"
#include "order.cuh"

#if !defined(HIDDEN) || !defined(VOCAB) || !defined(N_TOK)
#error "HIDDEN, VOCAB and N_TOK must be defined"
#endif

constexpr int kWarps = 8;
constexpr int kRows = 4;
static_assert(N_TOK >= 1 && N_TOK <= 8, "a warp takes each token's maximum, a lane each sum");

template <class Matrix>
__device__ __forceinline__ void lm_head(const Matrix& matrix, const float* __restrict__ x, float* __restrict__ logits,
                                        unsigned long long* best, unsigned* counter, int* __restrict__ token,
                                        float* __restrict__ top, int* __restrict__ status) {
  __shared__ unsigned long long of_lane[kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = (blockIdx.x * kWarps + warp) * kRows;
  unsigned long long mine = 0;
  if (first < VOCAB) {
    // Q8_0 at 8 tokens has 32 sums and 16 weights a load to keep: two loads a row would spill, and it is not memory-bound.
    constexpr int kFlight = Matrix::kCount > 8 && N_TOK > 4 ? 1 : 2;
    float acc[kRows][N_TOK];
    gemv_rows<HIDDEN, kRows, N_TOK, kFlight>(matrix, first, VOCAB, x, lane, acc);
    float logit = 0.f;  // lane r * N_TOK + t has that of row r, token t
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int t = 0; t < N_TOK; ++t) {
        if (lane == r * N_TOK + t) logit = acc[r][t];
      }
    }
    const int row = first + lane / N_TOK;
    if (lane < kRows * N_TOK && row < VOCAB) {
      logits[static_cast<size_t>(lane % N_TOK) * VOCAB + row] = logit;
      mine = ranked(order_key(logit), row);
    }
  }
  of_lane[warp][lane] = mine;
  __syncthreads();
  if (warp < N_TOK) {  // token `warp`: 8 warps times 4 rows, one a lane
    const unsigned long long highest = warp_highest(of_lane[lane / kRows][lane % kRows * N_TOK + warp]);
    if (lane == 0) atomicMax(best + warp, highest);
  }
  if (!last_block(counter, gridDim.x) || threadIdx.x >= N_TOK) return;
  const int t = threadIdx.x;
  const unsigned long long highest = atomicExch(best + t, 0ull);
  token[t] = ranked_index(highest);
  top[t] = order_value(ranked_key(highest));
  status[t] = is_finite_key(ranked_key(highest)) ? 0 : 1;
}

// x f32 [N_TOK, HIDDEN], values [VOCAB, HIDDEN]; logits f32 [N_TOK, VOCAB], token i32, top f32, status i32 [N_TOK] OUT;
// workspaces best u64 [8] and counter u32 [4].
extern "C" __global__ void __launch_bounds__(256) lm_head_f32(const float* x, const float* values, float* logits, unsigned long long* best, unsigned* counter, int* token, float* top, int* status) {
  lm_head(PlainMatrix<float, HIDDEN>{values}, x, logits, best, counter, token, top, status);
}
extern "C" __global__ void __launch_bounds__(256) lm_head_f16(const float* x, const __half* values, float* logits, unsigned long long* best, unsigned* counter, int* token, float* top, int* status) {
  lm_head(PlainMatrix<__half, HIDDEN>{values}, x, logits, best, counter, token, top, status);
}
extern "C" __global__ void __launch_bounds__(256) lm_head_bf16(const float* x, const __nv_bfloat16* values, float* logits, unsigned long long* best, unsigned* counter, int* token, float* top, int* status) {
  lm_head(PlainMatrix<__nv_bfloat16, HIDDEN>{values}, x, logits, best, counter, token, top, status);
}

// The same, with the planes of Q8_0: codes i8 [VOCAB, HIDDEN], d f16 [VOCAB, HIDDEN / 32 padded to 8].
extern "C" __global__ void __launch_bounds__(256) lm_head_q8_0(const float* x, const signed char* codes, const __half* d, float* logits, unsigned long long* best, unsigned* counter, int* token, float* top, int* status) {
  lm_head(Q8Matrix<HIDDEN>{codes, d}, x, logits, best, counter, token, top, status);
}
