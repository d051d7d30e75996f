// Calls that leave ranks out: those of a mask, and peers that do not answer. Such a call goes on
// without them, where any other call would end the group.
//
// A rank keeps whom it leaves out, for good, until the group is opened again (MaskSignals). It
// sends them nothing, waits for nothing of theirs, and reads nothing of theirs. So it does not
// matter that a peer may be slow instead of dead:
//
//   - What a late peer sends lies in that peer's own rooms and words here, which nobody reads any
//     more.
//   - The late peer finds packets of the calls before it was left out. Each carries its epoch, so
//     it takes none for one of a later call. It waits for packets that nobody sends, and then
//     leaves the others out, too.
//   - A peer overwrites half n % 2 only in a call n + 2 that does not leave this rank out. It has
//     then left this rank out in no call before either, since that would be for good. So it has
//     received this rank's part of call n + 1, as without masks (device/layout.h).
//
// All waits of a call end by one deadline, so that several dead peers delay the others no longer
// than one. A peer that died amid a call may have reached some ranks and not others: the others
// wait for it and come late to the next call. They say that they wait (MaskSignals::waits), and get
// twice the time.
#pragma once

#include <cstdint>

#include "device/packets.cuh"
#include "device/signals.cuh"
#include "device/stopwatch.h"
#include "device/turn.h"

namespace jax_ep {

/// A call that stores operands at those of its peers that take part.
struct MaskedCall : PushCall {
  static constexpr bool kLeavesOut = true;

  /// Begins to read the mask of the call. All threads of a warp make one each; Begin sets `ranks`.
  __device__ MaskedCall(const Endpoint& self, const bool* rank_mask)
      : PushCall{},
        start(GlobalTimer()),
        is_asked_(PacketLane() < self.num_ranks && rank_mask[PacketLane()]),
        left_out_(LoadRelaxed(&self.own()->left_out)) {}

  // A call that is aborted leaves nobody out: its mask may be the result of another such call.
  __device__ void Settle(const Endpoint& self, bool is_aborted) {
    const uint32_t asked = __ballot_sync(~0u, is_asked_);
    const uint32_t all = ~0u >> (kWarpSize - self.num_ranks);
    const bool is_first = blockIdx.x == 0 && threadIdx.x == 0;
    if (is_first && !is_aborted && (all & ~asked & ~left_out_) != 0) {
      atomicOr(&self.own()->left_out, all & ~asked);
    }
    ranks = asked & ~left_out_;
    if ((ranks >> self.rank & 1) == 0) ranks = 0;
  }
  __device__ bool Includes(int rank) const { return (ranks >> rank & 1) != 0; }
  __device__ uint32_t Among(uint32_t some) const { return some & ranks; }

  uint32_t ranks = 0;  // that take part, as bits; none if this rank does not
  uint64_t start;      // of the call, in the time of Stopwatch

 private:
  const bool is_asked_;
  const uint32_t left_out_;
};

__device__ inline bool IsLeftOut(const Endpoint& self, int peer) {
  return (LoadRelaxed(&self.own()->left_out) >> peer & 1) != 0;
}

/// Tells the peers of a call that this rank waits for one of them.
__device__ inline void SayThatItWaits(const Endpoint& self, uint32_t ranks, uint32_t epoch) {
  if (LoadRelaxed(&self.own()->waits[self.rank]) == epoch) return;
  for (int r = 0; r < self.num_ranks; ++r) {
    if ((ranks >> r & 1) != 0) StoreRelaxed(&self.control[r]->waits[self.rank], epoch);
  }
}

/// Whether a peer has said that it waits itself, in this call or in one shortly before.
__device__ inline bool HasSaidThatItWaits(const Endpoint& self, int peer, uint32_t epoch) {
  constexpr uint32_t kRecent = 4;  // epochs skip two numbers where they wrap around
  return epoch - LoadRelaxed(&self.own()->waits[peer]) <= kRecent;
}

/// Whether a call goes on waiting for a peer: the time at which the wait has begun, or 0 if the
/// peer is left out, as it is from the deadline on, or if the group has failed. Never inlined:
/// kernels have no registers left for it.
static __device__ __noinline__ uint64_t GoesOnWaiting(const Endpoint& self, int peer,
                                                      uint32_t ranks, uint32_t epoch,
                                                      uint64_t start) {
  if (LoadRelaxed(&self.own()->abort) != 0 || IsLeftOut(self, peer)) return 0;
  Stopwatch watch(start);
  const uint64_t now = GlobalTimer();
  const uint64_t limit = LoadRelaxed(&self.own()->timeout_ns);
  if (!watch.IsOver(now, limit / 2)) return watch.start();
  SayThatItWaits(self, ranks, epoch);
  if (!watch.IsOver(now, limit)) return watch.start();
  if (HasSaidThatItWaits(self, peer, epoch) && !watch.IsOver(now, 2 * limit)) return watch.start();
  atomicOr(&self.own()->left_out, 1u << peer);
  return 0;
}

/// AwaitPackets of a call that leaves out a peer which does not come. False if it is left out, or
/// if the group fails: IsAborted tells which.
template <typename IsThere>
__device__ bool AwaitPackets(const Endpoint& self, const MaskedCall& call, int peer,
                             IsThere&& is_there) {
  for (int n = 0; n < kLooks; ++n) {
    if (is_there()) return true;
  }
  uint64_t start = call.start;
  while (!is_there()) {
    start = GoesOnWaiting(self, peer, call.ranks, call.epoch, start);
    if (start == 0) return false;
  }
  return true;
}

/// Makes the blocks of a call agree on the ranks that take part, as bits: what the first of them
/// has found holds for all. A block that still misses packets of such a rank finds them now: the
/// first has seen them. By one thread of each block.
__device__ inline uint32_t AgreeOnRanks(const Endpoint& self, uint32_t epoch, uint32_t ranks) {
  auto* word = reinterpret_cast<unsigned long long*>(&self.own()->agreed);
  const unsigned long long own = uint64_t{ranks} << 32 | epoch;
  __threadfence();
  const Signal last = LoadRelaxed(&self.own()->agreed);
  unsigned long long seen = uint64_t{last.value} << 32 | last.epoch;
  while (static_cast<uint32_t>(seen) != epoch) {
    const unsigned long long before = atomicCAS(word, seen, own);
    seen = before == seen ? own : before;
  }
  __threadfence();
  return static_cast<uint32_t>(seen >> 32);
}

/// EndReading of a call that leaves ranks out. The last block writes who has taken part so far; if
/// the group has failed, nobody.
__device__ inline void EndReading(const Endpoint& self, bool* rank_mask_after) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  auto* turn = reinterpret_cast<unsigned long long*>(&self.own()->turn);
  const uint64_t left = atomicAdd(turn, -kOneReader) - kOneReader;
  if (left >> 32 != 0) return;
  __threadfence();
  const uint32_t left_out = IsAborted(self) ? ~0u : LoadRelaxed(&self.own()->left_out);
  for (int r = 0; r < self.num_ranks; ++r) rank_mask_after[r] = (left_out >> r & 1) == 0;
}

}  // namespace jax_ep
