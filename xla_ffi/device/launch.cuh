// Kernels of one call that follow one another on a stream without the gap of a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace jax_ep {

/// Waits until the kernel before this one has ended. A kernel that is launched behind another one
/// begins with it.
__device__ inline void WaitForPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

/// Lets the blocks of the kernel that is launched behind this one take their places, and wait.
__device__ inline void LetNextStart() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// Configuration of a launch. `is_behind`: another kernel of the call comes before it on the
/// stream. `priority`: that of the device's traits. With it, blocks get the next SMs that are free:
/// they are few, and peers wait for them.
struct LaunchConfig {
  int num_blocks;
  int num_threads;
  size_t shared_bytes;
  bool is_behind;
  int priority;
  cudaStream_t stream;
};

template <typename... Args>
cudaError_t Launch(void (*kernel)(Args...), const LaunchConfig& launch, const Args&... args) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributePriority;
  attributes[0].val.priority = launch.priority;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(launch.num_blocks);
  config.blockDim = dim3(launch.num_threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = launch.is_behind ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace jax_ep
