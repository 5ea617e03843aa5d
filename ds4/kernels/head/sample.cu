// sample: a token from each row of logits, the same that ds4/sampling.py draws.
//
//   l[v]   = logit, after the repetition penalty where first_seen[v] < position     f32
//   position of row t's token: pos + 1 + t, and as many more as were drafted
//   order  : falling l, ties to the lower id
//   e[v]   = exp((l[v] - max l) / temperature)                                       f64
//   kept   : the longest common beginning, in that order, of what each filter keeps: the first top_k; the tokens before
//            which less than top_p of the top_k's e lies; those with e >= min_p
//   p[v]   = f32(e[v] / sum of e over kept)
//   token  : the first id at which the running sum of p exceeds uniform(seed, position, stream) times the sum of all
//   temperature 0: the first in the order.
//
// Sums are sums of integers, E = round(e * 2^46) and P = floor(p * 2^62): no order of additions can show, and the grid,
// N_TOK and arrival do not matter. 2^17 tokens stay below 2^63. E is off by 2^-47 at most, less than the rounding of p to
// f32 in all that weighs; a token below 2^-47 of the likeliest is never drawn. No sort: as e falls with l, each filter is
// a threshold, found digit by digit of order_key(l) in histograms of counts and of E.
//
// Launches, all with grid (ceil(VOCAB / 1024), N_TOK) and 256 threads; a block has 1024 ids of one row. In each the block of
// a row that arrives last (last_block.cuh) works on for the row alone and writes the row's State, the next launch reads it:
//   sample_best    order keys; the largest: temperature 0 ends here. Threshold of min_p, by a search over keys
//   sample_mass    E of each id, histogram of the key's upper 11 bits; chooses the first digit of top_k, else of top_p
//   sample_refine  four times: the next digit (11, 10 bits) of top_k, then of top_p; returns at once when none is left
//   sample_draw    sums of P by block, the block and then the id at which the target is passed
//   sample_probs   only where they are wanted
// Blocks of one launch share counters, histograms (integer atomics) and `part` (one entry a block, read after last_block).
// Histograms are cleared by sample_best, the fine one again by who has read it. `counter` is zeroed once, at allocation.
//
// Bytes: per row logits and first_seen 1 MB once, keys 0.5 MB and E 1 MB written once; read keys 6 and E 2 times, all in L2.
// Estimates, not measured: 2 to 3 us a launch, 20 us in all; on GB10, whose FP64 is 1/64 of FP32, exp adds 20 us once and
// the division of sample_draw 10.
#include "last_block.cuh"
#include "order.cuh"
#include "sample_select.cuh"
#include "sample_state.cuh"
#include "scan.cuh"

// ---------------------------------------------------------------- sample_best

