// The kernels of dispatch, for its handler and for tests.
#pragma once

#include <cuda_runtime_api.h>

#include "device/endpoint.h"
#include "ops/dispatch/dispatch.h"

namespace jax_ep {

/// Arguments of a launch.
struct DispatchLaunch {
  Endpoint self;
  const int32_t* position;
  DispatchArgs args;
  void* workspace;  // DispatchWorkspaceBytes(args.shape)
};

/// Bytes of scratch of a dispatch; 0 if it has too many experts or choices for the device to plan.
size_t DispatchWorkspaceBytes(const DispatchShape& shape);
cudaError_t LaunchDispatch(const DispatchLaunch& launch, const DeviceTraits& device, int num_sms,
                           cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadDispatchKernels(DeviceTraits& device);

}  // namespace jax_ep
