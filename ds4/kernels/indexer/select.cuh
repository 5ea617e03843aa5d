// The `want` best of up to 16,384 scores that a block of 512 threads holds in registers, exactly: larger ones first, of
// equal ones those that come first (order.cuh). Positions of the chosen rise with their places.
//
// Element i * 512 + threadIdx.x is key[i]. 32 neighbours in a warp are a row, numbered by their elements: row i * 16 + warp.
#pragma once

#include "order.cuh"
#include "scan.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 32;
constexpr int kSlice = kThreads * kPerThread;
constexpr int kStep = 8;  // of a thread's elements; whole steps behind the last element are left out
static_assert(kPerThread == 32, "a lane keeps one row of its warp's");

// Chosen are the keys above `key`, and the first `ties` of those equal to it.
struct Cut {
  unsigned key;
  int ties;
};

// value[i] = get(i, element) of the first n elements, n > 0: loads that do not wait for each other. What lies behind gets
// the last element's, or stays as it is.
template <class Get>
__device__ __forceinline__ void load_elements(unsigned (&value)[kPerThread], int n, Get get) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (i % kStep == 0 && i * kThreads >= n) break;
    value[i] = get(i, min(i * kThreads + static_cast<int>(threadIdx.x), n - 1));
  }
}

// Bits of scores become keys that rise with them; behind the last element 0, which is below the key of any number.
__device__ __forceinline__ void make_keys(unsigned (&value)[kPerThread], int n) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool real = i * kThreads + static_cast<int>(threadIdx.x) < n;
    value[i] = real ? order_key(__uint_as_float(value[i])) : 0u;
  }
}

// In which bin of a histogram, the highest first, does the running count reach `want`? One warp; `found` becomes the bin,
// the count above it and its own.
__device__ __forceinline__ void find_bin(const unsigned* histogram, unsigned want, unsigned* found) {
  const int lane = threadIdx.x % 32;
  unsigned count[8], mine = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) mine += count[i] = histogram[255 - 8 * lane - i];
  unsigned above = mine;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned before = __shfl_up_sync(0xffffffffu, above, offset);
    if (lane >= offset) above += before;
  }
  above -= mine;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (above < want && want <= above + count[i]) {  // true once in the warp: count[i] > 0 there
      found[0] = 255 - 8 * lane - i, found[1] = above, found[2] = count[i];
    }
    above += count[i];
  }
}

// The cut that chooses exactly `want` of n > want elements: the digits of its key from the highest on, 8 bits each, until
// all elements that share the digits so far are chosen or the key is known. The zeros behind the last element count as
// lowest keys, which no cut reaches.
__device__ __forceinline__ Cut find_cut(const unsigned (&key)[kPerThread], int n, int want) {
  __shared__ unsigned histogram[256];
  __shared__ unsigned found[3];
  unsigned low = 0, rest = want;  // the lowest key with the digits so far; how many of these keys are chosen
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    const unsigned others = 0xffffffffu >> (24 - shift);  // digits that are not known yet
    if (threadIdx.x < 256) histogram[threadIdx.x] = 0u;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (i % kStep == 0 && i * kThreads >= n) break;
      const unsigned above = key[i] - low;
      if (above <= others) atomicAdd(histogram + (above >> shift), 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) find_bin(histogram, rest, found);
    __syncthreads();
    low += found[0] << shift;
    rest -= found[1];
    if (rest == found[2]) return {low - 1u, 0};  // low > 0: below are the elements that are not chosen
  }
  return {low, static_cast<int>(rest)};
}

// put(position, element) for each chosen element, positions from 0 on in the order of elements.
template <class Put>
__device__ __forceinline__ void compact(const unsigned (&key)[kPerThread], int n, Cut cut, Put put) {
  __shared__ unsigned before[kThreads];  // of a row: keys above the cut; ties in the upper half
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane * kWarps + warp;
  unsigned above = 0, tie = 0;  // of this lane's row, a bit an element
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (i % kStep == 0 && i * kThreads >= n) break;
    const unsigned its_above = __ballot_sync(0xffffffffu, key[i] > cut.key);
    const unsigned its_tie = __ballot_sync(0xffffffffu, key[i] == cut.key);
    if (lane == i) above = its_above, tie = its_tie;
  }
  before[row] = __popc(above) | __popc(tie) << 16;
  __syncthreads();
  const unsigned mine = before[threadIdx.x];
  unsigned long long total;  // neither half overflows: there are 16,384 elements
  const unsigned upto = static_cast<unsigned>(block_scan(mine, total));
  before[threadIdx.x] = upto - mine;
  __syncthreads();
  int ties = static_cast<int>(before[row] >> 16);
  int position = static_cast<int>(before[row] & 0xffffu) + min(ties, cut.ties);
  for (unsigned rest = above | tie; rest; rest &= rest - 1u) {
    const int i = __ffs(static_cast<int>(rest)) - 1;
    if (tie >> i & 1u && ties++ >= cut.ties) continue;
    put(position++, row * 32 + i);
  }
}

// The `want` best of n elements, or all where there are not more: put(position, element) as above.
template <class Put>
__device__ __forceinline__ void select(const unsigned (&key)[kPerThread], int n, int want, Put put) {
  compact(key, n, n > want ? find_cut(key, n, want) : Cut{0u, 0}, put);
}
