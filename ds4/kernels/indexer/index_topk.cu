// index_topk: the compressed entries that a token attends, by their scores (spec model.md 4, kernels.md b.5).
//
//   selected[t] = the top_k best of the first (pos + t + 1) / 4 entries, rising by index, then -1; all of them where they
//                 are not more than top_k
//   order       : larger score first, of equal scores the lower index; -0 = +0, a NaN above any number (order.cuh)
//
// Grid (ceil(n_entries / 16384), n_tok), block 512, sized by capacity: a block has the entries of one slice of a token in
// registers, and leaves at once where it has none that the token sees. select.cuh takes the key of the cut digit by digit
// from histograms in shared memory, counts of integers, and compacts by a scan: no order of arrival shows.
// One visible slice writes `selected` itself. Of several, each writes its top_k as candidates, and the block that arrives
// last of a token's visible slices (last_block.cuh) selects among them; they stand in the order of entries.
// Scores of entries that are not visible are never read. `counter` is zeroed by its owner once, at allocation.
//
// Bytes: 4 an entry and token once, from L2, where index_score has just put them; 32 loads of 4 bytes in flight a thread.
// Estimates, not measured, for H200: 5 us at 4,096 entries and 8 us at 16,384, of which 2 us loads, 4 us digits, 1 us the
// scan; 14 us at 262,144, where 16 blocks select 512 each and one selects among 8,192.
#include "last_block.cuh"
#include "ptx.cuh"
#include "select.cuh"
#include "visible.cuh"

// scores f32 [n_tok, n_entries], pos i32 [1]; selected i32 [n_tok, top_k] OUT. Workspaces: counter u32 [n_tok], and
// candidates i32 [n_tok, slices, top_k], null with one slice. slices * top_k is at most 16384. One block a multiprocessor:
// without that wish ptxas keeps to 64 registers, and spills on sm_100a.
extern "C" __global__ void __launch_bounds__(kThreads, 1) index_topk(const float* scores, const int* pos, unsigned* counter, int* candidates, int* selected, int n_entries, int top_k) {
  const int token = blockIdx.y, slice = blockIdx.x;
  pdl_launch();
  pdl_wait();
  const int n = visible_entries(*pos + token, n_entries), n_slices = max((n + kSlice - 1) / kSlice, 1);
  if (slice >= n_slices) return;
  int* chosen = selected + static_cast<size_t>(token) * top_k;
  if (n <= top_k) {
    for (int i = threadIdx.x; i < top_k; i += kThreads) chosen[i] = i < n ? i : -1;
    return;
  }
  const float* of_token = scores + static_cast<size_t>(token) * n_entries;
  const int first = slice * kSlice, n_mine = min(n - first, kSlice);
  unsigned key[kPerThread] = {};
  load_elements(key, n_mine, [&](int, int element) { return __float_as_uint(of_token[first + element]); });
  make_keys(key, n_mine);
  if (n_slices == 1) {
    select(key, n_mine, top_k, [&](int position, int element) { chosen[position] = element; });
    return;
  }
  int* entries = candidates + static_cast<size_t>(token) * gridDim.x * top_k;
  int* mine = entries + slice * top_k;
  select(key, n_mine, top_k, [&](int position, int element) { mine[position] = first + element; });
  if (!last_block(counter + token, n_slices)) return;
  const int n_candidates = (n_slices - 1) * top_k + min(n - (n_slices - 1) * kSlice, top_k);
  load_elements(key, n_candidates, [&](int, int i) { return static_cast<unsigned>(__ldcg(entries + i)); });
  load_elements(key, n_candidates, [&](int i, int) { return __float_as_uint(of_token[key[i]]); });
  make_keys(key, n_candidates);
  select(key, n_candidates, top_k, [&](int position, int i) { chosen[position] = i; });
  __syncthreads();
  for (int i = threadIdx.x; i < top_k; i += kThreads) chosen[i] = __ldcg(entries + chosen[i]);
}
