// The kernel of combine, for its handler and for tests.
#pragma once

#include <cuda_runtime_api.h>

#include "core/protocol.h"
#include "ops/combine/combine.h"

namespace jax_ep {

/// What the kernel gets.
struct CombineLaunch {
  Endpoint self;
  const int32_t* position;
  CombineArgs args;

  int64_t out_bytes() const {
    return args.num_tokens * args.hidden * (args.dtype == DType::kF32 ? 4 : 2);
  }
};

cudaError_t LaunchCombine(const CombineLaunch& launch, const DeviceTraits& device, int num_sms,
                          cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadCombineKernels(DeviceTraits& device);

}  // namespace jax_ep
