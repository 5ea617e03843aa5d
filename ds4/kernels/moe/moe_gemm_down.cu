// moe_down_gemm: down projections of the experts of a chunk's tokens (spec model.md 2.7, kernels.md c). The decode form is
// moe_down.cu.
//
//   parts[t][slot] = bf16(scale2[e] (w2[e] mid[t][slot]))                e = ids[t][slot]; slot top_k: the shared expert
//
// Grid (HIDDEN / kBlockRows rounded up, tiles), block kThreads; tiles and order as in moe_gemm_up.cu. moe_combine adds the
// parts of a token up, which have the routing weight already.
//
// At HIDDEN 4096, INTER 2048 and 4096 tokens with 6 of 256 experts: 412 GFLOP for 24,576 pairs, 69 for the shared expert. From
// memory 1.2 GB of NVFP4 weights and 117 MB of mid, from L2 1.6 GB of it; parts 235 MB out. Instructions as in moe_gemm_up.cu.
// Estimate, not measured: 400 TFLOPS with tiles of 128, 1.0 ms and 0.2 ms on H200.
#include "expert_gemm.cuh"

#if !defined(HIDDEN) || !defined(INTER) || !defined(DOWN_FORMAT)
#error "HIDDEN, INTER and DOWN_FORMAT must be defined, the latter as a format of mma_rows.cuh"
#endif

using Down = DOWN_FORMAT<INTER>;
using Gemm = ExpertGemm<Down, Down, INTER, false>;
using Plan = Gemm::Plan;
constexpr int kBlockRows = Gemm::kResults, kDeep = Gemm::kDeep, kWarps = Gemm::kWarps, kThreads = Gemm::kThreads;

// mid bf16 [n_rows, top_k + 1, INTER]; order, tiles and n_tiles of moe_group, or three times null; count i32 [1] or null;
// planes of the matrix [experts * HIDDEN, INTER], null where a format has fewer; down_scales f32 [experts] or null, then
// down_scale; patterns bf16 [256, 8] where the format is IQ2_XXS; parts bf16 [n_rows, top_k + 1, HIDDEN] OUT. Dynamic
// shared memory: SHARED_BYTES.
extern "C" __global__ void __launch_bounds__(kThreads, Gemm::kResident) moe_down_gemm(
    const __nv_bfloat16* mid, const int* order, const int* tiles, const int* n_tiles, const int* count,
    const unsigned char* down_0, const unsigned char* down_1, const unsigned char* down_2, const unsigned char* down_3,
    const float* down_scales, const unsigned long long* patterns, __nv_bfloat16* parts, float down_scale, int n_rows,
    int top_k) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Members members;
  pdl_launch();
  pdl_wait();
  const Work work = find_work(order, tiles, n_tiles, count, nullptr, n_rows, top_k, members);
  if (work.count <= 0) return;
  uint4* const table = reinterpret_cast<uint4*>(memory);
  if constexpr (Gemm::kPatterned) load_patterns<kThreads>(patterns, table);
  __syncthreads();
  const auto down = make_matrix<Down>({{down_0, down_1, down_2, down_3}}, table);

  const int first = blockIdx.x * kBlockRows, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto row_in_block = [&](int d) { return (d * kWarps + warp) * kTileRows; };
  const auto rows = [&](int d) {
    return tile_rows(down, work.expert * HIDDEN, first + row_in_block(d), HIDDEN, lane);
  };
  const auto source = [&](int t) {
    return reinterpret_cast<const unsigned short*>(mid) + static_cast<size_t>(members.slot[t]) * INTER;
  };
  float acc[kDeep][Plan::kTiles][4];
  gemm_tile<Plan>(down, down, rows, source, work.count, memory + Gemm::kMemoryAt, acc);

  const float factor = multiplier(down_scale, down_scales, work.expert);
  const Results<kBlockRows> results = {reinterpret_cast<unsigned short*>(memory)};
  __syncthreads();  // what is staged is used up
#pragma unroll
  for (int d = 0; d < kDeep; ++d) {
#pragma unroll
    for (int i = 0; i < 4 * Plan::kTiles; ++i) {
      const int pair = i / 4 * 8 + lane % 4 * 2 + i % 2, row = row_in_block(d) + lane / 4 + i % 4 / 2 * 8;
      if (pair < work.count) results.put(pair, row, __fmul_rn(acc[d][i / 4][i % 4], factor));
    }
  }
  __syncthreads();
  results.store(members, work.count, first, HIDDEN, parts);
}
