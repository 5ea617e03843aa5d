// accept_drawn: what is kept of a drawn draft, and the token behind it (spec model.md 7.3; ds4/mtp/accept.py).
//
//   token x of the draft's place i, drawn from q[i], is kept while uniform(seed, position, 1) q[i][x] < p[i][x]
//   n       = how many are, one after another; place n has a draft that is not kept, or none
//   next    = the first id at which the running sum of max(0, p[n] - q[n]) exceeds uniform(seed, position, 0) times the
//             sum of all: a draw from what the draft's distribution had too little of. Where there is no draft in place
//             n, or nothing is left, token[n]: the draw from p[n] with the same number
//   the step's position moves by n + 1, and the next token becomes the step's first, as `accept` has it
//
// Sums are of integers, floor((p - q) 2^62): no order of additions can show.
//
// Grid ceil(vocab / 1024), block 256. Each block finds n by itself: seven lanes with two loads each. Then it sums its 1024
// ids of the one row; the block that arrives last looks for the block and then the id that the sum passes at, and changes
// the words, which by then all others have read. `counter` is zeroed once, at allocation.
// Bytes: 8 vocab, 1 MB. Latency alone: estimate, not measured, 5 us.
#include "draws.cuh"
#include "last_block.cuh"
#include "ptx.cuh"
#include "scan.cuh"
#include "words.cuh"

constexpr int kThreads = 256;
constexpr int kChunk = 1024;  // ids of a block

// What p has more of than q.
__device__ __forceinline__ unsigned long long left_over(float p, float q) {
  const double left = __dadd_rn(static_cast<double>(p), -static_cast<double>(q));
  return left > 0. ? static_cast<unsigned long long>(__dmul_rn(left, 0x1p62)) : 0ull;
}

// Item at which the running sum of `mine` passes `target`, an item a thread; `target` becomes what is left of it in front of
// that item. -1: none of them.
__device__ __forceinline__ int pass(unsigned long long& target, unsigned long long mine) {
  __shared__ unsigned long long found[2];
  if (threadIdx.x == 0) found[0] = ~0ull;
  unsigned long long sum;
  const unsigned long long upto = block_scan(mine, sum);
  if (upto > target && upto - mine <= target) found[0] = threadIdx.x, found[1] = target - (upto - mine);
  __syncthreads();
  const int item = static_cast<int>(found[0]);
  target = item >= 0 ? found[1] : target - sum;
  __syncthreads();  // before the next call writes found
  return item;
}

// p f32 [n_tok, vocab], q f32 [7, pitch] of which n_tok - 1 rows count, token and status i32 [n_tok], params i64 [6]
// (draws.cuh); words i32 [64] IN OUT; workspaces part u64 [blocks], counter u32 [4].
extern "C" __global__ void __launch_bounds__(256) accept_drawn(const float* p, const float* q, const int* token, const int* status, const long long* params, int* words, unsigned long long* part, unsigned* counter, int n_tok, int vocab, int pitch) {
  __shared__ int shared_n;
  pdl_launch();
  pdl_wait();
  const long long seed = params[kSeed], position = words[kPos] + 1;
  if (threadIdx.x < 32) {
    const int i = threadIdx.x;
    bool kept = i < n_tok - 1 && status[i] == 0;
    if (kept) {
      const int x = words[kTokens + 1 + i];
      const double number = uniform(seed, position + i, kAcceptStream);
      kept = __dmul_rn(number, static_cast<double>(q[static_cast<size_t>(i) * pitch + x])) < p[static_cast<size_t>(i) * vocab + x];
    }
    const unsigned not_kept = ~__ballot_sync(0xffffffffu, kept);  // the last row has no draft, so there is one
    if (i == 0) shared_n = __ffs(not_kept) - 1;
  }
  __syncthreads();
  const int n = shared_n;
  const bool rejected = n < n_tok - 1 && status[n] == 0;
  const float *target_row = p + static_cast<size_t>(n) * vocab, *draft_row = q + static_cast<size_t>(n) * pitch;
  unsigned long long mine = 0;
  if (rejected) {
#pragma unroll
    for (int i = 0; i < kChunk / kThreads; ++i) {
      const int id = static_cast<int>(blockIdx.x) * kChunk + i * kThreads + static_cast<int>(threadIdx.x);
      if (id < vocab) mine += left_over(target_row[id], draft_row[id]);
    }
  }
  mine = block_total(mine);
  if (threadIdx.x == 0) part[blockIdx.x] = mine;
  if (!last_block(counter, gridDim.x)) return;

  unsigned long long all = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) all += __ldcg(part + b);
  all = block_total(all);
  int next = token[n];
  if (all > 0) {
    unsigned long long target = target_of(uniform(seed, position + n, kTokenStream), all);
    int block = -1;
    for (unsigned first = 0; block < 0; first += kThreads) {
      const unsigned b = first + threadIdx.x;
      block = pass(target, b < gridDim.x ? __ldcg(part + b) : 0ull);
      if (block >= 0) block += first;
    }
    next = -1;
    for (int first = block * kChunk; next < 0; first += kThreads) {
      const int id = first + static_cast<int>(threadIdx.x);
      next = pass(target, id < vocab ? left_over(target_row[id], draft_row[id]) : 0ull);
      if (next >= 0) next += first;
    }
  }
  if (threadIdx.x != 0) return;
  words[kPos] = static_cast<int>(position) + n;
  words[kTokens] = next;
  words[kAccepted] = n;
  words[kStatus] = status[n];
}
