// Signals between ranks about the rings of partial sums (PartialRing, PartialCells).
#pragma once

#include <cstdint>

#include "device/bulk_copy.cuh"
#include "device/rows.cuh"
#include "device/signals.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/combine/terms_cuda.cuh"

namespace jax_ep {

// One warp's view of the signals. All functions are for the whole warp.
class OwnCells {
 public:
  __device__ OwnCells(const Endpoint& self, PartialRing ring, RowParts parts)
      : self_(self), ring_(ring), num_parts_(parts.count), epoch_(CurrentEpoch(self)) {}

  // Whether the holder of a partial sum has filled its part of a place. With `waits`, false only if
  // the group fails.
  __device__ bool IsFilled(const TermList& list, int holder, bool waits) {
    if (waits) FlushSignals();
    const SignalRow filled = CellsOf(list, self_.own()->partials.filled);
    bool is_filled = false;
    if (Lane() == 0) {
      const auto look = [&] { return Is(LoadAcquire(filled.Of(holder)), list.token); };
      is_filled = waits ? WaitUntil(self_, OpId::kCombine, holder, look) : look();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      ProxyFence();
#endif
    }
    __syncwarp();
    return __shfl_sync(~0u, is_filled, 0);
  }

  // Waits until the owner has read the previous sum in the part of a place. For an own token it
  // waits until this rank has signalled that, which keeps the rank's signals of a place in order.
  // False if the group fails.
  __device__ bool WaitUntilEmptied(const TermList& list) {
    if (list.token < ring_.num_tokens) return true;
    FlushSignals();
    const SignalRow emptied = CellsOf(list, self_.own()->partials.emptied);
    bool is_empty = false;
    if (Lane() == 0) {
      is_empty = WaitUntil(self_, OpId::kCombine, list.owner, [&] {
        return Is(LoadAcquire(emptied.Of(list.owner)), list.token - ring_.num_tokens);
      });
    }
    __syncwarp();
    return __shfl_sync(~0u, is_empty, 0);
  }

  // Defers the signals of a sum that is stored: to its owner, that the part of the place is filled,
  // or, for an own token, to all peers, that the part is empty. FlushSignals sends them, before
  // this warp waits for anyone. A release waits for the stores: later, they have long been made.
  __device__ void DeferSignals(const TermList& list) {
    __syncwarp();
    const auto defer = [&](const Signal* cells) {
      deferred_ = const_cast<Signal*>(CellsOf(list, cells).Of(self_.rank));
      deferred_token_ = list.token;
    };
    if (list.owner != self_.rank) {
      if (Lane() == 0) defer(self_.control[list.owner]->partials.filled);
    } else if (Lane() < self_.num_ranks) {
      defer(self_.control[Lane()]->partials.emptied);
      defers_own_ = Lane() == self_.rank;
    }
  }
  __device__ void FlushSignals() {
    // The signal to this rank comes last: then the warp that has the place next signals to the
    // peers after this warp.
    if (deferred_ != nullptr && !defers_own_) StoreRelease(deferred_, {epoch_, deferred_token_});
    __syncwarp();
    if (deferred_ != nullptr && defers_own_) StoreRelease(deferred_, {epoch_, deferred_token_});
    deferred_ = nullptr;
    defers_own_ = false;
  }

 private:
  static __device__ int Lane() { return threadIdx.x % kWarpSize; }
  __device__ bool Is(Signal signal, uint32_t token) const {
    return signal.epoch == epoch_ && signal.value == token;
  }
  // The signals of a part of a place, of all ranks.
  __device__ SignalRow CellsOf(const TermList& list, const Signal* cells) const {
    return {cells + list.token % ring_.num_tokens * num_parts_ + list.part,
            ring_.num_tokens * num_parts_ * sizeof(Signal)};
  }

  const Endpoint& self_;
  const PartialRing ring_;
  const int num_parts_;
  const uint32_t epoch_;
  Signal* deferred_ = nullptr;
  uint32_t deferred_token_ = 0;
  bool defers_own_ = false;
};

}  // namespace jax_ep
