#include <cuda_runtime.h>

#include "device/launch.cuh"
#include "ops/cuda_op.h"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "ops/dispatch/few_tokens_cuda.h"
#include "ops/dispatch/halves_cuda.cuh"
#include "ops/dispatch/halves_ffi.h"
#include "ops/handlers.h"

namespace jax_ep {
namespace {

using SendKernel = void (*)(LowLatencyDispatch, int32_t*);
using RecvKernel = void (*)(LowLatencyDispatch, Results, const int32_t*);

// Calls `use` with the type that stands for the rows of a dispatch.
template <typename Use>
auto WithSource(Quantize quantize, DType dtype, Use&& use) {
  if (quantize == Quantize::kNone) return use(Unchanged{});
  if (dtype == DType::kBF16) return use(__nv_bfloat162{});
  if (dtype == DType::kF16) return use(__half2{});
  return use(float{});  // DType::kI32 is refused at the border
}

SendKernel SendKernelOf(Quantize quantize, DType dtype) {
  return WithSource(quantize, dtype, []<typename Source>(Source) -> SendKernel {
    return DispatchSendKernel<Source>;
  });
}

RecvKernel RecvKernelOf(RecvLayout layout, Quantize quantize, DType dtype) {
  return WithSource(quantize, dtype, [&]<typename Source>(Source) -> RecvKernel {
    return layout == RecvLayout::kRank ? DispatchRecvKernel<RecvLayout::kRank, Source>
                                       : DispatchRecvKernel<RecvLayout::kExpert, Source>;
  });
}

template <typename Load>
cudaError_t ForEachSource(Load&& load) {
  for (const Quantize quantize : {Quantize::kNone, Quantize::kFp8}) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      const cudaError_t status = load(quantize, dtype);
      if (status != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t LoadDispatchSendKernels(DeviceTraits&) {
  return ForEachSource([](Quantize quantize, DType dtype) {
    cudaFuncAttributes found{};
    return cudaFuncGetAttributes(&found, SendKernelOf(quantize, dtype));
  });
}

cudaError_t LoadDispatchRecvKernels(DeviceTraits& device) {
  return ForEachSource([&](Quantize quantize, DType dtype) {
    for (const RecvLayout layout : {RecvLayout::kRank, RecvLayout::kExpert}) {
      const RecvKernel kernel = RecvKernelOf(layout, quantize, dtype);
      cudaFuncAttributes found{};
      cudaError_t status = cudaFuncGetAttributes(&found, kernel);
      if (status != cudaSuccess) return status;
      status =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(device.max_shared_bytes - found.sharedSizeBytes));
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  });
}

cudaError_t LaunchDispatchSend(const LowLatencyDispatch& launch, int32_t* flight,
                               const DeviceTraits& device, int num_sms, cudaStream_t stream) {
  LaunchConfig config = ConfigOf(launch, device, num_sms, stream);
  config.shared_bytes = 0;
  return Launch(SendKernelOf(launch.args.quantize, launch.args.dtype), config, launch, flight);
}

cudaError_t LaunchDispatchRecv(const LowLatencyDispatch& launch, const int32_t* flight,
                               const DeviceTraits& device, int num_sms, cudaStream_t stream) {
  const DispatchArgs& args = launch.args;
  return Launch(RecvKernelOf(args.shape.layout, args.quantize, args.dtype),
                ConfigOf(launch, device, num_sms, stream), launch, ResultsOf(args), flight);
}

namespace {

// What both halves have in common.
struct Half {
  DeviceCall call;
  LowLatencyDispatch launch;
};

ffi::Error MakeHalf(const DeviceContext& context, const int32_t* position, const DispatchArgs& args,
                    int64_t num_sms, Half& half) {
  JAX_EP_REQUIRE(args.shape.num_tokens > 0, context.op(), ": there are no tokens");
  ffi::Error error = CheckRowBytes(context.op(), args);
  if (error.failure()) return error;
  error = FindDevice(context, num_sms, half.call);
  if (error.failure()) return error;
  half.launch = MakeLowLatencyDispatch(half.call.endpoint, position, args);
  return CheckSentTokens(context.op(), half.launch, half.call.endpoint.rooms.in_flight_payload);
}

}  // namespace

template <>
ffi::Error RunDispatchSend<Cuda>(const DeviceContext& context, I32Buffer position,
                                 const DispatchArgs& args, int32_t* flight,
                                 const DispatchSendAttrs& attrs) {
  Half half{};
  ffi::Error error = MakeHalf(context, position.typed_data(), args, attrs.num_sms, half);
  if (error.failure()) return error;
  return CudaError(context.op(), LaunchDispatchSend(half.launch, flight, half.call.member->traits,
                                                    half.call.num_sms, context.stream));
}

template <>
ffi::Error RunDispatchRecv<Cuda>(const DeviceContext& context, I32Buffer position,
                                 const DispatchArgs& args, const int32_t* flight,
                                 const DispatchAttrs& attrs) {
  Half half{};
  ffi::Error error = MakeHalf(context, position.typed_data(), args, attrs.num_sms, half);
  if (error.failure()) return error;
  error = CheckReceivedTokens(context.op(), half.launch);
  if (error.failure()) return error;
  return CudaError(context.op(), LaunchDispatchRecv(half.launch, flight, half.call.member->traits,
                                                    half.call.num_sms, context.stream));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatchSendCuda, DispatchSend<Cuda>,
                              BindingOf(DispatchSend<Cuda>), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatchRecvCuda, DispatchRecv<Cuda>,
                              BindingOf(DispatchRecv<Cuda>), {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
