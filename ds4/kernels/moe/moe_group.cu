// moe_group: the (token, slot) pairs of a chunk sorted by expert, cut into tiles for the experts' matrix products
// (spec kernels.md c).
//
//   pair    = t * top_k + slot of token t < count, of expert ids[pair]
//   order   = pairs by rising expert, those of an expert by rising pair; zeros behind them
//   tiles   = (expert, first place in order, number of pairs 1 .. tile, 0), by rising place; zeros behind them
//
// Two launches, grid (n_experts), block kThreads; a block is an expert, a warp of it one of kWarps parts of the pairs.
//   moe_group_count   how many pairs of each part are of the expert
//   moe_group_place   sums the experts before its own, in integers, so that no order shows; then its warps write their
//                     pairs one behind the other. No atomics
// Every block reads all ids in either launch: 98 KB at 4096 tokens x 6, from L2, 25 MB for 256 experts. Estimate, not
// measured: 10 us for both on H200, 0.1 % of a layer.
#include "live_rows.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "scan.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The pairs of this warp's part that are of `expert`: take(pair, mask) for 32 neighbouring pairs at a time, `pair` this
// lane's, mask the lanes whose pairs are.
template <class Take>
__device__ __forceinline__ void for_pairs(const int* ids, int n_pairs, int expert, const Take& take) {
  const int of_warp = (n_pairs + kThreads - 1) / kThreads * 32, warp = threadIdx.x / 32;
  const int last = min((warp + 1) * of_warp, n_pairs);
#pragma unroll 4
  for (int base = warp * of_warp; base < last; base += 32) {
    const int pair = base + static_cast<int>(threadIdx.x) % 32;
    take(pair, __ballot_sync(kAllLanes, pair < last && ids[pair] == expert));
  }
}

// ids i32 [n_rows, top_k], of which rows from count on are not looked at; count i32 [1] or null; counts i32 [n_experts,
// kWarps] OUT.
extern "C" __global__ void __launch_bounds__(kThreads) moe_group_count(const int* ids, const int* count, int* counts,
                                                                       int n_rows, int top_k) {
  pdl_launch();
  pdl_wait();
  int found = 0;
  for_pairs(ids, live_rows(count, n_rows) * top_k, blockIdx.x, [&](int, unsigned mask) { found += __popc(mask); });
  if (threadIdx.x % 32 == 0) counts[blockIdx.x * kWarps + threadIdx.x / 32] = found;
}

// ids, count and counts as above; order i32 [n_rows * top_k], tiles i32 [max_tiles, 4] and n_tiles i32 [1] OUT.
extern "C" __global__ void __launch_bounds__(kThreads)
    moe_group_place(const int* ids, const int* count, const int* counts, int* order, int* tiles, int* n_tiles,
                    int n_rows, int top_k, int tile, int max_tiles) {
  const int expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  pdl_launch();
  pdl_wait();
  // Pairs of `of`, of its first n_parts parts.
  const auto pairs_of = [&](int of, int n_parts) {
    int n = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) n += i < n_parts ? counts[of * kWarps + i] : 0;
    return n;
  };
  unsigned long long before = 0;  // of the experts before this one: pairs in the upper half, tiles in the lower
  for (int e = threadIdx.x; e < expert; e += kThreads) {
    const int n = pairs_of(e, kWarps);
    before += static_cast<unsigned long long>(n) << 32 | static_cast<unsigned>((n + tile - 1) / tile);
  }
  before = block_total(before);
  const int first = static_cast<int>(before >> 32), first_tile = static_cast<int>(before & 0xffffffffu);
  const int n = pairs_of(expert, kWarps), end_tile = first_tile + (n + tile - 1) / tile;
  const auto put_tile = [&](int i, int4 entry) { reinterpret_cast<int4*>(tiles)[i] = entry; };
  for (int i = first_tile + threadIdx.x; i < end_tile; i += kThreads) {
    const int in_expert = (i - first_tile) * tile;
    put_tile(i, make_int4(expert, first + in_expert, min(tile, n - in_expert), 0));
  }
  const int n_pairs = live_rows(count, n_rows) * top_k;
  int at = first + pairs_of(expert, warp);
  for_pairs(ids, n_pairs, expert, [&](int pair, unsigned mask) {
    if (mask >> lane & 1u) order[at + __popc(mask & ((1u << lane) - 1u))] = pair;
    at += __popc(mask);
  });
  for (int i = n_pairs + expert * kThreads + threadIdx.x; i < n_rows * top_k; i += gridDim.x * kThreads) order[i] = 0;
  if (expert != gridDim.x - 1) return;
  if (threadIdx.x == 0) *n_tiles = end_tile;
  for (int i = end_tile + threadIdx.x; i < max_tiles; i += kThreads) put_tile(i, make_int4(0, 0, 0, 0));
}
