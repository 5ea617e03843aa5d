// kv_prefill: kv_publish for a chunk of up to n_rows tokens, of which `count` are there (spec model.md 2.1, 2.3, 3, 6;
// kernels.md c). Attention reads a chunk's own rows and those of the window before it from one tensor, `rows`, as the
// ring is shorter than a chunk. Launches, with first = pos[0] and t < count:
//
//   rows      rows[window + t] = row of rms_norm(kv[t]) kv_norm, turned by cis, in 584 bytes; qr[t] = rms_norm(q_a[t])
//             q_norm in BF16; rows[i] = ring[(first - window + i) % ring_slots], i < window, where that is not negative
//   entries   pool[e] and keys[e] of every window [e ratio, (e + 1) ratio) that ends in the chunk: from kv and gate,
//             and from `state` where it begins before the chunk
//   store     ring[(first + t) % ring_slots] = rows[window + t], state[(first + t) % slots] = (kv, gate + ape): of the
//             last tokens, as many as there are slots, each slot once
//
// rows and entries read the ring and states as they were before the chunk, store alone writes them: no launch writes
// what it reads. SWA layers have no entries. All bytes come from roles.cuh, as those of kv_publish do.
//
// rows      grid (2 n_rows + window), block 128: a token's row, then the tokens' norms, then the rows to copy.
// entries   grid (ceil(n_rows / ratio)), block 512 in HCA, else (ceil(n_rows / 4), 2), block 128: entry and key. A
//           block an entry, and not a token, as few tokens close one.
// store     grid (min(n_rows, most slots), 1 to 3), block 128: ring, state, key_state.
// Blocks without a live token, or of a row that pool lacks, leave at once, behind pdl_wait() so that launches end in
// order.
//
// Order: finish.cuh, pool.cuh. A token's sums see neither the other tokens nor the grid nor where a chunk begins.
//
// Bytes of a token at Q_LORA 1024: q_a and qr 6 KB, kv 2 KB, its row 0.6 KB; CSA raw rows 10 KB, HCA 4 KB: 35 to 80 MB
// for 4096 tokens. Estimates, not measured: at 80 % of an H200's memory speed 9 us SWA, 20 us CSA; HCA 12 us and 8 us
// for its 32 entries, 512 KB by one multiprocessor each; store is 136 rows and some states, latency alone, 3 us.
#include "live_rows.cuh"
#include "roles.cuh"

#if !defined(Q_LORA)
#error "Q_LORA must be defined"
#endif

// 584 bytes; a block of kThreads.
__device__ __forceinline__ void copy_row(const unsigned char* from, unsigned char* to) {
  constexpr int kWords = kRowBytes / sizeof(uint2);
  const int i = threadIdx.x;
  if (i < kWords) reinterpret_cast<uint2*>(to)[i] = reinterpret_cast<const uint2*>(from)[i];
}

// q_a f32 [n_rows, Q_LORA], kv f32 [n_rows, 512], pos i32 [1], count i32 [1] or null, cis f32 [n_rows, 32, 2], q_norm
// f32 [Q_LORA], kv_norm f32 [512], ring u8 [ring_slots, 584]; rows u8 [window + n_rows, 584] and qr bf16 [n_rows,
// Q_LORA] OUT.
extern "C" __global__ void __launch_bounds__(128) kv_prefill_rows(const float* q_a, const float* kv, const int* pos, const int* count, const float* cis, const float* q_norm, const float* kv_norm, const unsigned char* ring, unsigned char* rows, __nv_bfloat16* qr, float eps, int ring_slots, int window, int n_rows) {
  pdl_launch();
  const int block = blockIdx.x;
  if (block < n_rows) {
    const Four gain = load_mine<kHeadDim>(kv_norm);
    pdl_wait();
    if (block >= live_rows(count, n_rows)) return;
    unsigned char* row = rows + static_cast<size_t>(window + block) * kRowBytes;
    const float* turn = cis + static_cast<size_t>(block) * kRopeDim;
    return store_row(kv + static_cast<size_t>(block) * kHeadDim, turn, gain, eps, row);
  }
  if (block < 2 * n_rows) {
    const int token = block - n_rows;
    Latent<Q_LORA, kThreads> gain;
    gain.load(q_norm);
    pdl_wait();
    if (token >= live_rows(count, n_rows)) return;
    return norm_latent(q_a + static_cast<size_t>(token) * Q_LORA, gain, qr + static_cast<size_t>(token) * Q_LORA, eps);
  }
  pdl_wait();
  const int i = block - 2 * n_rows, p = pos[0] - window + i;
  if (p < 0) return;
  copy_row(ring + static_cast<size_t>(p % ring_slots) * kRowBytes, rows + static_cast<size_t>(i) * kRowBytes);
}

// The token that closes entry `entry` of a chunk at position `first`, or -1 where none of the live ones does or there
// is no room for the entry.
__device__ __forceinline__ int closing_token(int entry, int first, int ratio, int n_entries, int live) {
  const int token = (entry + 1) * ratio - 1 - first;
  return token < live && entry < n_entries ? token : -1;
}

// comp_kv, comp_gate f32 [n_rows, 512], pos and count as above, entry_cis f32 [n_rows, 32, 2], ape f32 [ratio, 512],
// comp_norm f32 [512], state f32 [state_slots, 2, 512]; pool u8 [n_entries, 584] IN OUT. ratio is a multiple of 4.
extern "C" __global__ void __launch_bounds__(512) kv_prefill_entries_hca(const float* comp_kv, const float* comp_gate, const int* pos, const int* count, const float* entry_cis, const float* ape, const float* comp_norm, const float* state, unsigned char* pool, float eps, int state_slots, int n_entries, int ratio, int n_rows) {
  pdl_launch();
  const Four gain = load_mine<kHeadDim>(comp_norm);
  pdl_wait();
  const Raw<kHeadDim> raw{comp_kv, comp_gate, ape, state, pos[0], state_slots, ratio};
  const int entry = raw.first / ratio + blockIdx.x;
  const int token = closing_token(entry, raw.first, ratio, n_entries, live_rows(count, n_rows));
  if (token < 0) return;
  store_hca(raw, entry, entry_cis + static_cast<size_t>(token) * kRopeDim, gain, eps, pool);
}

