// Copies from global to shared memory that the copying thread waits for itself.
#pragma once

#include <cstdint>

namespace jax_ep {

/// Copies 16 bytes past the L1 cache, which does not see writes of peers.
__device__ inline void AsyncCopy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

/// Copies 4 bytes that nobody writes while the kernel runs.
__device__ inline void AsyncCopy4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

__device__ inline void AsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `num_pending` groups of the thread are on their way, or kMax if that is
/// fewer.
template <int kMax>
__device__ void AsyncWait(int num_pending) {
  if constexpr (kMax == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else {
    if (num_pending >= kMax) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kMax) : "memory");
    } else {
      AsyncWait<kMax - 1>(num_pending);
    }
  }
}

}  // namespace jax_ep
