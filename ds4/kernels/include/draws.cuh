// What kernels that draw tokens share: the parameters of an answer, and random numbers that depend on nothing but a seed,
// a position and what the number is for.
#pragma once

// params i64 [6]: FP64 numbers by their bits, integers as they are.
enum Param { kTemperature, kTopK, kTopP, kMinP, kRepetitionPenalty, kSeed };

// Of a position: one number draws its token, one decides on its draft, one draws its draft (ds4/mtp/accept.py, drafter.py).
enum Stream { kTokenStream, kAcceptStream, kDraftStream };

// One step of splitmix64 (Steele, Lea and Flood 2014).
__device__ __forceinline__ unsigned long long splitmix64(unsigned long long v) {
  v += 0x9e3779b97f4a7c15ull;
  v = (v ^ v >> 30) * 0xbf58476d1ce4e5b9ull;
  v = (v ^ v >> 27) * 0x94d049bb133111ebull;
  return v ^ v >> 31;
}
// In [0, 1): the 53 upper bits of splitmix64 over seed, position and stream; what ds4.sampling.uniform gives.
__device__ __forceinline__ double uniform(long long seed, long long position, int stream) {
  unsigned long long v = splitmix64(static_cast<unsigned long long>(seed));
  v = splitmix64(v ^ static_cast<unsigned long long>(position));
  v = splitmix64(v ^ static_cast<unsigned long long>(stream));
  return __dmul_rn(static_cast<double>(v >> 11), 0x1p-53);
}
// The place in a sum of integers, above 0, that a number in [0, 1) points to.
__device__ __forceinline__ unsigned long long target_of(double number, unsigned long long sum) {
  return min(static_cast<unsigned long long>(__dmul_rn(number, static_cast<double>(sum))), sum - 1);
}
