// What the launches of sample.cu share: parameters, a row's state, numbers, histograms.
#pragma once

#include "draws.cuh"
#include "order.cuh"

#if !defined(VOCAB) || !defined(N_TOK)
#error "VOCAB and N_TOK must be defined"
#endif

constexpr int kThreads = 256;
constexpr int kPerThread = 4;
constexpr int kChunk = kThreads * kPerThread;
constexpr int kBins = 2048;
static_assert(VOCAB >= 1 && VOCAB <= 1 << 17, "sums of E stay below 2^63");
static_assert(N_TOK >= 1 && N_TOK <= 8, "decode form");

enum Phase { kDecided, kRefineTopK, kRefineTopP, kDraw };

// Digits of a key, the first the highest: 11, 11 and 10 bits.
__device__ __forceinline__ int digit_bits(int digit) { return digit == 2 ? 10 : 11; }
__device__ __forceinline__ int digit_low(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }

// Kept are keys above `threshold` and, of those that equal it, the first `ties` by id; `kept` is the sum of their E.
struct State {
  unsigned max_key, floor;  // the largest key, the smallest that min_p keeps
  int phase, digit;         // digits of `prefix` found
  unsigned prefix, threshold;
  unsigned long long want, above_count, above_mass;  // sought count or mass, and what lies above `prefix`
  unsigned long long floor_mass, kept, ties;
};

__device__ __forceinline__ State load(const unsigned long long* state, int t) {
  const unsigned long long* p = state + t * 16;
  State s;
  s.max_key = static_cast<unsigned>(p[0]), s.floor = static_cast<unsigned>(p[1]);
  s.phase = static_cast<int>(p[2]), s.digit = static_cast<int>(p[3]);
  s.prefix = static_cast<unsigned>(p[4]), s.threshold = static_cast<unsigned>(p[5]);
  s.want = p[6], s.above_count = p[7], s.above_mass = p[8];
  s.floor_mass = p[9], s.kept = p[10], s.ties = p[11];
  return s;
}
// One thread of the row's last block; the launch's other blocks have read the state before they arrived.
__device__ __forceinline__ void store(unsigned long long* state, int t, const State& s) {
  unsigned long long* p = state + t * 16;
  p[0] = s.max_key, p[1] = s.floor, p[2] = s.phase, p[3] = s.digit, p[4] = s.prefix, p[5] = s.threshold;
  p[6] = s.want, p[7] = s.above_count, p[8] = s.above_mass, p[9] = s.floor_mass, p[10] = s.kept, p[11] = s.ties;
}

// The filters before min_p have left threshold, ties and kept: min_p may shorten that beginning.
__device__ __forceinline__ void finish(State& s) {
  if (s.floor > s.threshold) s.threshold = s.floor, s.ties = VOCAB, s.kept = s.floor_mass;
  s.phase = kDraw;
}

// What is left of a draw: the sum to pass, the ties that are kept, P of one of them.
struct Draw {
  unsigned long long target, ties, each;
};

// e of a key.
__device__ __forceinline__ double relative(unsigned key, unsigned max_key, double temperature) {
  const double distance = static_cast<double>(order_value(key)) - static_cast<double>(order_value(max_key));
  return exp(distance / temperature);
}
__device__ __forceinline__ unsigned long long scaled(double e) {
  return static_cast<unsigned long long>(__dadd_rn(__dmul_rn(e, 0x1p46), 0.5));
}
__device__ __forceinline__ float f32_probability(unsigned long long e, unsigned long long kept) {
  return static_cast<float>(static_cast<double>(e) / static_cast<double>(kept));
}

// Position of the token that row t draws: `pos` is that of the token it comes behind, `drafted` counts tokens in between.
__device__ __forceinline__ long long drawn_position(const int* pos, const int* drafted, int t) {
  return static_cast<long long>(pos[0]) + (drafted ? drafted[0] : 0) + t + 1;
}

// A block's histogram of counts and of E, in 32-bit words of shared memory, whose additions are single instructions: E in
// three parts of 16 bits, of which 1024 fit.
struct Bins {
  unsigned* words;  // [4][kBins]

  __device__ __forceinline__ Bins() {
    __shared__ unsigned storage[4 * kBins];
    words = storage;
  }
  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < 4 * kBins; i += kThreads) words[i] = 0u;
    __syncthreads();
  }
  __device__ __forceinline__ void add(unsigned bin, unsigned long long e) {
    atomicAdd(words + bin, 1u);
    if (e == 0) return;
    atomicAdd(words + kBins + bin, static_cast<unsigned>(e & 0xffffu));
    atomicAdd(words + 2 * kBins + bin, static_cast<unsigned>(e >> 16 & 0xffffu));
    atomicAdd(words + 3 * kBins + bin, static_cast<unsigned>(e >> 32));
  }
  // Add to the row's histogram.
  __device__ __forceinline__ void flush(unsigned* count, unsigned long long* mass) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      if (words[bin] == 0) continue;
      atomicAdd(count + bin, words[bin]);
      const unsigned long long e = words[kBins + bin] + (static_cast<unsigned long long>(words[2 * kBins + bin]) << 16) +
                                   (static_cast<unsigned long long>(words[3 * kBins + bin]) << 32);
      if (e) atomicAdd(mass + bin, e);
    }
  }
};
