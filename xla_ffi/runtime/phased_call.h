// A call of the ranks of an exchange, in phases. Operations (xla_ffi/ops) derive from it.
#pragma once

#include <cstddef>
#include <cstring>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/types.h"
#include "runtime/peer_memory.h"

namespace jax_ep {

/// One collective call: the operands of all ranks, and the work of each phase.
class PhasedCall {
 public:
  PhasedCall(int num_ranks, std::vector<int> pids)
      : num_ranks_(num_ranks), memory_(std::move(pids)) {}
  virtual ~PhasedCall() = default;
  PhasedCall(const PhasedCall&) = delete;
  PhasedCall& operator=(const PhasedCall&) = delete;

  virtual int num_phases() const = 0;
  /// Whether every process does the shares of all ranks in this phase, not only those of its own
  /// ranks: results that follow from small operands are not worth sending.
  virtual bool IsForAll(int /*phase*/) const { return false; }
  /// Does the share of `rank` in `phase`. May read all ranks' operands, through a PeerReader where
  /// the rank may be elsewhere. Writes the results of `rank` only. Must not block.
  virtual void Run(int phase, int rank) = 0;
  /// Takes the arguments of a rank, as bytes, since they may come from another process. False where
  /// they belong to another call than those of the ranks before.
  virtual bool Deposit(int rank, std::span<const std::byte> args) = 0;

  int num_ranks() const { return num_ranks_; }
  PeerMemory& memory() { return memory_; }

 private:
  int num_ranks_;
  PeerMemory memory_;
};

/// A call whose ranks each bring one `ArgsT`.
template <typename ArgsT>
class CallOf : public PhasedCall {
 public:
  using Args = ArgsT;
  static_assert(std::is_trivially_copyable_v<Args>);

  CallOf(int num_ranks, std::vector<int> pids)
      : PhasedCall(num_ranks, std::move(pids)), args(num_ranks) {}

  bool Deposit(int rank, std::span<const std::byte> bytes) override {
    if (bytes.size() != sizeof(Args)) return false;
    std::memcpy(&args[rank], bytes.data(), sizeof(Args));
    if (first_rank_ == kNoIndex) first_rank_ = rank;
    return AreAlike(args[first_rank_], args[rank]);
  }

  /// Whether the operands of two ranks can be those of one call.
  virtual bool AreAlike(const Args&, const Args&) const { return true; }

  std::vector<Args> args;  // by rank

 private:
  int first_rank_ = kNoIndex;
};

}  // namespace jax_ep
