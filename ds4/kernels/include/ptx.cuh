// PTX instructions as functions: the only file that holds inline assembly. ptx_host.cuh has a function of the same name
// and signature for each of them, with which the tests run kernels on the CPU; it also shows what an instruction does.
//
// Tensor-core fragments (PTX ISA, "Matrix fragments for mma"): with g = lane / 4 and t = lane % 4, a lane holds
//   d      rows g, g + 8, columns 2t, 2t + 1:            d[0], d[1] in row g, d[2], d[3] in row g + 8
//   a      rows g, g + 8, alternating by register:       a[0], a[2] in row g, a[1], a[3] in row g + 8
//   b      column g
//   k      16-bit values, k = 16: 2t, 2t + 1 in a[0], a[1], b[0] and 8 more than that in a[2], a[3], b[1]
//          8-bit values, k = 32:  4t .. 4t + 3 in a[0], a[1], b[0] and 16 more than that in a[2], a[3], b[1]
// The value with the lowest k is in the lowest bits. The order of summation inside an mma is the hardware's own, and so
// is the rounding of e4m3 products; it does not depend on what other rows and columns hold.
#pragma once

#if defined(__CUDA_ARCH__)

// ---------------------------------------------------------------- tensor cores, all 32 lanes together: d += a b

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k32_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if __CUDA_ARCH__ >= 890
// Not on sm_80 and sm_86: an entry that uses it does not list them among its architectures.
__device__ __forceinline__ void mma_m16n8k32_e4m3(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Load 8x8 matrices of 16-bit values from shared memory. `row` is a row of 16 bytes: lane 8 i + j gives row j of matrix
// i, further lanes are not asked. A lane receives row lane / 4, columns 2 (lane % 4) and the next one, of matrix i in
// r[i]; transposed, the same of the transposed matrix.
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_transposed(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// ---------------------------------------------------------------- asynchronous copies, global to shared memory

// Copy kBytes (4, 8 or 16), both addresses multiples of it. 16 bytes bypass L1. The bytes are there for this thread
// after cp_async_wait, for others after a barrier that follows it.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
}

// The same, or zeros where `valid` is false; `global` is not read then but must still be an address.
template <int kBytes>
__device__ __forceinline__ void cp_async_or_zero(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared)), bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
}

// Close this thread's group of copies; an empty group counts too.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most kPending of this thread's latest groups have not arrived.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---------------------------------------------------------------- barriers of a part of the block

// Barrier `id` (1 .. 15) of n_threads threads, whole warps. The one waits for all, the other only counts itself.
__device__ __forceinline__ void named_barrier_sync(int id, int n_threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int n_threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// ---------------------------------------------------------------- programmatic dependent launch, nothing below sm_90

// Wait until the launch before this one has ended and what it wrote can be seen. Call it before the first access to
// what that launch writes or reads; with KernelCall.pdl unset it returns at once.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Allow the next launch to begin once every block has said so or ended. Says nothing about what has been written.
__device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---------------------------------------------------------------- bits

// a & mask | other in one instruction, also where mask and other are constants, for which the compiler takes two.
__device__ __forceinline__ unsigned and_or(unsigned a, unsigned mask, unsigned other) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(other));
  return d;
}

// x, by a way that the compiler does not see through: what a loop computes from it is computed in every pass and takes no
// register in between.
__device__ __forceinline__ unsigned opaque(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---------------------------------------------------------------- global memory

// 16 bytes that nobody writes during the launch and that are read once: kept out of L1. `p` is a multiple of 16.
__device__ __forceinline__ uint4 load_stream16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// The same of 8 bytes.
__device__ __forceinline__ uint2 load_stream8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// `p` is a multiple of sizeof(T), on which vector accesses fault otherwise; checked only on the CPU.
template <class T>
__device__ __forceinline__ void expect_aligned(const T*) {}

// Ask for the cache line of `p` to come to L2; `p` has to be global memory.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---------------------------------------------------------------- clusters (KernelCall.cluster), sm_90 and later

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// __syncthreads of all blocks of the cluster. One is due before a block leaves whose shared memory others read.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address, in the block of this rank, of what `shared` is in this block.
template <class T>
__device__ __forceinline__ T* cluster_map(T* shared, unsigned rank) {
  unsigned long long mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}
#endif

#else
#include "ptx_host.cuh"
#endif
