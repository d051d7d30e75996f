// The kernel of ragged_all_to_all, for its handler and for tests.
#pragma once

#include <cuda_runtime_api.h>

#include "device/endpoint.h"
#include "ops/ragged_all_to_all/ragged_all_to_all.h"

namespace jax_ep {

/// Arguments of a launch.
struct RaggedAllToAllLaunch {
  Endpoint self;
  const int32_t* position;
  RaggedAllToAllArgs args;
};

cudaError_t LaunchRaggedAllToAll(const RaggedAllToAllLaunch& launch, const DeviceTraits& device,
                                 int num_sms, cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadRaggedAllToAllKernels(DeviceTraits& device);

}  // namespace jax_ep
