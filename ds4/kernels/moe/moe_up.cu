// moe_up: gate and up projections of the experts of up to 8 tokens, their SwiGLU and routing weight (spec model.md 2.7,
// kernels.md b.8).
//
//   gate = scale1[e] (w1[e] x[t]), up = scale3[e] (w3[e] x[t])           e = ids[t][slot]; slot TOP_K: the shared expert
//   mid[t][slot] = silu(min(gate, limit)) * clamp(up, -limit, limit) * weight      weight[t][slot]; 1 for the shared one
//
// Grid (INTER / kBlockRows rounded up, 1 + N_TOK * TOP_K), block kThreads. blockIdx.y 0 is the shared expert, which
// comes first because it takes longest and asks for its weights before the router has run; 1 + p is pair p of token p /
// TOP_K and rank p % TOP_K, and leaves where the block of an earlier token serves its expert (members.cuh). A row tile
// is 8 gate rows above the same 8 up rows, for all tokens with this expert. Order: mma_rows.cuh; a token's sums depend
// neither on the other tokens nor on who shares its experts. The multiplier of a matrix is applied to its sum, rounded
// once. The four matrices have formats of their own, W1_FORMAT and so on: structs of dense_tiles.cuh, fp4_weights.cuh,
// kquant_weights.cuh or iq2_weights.cuh.
//
// Bytes at HIDDEN 4096, INTER 2048, TOP_K 6, one token: gate and up of 7 experts, 56.6 + 17.8 MB with NVFP4 experts and
// a Q8_0 shared one; 53.5 + 16.8 MB MXFP4, FP8; 26.0 + 17.8 MB IQ2_XXS, Q8_0; x, 16 KB a block, from L2.
// Thread-instructions a byte of weights on sm_90a, as scripts/kernel_instructions.py prints them, for one token (for
// eight with the same expert, without staging): NVFP4 5.0 (6.5), MXFP4 5.6 (7.8), Q4_K 5.5 (8.5), Q6_K 7.2, IQ2_XXS
// 10.6 (13.6), Q8_0 2.9 (4.1), FP8 3.3 (4.2), BF16 0.65; staging adds 7 % of NVFP4's for a token. Estimates, not
// measured: H200 has about 7 a byte, so at one token its memory binds all formats but IQ2_XXS, some 60 % of copy; B200
// has 5 and is about even with NVFP4, MXFP4 and Q4_K; GB10 has 64.
#include "members.cuh"

#if !defined(HIDDEN) || !defined(INTER) || !defined(TOP_K) || !defined(N_TOK) || !defined(SHARED_BYTES)
#error "HIDDEN, INTER, TOP_K, N_TOK and SHARED_BYTES must be defined"
#endif
#if !defined(W1_FORMAT) || !defined(W3_FORMAT) || !defined(SW1_FORMAT) || !defined(SW3_FORMAT)
#error "W1_FORMAT, W3_FORMAT, SW1_FORMAT and SW3_FORMAT must be defined, as formats of mma_rows.cuh"
#endif

using Gate = W1_FORMAT<HIDDEN>;
using Up = W3_FORMAT<HIDDEN>;
using SharedGate = SW1_FORMAT<HIDDEN>;
using SharedUp = SW3_FORMAT<HIDDEN>;
constexpr int kPairs = kTileRows / 2;  // of a row tile
constexpr int kBlockRows = kPairs * TilePlan<HIDDEN, N_TOK>::kBlockTiles;  // of each matrix of an expert
constexpr bool kPatterned =
    kNeedsPatterns<Gate> || kNeedsPatterns<Up> || kNeedsPatterns<SharedGate> || kNeedsPatterns<SharedUp>;
constexpr bool kAnyMinima = Gate::kMinima || Up::kMinima || SharedGate::kMinima || SharedUp::kMinima;
constexpr int kMemoryAt = kPatterned ? kPatternBytes : 0;
static_assert(SHARED_BYTES == kMemoryAt + plan_bytes<HIDDEN>(N_TOK, kAnyMinima), "as moe/tiles.py has it");

// This block's rows of one expert. Its matrices begin at row `base`; member: see members.cuh.
template <bool kShared, class GateMatrix, class UpMatrix>
struct ExpertUp {
  const GateMatrix& gate_matrix;
  const UpMatrix& up_matrix;
  size_t base;
  Multiplier gate_scale, up_scale;
  float limit;
  const float *x, *weights;
  const int* member;
  int count;
  unsigned char* memory;
  float* mid;

