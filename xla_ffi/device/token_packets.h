// Sizes of what a rank sends in a low-latency exchange: the choices of its tokens, and their rows.
//
// The room of a sender holds one packet for each two choices of a token, and behind these, for each
// token, the groups of its rows. So the place of a row is known to both sides before anything has
// been sent.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/limits.h"
#include "core/routing.h"
#include "core/row_stream.h"
#include "device/layout.h"

namespace jax_ep {

/// The rows of one token, cut into groups of packets: the groups of the first array come first.
struct TokenGroups {
  int first[kMaxRowStreams + 1];  // number of groups before each array; then of all

  JAX_EP_HOST_DEVICE int count() const { return first[kMaxRowStreams]; }

  /// `row_bytes(i)`: bytes of a row of array i, 0 behind the last array.
  template <typename RowBytes>
  static TokenGroups Of(RowBytes&& row_bytes) {
    TokenGroups groups{};
    for (int i = 0; i < kMaxRowStreams; ++i) {
      const size_t bytes = row_bytes(i);
      const size_t count = (bytes + kPacketGroupPayload - 1) / kPacketGroupPayload;
      groups.first[i + 1] = groups.first[i] + static_cast<int>(count);
    }
    return groups;
  }
};

/// Packets of the choices of one token; each packet holds two.
JAX_EP_HOST_DEVICE constexpr int ChoicePackets(int num_topk) { return (num_topk + 1) / 2; }
inline constexpr int kChoicePacketBytes = 16;

/// Bytes of the choices of all tokens of one rank, in the room of that rank.
JAX_EP_HOST_DEVICE constexpr int64_t ChoiceBytes(int64_t num_tokens, int num_topk) {
  return AlignUp(num_tokens * ChoicePackets(num_topk) * kChoicePacketBytes, kPacketGroupBytes);
}

/// Bytes that one rank sends to another in one exchange. A combine has no choices: num_topk is 0.
JAX_EP_HOST_DEVICE constexpr int64_t TokenPacketBytes(int64_t num_tokens, int num_topk,
                                                      int num_groups) {
  return ChoiceBytes(num_tokens, num_topk) +
         num_tokens * num_groups * static_cast<int64_t>(kPacketGroupBytes);
}

/// Stands for no expert among choices that are sent.
inline constexpr uint32_t kNoPacketExpert = kMaxPacketExperts;

}  // namespace jax_ep
