#include "runtime/interrupt.h"

#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace jax_ep {
namespace {

// State of the handler, which may only touch lock-free atomics and post a semaphore.
std::atomic<uint64_t> num_signals = 0;
static_assert(std::atomic<uint64_t>::is_always_lock_free);
sem_t has_come;
// Written once, before the handler is in place.
struct sigaction before = {};

void OnSignal(int number, siginfo_t* info, void* context) {
  const int error = errno;
  num_signals.fetch_add(1, std::memory_order_relaxed);
  sem_post(&has_come);
  errno = error;
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(number, info, context);
  } else {
    before.sa_handler(number);
  }
}

bool IsHandler(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) != 0 ||
         (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN);
}

bool AreEqual(const struct sigaction& a, const struct sigaction& b) {
  if ((a.sa_flags & SA_SIGINFO) != (b.sa_flags & SA_SIGINFO)) return false;
  return a.sa_flags & SA_SIGINFO ? a.sa_sigaction == b.sa_sigaction : a.sa_handler == b.sa_handler;
}

// One registered object, of the process that registered it. A forked child has no watching thread,
// and must not end its parent's calls.
struct Entry {
  pid_t process;
  std::weak_ptr<Interruptible> one;

  bool IsGone() const { return process != getpid() || one.expired(); }
};

struct State {
  std::mutex mutex;
  std::vector<Entry> entries;
  bool has_handler = false;
  pid_t watched = 0;  // process that the thread belongs to
  std::atomic<bool> leaves = false;
};

State& GetState() {
  static State* state = [] {
    sem_init(&has_come, /*pshared=*/0, 0);
    return new State;
  }();
  return *state;
}

std::vector<std::shared_ptr<Interruptible>> Living(State& state) {
  std::lock_guard<std::mutex> lock(state.mutex);
  std::vector<std::shared_ptr<Interruptible>> living;
  for (const Entry& entry : state.entries) {
    if (entry.IsGone()) continue;
    if (auto one = entry.one.lock()) living.push_back(std::move(one));
  }
  return living;
}

template <typename Step>
void ForEach(const std::vector<std::shared_ptr<Interruptible>>& living, Step&& step) {
  for (const auto& one : living) {
    try {
      step(*one);
    } catch (const std::exception&) {
      // A device that has failed ends its waits by itself.
    }
  }
}

void Serve(State& state) {
  for (;;) {
    if (!state.leaves) {
      while (sem_wait(&has_come) != 0) {
      }
    }
    // All signals that have come by now count as one; a later signal counts anew.
    while (sem_trywait(&has_come) == 0) {
    }
    const auto living = Living(state);
    ForEach(living, [](Interruptible& one) { one.NoteWaits(); });
    std::this_thread::sleep_for(Interrupts::kGrace);
    ForEach(living, [](Interruptible& one) { one.EndNotedWaits(); });
  }
}

// Call with the lock held. The thread blocks all signals: they are for the program's own threads.
void StartThread(State& state) {
  if (state.watched == getpid()) return;
  state.watched = getpid();
  sigset_t every, own;
  sigfillset(&every);
  pthread_sigmask(SIG_SETMASK, &every, &own);
  std::thread([&state] { Serve(state); }).detach();
  pthread_sigmask(SIG_SETMASK, &own, nullptr);
}

}  // namespace

Interrupts& Interrupts::Get() {
  static Interrupts* interrupts = new Interrupts;
  return *interrupts;
}

void Interrupts::Watch() {
  State& state = GetState();
  std::lock_guard<std::mutex> lock(state.mutex);
  struct sigaction present;
  if (sigaction(SIGINT, nullptr, &present) != 0 || !IsHandler(present)) return;
  // A third handler may call this one: to call it back would never end.
  if (state.has_handler && !AreEqual(present, before)) return;
  if (!state.has_handler) before = present;
  state.has_handler = true;
  StartThread(state);
  struct sigaction own = present;  // with its mask and its flags
  own.sa_flags |= SA_SIGINFO;
  own.sa_sigaction = OnSignal;
  sigaction(SIGINT, &own, nullptr);
}

uint64_t Interrupts::count() const { return num_signals.load(std::memory_order_relaxed); }

void Interrupts::Leave() {
  State& state = GetState();
  std::lock_guard<std::mutex> lock(state.mutex);
  state.leaves = true;
  StartThread(state);
  sem_post(&has_come);
}

bool Interrupts::AnyWaits() const {
  bool any = false;
  ForEach(Living(GetState()), [&](Interruptible& one) { any = any || one.IsWaiting(); });
  return any;
}

void Interrupts::Add(std::weak_ptr<Interruptible> interruptible) {
  State& state = GetState();
  std::lock_guard<std::mutex> lock(state.mutex);
  std::erase_if(state.entries, [](const Entry& entry) { return entry.IsGone(); });
  state.entries.push_back({getpid(), std::move(interruptible)});
}

}  // namespace jax_ep
