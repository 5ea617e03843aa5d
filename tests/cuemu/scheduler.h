// The scheduler's records: fibers, barriers, warps, blocks and their shared memory. Memory for them is taken before the
// threads of a cluster start: taken and given back by different threads, it would be a race to ThreadSanitizer.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuemu/runtime.h"
#include "fiber.h"

namespace cuemu {

constexpr unsigned kMaxThreads = 1024, kBarriers = 16, kMaxCopies = 512;
constexpr size_t kMaxSharedBytes = 256 << 10;  // of a block; no GPU has more

class Random {
 public:
  void seed(uint64_t seed) { state_ = seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull; }
  uint64_t below(uint64_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return (state_ >> 11) % n;
  }

 private:
  uint64_t state_ = 1;
};

struct Block;
struct Warp;

// The cp.async of a thread that have not landed, by age, each with the number of its group.
class PendingCopies {
 public:
  void reset() {
    ring_.resize(kMaxCopies);
    head_ = size_ = 0;
  }
  bool full() const { return size_ == kMaxCopies; }
  bool empty() const { return size_ == 0; }
  std::pair<int, AsyncCopy>& oldest() { return ring_[head_]; }
  void push(int group, const AsyncCopy& copy) { ring_[(head_ + size_++) % kMaxCopies] = {group, copy}; }
  void pop() {
    head_ = (head_ + 1) % kMaxCopies;
    --size_;
  }

 private:
  std::vector<std::pair<int, AsyncCopy>> ring_;
  size_t head_ = 0, size_ = 0;
};

struct Fiber {
  Thread thread;
  Context* context;
  Block* block;
  Warp* warp;
  bool live;
  int votes;  // result of the barrier it waited at
  const char* waits_in;
  unsigned waits_mask;  // of the warp collective it waits in, else 0
  PendingCopies copies;
  int open_group;
  Fiber* next_waiting;  // at the same barrier
};

// The threads that can run, each at most once.
class ReadyQueue {
 public:
  void reserve(size_t capacity) {
    size_t size = 1;
    while (size < capacity) size *= 2;
    ring_.resize(size);
  }
  size_t size() const { return size_; }
  Fiber*& operator[](size_t i) { return ring_[(head_ + i) & (ring_.size() - 1)]; }
  void push_back(Fiber* fiber) { (*this)[size_++] = fiber; }
  void push_front(Fiber* fiber) {
    --head_;
    ++size_;
    (*this)[0] = fiber;
  }
  Fiber* pop_back() { return (*this)[--size_]; }
  Fiber* pop_front() {
    Fiber* fiber = (*this)[0];
    ++head_;
    --size_;
    return fiber;
  }

 private:
  std::vector<Fiber*> ring_;
  size_t head_ = 0, size_ = 0;
};

struct Barrier {
  int arrived = 0, wanted = 0, votes = 0;
  const char* site = nullptr;
  Fiber* waiting = nullptr;
  Fiber** end_of_waiting = &waiting;
  unsigned phase = 0;
  char sync[2];  // for ThreadSanitizer; two, as some threads reach the next phase before others have left this one

  Barrier() = default;
  Barrier(const Barrier&) = delete;
  void add(Fiber* fiber) {
    fiber->next_waiting = nullptr;
    *end_of_waiting = fiber;
    end_of_waiting = &fiber->next_waiting;
  }
  void next_phase() {
    arrived = votes = 0;
    waiting = nullptr;
    end_of_waiting = &waiting;
    ++phase;
  }
};

struct Collective {
  unsigned mask, arrived;
  Resolve resolve;
  const char* name;
  char* sync;
};

struct Warp {
  Lane lanes[32];
  Fiber* fibers[32];
  std::vector<Collective> open;
  unsigned present, live;  // lanes that exist, and of them those that have not exited
  uint64_t priority;
  char syncs[16];  // taken in turn, for the reason given at Barrier::sync
  unsigned next_sync = 0;

  Collective* find(unsigned mask) {
    for (Collective& collective : open)
      if (collective.mask == mask) return &collective;
    return nullptr;
  }
  Collective* open_collective(unsigned mask, Resolve resolve, const char* name) {
    open.push_back({mask, 0, resolve, name, &syncs[next_sync++ % sizeof syncs]});
    return &open.back();
  }
};

// A piece of shared memory, filled with 0xff: NaN in every float format.
struct SharedBuffer {
  char* at = nullptr;
  size_t bytes = 0, alignment = 0;
  void* allocation = nullptr;

