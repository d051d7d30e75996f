#include <cuda_runtime.h>

#include "device/signals.cuh"
#include "ops/cuda_op.h"
#include "ops/handlers.h"
#include "ops/read_clock/read_clock_cuda.cuh"
#include "ops/read_clock/read_clock_ffi.h"

namespace jax_ep {
namespace {

// Waits, and writes the time at which the wait is over.
//
// Geometry   one block of one thread.
// Protocol   none, since the operation is local.
// Traffic    4 bytes read, 12 written.
// Floor      a launch, and the delay.
__global__ void __launch_bounds__(1) ReadClockKernel(ReadClockArgs args) {
  WaitAndReadClock(args, GlobalTimer);
}

}  // namespace

cudaError_t LoadReadClockKernels(DeviceTraits&) {
  cudaFuncAttributes found{};
  return cudaFuncGetAttributes(&found, ReadClockKernel);
}

template <>
ffi::Error RunReadClock<Cuda>(const DeviceLocalContext& context, const ReadClockArgs& args) {
  ReadClockKernel<<<1, 1, 0, context.stream>>>(args);
  return CudaError("read_clock", cudaGetLastError());
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpReadClockCuda, ReadClock<Cuda>, BindingOf(ReadClock<Cuda>),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
