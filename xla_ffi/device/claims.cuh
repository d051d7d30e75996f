// Work that is handed out to whoever asks.
#pragma once

#include <cstdint>

#include "device/rows.cuh"

namespace jax_ep {

/// One warp's items out of 0, 1, 2, ...: it gets the next one when it is ready for it, since the
/// link does not serve all SMs alike. What is claimed early is done late by a warp that is slow at
/// the end. Which warp does what leaves no trace in the results.
class Claims {
 public:
  /// `counter` is 0 when the call begins; the first items are given to the warps in their order.
  __device__ Claims(uint32_t* counter, uint32_t warp, uint32_t num_warps)
      : counter_(counter), num_warps_(num_warps), next_(warp) {}

  /// By the whole warp. The counter's answer for the time after is on its way meanwhile.
  __device__ uint32_t Next() {
    const uint32_t item = __shfl_sync(~0u, next_, 0);
    if (threadIdx.x % kWarpSize == 0) next_ = num_warps_ + atomicAdd(counter_, 1);
    return item;
  }

 private:
  uint32_t* counter_;
  uint32_t num_warps_;
  uint32_t next_;  // of lane 0
};

}  // namespace jax_ep
