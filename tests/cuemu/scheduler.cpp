// Runs the clusters of a launch one after another, and the threads of a cluster as fibers: a thread runs until it meets
// a barrier or a warp collective. Compiled without sanitizers; it tells them which of these order memory.
#include "scheduler.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

#include "guard.h"
#include "trace.h"

namespace cuemu {

Thread* cuemu_thread;

namespace {

LaunchConfig config;
void (*kernel)(void*);
void* kernel_arguments;
Context launcher;
std::vector<std::unique_ptr<Fiber>> fibers;
std::unique_ptr<Cluster> cluster;  // that runs
Fiber* running;
Random randomness;
ContextPool contexts;
void* tsan_courier;  // carries what blocks have published, and knows nothing else
char start_sync, published_sync, failed_sync;
volatile sig_atomic_t in_scheduler = 1, time_is_up;
std::string error;
int n_slots = 1;  // slot 0 is dynamic shared memory

// ---------------------------------------------------------------- switching between threads
Fiber* pick() {
  ReadyQueue& ready = cluster->ready;
  if (!ready.size()) return nullptr;
  if (config.order == kLifo) return ready.pop_back();
  size_t chosen = 0;
  if (config.order == kRandom) chosen = randomness.below(ready.size());
  if (config.order == kWarps)
    for (size_t i = 1; i < ready.size(); ++i)
      if (ready[i]->warp->priority > ready[chosen]->warp->priority) chosen = i;
  std::swap(ready[0], ready[chosen]);
  return ready.pop_front();
}

void switch_to(Fiber* next, bool ends) {  // null: back to the launcher
  Context& from = running ? *running->context : launcher;
  running = next;
  cuemu_thread = next ? &next->thread : nullptr;
  switch_context(from, next ? *next->context : launcher, ends);
}

void wait() {
  Fiber* next = pick();
  if (next != running) switch_to(next, false);
}

// Every function that a kernel calls holds one: a signal may stop a launch only while none is held.
struct InScheduler {
  InScheduler() { in_scheduler = 1; }
  ~InScheduler() {
    if (time_is_up) cuemu_fail(kTimeIsUp);
    in_scheduler = 0;
  }
};

[[noreturn]] void give_up(const char* what, Place where) {
  in_scheduler = 1;
  const Thread& t = running->thread;
  error = std::string(what) + " in block " + to_text(t.block_index) + ", thread " + to_text(t.thread_index) + " " +
          trace(where, *running->context);
  release(&failed_sync);
  switch_to(nullptr, true);
  abort();
}

[[noreturn]] __attribute__((always_inline)) inline void fail(const std::string& what) { cuemu_fail(what.c_str()); }

constexpr char kTwoCounts[] = "a named barrier is used with two thread counts";
constexpr char kWholeWarps[] = "a named barrier counts whole warps";

void on_signal(const char* what, Place where) {
  if (!running || in_scheduler)
    time_is_up = what == kTimeIsUp;
  else
    give_up(what, where);
}

// ---------------------------------------------------------------- barriers
void complete(Barrier& barrier, Block* block) {
  for (Fiber* fiber = barrier.waiting; fiber; fiber = fiber->next_waiting) {
    fiber->votes = barrier.votes;
    cluster->ready.push_back(fiber);
  }
  barrier.next_phase();
  if (block)
    for (Warp& warp : block->warps) warp.priority = randomness.below(1 << 20);
}

void wait_at(Barrier& barrier, Block* block, const char* name) {
  Fiber* me = running;
  char* sync = &barrier.sync[barrier.phase % 2];
  me->waits_in = name;
  me->waits_mask = 0;
  release(sync);
  barrier.add(me);
  if (++barrier.arrived == barrier.wanted) complete(barrier, block);
  wait();
  acquire(sync);
}

void thread_exits(Fiber* fiber) {
  Block& block = *fiber->block;
  fiber->live = false;
  fiber->warp->live &= ~(1u << fiber->thread.lane);
  --block.live;
  --cluster->live;
  // An exited thread no longer counts: the others may now be complete.
  if (block.barriers[0].arrived && block.barriers[0].arrived == block.live) complete(block.barriers[0], &block);
  if (cluster->barrier.arrived && cluster->barrier.arrived == cluster->live) complete(cluster->barrier, nullptr);
}

void fiber_main() {
  finish_first_switch(launcher);
  Fiber* me = running;
  acquire(&start_sync);
  in_scheduler = 0;
  kernel(kernel_arguments);
  in_scheduler = 1;
  release(config.done);
  thread_exits(me);
  switch_to(pick(), true);
  abort();
}

// ---------------------------------------------------------------- a cluster of blocks
uint3 position(unsigned i, const unsigned (&size)[3]) {
  return uint3{i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
}

unsigned volume(const unsigned (&size)[3]) { return size[0] * size[1] * size[2]; }

void start_block(unsigned rank, uint3 first) {
  const unsigned n = volume(config.block);
  const uint3 in_cluster = position(rank, config.cluster);
  cluster->blocks.push_back(std::make_unique<Block>(n, static_cast<size_t>(n_slots), config.shared_bytes, randomness));
  Block& block = *cluster->blocks.back();
  for (unsigned i = 0; i < n; ++i) {
    Fiber& fiber = *fibers[rank * n + i];
    fiber.thread.thread_index = position(i, config.block);
    fiber.thread.block_index = uint3{first.x + in_cluster.x, first.y + in_cluster.y, first.z + in_cluster.z};
    fiber.thread.block_dim = dim3(config.block[0], config.block[1], config.block[2]);
    fiber.thread.grid_dim = dim3(config.grid[0], config.grid[1], config.grid[2]);
    fiber.thread.lane = static_cast<int>(i % 32);
    fiber.thread.cluster_rank = rank;
    fiber.thread.cluster_size = volume(config.cluster);
    fiber.block = &block;
    fiber.warp = &block.warps[i / 32];
    fiber.warp->fibers[i % 32] = &fiber;
    fiber.live = true;
    fiber.copies.reset();
    fiber.open_group = 0;
    fiber.context = contexts.next();
    fiber.context->start(&fiber_main);
    cluster->ready.push_back(&fiber);
  }
}

std::string describe_deadlock() {
  std::vector<std::pair<std::string, std::vector<Fiber*>>> groups;  // by what they wait for, and where
  const size_t n = cluster->blocks.size() * volume(config.block);
  for (size_t i = 0; i < n; ++i) {
    Fiber* fiber = fibers[i].get();
    if (!fiber->live) continue;
    std::string what = fiber->waits_in;
    if (fiber->waits_mask) what += ", mask " + to_hex(fiber->waits_mask);
    if (fiber->waits_mask & ~fiber->warp->live)
      what += ", of which " + to_hex(fiber->waits_mask & ~fiber->warp->live) + " have exited,";
    what += " " + trace(fiber->context->place(), *fiber->context);
    auto group = std::find_if(groups.begin(), groups.end(), [&](auto& g) { return g.first == what; });
    if (group == groups.end()) group = groups.insert(group, {what, {}});
    group->second.push_back(fiber);
  }
  std::string text = "deadlock: " + std::to_string(cluster->live) + " of " + std::to_string(n) + " threads wait: ";
  for (size_t i = 0; i < std::min<size_t>(groups.size(), 6); ++i) {
    const std::vector<Fiber*>& who = groups[i].second;
    const Thread& first = who[0]->thread;
    text += (i ? "; block " : "block ") + to_text(first.block_index) + " thread " + to_text(first.thread_index);
    if (who.size() > 1) text += " and " + std::to_string(who.size() - 1) + " more";
    text += " in " + groups[i].first;
  }
  return text;
}

void run_cluster(unsigned index) {
  const unsigned clusters[3] = {config.grid[0] / config.cluster[0], config.grid[1] / config.cluster[1],
                                config.grid[2] / config.cluster[2]};
  const uint3 at = position(index, clusters);
  const uint3 first{at.x * config.cluster[0], at.y * config.cluster[1], at.z * config.cluster[2]};
  const unsigned n_blocks = volume(config.cluster);
  SharedBuffer::prepare(n_blocks);
  cluster = std::make_unique<Cluster>();
  cluster->live = static_cast<int>(n_blocks * volume(config.block));
  cluster->ready.reserve(n_blocks * volume(config.block));
  for (unsigned rank = 0; rank < n_blocks; ++rank) start_block(rank, first);
  release(&start_sync);
  switch_to(pick(), false);
  acquire(&failed_sync);
  if (cluster->live && error.empty()) error = describe_deadlock();
  cluster.reset();
}

std::string too_much_shared(size_t static_bytes) {
  return std::to_string(config.shared_bytes) + " bytes of dynamic and " + std::to_string(static_bytes) +
         " of static shared memory are more than the " + std::to_string(config.shared_limit) +
         " that every architecture of the kernel has";
}

bool check_config() {
  const unsigned threads = volume(config.block);
  if (threads < 1 || threads > kMaxThreads) error = "a block of " + std::to_string(threads) + " threads";
  if (config.shared_bytes > config.shared_limit) error = too_much_shared(0);
  for (int i = 0; i < 3; ++i)
    if (!config.cluster[i] || config.grid[i] % config.cluster[i]) error = "the grid is not a multiple of the cluster";
  return error.empty();
}

}  // namespace

// ---------------------------------------------------------------- what kernels call
void cuemu_fail(const char* what) {
  give_up(what, {reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - 1,
                 *static_cast<uintptr_t*>(__builtin_frame_address(0))});
}

int cuemu_barrier(int id, int count, int vote, const char* site) {
  InScheduler guard;
  Fiber* me = running;
  Barrier& barrier = me->block->barriers[id];
  const int wanted = count ? count : me->block->live;
  if (wanted % 32 && count) cuemu_fail(kWholeWarps);
  if (barrier.arrived && id == 0 && strcmp(barrier.site, site))
    fail("the threads of a block meet at different __syncthreads, one at " + std::string(barrier.site));
  if (barrier.arrived && id != 0 && barrier.wanted != wanted) cuemu_fail(kTwoCounts);
  barrier.site = site;
  barrier.wanted = wanted;
  barrier.votes += vote;
  wait_at(barrier, me->block, id ? "a named barrier" : "__syncthreads");
  return me->votes;
}

void cuemu_barrier_arrive(int id, int count) {
  InScheduler guard;
  Barrier& barrier = running->block->barriers[id];
  if (count % 32) cuemu_fail(kWholeWarps);
  if (barrier.arrived && barrier.wanted != count) cuemu_fail(kTwoCounts);
  barrier.wanted = count;
  release(&barrier.sync[barrier.phase % 2]);
  if (++barrier.arrived == barrier.wanted) complete(barrier, running->block);
}

void cuemu_cluster_barrier() {
  InScheduler guard;
  cluster->barrier.wanted = cluster->live;
  wait_at(cluster->barrier, nullptr, "the cluster's barrier");
}

void cuemu_collective(unsigned mask, void* in, void* out, Resolve resolve, const char* name, int orders_memory) {
  InScheduler guard;
  Fiber* me = running;
  Warp& warp = *me->warp;
  const unsigned bit = 1u << me->thread.lane;
  mask &= warp.present;  // a block's last warp may have fewer than 32 threads
  if (!(mask & bit)) fail(std::string(name) + ": the calling lane is not in the mask");
  if (mask & ~warp.live) fail(std::string(name) + ": the mask names a lane that has exited");
  Collective* collective = warp.find(mask);
  if (!collective) collective = warp.open_collective(mask, resolve, name);
  if (collective->resolve != resolve)
    fail(std::string("lanes of one warp meet in different collectives, ") + name + " and " + collective->name);
  me->waits_in = name;
  me->waits_mask = mask;
  warp.lanes[me->thread.lane] = {in, out};
  char* sync = orders_memory ? collective->sync : nullptr;
  release(sync);
  collective->arrived |= bit;
  if (collective->arrived == mask) {
    warp.open.erase(warp.open.begin() + (collective - warp.open.data()));
    if (resolve) resolve(warp.lanes, mask);
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) cluster->ready.push_back(warp.fibers[i]);
  }
  wait();
  acquire(sync);
}

void* cuemu_shared(int slot, size_t bytes, size_t alignment) {
  InScheduler guard;
  Block& block = *running->block;
  char* at = block.shared_buffer(slot, bytes, alignment).at;
  if (block.static_bytes + config.shared_bytes > config.shared_limit) fail(too_much_shared(block.static_bytes));
  return at;
}

void* cuemu_dynamic_shared(size_t alignment) {
  InScheduler guard;
  return running->block->dynamic_buffer(alignment).at;
}

void* cuemu_cluster_map(const void* shared, unsigned rank) {
  InScheduler guard;
  if (rank >= cluster->blocks.size()) cuemu_fail("no block of this rank in the cluster");
  void* mapped = running->block->same_place_in((*cluster)[rank], static_cast<const char*>(shared));
  if (!mapped) cuemu_fail("not an address of this block's shared memory");
  return mapped;
}

void cuemu_require_shared(const void* p, const char* what) {
  InScheduler guard;
  const char* address = static_cast<const char*>(p);
  for (auto& block : cluster->blocks)  // a block of a cluster may use its peers' shared memory
    if (block->same_place_in(*block, address)) return;
  cuemu_fail(what);
}

int cuemu_new_slot() { return n_slots++; }

// A fence makes what the block's threads wrote visible to others at the block's next atomic, and what others had
// published visible to the block if an atomic came before it.
void cuemu_fence() {
  InScheduler guard;
  Block& block = *running->block;
  release(&block.fence_sync);
  block.fenced = true;
  if (block.saw_atomic) acquire(&published_sync);
}

void cuemu_atomic() {
  InScheduler guard;
  Block& block = *running->block;
  block.saw_atomic = true;
  if (!block.fenced || !__tsan_switch_to_fiber) return;
  if (!tsan_courier) tsan_courier = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(tsan_courier, kOrdersNothing);
  acquire(&block.fence_sync);
  release(&published_sync);
  __tsan_switch_to_fiber(running->context->tsan, kOrdersNothing);
}

void cuemu_yield() {
  InScheduler guard;
  config.order == kLifo ? cluster->ready.push_front(running) : cluster->ready.push_back(running);
  wait();
}

int64_t cuemu_clock() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

void cuemu_async_issue(const AsyncCopy* copy) {
  InScheduler guard;
  if (running->copies.full()) cuemu_fail("a thread has 512 cp.async that it has not waited for");
  running->copies.push(running->open_group, *copy);
}

void cuemu_async_commit() { ++running->open_group; }

int cuemu_async_take(int pending_groups, AsyncCopy* copy) {
  InScheduler guard;
  Fiber& me = *running;
  // The group that is still open has not been committed: a wait does not cover it.
  if (me.copies.empty() || me.copies.oldest().first >= me.open_group - pending_groups) return 0;
  *copy = me.copies.oldest().second;
  me.copies.pop();
  return 1;
}

void cuemu_wait_predecessor() { acquire(config.predecessor_done); }

int cuemu_launch(void (*entry)(void*), void* arguments, const LaunchConfig* launch) {
  error.clear();
  config = *launch;
  kernel = entry;
  kernel_arguments = arguments;
  time_is_up = 0;
  if (!check_config()) return 1;
  randomness.seed(config.seed);
  const unsigned n_blocks = volume(config.cluster), n_threads = volume(config.block) * n_blocks;
  while (fibers.size() < n_threads) fibers.push_back(std::make_unique<Fiber>());
  std::vector<unsigned> order(volume(config.grid) / n_blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (config.order == kLifo) std::reverse(order.begin(), order.end());
  if (config.order == kRandom || config.order == kWarps)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[randomness.below(i)]);
  if (__tsan_get_current_fiber) launcher.tsan = __tsan_get_current_fiber();
  contexts.start_launch(n_threads, order.size(), config.predecessor_done != nullptr);
  Guard guard(config.time_limit_s, &on_signal);
  for (unsigned index : order) {
    run_cluster(index);
    if (!error.empty()) break;
  }
  return !error.empty();
}

const char* cuemu_error() { return error.c_str(); }

void cuemu_free() {
  contexts.free_all();
  fibers.clear();
}

}  // namespace cuemu
