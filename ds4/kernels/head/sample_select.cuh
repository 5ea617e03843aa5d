// How a row's last block finds the thresholds of the filters: called by all its threads, min_p_key by one warp.
#pragma once

#include "order.cuh"
#include "sample_state.cuh"
#include "scan.cuh"

// Smallest key whose e is at least min_p; one warp. e rises with the key, 0 < min_p <= 1 and e(max) = 1.
__device__ __forceinline__ unsigned min_p_key(unsigned max_key, double temperature, double min_p, int lane) {
  unsigned low = kKeyOfMinusInfinity - 1, high = max_key;  // fails, passes
  while (high - low > 1) {
    const unsigned probe = low + static_cast<unsigned>(static_cast<unsigned long long>(high - low) * (lane + 1) / 33);
    const bool passes = probe > low && relative(probe, max_key, temperature) >= min_p;
    const unsigned passing = __ballot_sync(0xffffffffu, passes);
    const int first = passing ? __ffs(passing) - 1 : 32;
    const unsigned below = __shfl_sync(0xffffffffu, probe, first > 0 ? first - 1 : 0);
    const unsigned at = __shfl_sync(0xffffffffu, probe, first < 32 ? first : 31);
    if (first > 0) low = below;
    if (first < 32) high = at;
  }
  return high;
}

// Bins of one histogram, the highest first: in which does the running count (top_k) or mass (top_p) reach s.want? Writes the
// digit and what lies above to `s`, the same in all threads.
__device__ __forceinline__ void choose_digit(State& s, const unsigned* count, const unsigned long long* mass, int n_bins) {
  __shared__ unsigned long long found[3];
  constexpr int kMine = kBins / kThreads;
  unsigned long long counts = 0, masses = 0, total;
#pragma unroll 1
  for (int i = 0; i < kMine; ++i) {
    const int bin = n_bins - 1 - (static_cast<int>(threadIdx.x) * kMine + i);
    if (bin >= 0) counts += __ldcg(count + bin), masses += __ldcg(mass + bin);
  }
  const bool by_count = s.phase == kRefineTopK;
  unsigned long long above_count = s.above_count + block_scan(counts, total) - counts;
  unsigned long long above_mass = s.above_mass + block_scan(masses, total) - masses;
#pragma unroll 1
  for (int i = 0; i < kMine; ++i) {
    const int bin = n_bins - 1 - (static_cast<int>(threadIdx.x) * kMine + i);
    if (bin < 0) break;
    const unsigned long long c = __ldcg(count + bin), m = __ldcg(mass + bin);
    const unsigned long long before = by_count ? above_count : above_mass, step = by_count ? c : m;
    if (before < s.want && s.want <= before + step) {  // true once in the block: step > 0 there
      found[0] = bin, found[1] = above_count, found[2] = above_mass;
    }
    above_count += c, above_mass += m;
  }
  __syncthreads();
  s.prefix = s.prefix << digit_bits(s.digit) | static_cast<unsigned>(found[0]);
  s.above_count = found[1], s.above_mass = found[2];
  __syncthreads();  // before the next call writes found
  s.digit += 1;
}

// The first digit of a phase, from the histogram of upper bits that sample_mass has left.
__device__ __forceinline__ void begin(State& s, int phase, unsigned long long want, const unsigned* count,
                                      const unsigned long long* mass) {
  s.phase = phase, s.want = want;
  s.digit = 0, s.prefix = 0u, s.above_count = 0, s.above_mass = 0;
  choose_digit(s, count, mass, kBins);
}

// Go on after top_k with the beginning that it keeps in s.threshold, s.ties and s.kept; `count`, `mass` are the coarse bins.
__device__ __forceinline__ void after_top_k(State& s, double top_p, const unsigned* count,
                                            const unsigned long long* mass) {
  if (top_p < 1.) {
    const unsigned long long want = static_cast<unsigned long long>(ceil(__dmul_rn(top_p, static_cast<double>(s.kept))));
    begin(s, kRefineTopP, max(1ull, min(want, s.kept)), count, mass);
  } else {
    finish(s);
  }
}
