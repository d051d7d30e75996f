// runtime/interrupt.h: what an interrupt ends, and what it leaves alone.
#include "runtime/interrupt.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <thread>

#include "runtime/exchange.h"
#include "tests/test.h"

namespace jax_ep {
namespace {

constexpr auto kLong = std::chrono::minutes(2);
constexpr uint64_t kSite = 3;

struct NoArgs {};

struct EmptyCall : CallOf<NoArgs> {
  using CallOf::CallOf;
  int num_phases() const override { return 1; }
  void Run(int, int) override {}
  static void Poison(const NoArgs&) {}
};

void Join(Exchange& exchange, int rank, Countdown& done, uint64_t site = kSite) {
  exchange.Join<EmptyCall>({"test_op", SiteOf(site), site, 7, {0, rank}}, {},
                           [&done] { done.Down(); });
}

// Counts what it is told, and throws: the thread goes on.
struct Probe : Interruptible {
  Countdown notes{1}, ends{1};
  std::atomic<int> num_notes = 0, num_ends = 0;

  void NoteWaits() override {
    ++num_notes;
    notes.Down();
    throw std::runtime_error("of a device");
  }
  void EndNotedWaits() override {
    CHECK(num_notes > num_ends, num_notes.load(), num_ends.load());
    ++num_ends;
    ends.Down();
    throw std::runtime_error("of a device");
  }
  bool IsWaiting() override { return true; }
};

std::atomic<int> num_handled = 0;
void Count(int) { ++num_handled; }

struct sigaction Present() {
  struct sigaction present;
  CHECK(sigaction(SIGINT, nullptr, &present) == 0, 0);
  return present;
}

void Set(void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;
  CHECK(sigaction(SIGINT, &action, nullptr) == 0, 0);
}

// The process has one handler, so this is one test. It comes last: at its end the process leaves.
void TestHandlers() {
  Interrupts& interrupts = Interrupts::Get();
  for (auto* handler : {SIG_DFL, SIG_IGN}) {
    Set(handler);
    interrupts.Watch();
    CHECK(Present().sa_handler == handler, handler == SIG_IGN);
  }
  Set(Count);
  interrupts.Watch();
  const auto own = Present().sa_sigaction;
  auto probe = std::make_shared<Probe>();
  interrupts.Add(probe);
  CHECK(interrupts.AnyWaits(), 0);
  raise(SIGINT);
  probe->ends.Wait();
  CHECK(num_handled == 1 && interrupts.count() == 1, num_handled.load(), interrupts.count());

  interrupts.Watch();  // in place already
  CHECK(Present().sa_sigaction == own, 0);
  raise(SIGINT);
  CHECK(num_handled == 2 && interrupts.count() == 2, num_handled.load(), interrupts.count());

  Set(Count);  // as signal.signal of Python does
  raise(SIGINT);
  CHECK(num_handled == 3 && interrupts.count() == 2, num_handled.load(), interrupts.count());
  interrupts.Watch();
  raise(SIGINT);
  CHECK(num_handled == 4 && interrupts.count() == 3, num_handled.load(), interrupts.count());

  static struct sigaction behind;
  behind = Present();
  const auto in_front = [](int number) { behind.sa_sigaction(number, nullptr, nullptr); };
  Set(in_front);
  interrupts.Watch();  // which would call itself for ever
  CHECK(Present().sa_handler == +in_front, 0);
  raise(SIGINT);
  CHECK(num_handled == 5 && interrupts.count() == 4, num_handled.load(), interrupts.count());

  const std::weak_ptr<Probe> weak = probe;
  probe.reset();
  while (!weak.expired()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  CHECK(!interrupts.AnyWaits(), 0);

  // The process ends: without a signal, also what has yet to begin.
  interrupts.Leave();
  Exchange exchange({.num_slices = 1, .num_ranks = 2}, kLong);
  Countdown done(1);
  Join(exchange, 1, done);
  done.Wait();
  CHECK(exchange.error()->kind == FailureKind::kInterrupted, 0);
}

void TestAChildDoesNotEndItsParentsCalls() {
  auto probe = std::make_shared<Probe>();
  Interrupts::Get().Add(probe);
  CHECK(Interrupts::Get().AnyWaits(), 0);
  const pid_t child = fork();
  if (child == 0) _exit(Interrupts::Get().AnyWaits() ? 1 : 0);
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child, child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, status);
}

void TestAnInterruptEndsWhatWaitsAllTheTime() {
  Exchange exchange({.num_slices = 1, .num_ranks = 3}, kLong);
  const auto interruptible = exchange.interruptible();
  Countdown first(2);
  Join(exchange, 0, first);
  Join(exchange, 2, first);
  CHECK(interruptible->IsWaiting(), 0);
  interruptible->NoteWaits();
  interruptible->EndNotedWaits();
  first.Wait();
  const auto record = exchange.error();
  CHECK(record && record->kind == FailureKind::kInterrupted, record.has_value());
  CHECK(record->op == "test_op" && record->rank == 0 && record->peer == 1, record->rank,
        record->peer);
  CHECK(record->expected == 3 && record->seen == 2, record->expected, record->seen);
  CHECK(!interruptible->IsWaiting(), 0);
}

void TestAnInterruptLeavesTheRestAlone() {
  Exchange exchange({.num_slices = 1, .num_ranks = 2}, kLong);
  const auto interruptible = exchange.interruptible();
  interruptible->NoteWaits();
  interruptible->EndNotedWaits();

  Countdown all(4);
  Join(exchange, 0, all);  // goes on by itself
  interruptible->NoteWaits();
  Join(exchange, 1, all);
  Join(exchange, 0, all, kSite + 1);  // did not wait yet
  interruptible->EndNotedWaits();
  interruptible->EndNotedWaits();
  Join(exchange, 1, all, kSite + 1);
  all.Wait();
  CHECK(!exchange.error(), 0);

  // The same call site in its next launch is another call.
  Countdown again(2);
  Join(exchange, 0, again);
  interruptible->EndNotedWaits();
  Join(exchange, 1, again);
  again.Wait();
  CHECK(!exchange.error(), 0);
}

}  // namespace

Tests InterruptTests() {
  return {
      {"interrupt_forked_child", TestAChildDoesNotEndItsParentsCalls},
      {"interrupt_ends_waits", TestAnInterruptEndsWhatWaitsAllTheTime},
      {"interrupt_leaves_the_rest", TestAnInterruptLeavesTheRestAlone},
      {"interrupt_handlers", TestHandlers},
  };
}

}  // namespace jax_ep
