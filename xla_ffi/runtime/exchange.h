// The exchange brings the ranks of a host together, call by call, without ever blocking a caller.
//
// A rank joins a call with its operands and a callback. When all ranks have joined, the call's
// phases run on the exchange's threads, one share per rank. A phase begins when the phase before it
// is done on all ranks of the process. After the last phase each rank's callback runs on a thread
// that runs nothing else: XLA continues that device's program inside it, and may block there on a
// collective of its own.
//
// XLA starts independent calls in a different order on each device, so calls are matched by their
// place in the program and the launch (call_site.h), never by order of arrival.
//
// Ranks may live in several processes. Each process tells the others which of its ranks have
// joined, and where their operands are. Operands are read where they lie (peer_memory.h). A call
// ends in a process when the process has done its shares and no other process reads its operands
// any more.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "runtime/call_site.h"
#include "runtime/error_record.h"
#include "runtime/interrupt.h"
#include "runtime/mesh_position.h"
#include "runtime/phased_call.h"
#include "runtime/rank_map.h"

namespace jax_ep {

struct Arrival {
  std::string op;
  const CallSite& site;  // after CallSites::Settle
  uint64_t newest_site;  // of the process
  int64_t run_id;
  Member member;
};

class Exchange {
 public:
  using Done = std::function<void()>;

  Exchange(RankMap rank_map, std::chrono::milliseconds timeout);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  /// Joins a call. `done` (not empty) runs exactly once, in the floating-point environment of the
  /// caller of Join: after the call, or after Call::Poison(args) if the call fails or the exchange
  /// is destroyed first.
  template <typename Call>
  void Join(const Arrival& arrival, const typename Call::Args& args, Done done) {
    JoinErased(arrival, {.make =
                             [](int num_ranks, std::vector<int> pids) {
                               return std::make_shared<Call>(num_ranks, std::move(pids));
                             },
                         .args = std::as_bytes(std::span(&args, 1)),
                         .poison = [args] { Call::Poison(args); },
                         .done = std::move(done)});
  }

  /// Records the error if it is the first, and ends every open call. From then on every call ends
  /// at once with poisoned results. No error goes to XLA: an error of one device alone would leave
  /// the others waiting in their own collectives until the process is aborted.
  void Fail(const ErrorRecord& record);
  std::optional<ErrorRecord> error() const;

  /// Whether another process of the group is still there, as far as is known.
  bool HasOtherProcesses() const;

  /// The object that ends the exchange's waits when the user interrupts the process.
  std::shared_ptr<Interruptible> interruptible() const;

  /// For tests: calls of `rank` end at once, poisoned, and never reach the peers. kNoIndex undoes
  /// this.
  void SkipRank(int rank);

 private:
  struct Participant {
    std::function<std::shared_ptr<PhasedCall>(int num_ranks, std::vector<int> pids)> make;
    std::span<const std::byte> args;
    std::function<void()> poison;
    Done done;
  };
  struct State;

  void JoinErased(const Arrival& arrival, Participant participant);

  std::shared_ptr<State> state_;
};

}  // namespace jax_ep
