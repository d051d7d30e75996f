// The state of an exchange, which outlives it while its threads run.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "runtime/exchange.h"
#include "runtime/exchange_wire.h"
#include "runtime/home_process.h"
#include "runtime/links.h"
#include "runtime/pending_call.h"
#include "runtime/thread_pool.h"

namespace jax_ep {

struct Exchange::State : Interruptible, std::enable_shared_from_this<Exchange::State> {
  using CallPtr = std::shared_ptr<PendingCall>;
  // A rank of another process that has joined before any rank of this process, or while the
  // previous call of the same site still runs here.
  struct Early {
    WireMessage message;
    std::vector<std::byte> args;
  };

  State(RankMap rank_map_, std::chrono::milliseconds timeout_);

  // --- Calls, from the first rank that joins to the last that is done.

  // The key by which the processes of a call name it; none where nothing tells the call from
  // another one. Call with the lock held.
  std::optional<CallKey> KeyOf(const Arrival& arrival);
  // Finds the call that another process means by a key. Call with the lock held.
  template <typename Value>
  static auto Find(std::map<CallKey, Value>& calls, const CallKey& key) {
    const CallKey first{.site = key.site, .launch = key.launch, .slice = key.slice, .count = 0};
    auto it = calls.lower_bound(first);
    while (it != calls.end() && it->first.IsAlike(key) && !it->first.Matches(key)) ++it;
    return it != calls.end() && it->first.IsAlike(key) ? it : calls.end();
  }
  CallPtr Open(const CallKey& key, const Arrival& arrival, const Participant& participant);
  // Moves a call that all ranks have joined to the running ones. Call with the lock held.
  bool IsReady(const CallPtr& call);
  void StartPhase(const CallPtr& call);
  void EndPhase(const CallPtr& call);
  void Complete(PendingCall& call);
  void Poison(Participation participation);
  void PoisonAll(PendingCall& call);

  // --- Failures.

  // Ends every open call: its ranks get poisoned results. Without a record the exchange closes.
  void Abandon(const std::optional<ErrorRecord>& record, bool tells);
  // The failure of a call that waits for a process which has ended. Call with the lock held.
  std::optional<ErrorRecord> FindLost(const PendingCall& call) const;
  std::optional<ErrorRecord> FindExpired();
  // Says where a rank is that a call waits for in vain. Call with the lock held.
  std::string PlaceOf(const PendingCall& call, int rank) const;
  static void Watch(const std::shared_ptr<State>& state);

  // --- Interrupts by the user.

  void NoteWaits() override;
  void EndNotedWaits() override;
  bool IsWaiting() override;
  static bool IsIn(const std::map<CallKey, CallPtr>& calls, const CallPtr& call);

  // --- Messages from and to other processes (exchange_messages.cc).

  void Tell(const std::set<int>& processes, const std::vector<std::byte>& message);
  void Receive(int process, std::span<const std::byte> bytes);
  void ReceiveJoin(const WireMessage& message, std::span<const std::byte> args);
  void ReceiveRead(int process, const CallKey& key);
  void Lose(int process);

  const HomeProcess home;
  const RankMap rank_map;
  const std::chrono::milliseconds timeout;
  std::mutex mutex;
  std::condition_variable closed;
  std::map<CallKey, CallPtr> open;              // not all ranks have joined
  std::map<CallKey, CallPtr> running;           // all ranks have joined
  std::map<CallKey, std::vector<Early>> early;  // by the sender's key
  std::vector<LaunchCount> launches;            // by slice
  std::set<int> lost;                           // processes
  std::optional<ErrorRecord> error;
  int skip_rank = kNoIndex;
  bool is_closed = false;
  std::vector<std::weak_ptr<PendingCall>> noted;  // waited when the process was interrupted
  // Not 0 once operands may be gone. Other processes read it after their last look at operands of
  // this process.
  std::atomic<uint64_t> gave_up = 0;
  ThreadPool workers;
  ThreadPool completions;
  std::unique_ptr<Links> links;  // null: all ranks are here
};

}  // namespace jax_ep
