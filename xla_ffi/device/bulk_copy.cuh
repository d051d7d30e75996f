// The bulk copy engine of compute capability 9.0 (TMA without tensor maps), and its barriers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_ep {

/// The engine's unit: addresses and sizes are multiples of it.
inline constexpr int kBulkAlignment = 16;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Counts bytes that arrive in shared memory. One thread initialises the barrier for all.
class BulkBarrier {
 public:
  __device__ void Init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(&word_)));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __device__ void Expect(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(&word_)),
        "r"(bytes)
        : "memory");
  }
  __device__ void Wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(SharedAddress(&word_)),
        "r"(parity)
        : "memory");
  }
  __device__ uint32_t address() const { return SharedAddress(&word_); }

 private:
  uint64_t word_;
};

/// Copies global memory, also a peer's, to shared memory. The barrier says when the bytes are
/// there.
__device__ inline void BulkLoad(void* shared, const void* global, uint32_t bytes,
                                const BulkBarrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(barrier.address())
      : "memory");
}

/// Expect and BulkLoad, without a branch, if `does`: true in one lane of a warp.
__device__ inline void ExpectAndLoadIf(bool does, void* shared, const void* global, uint32_t bytes,
                                       const BulkBarrier& barrier) {
  asm volatile(
      "{\n"
      ".reg .pred does;\n"
      "setp.ne.u32 does, %4, 0;\n"
      "@does mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
      "@does cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];\n"
      "}\n" ::"r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(barrier.address()), "r"(static_cast<uint32_t>(does))
      : "memory");
}

/// Copies shared to global memory, in the open group of stores of the calling thread.
__device__ inline void BulkStore(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(SharedAddress(shared)), "r"(bytes)
               : "memory");
}

__device__ inline void BulkStoreCommit() { asm volatile("cp.async.bulk.commit_group;"); }

/// Waits until all but the last `kPending` groups of the thread have been read out of shared
/// memory.
template <int kPending>
__device__ void BulkStoreWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

/// Waits until all groups of the thread have been written.
__device__ inline void BulkStoreWait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/// Orders ordinary accesses to memory before accesses of the engine to the same memory, or after
/// them.
__device__ inline void ProxyFence() { asm volatile("fence.proxy.async;" ::: "memory"); }

#endif

}  // namespace jax_ep
