// What one block stores for a token or an entry, in the decode form (kv_publish.cu) and in the prefill form
// (kv_prefill.cu): the same code, so that a cache has the same bytes whichever of them wrote it.
//
// Gains are loaded before pdl_wait(), what the launch before wrote behind it.
#pragma once

#include "pool.cuh"

constexpr int kThreads = 128;  // of a block, four columns each, where nothing needs more

// ---------------------------------------------------------------- a row of up to 512 columns: four a thread

// Columns of a gain or of a row in this thread; zeros behind the last.
template <int kColumns>
__device__ __forceinline__ Four load_mine(const float* p) {
  const int column = 4 * threadIdx.x;
  return column < kColumns ? load_vec<4>(p + column) : four_of(0.f);
}

// kv f32 [512], cis f32 [32, 2]; row u8 [584] OUT.
__device__ __forceinline__ void store_row(const float* kv, const float* cis, const Four& gain, float eps,
                                          unsigned char* row) {
  finish_row(load_mine<kHeadDim>(kv), gain, load_turn<kHeadDim>(cis, 4 * threadIdx.x), eps, row);
}

// ---------------------------------------------------------------- the query's latent: kColumns of it, any number

// Columns 4 (thread + i kBlock) .. + 3 in v[i]; zeros behind the last.
template <int kColumns, int kBlock>
struct Latent {
  static_assert(kColumns % 4 == 0, "rows are read 16 bytes at a time");
  static constexpr int kLoads = (kColumns / 4 + kBlock - 1) / kBlock;
  Four v[kLoads];

  __device__ __forceinline__ static int column(int i) { return 4 * (threadIdx.x + i * kBlock); }
  __device__ __forceinline__ void load(const float* p) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) v[i] = column(i) < kColumns ? load_vec<4>(p + column(i)) : four_of(0.f);
  }
};

__device__ __forceinline__ void store_four(float* p, const Four& v) { store_vec<4>(p, v); }
__device__ __forceinline__ void store_four(__nv_bfloat16* p, const Four& v) {
  const Vec<unsigned, 2> words{f32x2_to_bf16(v[0], v[1]), f32x2_to_bf16(v[2], v[3])};
  store_vec<2>(reinterpret_cast<unsigned*>(p), words);
}

// qr = rms_norm(q_a) gain, FP32 or rounded to BF16. Every thread of the block calls it.
template <int kColumns, int kBlock, class T>
__device__ __forceinline__ void norm_latent(const float* q_a, const Latent<kColumns, kBlock>& gain, T* qr, float eps) {
  using Columns = Latent<kColumns, kBlock>;
  Columns x;
  x.load(q_a);
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < Columns::kLoads; ++i) squares = sum_of_squares(x.v[i], squares);
  squares = block_sum(squares);
#pragma unroll
  for (int i = 0; i < Columns::kLoads; ++i) {
    const int column = Columns::column(i);
    if (column < kColumns) store_four(qr + column, normed<kColumns>(x.v[i], squares, eps, gain.v[i]));
  }
}

// ---------------------------------------------------------------- entries; cis f32 [32, 2] of the window's beginning

// A block of kHcaThreads, or of kThreads; pool u8 [n_entries, 584] IN OUT.
__device__ __forceinline__ void store_hca(const Raw<kHeadDim>& raw, int entry, const float* cis, const Four& gain,
                                          float eps, unsigned char* pool) {
  const Four turn = load_turn<kHeadDim>(cis, 4 * threadIdx.x);
  finish_row(pool_hca(raw, entry), gain, turn, eps, pool + static_cast<size_t>(entry) * kRowBytes);
}
__device__ __forceinline__ void store_csa(const Raw<2 * kHeadDim>& raw, int entry, const float* cis, const Four& gain,
                                          float eps, unsigned char* pool) {
  const int column = 4 * threadIdx.x;
  const Four turn = load_turn<kHeadDim>(cis, column);
  finish_row(pool_csa(raw, entry, column), gain, turn, eps, pool + static_cast<size_t>(entry) * kRowBytes);
}
// keys u8 [n_entries, 68] IN OUT; the block's first warp, whose lanes are the threads.
__device__ __forceinline__ void store_key(const Raw<2 * kKeyDim>& raw, int entry, const float* cis, const Four& gain,
                                          float eps, unsigned char* keys) {
  const int column = 4 * threadIdx.x;
  if (column >= kKeyDim) return;
  const Four turn = load_turn<kKeyDim>(cis, column);
  finish_key(pool_csa(raw, entry, column), gain, turn, eps, keys + static_cast<size_t>(entry) * kKeyBytes);
}