  // The address is an odd multiple of the alignment, so that code which relies on more is found out.
  void allocate(size_t n, size_t align) {
    const size_t offset = align < 8 ? 8 + align : align;
    allocation = take(offset + n, 2 * offset < 64 ? 64 : 2 * align);
    at = static_cast<char*>(allocation) + offset;
    bytes = n;
    alignment = align;
    for (size_t i = 0; i < n; ++i) at[i] = static_cast<char>(0xff);  // no memset: sanitizers would see it
    if (__asan_poison_memory_region) __asan_poison_memory_region(allocation, offset & ~size_t(7));
  }
  void free_it() {
    if (!__tsan_create_fiber) free(allocation);
    *this = {};
  }
  // Before the threads start: makes sure that `blocks` blocks can have all the shared memory there is.
  static void prepare(size_t blocks) {
    constexpr size_t kArena = 1u << 30;
    if (!__tsan_create_fiber || left >= 2 * blocks * kMaxSharedBytes) return;
    void* map = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) abort();
    arena = static_cast<char*>(map);
    left = kArena;
  }

 private:
  // AddressSanitizer needs malloc's red zones; to ThreadSanitizer an address that is used again would be a race.
  static inline char* arena;
  static inline size_t left;
  static void* take(size_t n, size_t align) {
    if (!__tsan_create_fiber) {
      void* p = nullptr;
      if (posix_memalign(&p, align, n)) abort();
      return p;
    }
    constexpr size_t kStep = 1024;
    n = (n + kStep - 1) / kStep * kStep;
    if (n > left) abort();
    left -= n;
    return std::exchange(arena, arena + n);
  }
};

struct Block {
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::vector<SharedBuffer> shared;  // by slot; [0] is the dynamic one
  size_t dynamic_bytes, static_bytes = 0;
  int live;
  bool fenced = false, saw_atomic = false;
  char fence_sync;

  Block(unsigned n_threads, size_t n_slots, size_t dynamic, Random& randomness)
      : warps((n_threads + 31) / 32), shared(n_slots), dynamic_bytes(dynamic), live(static_cast<int>(n_threads)) {
    for (size_t i = 0; i < warps.size(); ++i) {
      const unsigned lanes = n_threads - static_cast<unsigned>(i) * 32;
      warps[i].open.reserve(32);
      warps[i].present = warps[i].live = lanes >= 32 ? kFullWarp : (1u << lanes) - 1;
      warps[i].priority = randomness.below(1 << 20);
    }
  }
  ~Block() {
    for (SharedBuffer& buffer : shared)
      if (buffer.allocation) buffer.free_it();
  }
  Block(const Block&) = delete;

  SharedBuffer& shared_buffer(int slot, size_t bytes, size_t alignment) {
    SharedBuffer& buffer = shared[static_cast<size_t>(slot)];
    if (!buffer.allocation) {
      buffer.allocate(bytes, alignment);
      if (slot) static_bytes += bytes;
    }
    return buffer;
  }
  SharedBuffer& dynamic_buffer(size_t alignment) { return shared_buffer(0, dynamic_bytes, alignment); }

  // The address in `peer` that `address` has in this block; null if it is not shared memory of this block.
  void* same_place_in(Block& peer, const char* address) {
    for (size_t slot = 0; slot < shared.size(); ++slot) {
      const SharedBuffer& own = shared[slot];
      if (own.allocation && address >= own.at && address < own.at + own.bytes)
        return peer.shared_buffer(static_cast<int>(slot), own.bytes, own.alignment).at + (address - own.at);
    }
    return nullptr;
  }
};

// Blocks that run at the same time. Made anew for every cluster: what ThreadSanitizer knows about the addresses in it
// goes when it is given back.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  int live;  // threads
  ReadyQueue ready;

  Block& operator[](size_t rank) { return *blocks[rank]; }
};

// Stacks for the threads of a launch, each with ThreadSanitizer's record of it. Threads of different blocks must be
// different fibers on different stacks, or it takes them for ordered; as making a fiber takes half a millisecond, a
// launch of many blocks then uses a few sets of them in turn.
class ContextPool {
 public:
  void start_launch(size_t threads, size_t clusters, bool overlaps_predecessor) {
    constexpr size_t kMost = 768, kFewestSets = 3;
    const size_t sets = __tsan_create_fiber ? std::min(clusters, std::max(kMost / threads, kFewestSets)) : 1;
    begin_ = overlaps_predecessor ? end_ : 0;
    end_ = begin_ + sets * threads;
    next_ = begin_;
    while (all_.size() < end_) {
      all_.push_back(std::make_unique<Context>());
      all_.back()->allocate_stack();
      if (__tsan_create_fiber) all_.back()->tsan = __tsan_create_fiber(0);
    }
  }
  Context* next() {
    if (next_ == end_) next_ = begin_;
    return all_[next_++].get();
  }
  void free_all() {
    for (auto& context : all_) context->free_stack();
    all_.clear();
    begin_ = end_ = next_ = 0;
  }

 private:
  std::vector<std::unique_ptr<Context>> all_;
  size_t begin_ = 0, end_ = 0, next_ = 0;
};

}  // namespace cuemu