// comp_kv, comp_gate f32 [n_rows, 1024], idx_kv, idx_gate f32 [n_rows, 256], pos, count and entry_cis as above, ape f32
// [4, 1024], comp_norm f32 [512], idx_ape f32 [4, 256], idx_norm f32 [128], state f32 [state_slots, 2, 1024], key_state
// f32 [key_slots, 2, 256]; pool u8 [n_entries, 584] and keys u8 [n_entries, 68] IN OUT.
extern "C" __global__ void __launch_bounds__(128) kv_prefill_entries_csa(const float* comp_kv, const float* comp_gate, const float* idx_kv, const float* idx_gate, const int* pos, const int* count, const float* entry_cis, const float* ape, const float* comp_norm, const float* idx_ape, const float* idx_norm, const float* state, const float* key_state, unsigned char* pool, unsigned char* keys, float eps, int state_slots, int key_slots, int n_entries, int n_rows) {
  pdl_launch();
  const bool is_key = blockIdx.y > 0;
  const Four gain = is_key ? load_mine<kKeyDim>(idx_norm) : load_mine<kHeadDim>(comp_norm);
  pdl_wait();
  const int first = pos[0], entry = first / kCsaRatio + blockIdx.x;
  const int token = closing_token(entry, first, kCsaRatio, n_entries, live_rows(count, n_rows));
  if (token < 0) return;
  const float* turn = entry_cis + static_cast<size_t>(token) * kRopeDim;
  if (is_key) {
    const Raw<2 * kKeyDim> raw{idx_kv, idx_gate, idx_ape, key_state, first, key_slots, kCsaRatio};
    return store_key(raw, entry, turn, gain, eps, keys);
  }
  const Raw<2 * kHeadDim> raw{comp_kv, comp_gate, ape, state, first, state_slots, kCsaRatio};
  store_csa(raw, entry, turn, gain, eps, pool);
}

// The token whose slot this block writes: the last tokens, a slot each; -1 where there are not so many.
__device__ __forceinline__ int stored_token(const int* count, int n_rows, int slots) {
  const int token = live_rows(count, n_rows) - 1 - static_cast<int>(blockIdx.x);
  return blockIdx.x < slots ? token : -1;
}

__device__ __forceinline__ void store_ring(const unsigned char* rows, const int* pos, const int* count,
                                           unsigned char* ring, int ring_slots, int window, int n_rows) {
  const int token = stored_token(count, n_rows, ring_slots);
  if (token < 0) return;
  unsigned char* slot = ring + static_cast<size_t>((pos[0] + token) % ring_slots) * kRowBytes;
  copy_row(rows + static_cast<size_t>(window + token) * kRowBytes, slot);
}

template <int kWidth>
__device__ __forceinline__ void store_state(const Raw<kWidth>& raw, const int* count, int n_rows, float* state) {
  const int token = stored_token(count, n_rows, raw.slots);
  if (token >= 0) append<kWidth, kThreads>(raw, token, state);
}

// rows, pos and count as above; ring u8 [ring_slots, 584] IN OUT.
extern "C" __global__ void __launch_bounds__(128) kv_prefill_store_swa(const unsigned char* rows, const int* pos, const int* count, unsigned char* ring, int ring_slots, int window, int n_rows) {
  pdl_launch();
  pdl_wait();
  store_ring(rows, pos, count, ring, ring_slots, window, n_rows);
}

// The same and the compressor's rows as above; state f32 [state_slots, 2, 512] IN OUT.
extern "C" __global__ void __launch_bounds__(128) kv_prefill_store_hca(const unsigned char* rows, const float* comp_kv, const float* comp_gate, const int* pos, const int* count, const float* ape, unsigned char* ring, float* state, int ring_slots, int state_slots, int ratio, int window, int n_rows) {
  pdl_launch();
  pdl_wait();
  if (blockIdx.y == 0) return store_ring(rows, pos, count, ring, ring_slots, window, n_rows);
  store_state(Raw<kHeadDim>{comp_kv, comp_gate, ape, state, pos[0], state_slots, ratio}, count, n_rows, state);
}

// The same; state f32 [state_slots, 2, 1024] and key_state f32 [key_slots, 2, 256] IN OUT.
extern "C" __global__ void __launch_bounds__(128) kv_prefill_store_csa(const unsigned char* rows, const float* comp_kv, const float* comp_gate, const float* idx_kv, const float* idx_gate, const int* pos, const int* count, const float* ape, const float* idx_ape, unsigned char* ring, float* state, float* key_state, int ring_slots, int state_slots, int key_slots, int window, int n_rows) {
  pdl_launch();
  pdl_wait();
  if (blockIdx.y == 0) return store_ring(rows, pos, count, ring, ring_slots, window, n_rows);
  const Raw<2 * kHeadDim> raw{comp_kv, comp_gate, ape, state, pos[0], state_slots, kCsaRatio};
  const Raw<2 * kKeyDim> raw_key{idx_kv, idx_gate, idx_ape, key_state, pos[0], key_slots, kCsaRatio};
  if (blockIdx.y == 1) return store_state(raw, count, n_rows, state);
  store_state(raw_key, count, n_rows, key_state);
}
