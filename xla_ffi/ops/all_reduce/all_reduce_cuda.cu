#include <cuda_runtime.h>

#include <algorithm>

#include "device/launch.cuh"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce/all_reduce_ffi.h"
#include "ops/all_reduce/pull_cuda.cuh"
#include "ops/all_reduce/push_cuda.cuh"
#include "ops/cuda_op.h"
#include "ops/handlers.h"

namespace jax_ep {
namespace {

constexpr int64_t kMinLowLatencyThreads = 128;

// Whether the peers have room for the operand.
bool IsPushed(const AllReduceArgs& args, Algorithm algorithm) {
  const bool is_two_shot = algorithm == Algorithm::kTwoShot;
  const size_t room = is_two_shot ? TwoShotPayload(args.num_ranks) : PushPayload(args.num_ranks);
  return algorithm != Algorithm::kLowLatency && args.bytes <= static_cast<int64_t>(room);
}

using Kernel = void (*)(AllReduceLaunch);

struct Kernels {
  Kernel low_latency;
  Kernel low_latency_whole;  // whole vectors
  Kernel push_one_shot;
  Kernel push_two_shot;  // null: none
  Kernel one_shot;
  Kernel two_shot;  // null: none
};

template <typename Element>
Kernels KernelsOf() {
  if constexpr (std::is_same_v<Element, Byte>) {
    return {LowLatencyKernel<Byte, false>,
            LowLatencyKernel<Byte, true>,
            PushKernel<Byte>,
            nullptr,
            OneShotKernel<Byte>,
            nullptr};
  } else {
    return {
        LowLatencyKernel<Element, false>, LowLatencyKernel<Element, true>, PushKernel<Element>,
        PushTwoShotKernel<Element>,       OneShotKernel<Element>,          TwoShotKernel<Element>};
  }
}

Kernels KernelsOf(Movement movement, DType dtype) {
  if (movement == Movement::kAllGather) return KernelsOf<Byte>();
  switch (dtype) {
    case DType::kBF16:
      return KernelsOf<__nv_bfloat162>();
    case DType::kF16:
      return KernelsOf<__half2>();
    case DType::kF32:
      return KernelsOf<float>();
    case DType::kI32:
      return KernelsOf<uint32_t>();
  }
  return {};
}

}  // namespace

cudaError_t LoadAllReduceKernels(DeviceTraits&) {
  for (const Movement movement : {Movement::kAllReduce, Movement::kAllGather}) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32, DType::kI32}) {
      const Kernels kernels = KernelsOf(movement, dtype);
      for (const Kernel kernel :
           {kernels.low_latency, kernels.low_latency_whole, kernels.push_one_shot,
            kernels.push_two_shot, kernels.one_shot, kernels.two_shot}) {
        cudaFuncAttributes found{};
        if (kernel == nullptr) continue;
        const cudaError_t status = cudaFuncGetAttributes(&found, kernel);
        if (status != cudaSuccess) return status;
      }
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchAllReduce(const AllReduceLaunch& launch, Algorithm algorithm,
                            const DeviceTraits& device, cudaStream_t stream) {
  const AllReduceArgs& args = launch.args;
  const Kernels kernels = KernelsOf(args.movement, args.dtype);
  const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t num_vectors = NumVectors(args.bytes);
  LaunchConfig config{.num_blocks = 1,
                      .num_threads = kReduceThreads,
                      .shared_bytes = 0,
                      .is_behind = false,
                      .priority = device.highest_priority,
                      .stream = stream};
  const int64_t most_blocks = std::min(device.num_sms, kMaxReduceBlocks);
  if (algorithm == Algorithm::kLowLatency) {
    const int64_t wanted = divide(num_vectors, most_blocks * kPair * kWarpSize) * kWarpSize;
    config.num_threads =
        static_cast<int>(std::clamp<int64_t>(wanted, kMinLowLatencyThreads, kReduceThreads));
    config.num_blocks =
        static_cast<int>(std::min(most_blocks, divide(num_vectors, config.num_threads)));
    const bool is_whole = IsWhole(args.bytes, args.in) && IsWhole(args.bytes, args.out);
    return Launch(is_whole ? kernels.low_latency_whole : kernels.low_latency, config, launch);
  }
  const bool is_two_shot = algorithm == Algorithm::kTwoShot;
  const int64_t num_chunks = is_two_shot ? launch.self.num_ranks : 1;
  const int64_t wanted = divide(num_vectors, kReduceThreads * num_chunks);
  config.num_blocks = static_cast<int>(std::min(most_blocks, wanted));
  config.num_threads = static_cast<int>(
      std::min<int64_t>(kReduceThreads, divide(num_vectors, kWarpSize) * kWarpSize));
  const Kernel one_shot = IsPushed(args, algorithm) ? kernels.push_one_shot : kernels.one_shot;
  const Kernel two_shot = IsPushed(args, algorithm) ? kernels.push_two_shot : kernels.two_shot;
  return Launch(is_two_shot ? two_shot : one_shot, config, launch);
}

template <>
ffi::Error RunAllReduce<Cuda>(const DeviceContext& context, I32Buffer position,
                              const AllReduceArgs& args, const AllReduceAttrs& attrs) {
  const Algorithm how = attrs.algorithm;
  const size_t payload = SlotPayload(args.num_ranks);
  JAX_EP_REQUIRE(args.bytes > 0, context.op(), ": there are no elements");
  JAX_EP_REQUIRE(how != Algorithm::kLowLatency || args.bytes <= static_cast<int64_t>(payload),
                 context.op(), ": low_latency takes at most ", payload, " bytes from a rank, got ",
                 args.bytes);
  JAX_EP_REQUIRE(how != Algorithm::kTwoShot || args.movement == Movement::kAllReduce, context.op(),
                 ": two_shot is for all_reduce only");
  DeviceCall call;
  ffi::Error error = FindDevice(context, /*num_sms=*/1, call);
  if (error.failure()) return error;
  AllReduceLaunch launch{.self = call.endpoint, .position = position.typed_data(), .args = args};
  if (how != Algorithm::kLowLatency && !IsPushed(args, how)) {
    Staging staging(call, context.stream);
    staging.Copy(launch.args.in, args.in_bytes());
    if (staging.status() != cudaSuccess) return CudaError(context.op(), staging.status());
  }
  return CudaError(context.op(), LaunchAllReduce(launch, how, call.member->traits, context.stream));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpAllReduceCuda, AllReduce<Cuda>, BindingOf(AllReduce<Cuda>),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
