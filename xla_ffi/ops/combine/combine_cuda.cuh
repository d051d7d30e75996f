// The kernel of combine, for its handler and for tests.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "device/endpoint.h"
#include "device/token_packets.h"
#include "ops/combine/combine.h"
#include "ops/combine/combine_geometry.h"

namespace jax_ep {

/// Arguments of the kernel.
struct CombineLaunch {
  Endpoint self;
  const int32_t* position;
  CombineArgs args;
  void* workspace;  // workspace_bytes()

  size_t row_bytes() const { return args.hidden * (args.dtype == DType::kF32 ? 4 : 2); }
  int64_t out_bytes() const { return args.num_tokens * static_cast<int64_t>(row_bytes()); }
  PartialRing ring() const {
    return PartialRing::Of(args.layout, args.num_ranks, args.num_tokens, args.num_slots,
                           row_bytes());
  }
  size_t workspace_bytes() const { return ring().Bytes(args.num_ranks, row_bytes()); }
};

/// Arguments of the kernel for few tokens (low_latency_cuda.cuh).
struct LowLatencyCombine {
  Endpoint self;
  const int32_t* position;
  CombineArgs args;
  TokenGroups groups;  // of the sum of a token; the scales are the second array
  int tokens_per_block;

  JAX_EP_HOST_DEVICE size_t row_bytes() const {
    return args.hidden * (args.dtype == DType::kF32 ? 4 : 2);
  }
  /// Rows that this rank may hold of one token.
  JAX_EP_HOST_DEVICE int held_slots() const {
    return args.layout == RecvLayout::kRank ? 1 : args.num_slots;
  }
  /// Bytes that a rank sends to another one.
  int64_t room() const { return TokenPacketBytes(args.num_tokens, 0, groups.count()); }
};

LowLatencyCombine MakeLowLatencyCombine(const Endpoint& self, const int32_t* position,
                                        const CombineArgs& args, int num_sms);
/// Bytes of a block's table, at most kMaxLowLatencyTable.
size_t LowLatencyCombineSharedBytes(const LowLatencyCombine& launch);
cudaError_t LaunchLowLatencyCombine(const LowLatencyCombine& launch, const DeviceTraits& device,
                                    cudaStream_t stream);
cudaError_t LoadLowLatencyCombineKernels(DeviceTraits& device);

struct LaunchConfig;
/// The launch of a kernel for few tokens.
LaunchConfig ConfigOf(const LowLatencyCombine& launch, const DeviceTraits& device,
                      cudaStream_t stream);

/// The halves (halves_cuda.cuh). `flight`: kFlightWords, which joins the halves.
cudaError_t LaunchCombineSend(const LowLatencyCombine& launch, int32_t* flight,
                              const DeviceTraits& device, cudaStream_t stream);
cudaError_t LaunchCombineRecv(const LowLatencyCombine& launch, const int32_t* flight,
                              const DeviceTraits& device, cudaStream_t stream);
cudaError_t LoadCombineSendKernels(DeviceTraits& device);
cudaError_t LoadCombineRecvKernels(DeviceTraits& device);

cudaError_t LaunchCombine(const CombineLaunch& launch, const DeviceTraits& device, int num_sms,
                          cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadCombineKernels(DeviceTraits& device);

/// Indices of a combine's operands in OwnAddresses.
inline constexpr int kRowsAddress = 0;
inline constexpr int kWeightsAddress = 1;
inline constexpr int kSendRankAddress = 2;
inline constexpr int kSendRowAddress = 3;
inline constexpr int kPartialsAddress = 4;
inline constexpr int kNumCombineAddresses = 5;

}  // namespace jax_ep
