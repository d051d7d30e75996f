// The rows of the result that one token of a dispatch of few tokens becomes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/packets.cuh"
#include "ops/dispatch/low_latency_choices_cuda.cuh"
#include "ops/dispatch/low_latency_table_cuda.cuh"

namespace jax_ep {

// The rows of this rank that a token becomes. For a whole warp: in the expert layout, each lane has
// the row of one choice.
template <RecvLayout kLayout, typename Call = PushCall>
class TokenRows {
 public:
  __device__ TokenRows(const RoutingTable<kLayout, Call>& table, int source, int token)
      : table_(table), source_(source), token_(token) {
    if constexpr (kLayout == RecvLayout::kRank) {
      row_ = table.RowOfToken(source, token);
      some_ = row_ >= 0 ? 1 : 0;
      return;
    }
    const DispatchShape& shape = table.launch().args.shape;
    if (PacketLane() < shape.num_topk) {
      choice_ = table.ChoiceOf(source, token, PacketLane());
      if (table.IsHere(choice_.expert)) {
        row_ = table.RowOfChoice(source, token, PacketLane(), static_cast<int>(choice_.expert));
      }
    }
    some_ = __ballot_sync(~0u, row_ >= 0);
  }

  __device__ bool IsNone() const { return some_ == 0; }

  template <typename Use>
  __device__ void ForEach(Use&& use) const {
    if constexpr (kLayout == RecvLayout::kRank) {
      use(int64_t{row_});
    } else {
      for (uint32_t lanes = some_; lanes != 0; lanes &= lanes - 1) {
        use(int64_t{__shfl_sync(~0u, row_, __ffs(lanes) - 1)});
      }
    }
  }

  // Writes what the results say of these rows.
  __device__ void WriteIndices() const {
    const DispatchArgs& a = table_.launch().args;
    const auto recv_src = static_cast<int32_t>(source_ * a.shape.num_tokens + token_);
    const int lane = PacketLane();
    if constexpr (kLayout == RecvLayout::kExpert) {
      if (row_ < 0) return;
      a.recv_src[row_] = recv_src;
      a.recv_k[row_] = lane;
      if (a.recv_weights) a.recv_weights[row_] = choice_.weight;
      return;
    }
    if (lane == 0) a.recv_src[row_] = recv_src;
    if (lane >= a.shape.num_topk) return;
    const Choice choice = table_.ChoiceOf(source_, token_, lane);
    const bool is_here = table_.IsHere(choice.expert);
    const int64_t i = int64_t{row_} * a.shape.num_topk + lane;
    a.recv_topk_idx[i] =
        is_here ? a.shape.experts.LocalOf(static_cast<int32_t>(choice.expert)) : kNoIndex;
    if (a.recv_weights) a.recv_weights[i] = is_here ? choice.weight : 0.0f;
  }

 private:
  const RoutingTable<kLayout, Call>& table_;
  const int source_;
  const int token_;
  Choice choice_{kNoPacketExpert, 0.0f};
  int32_t row_ = kNoIndex;
  uint32_t some_ = 0;
};

}  // namespace jax_ep
