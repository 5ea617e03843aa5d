// kv_publish: what a layer's attention will read, stored from the layer's projections (spec model.md 2.1, 2.3, 3, 6;
// kernels.md b.4). One launch; each block has one role for one token.
//
//   norm    qr = rms_norm(q_a) q_norm
//   row     ring[p % ring_slots] = row of rms_norm(kv) kv_norm, turned by cis, in 584 bytes
//   append  state[p % slots] = (kv, gate + ape[p % ratio]) of a compressor, raw
//   entry   where (p + 1) % ratio == 0: pool[(p + 1) / ratio - 1] = the same of the pooled window, turned by entry_cis
//   key     the same for the indexer, then rotated by Hadamard, in 68 bytes
//
// p = pos[0] + token. SWA layers have norm and row; HCA layers append and entry too; CSA layers all, append twice.
// Grid (roles, n_tok): 2, 4 or 6 roles. Block 128, four columns a thread, and 512 for HCA, whose window of 128 tokens
// is pooled by four groups of threads, 16 loads of 16 bytes in flight each. An entry or key block whose token closes no
// window leaves at once, so that the launch is the same for every position. No block waits for another: pool.cuh says
// where raw rows are read. A launch of 8 tokens closes two CSA windows, in two blocks.
//
// Order: a token's sums see neither the other tokens nor the grid. Sums of squares: four columns by fmaf, then
// reduce.cuh; zeros of the threads behind a row's end change nothing, so that a row's bits are the same in blocks of
// 128 and 512.
//
// Bytes: some 20 KB a token, in HCA 512 KB where a window closes. Latency alone: position, rows, two barriers.
// Estimates, not measured: 3 us, with a closing HCA window 8 us on one multiprocessor.
#include "roles.cuh"

#if !defined(Q_LORA)
#error "Q_LORA must be defined"
#endif

enum Role { kEntry, kRow, kNorm, kAppend, kKey, kKeyAppend };  // by blockIdx.x; the longest comes first

template <int kBlock>
__device__ __forceinline__ void norm_q(const float* q_a, const float* q_norm, float* qr, float eps) {
  const size_t row = static_cast<size_t>(blockIdx.y) * Q_LORA;
  Latent<Q_LORA, kBlock> gain;
  gain.load(q_norm);
  pdl_wait();
  norm_latent(q_a + row, gain, qr + row, eps);
}

__device__ __forceinline__ void publish_row(const float* kv, const int* pos, const float* cis, const float* kv_norm,
                                            unsigned char* ring, float eps, int ring_slots) {
  const int token = blockIdx.y;
  const Four gain = load_mine<kHeadDim>(kv_norm);
  pdl_wait();
  unsigned char* row = ring + static_cast<size_t>((pos[0] + token) % ring_slots) * kRowBytes;
  store_row(kv + static_cast<size_t>(token) * kHeadDim, cis + token * kRopeDim, gain, eps, row);
}

// The entry that a token at position p closes, or -1.
__device__ __forceinline__ int closed_entry(int p, int ratio, int n_entries) {
  const int entry = (p + 1) / ratio - 1;
  return (p + 1) % ratio == 0 && entry < n_entries ? entry : -1;
}

// q_a f32 [n_tok, Q_LORA], kv f32 [n_tok, 512], pos i32 [1], cis f32 [n_tok, 32, 2], q_norm f32 [Q_LORA], kv_norm f32
// [512]; ring u8 [ring_slots, 584] IN OUT; qr f32 [n_tok, Q_LORA] OUT.
extern "C" __global__ void __launch_bounds__(128) kv_publish_swa(const float* q_a, const float* kv, const int* pos, const float* cis, const float* q_norm, const float* kv_norm, unsigned char* ring, float* qr, float eps, int ring_slots) {
  pdl_launch();
  if (blockIdx.x == 0) return publish_row(kv, pos, cis, kv_norm, ring, eps, ring_slots);
  norm_q<kThreads>(q_a, q_norm, qr, eps);
}

