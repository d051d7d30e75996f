// The signals of device/protocol.h in kernels: words, failures, and bounded waits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/endpoint.h"
#include "device/machine.cuh"
#include "device/stopwatch.h"
#include "device/turn.h"

namespace jax_ep {

/// Whether the group has failed, or a test skips this rank.
__device__ inline bool IsAborted(const Endpoint& self) {
  return (LoadRelaxed(&self.own()->abort) | LoadRelaxed(&self.own()->skip)) != 0;
}

/// The epoch of the call that is running.
__device__ inline uint32_t CurrentEpoch(const Endpoint& self) {
  return NextEpoch(LoadRelaxed(&self.own()->turn.epoch));
}

/// Takes the next epoch, by one thread of a call. `turn`: of this rank. The word before says
/// whether another call runs (IsOverlap).
__device__ inline Signal TakeTurn(Signal* turn) {
  // The mark is the highest bit, which a sum turns over, too.
  const uint64_t before = FetchXor(turn, kRunningMark);
  return {static_cast<uint32_t>(before), static_cast<uint32_t>(before >> 32)};
}

__device__ inline void Write(volatile FailureRecord& to, const FailureRecord& from) {
  to.kind = from.kind;
  to.op = from.op;
  to.site = from.site;
  to.rank = from.rank;
  to.peer = from.peer;
  to.expected = from.expected;
  to.seen = from.seen;
  __threadfence_system();
  to.is_set = 1;
}

/// Writes a record to host memory if it is this rank's first.
__device__ inline void Keep(const Endpoint& self, const FailureRecord& record) {
  if (atomicExch(&self.own()->has_record, 1) == 0) Write(*self.record, record);
}

/// The time limit of a wait for `peer`.
__device__ inline uint64_t WaitLimit(const Endpoint& self, int peer) {
  // A wait for the own rank mostly is a wait for what that rank waits for: the other wait must end
  // first, since it knows the peer.
  return LoadRelaxed(&self.own()->timeout_ns) * (peer == self.rank ? 2 : 1);
}

/// Tells a failure to every rank, since ranks may be in other processes, and ends every wait of the
/// group. When it returns, every rank has been told: until then peers may read this rank's operands
/// and results. Never inlined: code that seldom runs would lie between code that always runs, and
/// the first run of a kernel waits for its instructions.
static __device__ __noinline__ void Fail(const Endpoint& self, FailureKind kind, OpId op, int peer,
                                         int64_t expected, int64_t seen) {
  if (atomicExch(&self.own()->has_failed, 1) != 0) {
    // Another thread of this rank tells all ranks, and then ends their waits.
    const uint64_t limit = WaitLimit(self, self.rank);
    Stopwatch watch(GlobalTimer());
    while (LoadRelaxed(&self.own()->abort) == 0 && !watch.IsOver(GlobalTimer(), limit)) {
    }
    return;
  }
  const FailureRecord found{.is_set = 1,
                            .kind = kind,
                            .op = op,
                            .site = self.site,
                            .rank = self.rank,
                            .peer = peer,
                            .expected = expected,
                            .seen = seen};
  Keep(self, found);
  for (int r = 0; r < self.num_ranks; ++r) Write(self.control[r]->told[self.rank], found);
  __threadfence_system();
  for (int r = 0; r < self.num_ranks; ++r) StoreRelaxed(&self.control[r]->abort, 1);
}

/// Records the failure of another rank that ends this block. The block's first thread calls it, or,
/// if not all threads know of the failure, the threads that do. One thread of the rank writes the
/// record that a peer has sent. No peer is told: has_failed stays unset.
static __device__ __noinline__ void NotePeerFailure(const Endpoint& self) {
  // One thread of a warp: each thread would wait for fences of its own.
  if (threadIdx.x % kWarpSize + 1 != __ffs(__activemask())) return;
  __threadfence_system();  // behind the word that told of the failure
  for (int r = 0; r < self.num_ranks; ++r) {
    const volatile FailureRecord& told = self.own()->told[r];
    if (told.is_set == 0) continue;
    __threadfence_system();
    Keep(self, {.is_set = 1,
                .kind = told.kind,
                .op = told.op,
                .site = told.site,
                .rank = told.rank,
                .peer = told.peer,
                .expected = told.expected,
                .seen = told.seen});
    return;
  }
}

/// Waits until `is_there()`, which looks for a signal of `peer`. False if the group fails first: by
/// the failure of another rank, or by the timeout here, which is recorded with `count_seen()`, the
/// number of ranks whose signal has come.
template <typename IsThere, typename CountSeen>
__device__ bool WaitUntil(const Endpoint& self, OpId op, int peer, IsThere&& is_there,
                          CountSeen&& count_seen) {
  if (is_there()) return true;
  Stopwatch watch(GlobalTimer());
  while (!is_there()) {
    if (LoadRelaxed(&self.own()->abort)) return false;
    // The limit is loaded each time: kernels have no registers left for it.
    if (watch.IsOver(GlobalTimer(), WaitLimit(self, peer))) {
      Fail(self, FailureKind::kPeerTimeout, op, peer, self.num_ranks, count_seen());
      return false;
    }
  }
  return true;
}

/// Whether a wait for `peer` that has looked often goes on: not if the group has failed, or the
/// time is over. `begun`: time of the first such look, 0 in that look. Returns it, or 0 if the wait
/// ends. Never inlined: the first looks of a wait need not fetch its instructions.
static __device__ __noinline__ uint64_t GoesOn(const Endpoint& self, OpId op, int peer,
                                               uint64_t begun) {
  if (LoadRelaxed(&self.own()->abort)) return 0;
  const uint64_t now = GlobalTimer();
  // A clock that was set back begins anew, as in Stopwatch.
  if (begun == 0 || now < begun) return now;
  if (now - begun <= WaitLimit(self, peer)) return begun;
  Fail(self, FailureKind::kPeerTimeout, op, peer, self.num_ranks, self.num_ranks - 1);
  return 0;
}

/// The same for a signal that not all peers send at once: only the late peer is known.
template <typename IsThere>
__device__ bool WaitUntil(const Endpoint& self, OpId op, int peer, IsThere&& is_there) {
  return WaitUntil(self, op, peer, is_there, [&] { return self.num_ranks - 1; });
}

/// Fails a call that differs from a peer's. Such a call may be this rank's second call at once,
/// which its first block knows. So the first block names the failure, and the other blocks wait for
/// it.
static __device__ __noinline__ void FailAsFirstBlock(const Endpoint& self, OpId op, int peer,
                                                     uint32_t tag, uint32_t seen) {
  if (blockIdx.x == 0) {
    Fail(self, FailureKind::kCallMismatch, op, peer, tag, seen);
  } else {
    WaitUntil(self, op, self.rank, [] { return false; });
  }
}

/// Whether the tag that a peer has sent is this call's. If not, the group fails.
__device__ inline bool IsCall(const Endpoint& self, OpId op, int peer, uint32_t tag,
                              uint32_t seen) {
  if (seen == tag) return true;
  FailAsFirstBlock(self, op, peer, tag, seen);
  return false;
}

}  // namespace jax_ep
