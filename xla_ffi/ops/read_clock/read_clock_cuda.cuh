// The kernel of read_clock, for the code that loads kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "device/endpoint.h"

namespace jax_ep {

/// Must be called once per device before a peer of any group waits.
cudaError_t LoadReadClockKernels(DeviceTraits& device);

}  // namespace jax_ep
