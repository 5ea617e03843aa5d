// draft_block, draft_push, accept: what drafting and acceptance change of the step's words (spec model.md 7.2, 7.3;
// kernels.md d.6).
//
//   draft_block  the tokens of a noise block, the step's first one in front; nothing is drafted, and the block's last
//                position is the one that all of it attends from
//   draft_push   the drafted token joins the step, and the next pair is one position on
//   accept       n = how many drafted tokens are, one after another, what the verifier chooses in their place: the step's
//                position moves by n + 1, and the verifier's token behind them becomes the step's first
//
// One warp each: integers, so there is no order to keep. Undoing a rejected token is a position that did not move.
// Latency alone: estimate, not measured, 2 us.
#include "ptx.cuh"
#include "words.cuh"

// words i32 [64] IN OUT; tokens i32 [n_tok] OUT. Block n_tok: a token a thread.
extern "C" __global__ void __launch_bounds__(8) draft_block(int* words, int* tokens, int noise, int n_tok) {
  pdl_launch();
  pdl_wait();
  const int row = threadIdx.x;
  tokens[row] = row == 0 ? words[kTokens] : noise;
  if (row == 0) words[kChain] = words[kTokens], words[kLast] = words[kPos] + n_tok - 1, words[kDrafted] = 0;
}

// token i32 [1]; words i32 [64] IN OUT. Block 4: a word a thread.
extern "C" __global__ void __launch_bounds__(4) draft_push(const int* token, int* words) {
  pdl_launch();
  pdl_wait();
  const int drafted = words[kDrafted], word = threadIdx.x;
  __syncwarp(0xfu);  // all have read the count that one of them raises
  if (word == 0) words[kTokens + 1 + drafted] = token[0];
  if (word == 1) words[kChain] = token[0];
  if (word == 2) words[kDrafted] = drafted + 1;
  if (word == 3) words[kLast] += 1;
}

// token, status i32 [n_tok] of the verifier's rows; words i32 [64] IN OUT. Block 32: a row a lane.
extern "C" __global__ void __launch_bounds__(32) accept(const int* token, const int* status, int* words, int n_tok) {
  pdl_launch();
  pdl_wait();
  const int row = threadIdx.x;
  const bool kept = row < n_tok - 1 && status[row] == 0 && token[row] == words[kTokens + 1 + row];
  const int n = __ffs(~__ballot_sync(0xffffffffu, kept)) - 1;  // the last row has no draft, so there is one that is not
  if (row != n) return;
  words[kPos] += n + 1;
  words[kTokens] = token[n];
  words[kAccepted] = n;
  words[kStatus] = status[n];
}
