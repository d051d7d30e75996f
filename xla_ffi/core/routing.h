// The map from experts to ranks, and the rounding of sizes, for host and device.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace jax_ep {

/// Expert e lives on rank e / num_local_experts.
struct ExpertMap {
  int num_experts;
  int num_ranks;

  bool operator==(const ExpertMap&) const = default;
  JAX_EP_HOST_DEVICE constexpr int num_local_experts() const { return num_experts / num_ranks; }
  JAX_EP_HOST_DEVICE constexpr bool IsExpert(int32_t id) const {
    return id >= 0 && id < num_experts;
  }
  /// Whether an id is neither an expert nor kNoIndex: num_invalid counts it, nothing else does.
  JAX_EP_HOST_DEVICE constexpr bool IsInvalid(int32_t id) const {
    return id != kNoIndex && !IsExpert(id);
  }
  JAX_EP_HOST_DEVICE constexpr int RankOf(int32_t expert) const {
    return expert / num_local_experts();
  }
  JAX_EP_HOST_DEVICE constexpr int LocalOf(int32_t expert) const {
    return expert % num_local_experts();
  }
};

/// The smallest multiple of `alignment` (> 0) that is not below `n`.
JAX_EP_HOST_DEVICE constexpr int64_t AlignUp(int64_t n, int64_t alignment) {
  return (n + alignment - 1) / alignment * alignment;
}

}  // namespace jax_ep
