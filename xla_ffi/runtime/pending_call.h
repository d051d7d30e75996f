// A call of an exchange from its first rank's arrival until its end: who has joined, whom it waits
// for, and what to say of it when it fails.
#pragma once

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/types.h"
#include "runtime/error_record.h"
#include "runtime/exchange_wire.h"
#include "runtime/phased_call.h"
#include "runtime/rank_map.h"

namespace jax_ep {

/// Of a rank that has come to a call where it is already.
ErrorRecord TwiceRecord(const std::string& op, int rank);

/// A rank of this process in a call.
struct Participation {
  std::function<void()> poison;
  std::function<void()> done;  // empty: not here, or not yet
  // XLA goes on with the device's program inside `done`. Its threads flush subnormals, so a
  // thread of ours would give the same program other bits.
  std::fenv_t environment;

  void Finish() const;
};

/// The exchange's lock guards what changes, but for the phase, which one thread at a time moves on.
struct PendingCall {
  /// By a rank of this process, which is still to be added.
  PendingCall(const CallKey& key, const std::string& op, int rank, std::shared_ptr<PhasedCall> body,
              const RankMap& rank_map);

  /// One more rank; what is wrong with it, if anything.
  std::optional<ErrorRecord> Add(int rank, std::string_view of_op, std::span<const std::byte> args);
  bool HasAll() const { return num_joined == body->num_ranks(); }
  /// Whether it waits for others, not for its own shares.
  bool Waits() const { return has_ended || !HasAll(); }

  /// What to say when the deadline has passed while it waits.
  ErrorRecord ExpiredRecord(const RankMap& rank_map) const;
  /// The call in a few words, for a rank that waits elsewhere.
  std::string Describe() const;
  /// When the user has interrupted the process while it waits.
  ErrorRecord InterruptedRecord(const RankMap& rank_map) const;
  /// Of a process that the call needs, and that is gone.
  ErrorRecord LostRecord(const RankMap& rank_map, int process) const;
  /// Processes whose operands may have been overwritten before this one had read them.
  std::set<int> ProcessesThatGaveUp(const RankMap& rank_map) const;

  CallKey key;
  std::shared_ptr<PhasedCall> body;
  std::string op;
  std::chrono::steady_clock::time_point deadline;
  std::vector<bool> has_joined;  // by rank
  int num_joined = 0;
  int first_rank;                           // of this process
  std::vector<Participation> participants;  // by rank
  int phase = 0;
  std::atomic<int> num_running = 0;
  bool has_ended = false;           // the shares of this process have
  std::set<int> are_reading;        // other processes that still need the operands of this one
  std::map<int, uint64_t> gave_up;  // by process, where it says so (WireMessage)

 private:
  ErrorRecord ProcessRecord(FailureKind kind, const RankMap& rank_map, int process) const;
};

}  // namespace jax_ep
