#include <cuda_runtime.h>

#include <algorithm>

#include "device/launch.cuh"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "ops/dispatch/low_latency_cuda.cuh"

namespace jax_ep {
namespace {

constexpr int kMinWarps = 4;

using Kernel = void (*)(LowLatencyDispatch, Results);

template <typename Source, RecvLayout kLayout>
Kernel KernelOf(bool leaves_out) {
  return leaves_out ? MaskedLowLatencyDispatchKernel<kLayout, Source>
                    : LowLatencyDispatchKernel<kLayout, Source>;
}

template <typename Source>
Kernel KernelOf(RecvLayout layout, bool leaves_out) {
  return layout == RecvLayout::kRank ? KernelOf<Source, RecvLayout::kRank>(leaves_out)
                                     : KernelOf<Source, RecvLayout::kExpert>(leaves_out);
}

Kernel KernelOf(RecvLayout layout, Quantize quantize, DType dtype, bool leaves_out) {
  if (quantize == Quantize::kNone) return KernelOf<Unchanged>(layout, leaves_out);
  switch (dtype) {
    case DType::kBF16:
      return KernelOf<__nv_bfloat162>(layout, leaves_out);
    case DType::kF16:
      return KernelOf<__half2>(layout, leaves_out);
    case DType::kF32:
      return KernelOf<float>(layout, leaves_out);
    case DType::kI32:
      break;  // refused at the border
  }
  return nullptr;
}

cudaError_t Load(Kernel kernel, const DeviceTraits& device) {
  cudaFuncAttributes found{};
  const cudaError_t status = cudaFuncGetAttributes(&found, kernel);
  if (status != cudaSuccess) return status;
  const size_t room = device.max_shared_bytes - found.sharedSizeBytes;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(room));
}

}  // namespace

size_t LowLatencyTableBytes(const DispatchShape& shape) {
  const size_t words = shape.layout == RecvLayout::kRank
                           ? RoutingTable<RecvLayout::kRank>::Words(shape)
                           : RoutingTable<RecvLayout::kExpert>::Words(shape);
  return words * sizeof(uint32_t);
}

LowLatencyDispatch MakeLowLatencyDispatch(const Endpoint& self, const int32_t* position,
                                          const DispatchArgs& args) {
  return {.self = self,
          .position = position,
          .args = args,
          .groups = TokenGroups::Of(
              [&](int i) { return i < args.num_streams ? args.streams[i].row_bytes : size_t{0}; }),
          .choice_bytes = ChoiceBytes(args.shape.num_tokens, args.shape.num_topk)};
}

cudaError_t LoadLowLatencyDispatchKernels(DeviceTraits& device) {
  for (const RecvLayout layout : {RecvLayout::kRank, RecvLayout::kExpert}) {
    for (const Quantize quantize : {Quantize::kNone, Quantize::kFp8}) {
      for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
        for (const bool leaves_out : {false, true}) {
          const cudaError_t status = Load(KernelOf(layout, quantize, dtype, leaves_out), device);
          if (status != cudaSuccess) return status;
        }
      }
    }
  }
  return cudaSuccess;
}

LaunchConfig ConfigOf(const LowLatencyDispatch& launch, const DeviceTraits& device, int num_sms,
                      cudaStream_t stream) {
  const DispatchArgs& args = launch.args;
  const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t num_units = args.shape.num_tokens * std::max(1, launch.groups.count());
  constexpr int64_t kMaxWarps = kLowLatencyThreads / kWarpSize;
  const int64_t num_warps =
      std::clamp<int64_t>(divide(num_units * launch.self.num_ranks, num_sms), kMinWarps, kMaxWarps);
  return {.num_blocks = static_cast<int>(
              std::min<int64_t>(num_sms, divide(num_units * launch.self.num_ranks, num_warps))),
          .num_threads = static_cast<int>(num_warps * kWarpSize),
          .shared_bytes = LowLatencyTableBytes(args.shape),
          .is_behind = false,
          .priority = device.highest_priority,
          .stream = stream};
}

cudaError_t LaunchLowLatencyDispatch(const LowLatencyDispatch& launch, const DeviceTraits& device,
                                     int num_sms, cudaStream_t stream) {
  const DispatchArgs& args = launch.args;
  const bool leaves_out = args.rank_mask != nullptr;
  return Launch(KernelOf(args.shape.layout, args.quantize, args.dtype, leaves_out),
                ConfigOf(launch, device, num_sms, stream), launch, ResultsOf(args));
}

}  // namespace jax_ep
