// The kernels of all_reduce_residual_rmsnorm, for its handler and for tests.
#pragma once

#include <cuda_runtime_api.h>

#include "device/endpoint.h"
#include "ops/all_reduce/all_reduce.h"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm.h"

namespace jax_ep {

/// Arguments of the kernels.
struct RmsNormLaunch {
  Endpoint self;
  const int32_t* position;
  RmsNormArgs args;
};

/// Launches a kernel. `algorithm`: low_latency or one_shot.
cudaError_t LaunchRmsNorm(const RmsNormLaunch& launch, Algorithm algorithm,
                          const DeviceTraits& device, cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadAllReduceResidualRmsnormKernels(DeviceTraits& device);

}  // namespace jax_ep
