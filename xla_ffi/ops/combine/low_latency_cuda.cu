#include <cuda_runtime.h>

#include <algorithm>

#include "device/launch.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/combine/low_latency_cuda.cuh"

namespace jax_ep {
namespace {

constexpr int kMinWarps = 4;

using Kernel = void (*)(LowLatencyCombine);

// How a kernel differs from others of its layout and dtype.
struct Variant {
  bool is_rounded;
  bool leaves_out;
};

template <typename Element, RecvLayout kLayout, bool kIsRounded>
Kernel KernelOf(Variant variant) {
  return variant.leaves_out ? MaskedLowLatencyCombineKernel<Element, kLayout, kIsRounded>
                            : LowLatencyCombineKernel<Element, kLayout, kIsRounded>;
}

template <typename Element, RecvLayout kLayout>
Kernel KernelOf(Variant variant) {
  return variant.is_rounded ? KernelOf<Element, kLayout, true>(variant)
                            : KernelOf<Element, kLayout, false>(variant);
}

template <typename Element>
Kernel KernelOf(RecvLayout layout, Variant variant) {
  return layout == RecvLayout::kRank ? KernelOf<Element, RecvLayout::kRank>(variant)
                                     : KernelOf<Element, RecvLayout::kExpert>(variant);
}

Kernel KernelOf(RecvLayout layout, DType dtype, Variant variant) {
  switch (dtype) {
    case DType::kBF16:
      return KernelOf<__nv_bfloat162>(layout, variant);
    case DType::kF16:
      return KernelOf<__half2>(layout, variant);
    case DType::kF32:
      return KernelOf<float>(layout, variant);
    case DType::kI32:
      break;  // refused at the border
  }
  return nullptr;
}

cudaError_t Load(Kernel kernel, const DeviceTraits& device) {
  cudaFuncAttributes found{};
  const cudaError_t status = cudaFuncGetAttributes(&found, kernel);
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(device.max_shared_bytes - found.sharedSizeBytes));
}

}  // namespace

LowLatencyCombine MakeLowLatencyCombine(const Endpoint& self, const int32_t* position,
                                        const CombineArgs& args, int num_sms) {
  LowLatencyCombine launch{
      .self = self, .position = position, .args = args, .groups = {}, .tokens_per_block = 0};
  const bool is_rounded = args.wire != Quantize::kNone;
  launch.groups = TokenGroups::Of([&](int i) -> size_t {
    if (i == 0) return is_rounded ? args.hidden : launch.row_bytes();
    return i == 1 && is_rounded ? args.hidden / kFp8Block * sizeof(float) : 0;
  });
  launch.tokens_per_block = static_cast<int>((args.num_tokens + num_sms - 1) / num_sms);
  return launch;
}

size_t LowLatencyCombineSharedBytes(const LowLatencyCombine& launch) {
  return sizeof(int32_t) * launch.args.num_ranks * launch.tokens_per_block * launch.held_slots();
}

cudaError_t LoadLowLatencyCombineKernels(DeviceTraits& device) {
  for (const RecvLayout layout : {RecvLayout::kRank, RecvLayout::kExpert}) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      for (const bool is_rounded : {false, true}) {
        for (const bool leaves_out : {false, true}) {
          const cudaError_t status =
              Load(KernelOf(layout, dtype, {is_rounded, leaves_out}), device);
          if (status != cudaSuccess) return status;
        }
      }
    }
  }
  return cudaSuccess;
}

LaunchConfig ConfigOf(const LowLatencyCombine& launch, const DeviceTraits& device,
                      cudaStream_t stream) {
  const CombineArgs& args = launch.args;
  const bool is_rounded = args.wire != Quantize::kNone;
  const int64_t max_warps =
      (is_rounded ? kLowLatencyCombineThreads<true> : kLowLatencyCombineThreads<false>) / kWarpSize;
  const int64_t num_units =
      int64_t{args.num_ranks} * launch.tokens_per_block * launch.groups.first[1];
  return {.num_blocks = static_cast<int>((args.num_tokens + launch.tokens_per_block - 1) /
                                         launch.tokens_per_block),
          .num_threads =
              static_cast<int>(std::clamp<int64_t>(num_units, kMinWarps, max_warps) * kWarpSize),
          .shared_bytes = LowLatencyCombineSharedBytes(launch),
          .is_behind = false,
          .priority = device.highest_priority,
          .stream = stream};
}

cudaError_t LaunchLowLatencyCombine(const LowLatencyCombine& launch, const DeviceTraits& device,
                                    cudaStream_t stream) {
  const CombineArgs& args = launch.args;
  const Variant variant{.is_rounded = args.wire != Quantize::kNone,
                        .leaves_out = args.rank_mask != nullptr};
  return Launch(KernelOf(args.layout, args.dtype, variant), ConfigOf(launch, device, stream),
                launch);
}

}  // namespace jax_ep
