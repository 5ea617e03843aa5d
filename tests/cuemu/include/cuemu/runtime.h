// What kernel code and the scheduler share: the running thread, barriers, warp collectives, shared memory, launches.
#pragma once

#include <cstddef>
#include <cstdint>

#include <vector_types.h>

namespace cuemu {

constexpr unsigned kFullWarp = 0xffffffffu;

// The running CUDA thread; threadIdx and its like read it.
struct Thread {
  uint3 thread_index, block_index;
  dim3 block_dim, grid_dim;
  int lane;
  unsigned cluster_rank, cluster_size;  // of its block, in blocks
};

// What a lane brings to a warp collective and takes from it.
struct Lane {
  void* in;
  void* out;
};
// Run once, by the last lane to arrive; lanes[i] is set where bit i of mask is.
using Resolve = void (*)(Lane* lanes, unsigned mask);

// A cp.async that has been issued: `valid` bytes are copied, the rest of `bytes` become zero.
struct AsyncCopy {
  void* to;
  const void* from;
  unsigned bytes, valid;
};

enum Order { kForward, kLifo, kRandom, kWarps };

// Mirrored by tests/cuemu/module.py.
struct LaunchConfig {
  unsigned grid[3], block[3], cluster[3];
  uint64_t shared_bytes;  // dynamic shared memory
  uint64_t shared_limit;  // of a block, static and dynamic together
  int32_t order;          // Order
  uint64_t seed;
  double time_limit_s;  // of CPU time; the launch is given up beyond it
  // For ThreadSanitizer only, else null: where this launch publishes what it did, and where the launch before it did if
  // this one may start before that one has ended (programmatic dependent launch).
  void* done;
  void* predecessor_done;
};

extern "C" {
extern __attribute__((visibility("hidden"))) Thread* cuemu_thread;

// Barrier `id` of the block, 0 being __syncthreads. `count` 0 stands for every thread of the block that has not exited.
// Returns for how many of the threads `vote` was true.
int cuemu_barrier(int id, int count, int vote, const char* site);
void cuemu_barrier_arrive(int id, int count);
void cuemu_collective(unsigned mask, void* in, void* out, Resolve resolve, const char* name, int orders_memory);

void* cuemu_shared(int slot, size_t bytes, size_t alignment);
void* cuemu_dynamic_shared(size_t alignment);
int cuemu_new_slot();
void cuemu_require_shared(const void* p, const char* what);  // fails with `what` where p is not shared memory

void cuemu_fence();   // __threadfence
void cuemu_atomic();  // before every atomic operation
void cuemu_yield();
int64_t cuemu_clock();

void cuemu_async_issue(const AsyncCopy* copy);
void cuemu_async_commit();
// Takes one copy that must have landed when at most `pending_groups` groups may be pending; 0 when none is left.
int cuemu_async_take(int pending_groups, AsyncCopy* copy);

void cuemu_wait_predecessor();  // griddepcontrol.wait
void cuemu_cluster_barrier();
void* cuemu_cluster_map(const void* shared, unsigned rank);

[[noreturn]] void cuemu_fail(const char* what);
__attribute__((visibility("default"))) const char* cuemu_error();  // of the last launch of this library
__attribute__((visibility("default"))) void cuemu_free();  // the stacks of this library's threads; none may be running
int cuemu_launch(void (*kernel)(void*), void* arguments, const LaunchConfig* config);
}

}  // namespace cuemu
