// moe_up_gemm: gate and up projections of the experts of a chunk's tokens, their SwiGLU and routing weight (spec model.md
// 2.7, kernels.md c). The decode form is moe_up.cu.
//
//   gate = scale1[e] (w1[e] x[t]), up = scale3[e] (w3[e] x[t])           e = ids[t][slot]; slot top_k: the shared expert
//   mid[t][slot] = bf16(silu(min(gate, limit)) * clamp(up, -limit, limit) * weight)      weight 1 for the shared one
//
// Grid (INTER / kBlockRows rounded up, tiles), block kThreads: a tile is up to TOKENS pairs of one expert, from moe_group,
// blocks behind the last one leave; or where order is null, for the shared expert, TOKENS tokens. Rows come first, so that
// blocks that run together share a tile's x in L2 and the tiles of an expert follow one another: its weights are read from
// memory once. A row tile of the mma is 8 gate rows above the same 8 up rows, so that a lane has both of a pair. Order:
// gemm_tiles.cuh; a pair's result depends neither on its tile nor on the other pairs in it.
//
// At HIDDEN 4096, INTER 2048 and 4096 tokens with 6 of 256 experts, an H200: 825 GFLOP for 24,576 pairs, 137 for the shared
// expert. From memory 2.4 GB of NVFP4 weights, 0.6 ms; x from L2, 3.2 GB, as 16 blocks read each pair's; mid 117 MB out.
// Tiles of 128 pairs, of which an expert fills 96 on average: a chunk takes a warp 256 mma in 1150 instructions (NVFP4, on
// sm_90a, scripts/kernel_instructions.py), so that the four schedulers are busy 2300 clocks; 512 mma take a scheduler's
// tensor core 2048 clocks at its peak, 3300 at the 62 % that mma.sync is known for. With tiles of 64, 64 mma in 510
// (NVFP4), 546 (MXFP4), 560 (IQ2_XXS), 561 (Q8_0), 737 (Q4_K): instructions bind. Estimate, not measured: 400 TFLOPS with
// tiles of 128, 2.1 ms and 0.35 ms.
#include "expert_gemm.cuh"

#if !defined(HIDDEN) || !defined(INTER) || !defined(GATE_FORMAT) || !defined(UP_FORMAT)
#error "HIDDEN, INTER, GATE_FORMAT and UP_FORMAT must be defined, the latter as formats of mma_rows.cuh"
#endif

using Gate = GATE_FORMAT<HIDDEN>;
using Up = UP_FORMAT<HIDDEN>;
using Gemm = ExpertGemm<Gate, Up, HIDDEN, true>;
using Plan = Gemm::Plan;
constexpr int kPairRows = kTileRows / 2;  // of each matrix in a row tile
constexpr int kBlockRows = Gemm::kResults, kDeep = Gemm::kDeep, kWarps = Gemm::kWarps, kThreads = Gemm::kThreads;

// x bf16 [n_rows, HIDDEN]; weights f32 [n_rows, top_k]; order, tiles and n_tiles of moe_group, or three times null; count i32
// [1] or null; planes of the gate's and the up matrix [experts * INTER, HIDDEN], null where a format has fewer; gate_scales,
// up_scales f32 [experts] or null, then gate_scale and up_scale; patterns bf16 [256, 8] where a format is IQ2_XXS; mid bf16
// [n_rows, top_k + 1, INTER] OUT. Dynamic shared memory: SHARED_BYTES.
extern "C" __global__ void __launch_bounds__(kThreads, Gemm::kResident) moe_up_gemm(
    const __nv_bfloat16* x, const float* weights, const int* order, const int* tiles, const int* n_tiles,
    const int* count, const unsigned char* gate_0, const unsigned char* gate_1, const unsigned char* gate_2,
    const unsigned char* gate_3, const unsigned char* up_0, const unsigned char* up_1, const unsigned char* up_2,
    const unsigned char* up_3, const float* gate_scales, const float* up_scales, const unsigned long long* patterns,
    __nv_bfloat16* mid, float gate_scale, float up_scale, float limit, int n_rows, int top_k) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Members members;
  pdl_launch();
  pdl_wait();
  const Work work = find_work(order, tiles, n_tiles, count, weights, n_rows, top_k, members);
  if (work.count <= 0) return;
  uint4* const table = reinterpret_cast<uint4*>(memory);
  if constexpr (Gemm::kPatterned) load_patterns<kThreads>(patterns, table);
  __syncthreads();
  const auto gate = make_matrix<Gate>({{gate_0, gate_1, gate_2, gate_3}}, table);
  const auto up = make_matrix<Up>({{up_0, up_1, up_2, up_3}}, table);

  const int first = blockIdx.x * kBlockRows, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto row_in_block = [&](int d) { return (d * kWarps + warp) * kPairRows + lane / 4; };
  const auto rows = [&](int d) -> RowPair<Gate, Up> {
    const size_t row = static_cast<size_t>(work.expert) * INTER + min(first + row_in_block(d), INTER - 1);
    return {gate, up, row, row};
  };
  const auto source = [&](int t) {
    return reinterpret_cast<const unsigned short*>(x) + static_cast<size_t>(members.token[t]) * HIDDEN;
  };
  float acc[kDeep][Plan::kTiles][4];
  gemm_tile<Plan>(gate, up, rows, source, work.count, memory + Gemm::kMemoryAt, acc);

  const float of_gate = multiplier(gate_scale, gate_scales, work.expert);
  const float of_up = multiplier(up_scale, up_scales, work.expert);
  const Results<kBlockRows> results = {reinterpret_cast<unsigned short*>(memory)};
  __syncthreads();  // what is staged is used up
#pragma unroll
  for (int i = 0; i < 2 * Plan::kTiles; ++i) {
    const int pair = i / 2 * 8 + lane % 4 * 2 + i % 2;
    if (pair >= work.count) continue;
    const float weight = members.weight[pair];
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      const float g = __fmul_rn(acc[d][i / 2][i % 2], of_gate), u = __fmul_rn(acc[d][i / 2][2 + i % 2], of_up);
      results.put(pair, row_in_block(d), __fmul_rn(swiglu(g, u, limit), weight));
    }
  }
  __syncthreads();
  results.store(members, work.count, first, INTER, mid);
}