// logits f32 [N_TOK, VOCAB], first_seen i32 [VOCAB] or null, pos i32 [1], drafted i32 [1] or null, params i64 [6] (draws.cuh);
// token and status i32 [N_TOK] OUT. Workspaces: keys u32 [N_TOK, VOCAB], part u64 [N_TOK, 2, blocks], count u32 and mass
// u64 [N_TOK, 2, 2048], state u64 [N_TOK, 16], counter u32 [8].
extern "C" __global__ void __launch_bounds__(256) sample_best(const float* logits, const int* first_seen, const int* pos, const int* drafted, const long long* params, unsigned* keys, unsigned long long* part, unsigned* count, unsigned long long* mass, unsigned long long* state, unsigned* counter, int* token, int* status) {
  __shared__ unsigned long long of_warp[kThreads / 32];
  const int t = blockIdx.y;
  const long long position = drawn_position(pos, drafted, t);
  const float penalty = static_cast<float>(__longlong_as_double(params[kRepetitionPenalty]));
  unsigned long long best = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int id = blockIdx.x * kChunk + i * kThreads + threadIdx.x;
    if (id >= VOCAB) break;
    float l = logits[static_cast<size_t>(t) * VOCAB + id];
    if (first_seen && first_seen[id] < position) l = l > 0.f ? __fdiv_rn(l, penalty) : __fmul_rn(l, penalty);
    const unsigned key = order_key(l);
    keys[static_cast<size_t>(t) * VOCAB + id] = key;
    best = max(best, ranked(key, id));
  }
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < 2 * kBins; i += gridDim.x * kThreads) {
    count[t * 2 * kBins + i] = 0u;
    mass[t * 2 * kBins + i] = 0ull;
  }
  best = warp_highest(best);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < kThreads / 32; ++w) best = max(best, of_warp[w]);
    part[t * 2 * gridDim.x + blockIdx.x] = best;
  }
  if (!last_block(counter + t, gridDim.x) || threadIdx.x >= 32) return;
  best = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += 32) best = max(best, __ldcg(part + t * 2 * gridDim.x + b));
  best = warp_highest(best);
  const unsigned max_key = ranked_key(best);
  const double temperature = __longlong_as_double(params[kTemperature]), min_p = __longlong_as_double(params[kMinP]);
  const bool decided = temperature == 0. || !is_finite_key(max_key);
  const unsigned least = !decided && min_p > 0. ? min_p_key(max_key, temperature, min_p, threadIdx.x) : 0u;
  if (threadIdx.x != 0) return;
  State s = {};
  s.max_key = max_key;
  s.floor = least;
  s.phase = decided ? kDecided : kRefineTopK;
  store(state, t, s);
  status[t] = is_finite_key(max_key) ? 0 : 1;
  token[t] = ranked_index(best);  // a draw replaces it
}

// ---------------------------------------------------------------- sample_mass

// Four blocks a multiprocessor: without that wish ptxas takes 40 registers on sm_90a, and spills; below, on sm_120a.
extern "C" __global__ void __launch_bounds__(256, 4) sample_mass(const long long* params, const unsigned* keys, unsigned long long* e, unsigned long long* part, unsigned* count, unsigned long long* mass, unsigned long long* state, unsigned* counter) {
  const int t = blockIdx.y;
  State s = load(state, t);
  if (s.phase == kDecided) return;
  const double temperature = __longlong_as_double(params[kTemperature]);
  Bins bins;
  bins.clear();
  unsigned long long all = 0, above_floor = 0;
#pragma unroll 1
  for (int i = 0; i < kPerThread; ++i) {
    const int id = blockIdx.x * kChunk + i * kThreads + threadIdx.x;
    if (id >= VOCAB) break;
    const unsigned key = keys[static_cast<size_t>(t) * VOCAB + id];
    const unsigned long long mine = scaled(relative(key, s.max_key, temperature));
    e[static_cast<size_t>(t) * VOCAB + id] = mine;
    all += mine;
    if (key >= s.floor) above_floor += mine;
    bins.add(key >> 21, mine);
  }
  bins.flush(count + t * 2 * kBins, mass + t * 2 * kBins);
  all = block_total(all), above_floor = block_total(above_floor);
  if (threadIdx.x == 0) {
    part[t * 2 * gridDim.x + blockIdx.x] = all;
    part[(t * 2 + 1) * gridDim.x + blockIdx.x] = above_floor;
  }
  if (!last_block(counter + t, gridDim.x)) return;
  all = above_floor = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    all += __ldcg(part + t * 2 * gridDim.x + b);
    above_floor += __ldcg(part + (t * 2 + 1) * gridDim.x + b);
  }
  s.kept = block_total(all);
  s.floor_mass = block_total(above_floor);
  s.threshold = 0u, s.ties = VOCAB;
  const long long top_k = params[kTopK];
  if (top_k > 0 && top_k < VOCAB) {
    begin(s, kRefineTopK, top_k, count + t * 2 * kBins, mass + t * 2 * kBins);
  } else {
    after_top_k(s, __longlong_as_double(params[kTopP]), count + t * 2 * kBins, mass + t * 2 * kBins);
  }
  if (threadIdx.x == 0) store(state, t, s);
}

// ---------------------------------------------------------------- sample_refine

