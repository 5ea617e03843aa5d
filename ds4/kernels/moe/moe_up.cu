// moe_up: gate and up projections of the experts of up to 8 tokens, their SwiGLU and routing weight (spec model.md 2.7,
// kernels.md b.8).
//
//   gate = scale1[e] (w1[e] x[t]), up = scale3[e] (w3[e] x[t])           e = ids[t][slot]; slot TOP_K: the shared expert
//   mid[t][slot] = silu(min(gate, limit)) * clamp(up, -limit, limit) * weight      weight[t][slot]; 1 for the shared one
//
// Grid (INTER / 8, 1 + N_TOK * TOP_K), block 256. blockIdx.y 0 is the shared expert, which comes first because it
// takes longest and asks for its weights before the router has run; 1 + p is pair p of token p / TOP_K and rank p % TOP_K,
// and leaves where the block of an earlier token serves its expert (members.cuh). A warp owns a gate row and the same up
// row, for all tokens with this expert, so that SwiGLU takes place in one lane.
// Order: expert_rows.cuh; a token's sums depend neither on the other tokens nor on who shares its experts. The multiplier
// of a matrix is applied to its sum, rounded once.
// The four matrices have formats of their own, W1_FORMAT and so on: templates of block_weights.cuh. Gate and up of one
// format are multiplied together, of two formats one after the other.
//
// Bytes at HIDDEN 4096, INTER 2048, TOP_K 6, one token: gate and up of 7 experts, 56.6 + 17.8 MB with NVFP4 experts and a
// Q8_0 shared one; 53.5 + 16.8 MB MXFP4, FP8; 26.0 + 17.8 MB IQ2_XXS, Q8_0; x, 16 KB, from L1.
// Instructions of the inner loop on sm_90a, counted, a weight (a byte): NVFP4 5.4 (9.5), MXFP4 5.4 (10.2), Q4_K 5.2 (9.1),
// Q2_K 4.7 (14), Q6_K 6.3 (7.7), IQ2_XXS 6.8 (26), Q8_0 4.9 (4.6), FP8 5.4, BF16 4.6 (2.3); a further token costs 1.7 more.
// Estimates, not measured: 0.37 ms on GB10 at 87 % of copy (64 instructions a byte to spare); on H200, which has 7 to spare,
// instructions bind all formats but Q8_0, FP8 and BF16: 28 us NVFP4 (63 % of copy), 35 us IQ2_XXS (30 %).
#include "fp4_weights.cuh"
#include "iq2_weights.cuh"
#include "kquant_weights.cuh"
#include "math.cuh"
#include "members.cuh"

#if !defined(HIDDEN) || !defined(INTER) || !defined(TOP_K) || !defined(N_TOK)
#error "HIDDEN, INTER, TOP_K and N_TOK must be defined"
#endif
#if !defined(W1_FORMAT) || !defined(W3_FORMAT) || !defined(SW1_FORMAT) || !defined(SW3_FORMAT)
#error "W1_FORMAT, W3_FORMAT, SW1_FORMAT and SW3_FORMAT must be defined, as templates of block_weights.cuh"
#endif

using Gate = W1_FORMAT<HIDDEN>;
using Up = W3_FORMAT<HIDDEN>;
using SharedGate = SW1_FORMAT<HIDDEN>;
using SharedUp = SW3_FORMAT<HIDDEN>;
constexpr int kResident = resident_blocks<Gate, Up, SharedGate, SharedUp>();
constexpr int kBlockRows = kWarps;  // of each matrix of an expert, a block
static_assert(INTER % kBlockRows == 0, "whole blocks");

// Comparisons with a NaN are false, so that a NaN stays one.
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : up < -limit ? -limit : up;
  return __fmul_rn(silu(g), u);
}

// gate[t], up[t]: a row of both matrices times the sources.
template <int kTok, class GateMatrix, class UpMatrix>
__device__ __forceinline__ void multiply_pair(const GateMatrix& gate_matrix, const UpMatrix& up_matrix, size_t row,
                                              const Sources<kSlots>& from, float* staged, float (&gate)[kTok],
                                              float (&up)[kTok]) {
  if constexpr (SameType<GateMatrix, UpMatrix>::value) {
    const GateMatrix both[2] = {gate_matrix, up_matrix};
    float acc[2][1][kTok];
    multiply_rows<HIDDEN>(both, row, from, staged, acc);
#pragma unroll
    for (int t = 0; t < kTok; ++t) gate[t] = acc[0][0][t], up[t] = acc[1][0][t];
  } else {
    const GateMatrix only_gate[1] = {gate_matrix};
    const UpMatrix only_up[1] = {up_matrix};
    float acc[1][1][kTok];
    multiply_rows<HIDDEN>(only_gate, row, from, staged, acc);
#pragma unroll
    for (int t = 0; t < kTok; ++t) gate[t] = acc[0][0][t];
    multiply_rows<HIDDEN>(only_up, row, from, staged, acc);
#pragma unroll
    for (int t = 0; t < kTok; ++t) up[t] = acc[0][0][t];
  }
}

