// The border of dispatch: operands, results and attributes in their order, for all twins.
#pragma once

#include <algorithm>
#include <utility>

#include "ops/dispatch/dispatch.h"
#include "ops/ffi_checks.h"

namespace jax_ep {

/// Appends what dispatch takes and gives to a binding that already names the twin's contexts.
template <typename Binding>
auto BindDispatch(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<I32Buffer>()       // position [1]
      .template Arg<I32Buffer>()       // topk_idx
      .template Arg<F32Buffer>()       // topk_weights, read if has_weights
      .RemainingArgs()                 // row streams
      .template Ret<I32Buffer>()       // group_sizes
      .template Ret<I32Buffer>()       // num_recv
      .template Ret<I32Buffer>()       // num_dropped
      .template Ret<I32Buffer>()       // num_invalid
      .template Ret<I32Buffer>()       // recv_src
      .template Ret<I32Buffer>()       // recv_k, empty in the rank layout
      .template Ret<I32Buffer>()       // send_row
      .template Ret<I32Buffer>()       // recv_topk_idx, empty in the expert layout
      .template Ret<F32Buffer>()       // recv_weights, empty when absent
      .template Ret<ffi::AnyBuffer>()  // workspace, of the twins that need one
      .RemainingRets()                 // row streams
      .template Attr<int64_t>("expert_alignment")
      .template Attr<int64_t>("fill")
      .template Attr<std::string_view>("call")
      .template Attr<int64_t>("has_weights")
      .template Attr<int64_t>("layout")
      .template Attr<int64_t>("num_experts")
      .template Attr<int64_t>("num_sms");
}

/// The operands and results as XLA hands them over; the order is that of BindDispatch.
struct DispatchBuffers {
  I32Buffer topk_idx;
  F32Buffer topk_weights;
  ffi::RemainingArgs rows;
  I32Result group_sizes, num_recv, num_dropped, num_invalid, recv_src, recv_k, send_row,
      recv_topk_idx;
  F32Result recv_weights;
  ffi::RemainingRets recv_rows;
  int64_t expert_alignment;
  int64_t fill;
  int64_t has_weights;
  int64_t layout;
  int64_t num_experts;
};

inline ffi::Error DecodeDispatch(DispatchBuffers b, int num_ranks, DispatchArgs& args) {
  const int64_t num_tokens = Dim(b.topk_idx, 0);
  const int64_t num_topk = Dim(b.topk_idx, 1);
  const int64_t recv_capacity = Dim(*b.recv_src, 0);
  JAX_EP_REQUIRE(b.num_experts > 0 && b.num_experts % num_ranks == 0,
                 "dispatch: num_experts=", b.num_experts,
                 " must be a multiple of num_ranks=", num_ranks);
  JAX_EP_REQUIRE(b.expert_alignment > 0 && b.expert_alignment <= INT32_MAX / b.num_experts,
                 "dispatch: expert_alignment=", b.expert_alignment,
                 " must be positive, and the aligned groups must be countable in int32");
  args.shape = {.layout = static_cast<RecvLayout>(b.layout),
                .experts = {.num_experts = static_cast<int>(b.num_experts), .num_ranks = num_ranks},
                .num_tokens = num_tokens,
                .num_topk = static_cast<int>(num_topk),
                .recv_capacity = recv_capacity,
                .expert_alignment = b.expert_alignment};
  JAX_EP_REQUIRE(num_topk == 0 || std::max(recv_capacity, num_tokens) <=
                                      INT32_MAX / (int64_t{num_ranks} * num_topk),
                 "dispatch: choices of all ranks must be countable in int32, got recv_capacity=",
                 recv_capacity, ", num_tokens=", num_tokens, ", num_topk=", num_topk);
  args.fill = static_cast<Fill>(b.fill);
  const bool is_rank_layout = args.shape.layout == RecvLayout::kRank;
  const size_t recv_choices = recv_capacity * num_topk;
  const size_t recv_weights = is_rank_layout ? recv_choices : recv_capacity;
  JAX_EP_REQUIRE(
      b.group_sizes->element_count() == static_cast<size_t>(args.shape.experts.num_local_experts()),
      "dispatch: group_sizes has ", b.group_sizes->element_count(), " elements");
  JAX_EP_REQUIRE(
      b.send_row->element_count() == static_cast<size_t>(num_tokens * args.shape.num_send_slots()),
      "dispatch: send_row has ", b.send_row->element_count(), " elements");
  JAX_EP_REQUIRE(b.recv_k->element_count() == (is_rank_layout ? 0 : size_t(recv_capacity)) &&
                     b.recv_topk_idx->element_count() == (is_rank_layout ? recv_choices : 0),
                 "dispatch: the index results do not fit the layout");
  JAX_EP_REQUIRE(!b.has_weights || (b.topk_weights.element_count() == b.topk_idx.element_count() &&
                                    b.recv_weights->element_count() == recv_weights),
                 "dispatch: topk_weights does not fit topk_idx");
  args.topk_idx = b.topk_idx.typed_data();
  args.topk_weights = b.has_weights ? b.topk_weights.typed_data() : nullptr;
  args.group_sizes = b.group_sizes->typed_data();
  args.num_recv = b.num_recv->typed_data();
  args.num_dropped = b.num_dropped->typed_data();
  args.num_invalid = b.num_invalid->typed_data();
  args.recv_src = b.recv_src->typed_data();
  args.recv_k = DataOrNull(*b.recv_k);
  args.send_row = b.send_row->typed_data();
  args.recv_topk_idx = DataOrNull(*b.recv_topk_idx);
  args.recv_weights = b.has_weights ? b.recv_weights->typed_data() : nullptr;

  JAX_EP_REQUIRE(b.rows.size() == b.recv_rows.size() && b.rows.size() <= kMaxRowStreams,
                 "dispatch: ", b.rows.size(), " row arrays in, ", b.recv_rows.size(),
                 " out; at most ", kMaxRowStreams);
  args.num_streams = static_cast<int>(b.rows.size());
  for (int i = 0; i < args.num_streams; ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> in = b.rows.get<ffi::AnyBuffer>(i);
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> out = b.recv_rows.get<ffi::AnyBuffer>(i);
    if (!in.has_value()) return in.error();
    if (!out.has_value()) return out.error();
    const ffi::AnyBuffer recv_rows = **out;
    JAX_EP_REQUIRE(Dim(*in, 0) == num_tokens && Dim(recv_rows, 0) == recv_capacity &&
                       RowBytes(*in) == RowBytes(recv_rows),
                   "dispatch: row array ", i, " does not fit topk_idx and recv_capacity");
    args.streams[i] = {.in = static_cast<const std::byte*>(in->untyped_data()),
                       .out = static_cast<std::byte*>(recv_rows.untyped_data()),
                       .row_bytes = RowBytes(*in)};
  }
  return ffi::Error::Success();
}

}  // namespace jax_ep
