// moe_down: down projections of the experts of up to 8 tokens and their sum (spec model.md 2.7, kernels.md b.8).
//
//   part[t][slot] = scale2[e] (w2[e] mid[t][slot])                        e = ids[t][slot]; slot TOP_K: the shared expert
//   y[t]          = part[t][0] + part[t][1] + ... + part[t][TOP_K]        from the left; mid has the routing weight already
//
// Grid (HIDDEN / 16, 1 + N_TOK * TOP_K), block 256. blockIdx.y 0 is the shared expert, 1 + p is pair p of token p /
// TOP_K and rank p % TOP_K, without work where the block of an earlier token serves its expert (members.cuh). A warp owns 2
// rows, for all tokens with this expert. Parts go through a workspace; of the blocks of a row tile the one that arrives last
// adds them up, so that the order is that of the slots whatever the order of arrival. No float atomics.
// `counter`, one number a row tile, is zeroed by its owner once, at allocation. Order along INTER: expert_rows.cuh.
//
// Bytes at HIDDEN 4096, INTER 2048, TOP_K 6, one token: down of 7 experts, 28.3 + 8.9 MB with NVFP4 experts and a Q8_0 shared
// one; 26.7 + 8.4 MB MXFP4, FP8; 16.5 + 8.9 MB Q2_K, Q8_0; parts 115 KB out and in from L2, mid 8 KB a block from L1 or L2.
// Estimates, not measured, with the instruction counts of moe_up.cu: 0.18 ms on GB10 at 87 % of copy, 15 us on H200 (NVFP4).
#include "fp4_weights.cuh"
#include "iq2_weights.cuh"
#include "kquant_weights.cuh"
#include "last_block.cuh"
#include "members.cuh"

#if !defined(HIDDEN) || !defined(INTER) || !defined(TOP_K) || !defined(N_TOK)
#error "HIDDEN, INTER, TOP_K and N_TOK must be defined"
#endif
#if !defined(W2_FORMAT) || !defined(SW2_FORMAT)
#error "W2_FORMAT and SW2_FORMAT must be defined, as templates of block_weights.cuh"
#endif

using Matrix = W2_FORMAT<INTER>;
using Shared = SW2_FORMAT<INTER>;
constexpr int kResident = resident_blocks<Matrix, Shared>();
constexpr int kWarpRows = 2;
constexpr int kBlockRows = kWarps * kWarpRows;
static_assert(HIDDEN % kBlockRows == 0, "whole blocks");

// This block's rows of one expert. Its matrix begins at row `base`; member: see members.cuh.
template <class W>
struct ExpertDown {
  const W& down;
  size_t base;
  float scale;
  const float* mid;
  const int* member;
  float *staged, *parts;

  template <int kTok>
  __device__ __forceinline__ void run(int begin, int count) const {
    const int first = blockIdx.x * kBlockRows + threadIdx.x / 32 * kWarpRows;
    const int lane = threadIdx.x % 32, t = lane % kTok, row = first + lane / kTok;
    const W matrix[1] = {down};
    float acc[1][kWarpRows][kTok];
    multiply_rows<INTER>(matrix, base + first, Sources<1>{mid, member + begin, count}, staged, acc);
    float sum = 0.f;  // lane r * kTok + t has that of row first + r, member t
#pragma unroll
    for (int i = 0; i < kWarpRows * kTok; ++i) {
      if (lane == i) sum = acc[0][i / kTok][i % kTok];
    }
    if (lane < kWarpRows * kTok && t < count) parts[static_cast<size_t>(member[begin + t]) * HIDDEN + row] = __fmul_rn(sum, scale);
  }
};

// mid f32 [N_TOK, TOP_K + 1, INTER], ids i32 [N_TOK, TOP_K]; planes of w2 [experts * HIDDEN, INTER] and of sw2 [HIDDEN, INTER],
// null where a format has fewer; w2_scale f32 [experts] or null; patterns u64 [256] where a format is IQ2_XXS; y f32
// [N_TOK, HIDDEN] OUT; workspaces parts f32 [N_TOK, TOP_K + 1, HIDDEN] and counter u32 [HIDDEN / 16].
extern "C" __global__ void __launch_bounds__(256, kResident) moe_down(
    const float* mid, const int* ids, const unsigned char* w2_0, const unsigned char* w2_1, const unsigned char* w2_2,
    const unsigned char* w2_3, const unsigned char* sw2_0, const unsigned char* sw2_1, const unsigned char* sw2_2,
    const unsigned char* sw2_3, const float* w2_scale, const unsigned long long* patterns, float* y, float* parts,
    unsigned* counter, float sw2_scale) {
  constexpr int kEntries = pattern_entries<Matrix, Shared>();
  __shared__ __align__(16) float staged[staged_floats(INTER, N_TOK)];
  __shared__ uint2 table[kEntries + 1];
  __shared__ int member[N_TOK];
  pdl_launch();
  load_patterns<kEntries>(patterns, table);
  if (blockIdx.y == 0) {
    const Shared matrix({{sw2_0, sw2_1, sw2_2, sw2_3}}, table);
    prefetch_rows<kBlockRows>(matrix, blockIdx.x * kBlockRows);
    const int total = all_tokens(member);
    pdl_wait();
    in_groups<Shared::kTokens, true>(total, ExpertDown<Shared>{matrix, 0, sw2_scale, mid, member, staged, parts});
  } else {
    pdl_wait();
    const int pair = blockIdx.y - 1, total = find_members(ids, pair, member), e = ids[pair];
    const Matrix matrix({{w2_0, w2_1, w2_2, w2_3}}, table);
    const float scale = w2_scale ? w2_scale[e] : 1.f;
    const size_t base = static_cast<size_t>(e) * HIDDEN;
    in_groups<Matrix::kTokens, false>(total, ExpertDown<Matrix>{matrix, base, scale, mid, member, staged, parts});
  }
  if (!last_block(counter + blockIdx.x, gridDim.y)) return;
  for (int i = threadIdx.x; i < N_TOK * kBlockRows; i += kWarps * 32) {
    const int token = i / kBlockRows, column = blockIdx.x * kBlockRows + i % kBlockRows;
    const float* part = parts + static_cast<size_t>(token) * kSlots * HIDDEN + column;
    float sum = __ldcg(part);
#pragma unroll
    for (int slot = 1; slot < kSlots; ++slot) sum = __fadd_rn(sum, __ldcg(part + static_cast<size_t>(slot) * HIDDEN));
    y[static_cast<size_t>(token) * HIDDEN + column] = sum;
  }
}
