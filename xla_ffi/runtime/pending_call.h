// A call of an exchange, from its first rank's arrival until its end: which ranks have joined,
// which ones it waits for, and the record of its failure.
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
#include "runtime/mesh_position.h"
#include "runtime/phased_call.h"
#include "runtime/rank_map.h"

namespace jax_ep {

/// The failure of a rank that joins a call twice.
ErrorRecord TwiceRecord(const std::string& op, Member member);

/// A rank of this process in a call.
struct Participation {
  std::function<void()> poison;
  std::function<void()> done;  // empty: the rank is elsewhere, or has not joined yet
  // Environment of XLA's thread. XLA continues the device's program inside `done`, and its threads
  // flush subnormals: in the environment of our thread the program would give other bits.
  std::fenv_t environment;

  void Finish() const;
};

/// The exchange's lock guards all that changes, except `phase`: one thread at a time advances it.
struct PendingCall {
  /// Opens a call for a rank of this process, which must still be added.
  PendingCall(const CallKey& key, const std::string& op, int rank, std::shared_ptr<PhasedCall> body,
              const RankMap& rank_map);

  /// Adds a rank. Returns the failure if the rank does not fit the call.
  std::optional<ErrorRecord> Add(int rank, std::string_view of_op, std::span<const std::byte> args);
  bool HasAll() const { return num_joined == body->num_ranks(); }
  /// Whether the call waits for other ranks or processes, not for shares of this process.
  bool Waits() const { return has_ended || !HasAll(); }

  /// The failure of a call whose deadline has passed while it waits.
  ErrorRecord ExpiredRecord(const RankMap& rank_map) const;
  /// The call in a few words, for a rank that waits elsewhere.
  std::string Describe() const;
  /// The failure of a call that waits when the user interrupts the process.
  ErrorRecord InterruptedRecord(const RankMap& rank_map) const;
  /// The failure of a call that needs a process which is gone.
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
  bool has_ended = false;           // all shares of this process are done
  std::set<int> are_reading;        // other processes that still need the operands of this one
  std::map<int, uint64_t> gave_up;  // by process: the address in its Join (WireMessage)

 private:
  ErrorRecord ProcessRecord(FailureKind kind, const RankMap& rank_map, int process) const;
};

}  // namespace jax_ep
