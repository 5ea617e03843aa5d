// moe_down: down projections of the experts of up to 8 tokens and their sum (spec model.md 2.7, kernels.md b.8).
//
//   part[t][slot] = scale2[e] (w2[e] mid[t][slot])                        e = ids[t][slot]; slot TOP_K: the shared expert
//   y[t]          = part[t][0] + part[t][1] + ... + part[t][TOP_K]        from the left; mid has the routing weight already
//
// Grid (HIDDEN / kBlockRows rounded up, 1 + N_TOK * TOP_K), block kThreads. blockIdx.y 0 is the shared expert, 1 + p is
// pair p of token p / TOP_K and rank p % TOP_K, without work where the block of an earlier token serves its expert
// (members.cuh). Parts go through a workspace; of the blocks of the same rows the one that arrives last adds them up,
// so that the order is that of the slots whatever the order of arrival. No float atomics. `counter`, a number for each
// kBlockRows rows, is zeroed by its owner once, at allocation. Order along INTER: mma_rows.cuh.
//
// Bytes at HIDDEN 4096, INTER 2048, TOP_K 6, one token: down of 7 experts, 28.3 + 8.9 MB with NVFP4 experts and a Q8_0
// shared one; 26.7 + 8.4 MB MXFP4, FP8; 16.5 + 8.9 MB Q2_K, Q8_0; parts 115 KB out and in from L2, mid 8 KB a block
// from L2. Thread-instructions a byte of Q2_K: 9.3 for one token, 13.8 for eight; the others as in moe_up.cu.
#include "last_block.cuh"
#include "members.cuh"

#if !defined(HIDDEN) || !defined(INTER) || !defined(TOP_K) || !defined(N_TOK) || !defined(SHARED_BYTES)
#error "HIDDEN, INTER, TOP_K, N_TOK and SHARED_BYTES must be defined"
#endif
#if !defined(W2_FORMAT) || !defined(SW2_FORMAT)
#error "W2_FORMAT and SW2_FORMAT must be defined, as formats of mma_rows.cuh"
#endif

using Down = W2_FORMAT<INTER>;
using SharedDown = SW2_FORMAT<INTER>;
constexpr int kBlockRows = kTileRows * TilePlan<INTER, N_TOK>::kBlockTiles;
constexpr bool kPatterned = kNeedsPatterns<Down> || kNeedsPatterns<SharedDown>;
constexpr int kMemoryAt = kPatterned ? kPatternBytes : 0;
constexpr bool kAnyMinima = Down::kMinima || SharedDown::kMinima;
static_assert(SHARED_BYTES == kMemoryAt + plan_bytes<INTER>(N_TOK, kAnyMinima), "as moe/tiles.py has it");

// This block's rows of one expert. Its matrix begins at row `base`; member: see members.cuh.
template <class Matrix>
struct ExpertDown {
  const Matrix& matrix;
  int base;
  Multiplier scale;
  const float* mid;
  const int* member;
  int count;
  unsigned char* memory;
  float* parts;

  template <int kTok>
  __device__ __forceinline__ void run() const {
    using Plan = TilePlan<INTER, kTok>;
    const int first = blockIdx.x * kBlockRows, lane = threadIdx.x % 32;
    const auto rows = [&](int tile) { return tile_rows(matrix, base, first + tile * kTileRows, HIDDEN, lane); };
    const int n_tiles = (min(kBlockRows, HIDDEN - first) + kTileRows - 1) / kTileRows;
    const Sources<1> from = {mid, member, count};
    const auto finish = [&](int tile, const float* sums) {
      constexpr int kRows = kTileRows * Plan::kSide;
      const float factor = scale.get();
      for (int i = threadIdx.x; i < kRows * count; i += kThreads) {
        const int in_pass = i % kRows, t = i / kRows, row = first + tile * kTileRows + in_pass;
        if (row >= HIDDEN) continue;
        const float* of_tile = sums + in_pass / kTileRows * Plan::kSlices * sums_of_warp(kTok);
        const float sum = sum_of_slices<Plan::kSlices, Plan::kTiles>(of_tile, in_pass % kTileRows, t);
        parts[static_cast<size_t>(member[t]) * HIDDEN + row] = __fmul_rn(__fmul_rn(sum, Matrix::kFactor), factor);
      }
    };
    multiply_tiles<Plan, HIDDEN % kBlockRows == 0>(matrix, matrix, n_tiles, rows, from, memory, finish);
  }
};

// mid f32 [N_TOK, TOP_K + 1, INTER], ids i32 [N_TOK, TOP_K]; planes of w2 [experts * HIDDEN, INTER] and of sw2 [HIDDEN,
// INTER], null where a format has fewer; w2_scale f32 [experts] or null; patterns bf16 [256, 8] where a format is
// IQ2_XXS; y f32 [N_TOK, HIDDEN] OUT; workspaces parts f32 [N_TOK, TOP_K + 1, HIDDEN] and counter u32 [HIDDEN /
// kBlockRows rounded up]. Dynamic shared memory: SHARED_BYTES.
extern "C" __global__ void __launch_bounds__(kThreads, kResident) moe_down(
    const float* mid, const int* ids, const unsigned char* w2_0, const unsigned char* w2_1, const unsigned char* w2_2,
    const unsigned char* w2_3, const unsigned char* sw2_0, const unsigned char* sw2_1, const unsigned char* sw2_2,
    const unsigned char* sw2_3, const float* w2_scale, const unsigned long long* patterns, float* y, float* parts,
    unsigned* counter, float sw2_scale) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int member[N_TOK + 1];
  uint4* const table = reinterpret_cast<uint4*>(memory);
  unsigned char* const rest = memory + kMemoryAt;
  pdl_launch();
  if constexpr (kPatterned) {
    load_patterns<kThreads>(patterns, table);
    __syncthreads();
  }
  const int first = blockIdx.x * kBlockRows, n_rows = min(kBlockRows, HIDDEN - first);
  if (blockIdx.y == 0) {
    const auto matrix = make_matrix<SharedDown>({{sw2_0, sw2_1, sw2_2, sw2_3}}, table);
    prefetch_rows(matrix, first, n_rows);
    const int count = all_tokens(member);
    const ExpertDown<SharedDown> step = {matrix, 0, {sw2_scale, nullptr, nullptr}, mid, member, count, rest, parts};
    step.template run<N_TOK <= 2 ? N_TOK : N_TOK <= 5 ? 5 : 8>();
  } else {
    pdl_wait();
    const int count = find_members(ids, blockIdx.y - 1, member);
    if (count > 0) {
      const auto matrix = make_matrix<Down>({{w2_0, w2_1, w2_2, w2_3}}, table);
      const Multiplier scale = {1.f, w2_scale, member};
      const ExpertDown<Down> step = {matrix, ids[blockIdx.y - 1] * HIDDEN, scale, mid, member, count, rest, parts};
      for_count(count, step);
    }
  }
  if (!last_block(counter + blockIdx.x, gridDim.y)) return;
  for (int i = threadIdx.x; i < N_TOK * n_rows; i += kThreads) {
    const int token = i / n_rows, column = first + i % n_rows;
    const float* part = parts + static_cast<size_t>(token) * kSlots * HIDDEN + column;
    float sum = __ldcg(part);
#pragma unroll
    for (int slot = 1; slot < kSlots; ++slot) sum = __fadd_rn(sum, __ldcg(part + static_cast<size_t>(slot) * HIDDEN));
    y[static_cast<size_t>(token) * HIDDEN + column] = sum;
  }
}
