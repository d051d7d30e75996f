// The kernel of combine, for its handler and for tests.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/protocol.h"
#include "ops/combine/combine.h"

namespace jax_ep {

inline constexpr size_t kMaxRingBytes = 32 * 1024 * 1024;
/// A row is summed in up to so many parts, by different warps.
inline constexpr int kMaxRowParts = 4;

/// Expert layout: where a rank leaves, for each of its peers, the sums of a token's rows that it
/// holds: one row crosses to the token's rank instead of several.
///
/// A ring for each peer, in scratch of the call. Token t has place t % num_tokens; PartialCells
/// says of each part of a place when it is filled, and when it may be filled again.
struct PartialRing {
  int32_t num_tokens = 0;  // places; 0: rows cross one by one

  static PartialRing Of(RecvLayout layout, int num_ranks, int64_t num_tokens, int num_slots,
                        size_t row_bytes) {
    if (layout == RecvLayout::kRank || num_ranks == 1 || num_slots == 1) return {};
    const int64_t room = kMaxRingBytes / ((num_ranks - 1) * row_bytes);
    const int64_t most = std::min<int64_t>(room, kMaxPartialCells / (num_ranks * kMaxRowParts));
    return {static_cast<int32_t>(std::min(num_tokens, most))};
  }
  /// The rings of one rank.
  size_t Bytes(int num_ranks, size_t row_bytes) const {
    return num_tokens == 0 ? 0 : (num_ranks - 1) * static_cast<size_t>(num_tokens) * row_bytes;
  }

  /// Of the partial sum that `holder` has for token `token` of rank `owner`, in rows.
  JAX_EP_HOST_DEVICE int64_t Row(int holder, int owner, uint32_t token) const {
    return int64_t{owner < holder ? owner : owner - 1} * num_tokens + token % num_tokens;
  }
};

/// What the kernel gets.
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

cudaError_t LaunchCombine(const CombineLaunch& launch, const DeviceTraits& device, int num_sms,
                          cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadCombineKernels(DeviceTraits& device);

/// Where peers find each operand of a combine (OwnAddresses).
inline constexpr int kRowsAddress = 0;
inline constexpr int kWeightsAddress = 1;
inline constexpr int kSendRankAddress = 2;
inline constexpr int kSendRowAddress = 3;
inline constexpr int kPartialsAddress = 4;
inline constexpr int kNumCombineAddresses = 5;

}  // namespace jax_ep