extern "C" __global__ void __launch_bounds__(256) sample_refine(const long long* params, const unsigned* keys, const unsigned long long* e, unsigned* count, unsigned long long* mass, unsigned long long* state, unsigned* counter) {
  const int t = blockIdx.y;
  State s = load(state, t);
  if (s.phase != kRefineTopK && s.phase != kRefineTopP) return;
  unsigned *coarse_count = count + t * 2 * kBins, *fine_count = coarse_count + kBins;
  unsigned long long *coarse_mass = mass + t * 2 * kBins, *fine_mass = coarse_mass + kBins;
  const int low = digit_low(s.digit), bits = digit_bits(s.digit);
  Bins bins;
  bins.clear();
#pragma unroll 1
  for (int i = 0; i < kPerThread; ++i) {
    const int id = blockIdx.x * kChunk + i * kThreads + threadIdx.x;
    if (id >= VOCAB) break;
    const unsigned key = keys[static_cast<size_t>(t) * VOCAB + id];
    if (key >> (low + bits) == s.prefix) {
      bins.add(key >> low & ((1u << bits) - 1u), e[static_cast<size_t>(t) * VOCAB + id]);
    }
  }
  bins.flush(fine_count, fine_mass);
  if (!last_block(counter + t, gridDim.x)) return;
  choose_digit(s, fine_count, fine_mass, 1 << bits);
  if (s.digit == 3) {  // the whole key: all its tokens have the same E
    const unsigned bin = s.prefix & ((1u << bits) - 1u);
    const unsigned long long ties = __ldcg(fine_count + bin), each = __ldcg(fine_mass + bin) / ties;
    const bool by_count = s.phase == kRefineTopK;
    s.threshold = s.prefix;
    s.ties = by_count ? s.want - s.above_count : (s.want - s.above_mass + each - 1) / each;
    s.kept = s.above_mass + s.ties * each;
    __syncthreads();  // `ties` and `each` are read
    if (by_count) {
      after_top_k(s, __longlong_as_double(params[kTopP]), coarse_count, coarse_mass);
    } else {
      finish(s);
    }
  }
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) fine_count[bin] = 0u, fine_mass[bin] = 0ull;
  if (threadIdx.x == 0) store(state, t, s);
}

// ---------------------------------------------------------------- sample_draw

// P of an E.
__device__ __forceinline__ unsigned long long probability(unsigned long long e, unsigned long long kept) {
  return static_cast<unsigned long long>(__dmul_rn(static_cast<double>(f32_probability(e, kept)), 0x1p62));
}

// Item at which the running sum of strict + (kept ties) * each passes s.target; items in order of threads, one a thread.
// `strict` and `ties` are the item's; on return s.target and s.ties are what is left before it. -1: none in this block.
__device__ __forceinline__ int pass(Draw& s, unsigned long long strict, unsigned long long ties) {
  __shared__ unsigned long long found[3];
  if (threadIdx.x == 0) found[0] = ~0ull;
  unsigned long long n_ties, sum;
  const unsigned long long before = min(s.ties, block_scan(ties, n_ties) - ties);
  const unsigned long long mine = strict + min(ties, s.ties - before) * s.each;
  const unsigned long long upto = block_scan(mine, sum);
  if (upto > s.target && upto - mine <= s.target) {
    found[0] = threadIdx.x, found[1] = s.target - (upto - mine), found[2] = s.ties - before;
  }
  __syncthreads();
  const int item = static_cast<int>(found[0]);
  if (item >= 0) {
    s.target = found[1], s.ties = found[2];
  } else {
    s.target -= sum, s.ties -= min(s.ties, n_ties);
  }
  __syncthreads();  // before the next call writes found
  return item;
}

