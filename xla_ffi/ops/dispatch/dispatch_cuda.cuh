// The kernels of dispatch, for its handler and for tests.
#pragma once

#include <cuda_runtime_api.h>

#include "device/endpoint.h"
#include "ops/dispatch/dispatch.h"

namespace jax_ep {

/// What a launch gets.
struct DispatchLaunch {
  Endpoint self;
  const int32_t* position;
  DispatchArgs args;
  void* workspace;  // DispatchWorkspaceBytes(args.shape)
};

/// 0 where the device cannot plan such a dispatch: too many experts or choices.
size_t DispatchWorkspaceBytes(const DispatchShape& shape);
cudaError_t LaunchDispatch(const DispatchLaunch& launch, const DeviceTraits& device, int num_sms,
                           cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadDispatchKernels(DeviceTraits& device);

}  // namespace jax_ep