// This block's rows of one expert. Its matrices begin at row `base`; member: see members.cuh.
template <bool kShared, class GateMatrix, class UpMatrix>
struct ExpertUp {
  const GateMatrix& gate_matrix;
  const UpMatrix& up_matrix;
  size_t base;
  float gate_scale, up_scale, limit;
  const float *x, *weights;
  const int* member;
  float *staged, *mid;

  static constexpr int kMost = GateMatrix::kTokens < UpMatrix::kTokens ? GateMatrix::kTokens : UpMatrix::kTokens;

  template <int kTok>
  __device__ __forceinline__ void run(int begin, int count) const {
    const int row = blockIdx.x * kBlockRows + threadIdx.x / 32, lane = threadIdx.x % 32;
    float gate[kTok], up[kTok];
    multiply_pair(gate_matrix, up_matrix, base + row, {x, member + begin, count}, staged, gate, up);
    float g = 0.f, u = 0.f;  // lane t has those of member t
#pragma unroll
    for (int t = 0; t < kTok; ++t) {
      if (lane == t) g = gate[t], u = up[t];
    }
    if (lane >= count) return;
    const int to = member[begin + lane];
    const float value = swiglu(__fmul_rn(g, gate_scale), __fmul_rn(u, up_scale), limit);
    const float weight = kShared ? 1.f : weights[to / kSlots * TOP_K + to % kSlots];
    mid[static_cast<size_t>(to) * INTER + row] = __fmul_rn(value, weight);
  }
};

// x f32 [N_TOK, HIDDEN], ids i32 and weights f32 [N_TOK, TOP_K]; planes of w1 and w3 [experts * INTER, HIDDEN], of sw1 and sw3
// [INTER, HIDDEN], null where a format has fewer; w1_scale, w3_scale f32 [experts] or null; patterns u64 [256] where a format
// is IQ2_XXS; mid f32 [N_TOK, TOP_K + 1, INTER] OUT.
extern "C" __global__ void __launch_bounds__(256, kResident) moe_up(
    const float* x, const int* ids, const float* weights, const unsigned char* w1_0, const unsigned char* w1_1,
    const unsigned char* w1_2, const unsigned char* w1_3, const unsigned char* w3_0, const unsigned char* w3_1,
    const unsigned char* w3_2, const unsigned char* w3_3, const unsigned char* sw1_0, const unsigned char* sw1_1,
    const unsigned char* sw1_2, const unsigned char* sw1_3, const unsigned char* sw3_0, const unsigned char* sw3_1,
    const unsigned char* sw3_2, const unsigned char* sw3_3, const float* w1_scale, const float* w3_scale,
    const unsigned long long* patterns, float* mid, float sw1_scale, float sw3_scale, float limit) {
  constexpr int kEntries = pattern_entries<Gate, Up, SharedGate, SharedUp>();
  __shared__ __align__(16) float staged[staged_floats(HIDDEN, N_TOK)];
  __shared__ uint2 table[kEntries + 1];
  __shared__ int member[N_TOK];
  pdl_launch();
  load_patterns<kEntries>(patterns, table);
  if (blockIdx.y == 0) {
    const SharedGate gate({{sw1_0, sw1_1, sw1_2, sw1_3}}, table);
    const SharedUp up({{sw3_0, sw3_1, sw3_2, sw3_3}}, table);
    prefetch_rows<kBlockRows>(gate, blockIdx.x * kBlockRows);
    prefetch_rows<kBlockRows>(up, blockIdx.x * kBlockRows);
    const int total = all_tokens(member);
    pdl_wait();
    using Step = ExpertUp<true, SharedGate, SharedUp>;
    const Step step = {gate, up, 0, sw1_scale, sw3_scale, limit, x, weights, member, staged, mid};
    in_groups<Step::kMost, true>(total, step);
    return;
  }
  pdl_wait();
  const int pair = blockIdx.y - 1, total = find_members(ids, pair, member);
  if (total == 0) return;
  const int e = ids[pair];
  const Gate gate({{w1_0, w1_1, w1_2, w1_3}}, table);
  const Up up({{w3_0, w3_1, w3_2, w3_3}}, table);
  const size_t base = static_cast<size_t>(e) * INTER;
  const float gate_scale = w1_scale ? w1_scale[e] : 1.f, up_scale = w3_scale ? w3_scale[e] : 1.f;
  using Step = ExpertUp<false, Gate, Up>;
  const Step step = {gate, up, base, gate_scale, up_scale, limit, x, weights, member, staged, mid};
  in_groups<Step::kMost, false>(total, step);
}
