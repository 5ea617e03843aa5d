// Vector loads and stores, and loads from packed blocks whose parts are not aligned to a word.
#pragma once

#include "ptx.cuh"

__device__ __forceinline__ bool is_aligned(const void* p, unsigned bytes) {
  return reinterpret_cast<unsigned long long>(p) % bytes == 0;
}

// kCount values of T that one instruction moves: 4, 8 or 16 bytes, aligned to their size.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vec {
  static_assert(sizeof(T) * kCount == 4 || sizeof(T) * kCount == 8 || sizeof(T) * kCount == 16, "4, 8 or 16 bytes");
  T v[kCount];
  __device__ __forceinline__ T& operator[](int i) { return v[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};

// One access of sizeof(Vec<T, kCount>) bytes; `p` is a multiple of that, in global or shared memory.
template <int kCount, class T>
__device__ __forceinline__ Vec<T, kCount> load_vec(const T* p) {
  const Vec<T, kCount>* vec = reinterpret_cast<const Vec<T, kCount>*>(p);
  expect_aligned(vec);
  return *vec;
}
template <int kCount, class T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, kCount>& v) {
  Vec<T, kCount>* vec = reinterpret_cast<Vec<T, kCount>*>(p);
  expect_aligned(vec);
  *vec = v;
}

// 16 bytes of weights: global memory that nobody writes during the launch, read once (load_stream16). `p` in 16s.
template <class T>
__device__ __forceinline__ Vec<T, 16 / sizeof(T)> load_weights(const T* p) {
  union Bytes {
    uint4 words;
    Vec<T, 16 / sizeof(T)> values;
    __device__ Bytes() {}
  } bytes;
  bytes.words = load_stream16(p);
  return bytes.values;
}

// The 4 bytes at an even address, little-endian: fields of blocks such as Q8_0's 34 bytes.
__device__ __forceinline__ unsigned load_u32_at_even(const unsigned char* p) {
  const unsigned short* half = reinterpret_cast<const unsigned short*>(p);
  return half[0] | static_cast<unsigned>(half[1]) << 16;
}