// part [N_TOK, 2, blocks] is left with each block's ties in its second row, for sample_probs.
extern "C" __global__ void __launch_bounds__(256, 4) sample_draw(const int* pos, const int* drafted, const long long* params, const unsigned* keys, const unsigned long long* e, unsigned long long* part, const unsigned long long* state, unsigned* counter, int* token, int stream) {
  const int t = blockIdx.y;
  const State s = load(state, t);
  if (s.phase == kDecided) return;
  const unsigned* my_keys = keys + static_cast<size_t>(t) * VOCAB;
  const unsigned long long* my_e = e + static_cast<size_t>(t) * VOCAB;
  unsigned long long strict = 0, ties = 0;
#pragma unroll 1
  for (int i = 0; i < kPerThread; ++i) {
    const int id = blockIdx.x * kChunk + i * kThreads + threadIdx.x;
    if (id >= VOCAB) break;
    if (my_keys[id] > s.threshold) strict += probability(my_e[id], s.kept);
    ties += my_keys[id] == s.threshold;
  }
  unsigned long long *of_block = part + t * 2 * gridDim.x, *ties_of_block = of_block + gridDim.x;
  strict = block_total(strict), ties = block_total(ties);
  if (threadIdx.x == 0) of_block[blockIdx.x] = strict, ties_of_block[blockIdx.x] = ties;
  if (!last_block(counter + t, gridDim.x)) return;

  strict = ties = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    strict += __ldcg(of_block + b), ties += __ldcg(ties_of_block + b);
  }
  strict = block_total(strict), ties = block_total(ties);
  Draw draw;
  const double temperature = __longlong_as_double(params[kTemperature]);
  draw.each = ties ? probability(scaled(relative(s.threshold, s.max_key, temperature)), s.kept) : 0ull;
  draw.ties = s.ties;
  const unsigned long long sum = strict + min(ties, s.ties) * draw.each;
  draw.target = target_of(uniform(params[kSeed], drawn_position(pos, drafted, t), stream), sum);

  int block = -1;
  for (unsigned first = 0; block < 0; first += kThreads) {
    const unsigned b = first + threadIdx.x;
    const bool real = b < gridDim.x;
    block = pass(draw, real ? __ldcg(of_block + b) : 0ull, real ? __ldcg(ties_of_block + b) : 0ull);
    if (block >= 0) block += first;
  }
  int chosen = -1;
  for (int first = block * kChunk; chosen < 0; first += kThreads) {
    const int id = first + threadIdx.x;
    const unsigned key = id < VOCAB ? my_keys[id] : 0u;
    const bool above = id < VOCAB && key > s.threshold, tie = id < VOCAB && key == s.threshold;
    chosen = pass(draw, above ? probability(my_e[id], s.kept) : 0ull, tie);
    if (chosen >= 0) chosen += first;
  }
  if (threadIdx.x == 0) token[t] = chosen;
}

// ---------------------------------------------------------------- sample_probs

// probs f32 [N_TOK, VOCAB] OUT: p, 0 where filtered out; one-hot at the token where that was decided without a draw.
extern "C" __global__ void __launch_bounds__(256) sample_probs(const unsigned* keys, const unsigned long long* e, const unsigned long long* part, const unsigned long long* state, const int* token, float* probs) {
  const int t = blockIdx.y;
  const State s = load(state, t);
  const bool decided = s.phase == kDecided;
  const unsigned long long* ties_of_block = part + (t * 2 + 1) * gridDim.x;
  unsigned long long before = 0, n_ties;
  if (!decided) {
    for (unsigned b = threadIdx.x; b < blockIdx.x; b += kThreads) before += ties_of_block[b];
    before = block_total(before);
  }
#pragma unroll 1
  for (int i = 0; i < kPerThread; ++i) {
    const int id = blockIdx.x * kChunk + i * kThreads + threadIdx.x;
    const size_t at = static_cast<size_t>(t) * VOCAB + id;
    const unsigned key = id < VOCAB && !decided ? keys[at] : 0u;
    const unsigned long long tie = id < VOCAB && !decided && key == s.threshold;
    const unsigned long long rank = before + block_scan(tie, n_ties);
    before += n_ties;
    if (id >= VOCAB) continue;
    if (decided) {
      probs[at] = id == token[t] ? 1.f : 0.f;
    } else {
      probs[at] = key > s.threshold || (tie && rank <= s.ties) ? f32_probability(e[at], s.kept) : 0.f;
    }
  }
}