// The same and comp_kv, comp_gate f32 [n_tok, 512], entry_cis f32 [n_tok, 32, 2], ape f32 [ratio, 512], comp_norm f32
// [512]; state f32 [state_slots, 2, 512] and pool u8 [n_entries, 584] IN OUT. ratio is a multiple of 4.
extern "C" __global__ void __launch_bounds__(512) kv_publish_hca(const float* q_a, const float* kv, const float* comp_kv, const float* comp_gate, const int* pos, const float* cis, const float* entry_cis, const float* q_norm, const float* kv_norm, const float* ape, const float* comp_norm, unsigned char* ring, float* state, unsigned char* pool, float* qr, float eps, int ring_slots, int state_slots, int n_entries, int ratio) {
  pdl_launch();
  const int role = blockIdx.x, token = blockIdx.y;
  if (role == kRow) return publish_row(kv, pos, cis, kv_norm, ring, eps, ring_slots);
  if (role == kNorm) return norm_q<kHcaThreads>(q_a, q_norm, qr, eps);
  const Four gain = load_mine<kHeadDim>(comp_norm);
  pdl_wait();
  const Raw<kHeadDim> raw{comp_kv, comp_gate, ape, state, pos[0], state_slots, ratio};
  if (role == kAppend) return append<kHeadDim, kHcaThreads>(raw, token, state);
  const int entry = closed_entry(raw.first + token, ratio, n_entries);
  if (entry < 0) return;
  store_hca(raw, entry, entry_cis + token * kRopeDim, gain, eps, pool);
}

// As kv_publish_hca with comp_kv, comp_gate f32 [n_tok, 1024], ape f32 [4, 1024], state f32 [state_slots, 2, 1024]; and
// the indexer's idx_kv, idx_gate f32 [n_tok, 256], idx_ape f32 [4, 256], idx_norm f32 [128]; key_state f32 [key_slots,
// 2, 256] and keys u8 [n_entries, 68] IN OUT.
extern "C" __global__ void __launch_bounds__(128) kv_publish_csa(const float* q_a, const float* kv, const float* comp_kv, const float* comp_gate, const float* idx_kv, const float* idx_gate, const int* pos, const float* cis, const float* entry_cis, const float* q_norm, const float* kv_norm, const float* ape, const float* comp_norm, const float* idx_ape, const float* idx_norm, unsigned char* ring, float* state, unsigned char* pool, float* key_state, unsigned char* keys, float* qr, float eps, int ring_slots, int state_slots, int key_slots, int n_entries) {
  pdl_launch();
  const int role = blockIdx.x, token = blockIdx.y;
  if (role == kRow) return publish_row(kv, pos, cis, kv_norm, ring, eps, ring_slots);
  if (role == kNorm) return norm_q<kThreads>(q_a, q_norm, qr, eps);
  const Four row_gain = load_mine<kHeadDim>(comp_norm), key_gain = load_mine<kKeyDim>(idx_norm);
  pdl_wait();
  const Raw<2 * kHeadDim> raw{comp_kv, comp_gate, ape, state, pos[0], state_slots, kCsaRatio};
  const Raw<2 * kKeyDim> raw_key{idx_kv, idx_gate, idx_ape, key_state, raw.first, key_slots, kCsaRatio};
  if (role == kAppend) return append<2 * kHeadDim, kThreads>(raw, token, state);
  if (role == kKeyAppend) return append<2 * kKeyDim, kThreads>(raw_key, token, key_state);
  const int entry = closed_entry(raw.first + token, kCsaRatio, n_entries);
  if (entry < 0) return;
  const float* turn = entry_cis + token * kRopeDim;
  if (role == kEntry) return store_csa(raw, entry, turn, row_gain, eps, pool);
  store_key(raw_key, entry, turn, key_gain, eps, keys);
}