  template <int kTok>
  __device__ __forceinline__ void run() const {
    using Plan = TilePlan<HIDDEN, kTok>;
    const int first = blockIdx.x * kBlockRows, lane = threadIdx.x % 32;
    const auto rows = [&](int tile) -> RowPair<GateMatrix, UpMatrix> {
      const size_t row = base + min(first + tile * kPairs + lane / 4, INTER - 1);
      return {gate_matrix, up_matrix, row, row};
    };
    const int n_tiles = (min(kBlockRows, INTER - first) + kPairs - 1) / kPairs;
    const Sources<kSlots> from = {x, member, count};
    const auto finish = [&](int tile, const float* sums) {
      constexpr int kRows = kPairs * Plan::kSide;
      const float gate_factor = gate_scale.get(), up_factor = up_scale.get();
      for (int i = threadIdx.x; i < kRows * count; i += kThreads) {
        const int in_pass = i % kRows, t = i / kRows, pair = in_pass % kPairs, row = first + tile * kPairs + in_pass;
        if (row >= INTER) continue;
        const float* of_tile = sums + in_pass / kPairs * Plan::kSlices * sums_of_warp(kTok);
        const float gate = sum_of_slices<Plan::kSlices, Plan::kTiles>(of_tile, pair, t);
        const float up = sum_of_slices<Plan::kSlices, Plan::kTiles>(of_tile, pair + kPairs, t);
        const float g = __fmul_rn(__fmul_rn(gate, GateMatrix::kFactor), gate_factor);
        const float u = __fmul_rn(__fmul_rn(up, UpMatrix::kFactor), up_factor);
        const int to = member[t];
        const float weight = kShared ? 1.f : weights[to / kSlots * TOP_K + to % kSlots];
        mid[static_cast<size_t>(to) * INTER + row] = __fmul_rn(swiglu(g, u, limit), weight);
      }
    };
    multiply_tiles<Plan, INTER % kBlockRows == 0>(gate_matrix, up_matrix, n_tiles, rows, from, memory, finish);
  }
};

// x f32 [N_TOK, HIDDEN], ids i32 and weights f32 [N_TOK, TOP_K]; planes of w1 and w3 [experts * INTER, HIDDEN], of sw1
// and sw3 [INTER, HIDDEN], null where a format has fewer; w1_scale, w3_scale f32 [experts] or null; patterns bf16 [256,
// 8] where a format is IQ2_XXS; mid f32 [N_TOK, TOP_K + 1, INTER] OUT. Dynamic shared memory: SHARED_BYTES.
extern "C" __global__ void __launch_bounds__(kThreads, kResident) moe_up(
    const float* x, const int* ids, const float* weights, const unsigned char* w1_0, const unsigned char* w1_1,
    const unsigned char* w1_2, const unsigned char* w1_3, const unsigned char* w3_0, const unsigned char* w3_1,
    const unsigned char* w3_2, const unsigned char* w3_3, const unsigned char* sw1_0, const unsigned char* sw1_1,
    const unsigned char* sw1_2, const unsigned char* sw1_3, const unsigned char* sw3_0, const unsigned char* sw3_1,
    const unsigned char* sw3_2, const unsigned char* sw3_3, const float* w1_scale, const float* w3_scale,
    const unsigned long long* patterns, float* mid, float sw1_scale, float sw3_scale, float limit) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int member[N_TOK + 1];
  uint4* const table = reinterpret_cast<uint4*>(memory);
  pdl_launch();
  if constexpr (kPatterned) {
    load_patterns<kThreads>(patterns, table);
    __syncthreads();
  }
  if (blockIdx.y == 0) {
    const auto gate = make_matrix<SharedGate>({{sw1_0, sw1_1, sw1_2, sw1_3}}, table);
    const auto up = make_matrix<SharedUp>({{sw3_0, sw3_1, sw3_2, sw3_3}}, table);
    const int first = blockIdx.x * kBlockRows, n_rows = min(kBlockRows, INTER - first);
    prefetch_rows(gate, first, n_rows);
    prefetch_rows(up, first, n_rows);
    const int count = all_tokens(member);
    using Step = ExpertUp<true, SharedGate, SharedUp>;
    const Multiplier gate_scale = {sw1_scale, nullptr, nullptr}, up_scale = {sw3_scale, nullptr, nullptr};
    const Step step = {gate,    up,     0,     gate_scale,         up_scale, limit, x,
                       weights, member, count, memory + kMemoryAt, mid};
    step.template run<N_TOK <= 2 ? N_TOK : N_TOK <= 5 ? 5 : 8>();
    return;
  }
  pdl_wait();
  const int count = find_members(ids, blockIdx.y - 1, member);
  if (count == 0) return;
  const auto gate = make_matrix<Gate>({{w1_0, w1_1, w1_2, w1_3}}, table);
  const auto up = make_matrix<Up>({{w3_0, w3_1, w3_2, w3_3}}, table);
  const size_t base = static_cast<size_t>(ids[blockIdx.y - 1]) * INTER;
  const Multiplier gate_scale = {1.f, w1_scale, member}, up_scale = {1.f, w3_scale, member};
  using Step = ExpertUp<false, Gate, Up>;
  const Step step = {gate,    up,     base,  gate_scale,         up_scale, limit, x,
                     weights, member, count, memory + kMemoryAt, mid};
  for_count(count, step);
}
