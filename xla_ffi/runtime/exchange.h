// Brings the ranks of one host process together, call by call, without ever blocking a caller.
//
// A rank joins a call with its operands and a callback. When all ranks have joined, the call's
// phases run, one share per rank, on the exchange's threads; a phase begins when the one before it
// is done on all ranks. After the last phase each rank's callback runs on a thread that runs
// nothing else: XLA continues that device's program inside it, and may block there on a
// collective of its own.
//
// XLA starts independent calls in a different order on each device, so calls are matched by their
// place in the program (`site`) and the launch (`run_id`), never by order of arrival.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/error_record.h"
#include "runtime/seat.h"

namespace jax_ep {

struct Arrival {
  const char* op;
  uint64_t site;
  int64_t run_id;
  Member member;
};

/// One collective call: the operands of all ranks, and what to do with them.
class PhasedCall {
 public:
  virtual ~PhasedCall() = default;
  virtual int num_phases() const = 0;
  /// The share of `rank` in `phase`. May read all ranks' operands; writes the results of `rank`
  /// only. Must not block.
  virtual void Run(int phase, int rank) = 0;
};

/// A call whose ranks each bring one `ArgsT`.
template <typename ArgsT>
class CallOf : public PhasedCall {
 public:
  using Args = ArgsT;
  std::vector<Args> args;  // by rank
};

class Exchange {
 public:
  using Done = std::function<void()>;

  Exchange(int num_slices, int num_ranks, std::chrono::milliseconds timeout);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  /// `done` (not empty) runs exactly once, in the floating-point environment of the caller of Join:
  /// after the call, or, when it failed or the exchange went away first, after Call::Poison(args).
  template <typename Call>
  void Join(const Arrival& arrival, const typename Call::Args& args, Done done) {
    JoinErased(arrival, {.make =
                             [this] {
                               auto call = std::make_shared<Call>();
                               call->args.resize(num_ranks_);
                               return call;
                             },
                         .deposit =
                             [&](PhasedCall& call) {
                               static_cast<Call&>(call).args[arrival.member.rank] = args;
                             },
                         .poison = [args] { Call::Poison(args); },
                         .done = std::move(done)});
  }

  /// Records the error if it is the first, and ends every open call. From then on every call ends
  /// at once with poisoned results: an error returned to XLA by one device alone would leave the
  /// others waiting in their own collectives until the process is aborted.
  void Fail(const ErrorRecord& record);
  std::optional<ErrorRecord> error() const;

  /// For tests: calls of `rank` end at once, poisoned, and never reach the peers. kNoIndex undoes
  /// it.
  void SkipRank(int rank);

 private:
  struct Participant {
    std::function<std::shared_ptr<PhasedCall>()> make;
    std::function<void(PhasedCall&)> deposit;
    std::function<void()> poison;
    Done done;
  };
  struct State;

  void JoinErased(const Arrival& arrival, Participant participant);

  int num_ranks_;
  std::shared_ptr<State> state_;
};

}  // namespace jax_ep
