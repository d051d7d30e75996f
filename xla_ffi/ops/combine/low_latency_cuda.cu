#include <cuda_runtime.h>

#include <algorithm>

#include "device/launch.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/combine/low_latency_cuda.cuh"

namespace jax_ep {
namespace {

constexpr int kMinWarps = 4;

using Kernel = void (*)(LowLatencyCombine);

template <RecvLayout kLayout>
Kernel KernelOf(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return LowLatencyCombineKernel<__nv_bfloat162, kLayout>;
    case DType::kF16:
      return LowLatencyCombineKernel<__half2, kLayout>;
    case DType::kF32:
      return LowLatencyCombineKernel<float, kLayout>;
    case DType::kI32:
      break;  // refused at the border
  }
  return nullptr;
}

Kernel KernelOf(RecvLayout layout, DType dtype) {
  return layout == RecvLayout::kRank ? KernelOf<RecvLayout::kRank>(dtype)
                                     : KernelOf<RecvLayout::kExpert>(dtype);
}

}  // namespace

LowLatencyCombine MakeLowLatencyCombine(const Endpoint& self, const int32_t* position,
                                        const CombineArgs& args, int num_sms) {
  LowLatencyCombine launch{
      .self = self, .position = position, .args = args, .num_groups = 0, .tokens_per_block = 0};
  launch.num_groups =
      static_cast<int>((launch.row_bytes() + kPacketGroupPayload - 1) / kPacketGroupPayload);
  launch.tokens_per_block = static_cast<int>((args.num_tokens + num_sms - 1) / num_sms);
  return launch;
}

size_t LowLatencyCombineSharedBytes(const LowLatencyCombine& launch) {
  return sizeof(int32_t) * launch.args.num_ranks * launch.tokens_per_block * launch.held_slots();
}

cudaError_t LoadLowLatencyCombineKernels(DeviceTraits& device) {
  for (const RecvLayout layout : {RecvLayout::kRank, RecvLayout::kExpert}) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      const Kernel kernel = KernelOf(layout, dtype);
      cudaFuncAttributes found{};
      cudaError_t status = cudaFuncGetAttributes(&found, kernel);
      if (status == cudaSuccess) {
        status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(device.max_shared_bytes - found.sharedSizeBytes));
      }
      if (status != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchLowLatencyCombine(const LowLatencyCombine& launch, const DeviceTraits& device,
                                    cudaStream_t stream) {
  const CombineArgs& args = launch.args;
  constexpr int64_t kMaxWarps = kLowLatencyCombineThreads / kWarpSize;
  const int64_t num_units = int64_t{args.num_ranks} * launch.tokens_per_block * launch.num_groups;
  const LaunchConfig config{
      .num_blocks = static_cast<int>((args.num_tokens + launch.tokens_per_block - 1) /
                                     launch.tokens_per_block),
      .num_threads =
          static_cast<int>(std::clamp<int64_t>(num_units, kMinWarps, kMaxWarps) * kWarpSize),
      .shared_bytes = LowLatencyCombineSharedBytes(launch),
      .is_behind = false,
      .priority = device.highest_priority,
      .stream = stream};
  return Launch(KernelOf(args.layout, args.dtype), config, launch);
}

}  // namespace jax_ep
