// Runs a list of launches under a sanitizer, in a process that knows nothing else. Reads the plan (isolated.py writes
// it), which names libraries, buffers and calls; works on its own copies of the buffers, and writes them back at the
// end. What goes wrong without a sanitizer's finding is written to the report.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iomanip>
#include <sstream>
#include <string>
#include <vector>

#include "cuemu/runtime.h"

extern "C" {
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
}

namespace {

constexpr int kLaunchFailed = 3, kBadPlan = 4;

const char* report;

[[noreturn]] void stop(int status, const std::string& message) {
  std::ofstream(report) << message;
  fflush(stdout);
  _Exit(status);
}

struct Buffer {
  char* at;
  size_t bytes;
};

// An allocation of its own for each buffer, at an odd multiple of 16: what a kernel may rely on, and not more.
Buffer allocate(size_t bytes) {
  constexpr size_t kOffset = 16;
  void* p = nullptr;
  if (posix_memalign(&p, 2 * kOffset, kOffset + bytes)) stop(kBadPlan, "out of memory");
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, kOffset);
  return {static_cast<char*>(p) + kOffset, bytes};
}

struct Call {
  std::string library, name;
  cuemu::LaunchConfig config;
  bool overlaps_predecessor;
  std::vector<uint64_t> values;
  std::vector<void*> arguments;  // one pointer into `values` each; kernels read them until all calls are joined
};

struct Plan {
  std::vector<Buffer> buffers;
  std::vector<Call> calls;
};

Plan read_plan(const char* path) {
  Plan plan;
  std::ifstream file(path);
  std::string line, word;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    words >> word;
    if (word == "buffer") {
      size_t bytes;
      words >> bytes;
      plan.buffers.push_back(allocate(bytes));
    } else if (word == "call") {
      Call call{};
      std::string config;
      words >> std::quoted(call.library) >> call.name >> config >> call.overlaps_predecessor;
      if (config.size() != 2 * sizeof call.config) stop(kBadPlan, "bad plan: " + line);
      for (size_t i = 0; i < sizeof call.config; ++i)
        reinterpret_cast<unsigned char*>(&call.config)[i] =
            static_cast<unsigned char>(std::stoi(config.substr(2 * i, 2), nullptr, 16));
      uint64_t index, offset;
      while (words >> word >> index >> offset)  // "value bits 0" or "buffer index offset"
        call.values.push_back(word == "value" ? index : reinterpret_cast<uint64_t>(plan.buffers.at(index).at) + offset);
      plan.calls.push_back(call);
    } else {
      stop(kBadPlan, "bad plan: " + line);
    }
  }
  return plan;
}

template <class Transfer>
void transfer(const char* path, const char* mode, const Plan& plan, Transfer transfer) {
  FILE* file = fopen(path, mode);
  if (!file) stop(kBadPlan, std::string("cannot open ") + path);
  for (const Buffer& buffer : plan.buffers)
    if (transfer(buffer.at, 1, buffer.bytes, file) != buffer.bytes) stop(kBadPlan, std::string("short file ") + path);
  fclose(file);
}

template <class F>
F symbol(void* library, const std::string& name) {
  void* found = dlsym(library, name.c_str());
  if (!found) stop(kBadPlan, dlerror());
  return reinterpret_cast<F>(found);
}

void run(Call& call) {
  void* library = dlopen(call.library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) stop(kBadPlan, dlerror());
  using Entry = int (*)(const cuemu::LaunchConfig*, void**);
  for (uint64_t& value : call.values) call.arguments.push_back(&value);
  if (symbol<Entry>(library, call.name + "__cuemu")(&call.config, call.arguments.data()))
    stop(kLaunchFailed, call.library + "\n" + call.name + ": " + symbol<const char* (*)()>(library, "cuemu_error")());
}

}  // namespace

// runner PLAN DATA REPORT: DATA holds the buffers one after another.
int main(int argc, char** argv) {
  if (argc != 4) return kBadPlan;
  report = argv[3];
  Plan plan = read_plan(argv[1]);
  transfer(argv[2], "rb", plan, [](char* p, size_t size, size_t n, FILE* f) { return fread(p, size, n, f); });
  std::vector<char> done(plan.calls.size());
  size_t joined = 0;  // the calls before this one are over, as far as this thread knows
  for (size_t i = 0; i < plan.calls.size(); ++i) {
    Call& call = plan.calls[i];
    if (call.overlaps_predecessor && i)
      call.config.predecessor_done = &done[i - 1];
    else
      for (; joined < i; ++joined)
        if (__tsan_acquire) __tsan_acquire(&done[joined]);
    call.config.done = &done[i];
    run(call);
  }
  for (; joined < done.size(); ++joined)
    if (__tsan_acquire) __tsan_acquire(&done[joined]);
  transfer(argv[2], "wb", plan, [](char* p, size_t size, size_t n, FILE* f) { return fwrite(p, size, n, f); });
  return 0;
}
