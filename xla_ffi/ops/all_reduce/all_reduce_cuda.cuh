// The kernels of all_reduce, for its handler and for tests.
#pragma once

#include <cuda_runtime_api.h>

#include "device/endpoint.h"
#include "ops/all_reduce/all_reduce.h"

namespace jax_ep {

/// Arguments of the kernels.
struct AllReduceLaunch {
  Endpoint self;
  const int32_t* position;
  AllReduceArgs args;
};

/// Launches a kernel. A two-shot is for all_reduce only, and needs peers that can read the result
/// if it is not pushed.
cudaError_t LaunchAllReduce(const AllReduceLaunch& launch, Algorithm algorithm,
                            const DeviceTraits& device, cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadAllReduceKernels(DeviceTraits& device);

}  // namespace jax_ep
