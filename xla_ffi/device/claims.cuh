// Work that warps claim when they are ready for it.
#pragma once

#include <cstdint>

#include "device/rows.cuh"

namespace jax_ep {

/// One warp's items out of 0, 1, 2, .... The warp gets the next item when it is ready for it, since
/// the link does not serve all SMs alike. An item that is claimed early is done late if its warp is
/// slow at the end. Results do not depend on which warp does an item.
class Claims {
 public:
  /// `counter` is 0 when the call begins. Warps get the first items in their order.
  __device__ Claims(uint32_t* counter, uint32_t warp, uint32_t num_warps)
      : counter_(counter), num_warps_(num_warps), next_(warp) {}

  /// The next item; for the whole warp. The counter's answer for the next call is on its way
  /// meanwhile.
  __device__ uint32_t Next() {
    const uint32_t item = __shfl_sync(~0u, next_, 0);
    if (threadIdx.x % kWarpSize == 0) next_ = num_warps_ + atomicAdd(counter_, 1);
    return item;
  }

 private:
  uint32_t* counter_;
  uint32_t num_warps_;
  uint32_t next_;  // valid in lane 0
};

}  // namespace jax_ep
