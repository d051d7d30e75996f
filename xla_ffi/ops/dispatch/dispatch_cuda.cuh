// The kernels of dispatch, for its handler and for tests.
#pragma once

#include <cuda_runtime_api.h>

#include "device/endpoint.h"
#include "device/token_packets.h"
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

/// Arguments of the kernel for few tokens (low_latency_cuda.cuh).
struct LowLatencyDispatch {
  Endpoint self;
  const int32_t* position;
  DispatchArgs args;
  TokenGroups groups;
  int64_t choice_bytes;  // ChoiceBytes

  /// Bytes of a row of the operand.
  JAX_EP_HOST_DEVICE int64_t in_bytes(int stream) const {
    const auto bytes = static_cast<int64_t>(args.streams[stream].row_bytes);
    if (stream != 0 || args.quantize == Quantize::kNone) return bytes;
    return bytes * (args.dtype == DType::kF32 ? 4 : 2);
  }
  /// Bytes that a rank sends to another one.
  int64_t room() const {
    return TokenPacketBytes(args.shape.num_tokens, args.shape.num_topk, groups.count());
  }
};

LowLatencyDispatch MakeLowLatencyDispatch(const Endpoint& self, const int32_t* position,
                                          const DispatchArgs& args);
/// Bytes of a block's table, at most kMaxLowLatencyTable.
size_t LowLatencyTableBytes(const DispatchShape& shape);
/// Launches the kernel for few tokens. No row may be too many for recv_capacity, unless a token
/// names an expert twice.
cudaError_t LaunchLowLatencyDispatch(const LowLatencyDispatch& launch, const DeviceTraits& device,
                                     int num_sms, cudaStream_t stream);

struct LaunchConfig;
/// The launch of a kernel for few tokens.
LaunchConfig ConfigOf(const LowLatencyDispatch& launch, const DeviceTraits& device, int num_sms,
                      cudaStream_t stream);

struct Results;
/// All results, with the bytes that poison them.
Results ResultsOf(const DispatchArgs& args);

/// Must be called once per device before the first launch.
cudaError_t LoadDispatchKernels(DeviceTraits& device);
cudaError_t LoadLowLatencyDispatchKernels(DeviceTraits& device);

/// The halves (halves_cuda.cuh). A send needs no results in the arguments, a receive all. `flight`:
/// kFlightWords, which joins the halves.
cudaError_t LaunchDispatchSend(const LowLatencyDispatch& launch, int32_t* flight,
                               const DeviceTraits& device, int num_sms, cudaStream_t stream);
cudaError_t LaunchDispatchRecv(const LowLatencyDispatch& launch, const int32_t* flight,
                               const DeviceTraits& device, int num_sms, cudaStream_t stream);
cudaError_t LoadDispatchSendKernels(DeviceTraits& device);
cudaError_t LoadDispatchRecvKernels(DeviceTraits& device);

}  // namespace jax_ep
