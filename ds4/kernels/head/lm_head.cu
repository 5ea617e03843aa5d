// lm_head: logits of up to 8 tokens, and the greedy token of each (spec model.md 2.0, kernels.md b.9).
//
//   logits[t][v] = sum over k of W[v][k] * x[t][k]       x normed, FP32; W F32, F16, BF16 or Q8_0, dequantised exactly
//   token[t]     = the v with the largest logit, the lowest v on ties, the first NaN where there is one
//   status[t]    = 1 where that logit is not finite, else 0; the host may read it any time before the next launch
//
// Grid: as many blocks as the device takes at once, or fewer; block 256. A block takes a run of units of rows (dense_rows.cuh);
// rows are read once for all N_TOK tokens. All VOCAB rows take part: rows beyond the tokenizer's are the model's own affair,
// as in ds4/sampling.py.
// Argmax: (logit, row) become one integer (order.cuh), whose maximum each thread keeps of the rows that it sees; that of the
// block is taken in shared memory, that of the grid by atomicMax. The block that arrives last turns it into the results and
// sets it back to 0. A maximum of integers does not depend on who takes it of what, and a logit's sum does not depend on
// N_TOK, so neither do the results.
// `best` and `counter` are zeroed by their owner once, at allocation.
//
// Bytes: the head once, VOCAB * HIDDEN * sizeof(weight): 1.06 GB in BF16, 0.56 GB in Q8_0; logits 0.5 MB a token.
// Estimates, not measured, at 88 % of copy: BF16 5.2 ms on GB10, 0.29 ms on H200; Q8_0 2.8 ms and 0.15 ms.
// Thread-instructions for a byte of weights, by scripts/kernel_instructions.py for sm_90a at N_TOK 1 / 2 / 8: BF16 0.6 / 1.8 /
// 2.4, F16 2.4 / 3.6 / 3.9, Q8_0 3.0 / 4.0 / 6.1; H200 has about 7 (estimate of kernels.md b.0).
// Activations stay FP32, in three parts: the logits decide about tokens, and a rounded activation would show there first.
#include "../proj/dense_rows.cuh"
#include "last_block.cuh"
#include "order.cuh"

#if !defined(HIDDEN) || !defined(VOCAB) || !defined(N_TOK)
#error "HIDDEN, VOCAB and N_TOK must be defined"
#endif

using Plan = RowsPlan<HIDDEN, N_TOK>;
static_assert(N_TOK >= 1 && N_TOK <= 8, "a warp takes each token's maximum");

template <class Matrix>
__device__ __forceinline__ void lm_head(const PlanePointers& planes, const float* x, unsigned char* memory,
                                        float* __restrict__ logits, unsigned long long* best, unsigned* counter,
                                        int* __restrict__ token, float* __restrict__ top, int* __restrict__ status) {
  constexpr int kResults = Plan::kPhaseRows * N_TOK, kMine = (kResults + Plan::kThreads - 1) / Plan::kThreads;
  __shared__ unsigned long long of_block[N_TOK];
  if (threadIdx.x < N_TOK) of_block[threadIdx.x] = 0ull;
  unsigned long long mine[kMine] = {};  // a thread sees one token in all its i-th calls
  const long long block = blockIdx.x;
  constexpr int kUnits = units_of<Plan>(VOCAB, 1);
  DenseRows<Plan> rows(x, memory);
  rows.run(Matrix(planes), {VOCAB, 1}, static_cast<int>(block * kUnits / gridDim.x),
           static_cast<int>((block + 1) * kUnits / gridDim.x), [&](int i, int row, int t, float logit) {
             logits[static_cast<size_t>(t) * VOCAB + row] = logit;
             mine[i] = max(mine[i], ranked(order_key(logit), row));
           });
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int t = (threadIdx.x + i * Plan::kThreads) / Plan::kPhaseRows;
    if (mine[i] != 0) atomicMax(of_block + t, mine[i]);
  }
  __syncthreads();
  if (threadIdx.x < N_TOK) atomicMax(best + threadIdx.x, of_block[threadIdx.x]);
  if (!last_block(counter, gridDim.x) || threadIdx.x >= N_TOK) return;
  const int t = threadIdx.x;
  const unsigned long long highest = atomicExch(best + t, 0ull);
  token[t] = ranked_index(highest);
  top[t] = order_value(ranked_key(highest));
  status[t] = is_finite_key(ranked_key(highest)) ? 0 : 1;
}

// x f32 [N_TOK, HIDDEN], values [VOCAB, HIDDEN]; logits f32 [N_TOK, VOCAB], token i32, top f32, status i32 [N_TOK] OUT;
// workspaces best u64 [8] and counter u32 [4]. Dynamic shared memory: Plan::kSharedBytes.
extern "C" __global__ void __launch_bounds__(256, Plan::kBlocks) lm_head_f32(const float* x, const float* values, float* logits, unsigned long long* best, unsigned* counter, int* token, float* top, int* status) {
  extern __shared__ __align__(16) unsigned char memory[];
  const PlanePointers planes{{reinterpret_cast<const unsigned char*>(values), nullptr, nullptr, nullptr}};
  lm_head<F32Tile<HIDDEN>>(planes, x, memory, logits, best, counter, token, top, status);
}
extern "C" __global__ void __launch_bounds__(256, Plan::kBlocks) lm_head_f16(const float* x, const __half* values, float* logits, unsigned long long* best, unsigned* counter, int* token, float* top, int* status) {
  extern __shared__ __align__(16) unsigned char memory[];
  const PlanePointers planes{{reinterpret_cast<const unsigned char*>(values), nullptr, nullptr, nullptr}};
  lm_head<F16Tile<HIDDEN>>(planes, x, memory, logits, best, counter, token, top, status);
}
extern "C" __global__ void __launch_bounds__(256, Plan::kBlocks) lm_head_bf16(const float* x, const __nv_bfloat16* values, float* logits, unsigned long long* best, unsigned* counter, int* token, float* top, int* status) {
  extern __shared__ __align__(16) unsigned char memory[];
  const PlanePointers planes{{reinterpret_cast<const unsigned char*>(values), nullptr, nullptr, nullptr}};
  lm_head<Bf16Tile<HIDDEN>>(planes, x, memory, logits, best, counter, token, top, status);
}

// The same, with the planes of Q8_0: codes i8 [VOCAB, HIDDEN], d f16 [VOCAB, HIDDEN / 32 padded to 8].
extern "C" __global__ void __launch_bounds__(256, Plan::kBlocks) lm_head_q8_0(const float* x, const signed char* codes, const __half* d, float* logits, unsigned long long* best, unsigned* counter, int* token, float* top, int* status) {
  extern __shared__ __align__(16) unsigned char memory[];
  const PlanePointers planes{{reinterpret_cast<const unsigned char*>(codes), reinterpret_cast<const unsigned char*>(d), nullptr, nullptr}};
  lm_head<Q8Tile<HIDDEN>>(planes, x, memory, logits, best, counter, token, top, status);
}
