// The signals of device/protocol.h on a device: words, failures, and bounded waits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/endpoint.h"
#include "device/stopwatch.h"
#include "device/turn.h"

namespace jax_ep {

__device__ inline void StoreRelease(Signal* cell, Signal signal) {
  const uint64_t word = uint64_t{signal.value} << 32 | signal.epoch;
  asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(cell), "l"(word) : "memory");
}

__device__ inline Signal LoadAcquire(const Signal* cell) {
  uint64_t word;
  asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(cell) : "memory");
  return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
}

/// Without order: for a signal whose neighbour is loaded with acquire order behind it.
__device__ inline Signal LoadRelaxed(const Signal* cell) {
  uint64_t word;
  asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(cell) : "memory");
  return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
}

__device__ inline void StoreRelaxed(Signal* cell, Signal signal) {
  const uint64_t word = uint64_t{signal.value} << 32 | signal.epoch;
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(cell), "l"(word) : "memory");
}

/// Gives the relaxed stores of signals behind it release order.
__device__ inline void ReleaseFence() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ inline uint32_t LoadRelaxed(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline uint64_t LoadRelaxed(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline void StoreRelaxed(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

/// Among the blocks of this rank: adds one, behind what the block has written and in front of what
/// it will read. What was there before.
__device__ inline uint32_t CountBlock(uint32_t* word) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(word)
               : "memory");
  return before;
}

__device__ inline uint32_t LoadAcquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline uint64_t GlobalTimer() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

/// Whether the group has failed, or a test keeps this rank away.
__device__ inline bool IsAborted(const Endpoint& self) {
  return (LoadRelaxed(&self.own()->abort) | LoadRelaxed(&self.own()->skip)) != 0;
}

/// The epoch of the call that is running.
__device__ inline uint32_t CurrentEpoch(const Endpoint& self) {
  return NextEpoch(LoadRelaxed(&self.own()->turn.epoch));
}

/// By one thread of a call: takes the epoch behind the one that has ended. What was there tells
/// whether another call runs.
__device__ inline Signal TakeTurn(const Endpoint& self) {
  auto* word = reinterpret_cast<unsigned long long*>(&self.own()->turn);
  const uint64_t before = atomicAdd(word, kRunningMark);
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

/// Keeps a record in host memory if it is this rank's first.
__device__ inline void Keep(const Endpoint& self, const FailureRecord& record) {
  if (atomicExch(&self.own()->has_record, 1) == 0) Write(*self.record, record);
}

/// The time after which a wait for `peer` is given up.
__device__ inline uint64_t WaitLimit(const Endpoint& self, int peer) {
  // Who waits for its own rank mostly waits for what that rank waits for: it knows less.
  return LoadRelaxed(&self.own()->timeout_ns) * (peer == self.rank ? 2 : 1);
}

/// Tells a failure to every rank, since they may be in other processes, and ends every wait of the
/// group. When it returns, every rank has been told: until then peers may read this rank's
/// operands and results. Never inlined: what seldom runs would lie between what always does, and
/// first runs of kernels wait for their instructions.
static __device__ __noinline__ void Fail(const Endpoint& self, FailureKind kind, OpId op, int peer,
                                         int64_t expected, int64_t seen) {
  if (atomicExch(&self.own()->has_failed, 1) != 0) {
    // Another thread of this rank tells all ranks, and ends their waits when it has.
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

/// By the first thread of a block that ends by another rank's failure, or, where the threads of a
/// block do not all know of it, by those that do. One thread of the rank keeps what the rank was
/// told. No peer hears of it: has_failed is not set.
static __device__ __noinline__ void NotePeerFailure(const Endpoint& self) {
  // Not all of a warp: each would wait for fences of its own.
  if (threadIdx.x % kWarpSize + 1 != __ffs(__activemask())) return;
  __threadfence_system();  // behind the word that said so
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

/// Waits until `is_there()`, which looks at what `peer` owes. False when the group fails first, by
/// the time that is up here, when `count_seen()` ranks were there, or by another's failure.
template <typename IsThere, typename CountSeen>
__device__ bool WaitUntil(const Endpoint& self, OpId op, int peer, IsThere&& is_there,
                          CountSeen&& count_seen) {
  if (is_there()) return true;
  Stopwatch watch(GlobalTimer());
  while (!is_there()) {
    if (LoadRelaxed(&self.own()->abort)) return false;
    // Loaded each time: what is kept in registers here, the kernels have none left for.
    if (watch.IsOver(GlobalTimer(), WaitLimit(self, peer))) {
      Fail(self, FailureKind::kPeerTimeout, op, peer, self.num_ranks, count_seen());
      return false;
    }
  }
  return true;
}

/// The same for what not all peers owe at once: no more is known than who is late.
template <typename IsThere>
__device__ bool WaitUntil(const Endpoint& self, OpId op, int peer, IsThere&& is_there) {
  return WaitUntil(self, op, peer, is_there, [&] { return self.num_ranks - 1; });
}

/// Who calls something else than a peer may be this rank's second call at once, which its first
/// block knows: that says what is wrong, and the others wait for it.
static __device__ __noinline__ void FailAsFirstBlock(const Endpoint& self, OpId op, int peer,
                                                     uint32_t tag, uint32_t seen) {
  if (blockIdx.x == 0) {
    Fail(self, FailureKind::kCallMismatch, op, peer, tag, seen);
  } else {
    WaitUntil(self, op, self.rank, [] { return false; });
  }
}

/// Whether the call of a peer, whose tag it has sent, is this one; if not, the group fails.
__device__ inline bool IsCall(const Endpoint& self, OpId op, int peer, uint32_t tag,
                              uint32_t seen) {
  if (seen == tag) return true;
  FailAsFirstBlock(self, op, peer, tag, seen);
  return false;
}

}  // namespace jax_ep
