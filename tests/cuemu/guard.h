// Turns a kernel's memory fault or endless loop into an error of the launch. Not under sanitizers, which report faults
// themselves and run in a process of their own.
#pragma once

#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>

#include "fiber.h"

namespace cuemu {

constexpr char kTimeIsUp[] = "time limit reached: an endless loop, or a wait for a thread that cannot run meanwhile";

// While one lives, a fault or the end of the time calls `on_signal(what, where)` on the signal's stack.
class Guard {
 public:
  using OnSignal = void (*)(const char* what, Place where);

  Guard(double time_limit_s, OnSignal on_signal) {
    if (__sanitizer_start_switch_fiber || __tsan_create_fiber) return;
    active_ = true;
    callback = on_signal;
    stack_t stack{};
    stack.ss_sp = alternate;
    stack.ss_size = sizeof alternate;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = &handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
    for (int i = 0; i < kSignals; ++i) sigaction(signals(i), &action, &old_actions_[i]);
    sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = signals(0);
    event._sigev_un._tid = static_cast<int>(syscall(SYS_gettid));
    armed_ = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) == 0;
    itimerspec limit{};
    limit.it_value.tv_sec = static_cast<time_t>(time_limit_s);
    limit.it_value.tv_nsec = static_cast<long>((time_limit_s - static_cast<double>(limit.it_value.tv_sec)) * 1e9);
    if (armed_) timer_settime(timer_, 0, &limit, nullptr);
  }

  ~Guard() {
    if (!active_) return;
    if (armed_) timer_delete(timer_);
    for (int i = 0; i < kSignals; ++i) sigaction(signals(i), &old_actions_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

  Guard(const Guard&) = delete;

 private:
  static constexpr int kSignals = 4;
  static int signals(int i) {
    const int all[kSignals] = {SIGRTMIN + 5, SIGSEGV, SIGBUS, SIGFPE};
    return all[i];
  }

  static void handle(int number, siginfo_t* info, void* context) {
    char what[200];
    if (number == SIGFPE)
      snprintf(what, sizeof what, "integer division by zero");
    else if (number == SIGSEGV && info->si_code == SI_KERNEL)
      snprintf(what, sizeof what, "misaligned vector access, or an address that no memory can have");
    else
      snprintf(what, sizeof what, "memory fault at %p: a bad pointer, or the stack overflowed", info->si_addr);
    const mcontext_t& m = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    const Place where{static_cast<uintptr_t>(m.gregs[REG_RIP]), static_cast<uintptr_t>(m.gregs[REG_RBP])};
#else
    const Place where{m.pc, m.regs[29]};
#endif
    callback(number == signals(0) ? kTimeIsUp : what, where);
    if (number == signals(0)) return;
    signal(number, SIG_DFL);  // a fault outside the kernel: it happens again and ends the process
  }

  static inline OnSignal callback = nullptr;
  static inline char alternate[64 << 10];

  bool active_ = false, armed_ = false;
  timer_t timer_{};
  stack_t old_stack_{};
  struct sigaction old_actions_[kSignals];
};

}  // namespace cuemu
