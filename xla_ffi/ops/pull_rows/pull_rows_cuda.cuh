// The kernel of pull_rows, for its handler and for tests.
#pragma once

#include <cuda_runtime_api.h>

#include "device/endpoint.h"
#include "ops/pull_rows/pull_rows.h"

namespace jax_ep {

/// Arguments of a launch.
struct PullRowsLaunch {
  Endpoint self;
  const int32_t* position;
  PullRowsArgs args;
};

cudaError_t LaunchPullRows(const PullRowsLaunch& launch, const DeviceTraits& device, int num_sms,
                           cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadPullRowsKernels(DeviceTraits& device);

}  // namespace jax_ep
