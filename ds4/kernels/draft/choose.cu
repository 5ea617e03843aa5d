// draft_choose: a token of a block, from its row's logits and what the token before it adds (spec model.md 7.2).
//
//   biased[v] = logits[v] + bias[v]
//   token     = the v with the largest of them, the lowest v on ties, the first NaN where there is one
//
// Grid ceil(vocab / 1024), block 256: four rows a thread, 256 apart. Argmax as in lm_head.cu: (value, row) become one
// integer (order.cuh), and a maximum of integers does not depend on who takes it of what. The block that arrives last
// turns it into the token and sets it back to 0. `best` and `counter` are zeroed by their owner once, at allocation.
// Bytes: 12 vocab, 1.6 MB. Latency alone: estimate, not measured, 3.5 us.
#include "last_block.cuh"
#include "order.cuh"
#include "ptx.cuh"

constexpr int kThreads = 256;
constexpr int kMine = 4;  // rows of a thread

// logits, bias f32 [vocab]; biased f32 [vocab], token i32 [1] OUT; workspaces best u64 [2], counter u32 [4].
extern "C" __global__ void __launch_bounds__(256) draft_choose(const float* logits, const float* bias, float* biased, int* token, unsigned long long* best, unsigned* counter, int vocab) {
  __shared__ unsigned long long of_block;
  if (threadIdx.x == 0) of_block = 0ull;
  pdl_launch();
  pdl_wait();
  unsigned long long mine = 0ull;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int row = (static_cast<int>(blockIdx.x) * kMine + i) * kThreads + static_cast<int>(threadIdx.x);
    if (row >= vocab) break;
    const float value = __fadd_rn(logits[row], bias[row]);
    biased[row] = value;
    mine = max(mine, ranked(order_key(value), row));
  }
  mine = warp_highest(mine);
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicMax(&of_block, mine);
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(best, of_block);
  if (!last_block(counter, gridDim.x) || threadIdx.x != 0) return;
  token[0] = ranked_index(atomicExch(best, 0ull));
}
