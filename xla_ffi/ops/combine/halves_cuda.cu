#include <cuda_runtime.h>

#include "device/launch.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/combine/few_tokens_cuda.h"
#include "ops/combine/halves_cuda.cuh"
#include "ops/combine/halves_ffi.h"
#include "ops/cuda_op.h"
#include "ops/handlers.h"

namespace jax_ep {
namespace {

using SendKernel = void (*)(LowLatencyCombine, int32_t*);
using RecvKernel = void (*)(LowLatencyCombine, const int32_t*);

// The kernels of a type of rows, of a layout, with sums that are rounded or not.
struct Halves {
  SendKernel send;
  RecvKernel recv;

  template <typename Element, RecvLayout kLayout, bool kIsRounded>
  static Halves Make() {
    return {CombineSendKernel<Element, kLayout, kIsRounded>,
            CombineRecvKernel<Element, kLayout, kIsRounded>};
  }
  template <typename Element, RecvLayout kLayout>
  static Halves Make(bool is_rounded) {
    return is_rounded ? Make<Element, kLayout, true>() : Make<Element, kLayout, false>();
  }
  template <typename Element>
  static Halves Make(RecvLayout layout, bool is_rounded) {
    return layout == RecvLayout::kRank ? Make<Element, RecvLayout::kRank>(is_rounded)
                                       : Make<Element, RecvLayout::kExpert>(is_rounded);
  }
  static Halves Of(RecvLayout layout, DType dtype, bool is_rounded) {
    if (dtype == DType::kBF16) return Make<__nv_bfloat162>(layout, is_rounded);
    if (dtype == DType::kF16) return Make<__half2>(layout, is_rounded);
    return Make<float>(layout, is_rounded);  // DType::kI32 is refused at the border
  }
  static Halves Of(const CombineArgs& args) {
    return Of(args.layout, args.dtype, args.wire != Quantize::kNone);
  }
};

template <typename Load>
cudaError_t ForEachHalves(Load&& load) {
  for (const RecvLayout layout : {RecvLayout::kRank, RecvLayout::kExpert}) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      for (const bool is_rounded : {false, true}) {
        const cudaError_t status = load(Halves::Of(layout, dtype, is_rounded));
        if (status != cudaSuccess) return status;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t LoadCombineSendKernels(DeviceTraits& device) {
  return ForEachHalves([&](const Halves& halves) {
    cudaFuncAttributes found{};
    const cudaError_t status = cudaFuncGetAttributes(&found, halves.send);
    if (status != cudaSuccess) return status;
    return cudaFuncSetAttribute(halves.send, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(device.max_shared_bytes - found.sharedSizeBytes));
  });
}

cudaError_t LoadCombineRecvKernels(DeviceTraits&) {
  return ForEachHalves([](const Halves& halves) {
    cudaFuncAttributes found{};
    return cudaFuncGetAttributes(&found, halves.recv);
  });
}

cudaError_t LaunchCombineSend(const LowLatencyCombine& launch, int32_t* flight,
                              const DeviceTraits& device, cudaStream_t stream) {
  return Launch(Halves::Of(launch.args).send, ConfigOf(launch, device, stream), launch, flight);
}

cudaError_t LaunchCombineRecv(const LowLatencyCombine& launch, const int32_t* flight,
                              const DeviceTraits& device, cudaStream_t stream) {
  LaunchConfig config = ConfigOf(launch, device, stream);
  config.shared_bytes = 0;
  return Launch(Halves::Of(launch.args).recv, config, launch, flight);
}

namespace {

// What both halves have in common.
struct Half {
  DeviceCall call;
  LowLatencyCombine launch;
};

ffi::Error MakeHalf(const DeviceContext& context, const int32_t* position, const CombineArgs& args,
                    int64_t num_sms, Half& half) {
  ffi::Error error = FindDevice(context, num_sms, half.call);
  if (error.failure()) return error;
  half.launch = MakeLowLatencyCombine(half.call.endpoint, position, args, half.call.num_sms);
  error = CheckRows(context.op(), args, half.launch.row_bytes());
  if (error.failure()) return error;
  return CheckFewTokens(context.op(), half.launch, half.call.endpoint.rooms.in_flight_payload);
}

}  // namespace

template <>
ffi::Error RunCombineSend<Cuda>(const DeviceContext& context, I32Buffer position,
                                const CombineArgs& args, int32_t* flight,
                                const CombineSendAttrs& attrs) {
  Half half{};
  ffi::Error error = MakeHalf(context, position.typed_data(), args, attrs.num_sms, half);
  if (error.failure()) return error;
  return CudaError(context.op(), LaunchCombineSend(half.launch, flight, half.call.member->traits,
                                                   context.stream));
}

template <>
ffi::Error RunCombineRecv<Cuda>(const DeviceContext& context, I32Buffer position,
                                const CombineArgs& args, const int32_t* flight,
                                const CombineAttrs& attrs) {
  Half half{};
  ffi::Error error = MakeHalf(context, position.typed_data(), args, attrs.num_sms, half);
  if (error.failure()) return error;
  return CudaError(context.op(), LaunchCombineRecv(half.launch, flight, half.call.member->traits,
                                                   context.stream));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineSendCuda, CombineSend<Cuda>, BindingOf(CombineSend<Cuda>),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineRecvCuda, CombineRecv<Cuda>, BindingOf(CombineRecv<Cuda>),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
