// The handler of dispatch for both back ends: operands, results and attributes in their order.
#pragma once

#include <algorithm>
#include <string_view>

#include "core/limits.h"
#include "ops/dispatch/dispatch.h"
#include "ops/ffi_checks.h"

namespace jax_ep {

/// Attributes, which the primitive of dispatch sets in Python.
struct DispatchAttrs {
  std::string_view call;
  int64_t expert_alignment;
  int64_t expert_stride;
  Fill fill;
  int64_t has_rank_mask;
  int64_t has_weights;
  RecvLayout layout;
  ExchangeMode mode;
  int64_t num_experts;
  int64_t num_parts;
  int64_t num_sms;
  Quantize quantize;
};

/// Runs the operation; each back end defines it. `workspace` is scratch, which `cpu` does not need.
template <typename Backend>
typename Backend::Status RunDispatch(const typename Backend::Context& context, I32Buffer position,
                                     const DispatchArgs& args, const DispatchAttrs& attrs,
                                     ffi::AnyBuffer workspace);

/// Reads the operands and results of a dispatch, and calls `run` with them. Operands behind the
/// rows only order the call.
template <typename Backend, typename Run>
typename Backend::Status DecodeDispatch(const typename Backend::Context& context,
                                        I32Buffer topk_idx, F32Buffer topk_weights,
                                        ffi::RemainingArgs rows, I32Result group_sizes,
                                        I32Result num_recv, I32Result num_dropped,
                                        I32Result num_invalid, I32Result recv_src, I32Result recv_k,
                                        I32Result send_row, I32Result recv_topk_idx,
                                        F32Result recv_weights, ffi::RemainingRets recv_rows,
                                        const DispatchAttrs& attrs, Run&& run) {
  const int num_ranks = context.num_ranks();
  const int64_t tokens_per_rank = Dim(topk_idx, 0);
  const int64_t num_topk = Dim(topk_idx, 1);
  const int64_t recv_capacity = Dim(*recv_src, 0);
  JAX_EP_REQUIRE(attrs.num_experts > 0 && attrs.num_experts % num_ranks == 0, context.op(),
                 ": num_experts=", attrs.num_experts,
                 " must be a multiple of num_ranks=", num_ranks);
  JAX_EP_REQUIRE(
      attrs.expert_alignment > 0 && attrs.expert_alignment <= INT32_MAX / attrs.num_experts,
      context.op(), ": expert_alignment=", attrs.expert_alignment,
      " must be positive, and the aligned groups must be countable in int32");
  const int64_t num_local_experts = attrs.num_experts / num_ranks;
  JAX_EP_REQUIRE(attrs.expert_stride == 0 ||
                     (attrs.layout == RecvLayout::kExpert && attrs.expert_alignment == 1 &&
                      attrs.expert_stride > 0 && attrs.fill != Fill::kZeros &&
                      recv_capacity == num_local_experts * attrs.expert_stride),
                 context.op(), ": expert_stride=", attrs.expert_stride, " does not fit");
  JAX_EP_REQUIRE(std::max(recv_capacity, tokens_per_rank) <=
                     INT32_MAX / (num_ranks * std::max<int64_t>(1, num_topk)),
                 context.op(),
                 ": choices of all ranks must be countable in int32, got recv_capacity=",
                 recv_capacity, ", num_tokens=", tokens_per_rank, ", num_topk=", num_topk);
  JAX_EP_REQUIRE(attrs.num_parts > 0 && attrs.num_parts <= INT32_MAX / num_ranks &&
                     tokens_per_rank % attrs.num_parts == 0,
                 context.op(), ": ", tokens_per_rank,
                 " tokens of a rank must be a multiple of num_parts=", attrs.num_parts);
  JAX_EP_REQUIRE(
      attrs.num_parts == 1 || attrs.mode == ExchangeMode::kThroughput, context.op(),
      ": low_latency takes tokens of one source a rank, got num_parts=", attrs.num_parts);
  DispatchArgs args{.shape = {.layout = attrs.layout,
                              .experts = {.num_experts = static_cast<int>(attrs.num_experts),
                                          .num_ranks = num_ranks},
                              .num_tokens = tokens_per_rank / attrs.num_parts,
                              .num_topk = static_cast<int>(num_topk),
                              .recv_capacity = recv_capacity,
                              .expert_alignment = attrs.expert_alignment,
                              .expert_stride = attrs.expert_stride,
                              .num_parts = static_cast<int>(attrs.num_parts)},
                    .fill = attrs.fill,
                    .quantize = attrs.quantize,
                    .dtype = DType::kF32,
                    .topk_idx = topk_idx.typed_data(),
                    .topk_weights = attrs.has_weights ? topk_weights.typed_data() : nullptr,
                    .num_streams = static_cast<int>(recv_rows.size()),
                    .streams = {},
                    .group_sizes = group_sizes->typed_data(),
                    .num_recv = num_recv->typed_data(),
                    .num_dropped = num_dropped->typed_data(),
                    .num_invalid = num_invalid->typed_data(),
                    .recv_src = recv_src->typed_data(),
                    .recv_k = DataOrNull(*recv_k),
                    .send_row = send_row->typed_data(),
                    .recv_topk_idx = DataOrNull(*recv_topk_idx),
                    .recv_weights = attrs.has_weights ? recv_weights->typed_data() : nullptr};
  const bool is_rank_layout = attrs.layout == RecvLayout::kRank;
  const size_t recv_choices = recv_capacity * num_topk;
  const size_t num_weights = is_rank_layout ? recv_choices : recv_capacity;
  JAX_EP_REQUIRE(
      group_sizes->element_count() == static_cast<size_t>(args.shape.experts.num_local_experts()),
      context.op(), ": group_sizes has ", group_sizes->element_count(), " elements");
  JAX_EP_REQUIRE(send_row->element_count() ==
                     static_cast<size_t>(tokens_per_rank * args.shape.num_send_slots()),
                 context.op(), ": send_row has ", send_row->element_count(), " elements");
  JAX_EP_REQUIRE(recv_k->element_count() == (is_rank_layout ? 0 : size_t(recv_capacity)) &&
                     recv_topk_idx->element_count() == (is_rank_layout ? recv_choices : 0),
                 context.op(), ": the index results do not fit the layout");
  JAX_EP_REQUIRE(!attrs.has_weights || (topk_weights.element_count() == topk_idx.element_count() &&
                                        recv_weights->element_count() == num_weights),
                 context.op(), ": topk_weights does not fit topk_idx");
  const size_t num_scales = attrs.quantize == Quantize::kNone ? 0 : 1;
  JAX_EP_REQUIRE(rows.size() + num_scales >= recv_rows.size() && recv_rows.size() > num_scales &&
                     recv_rows.size() <= kMaxRowStreams,
                 context.op(), ": ", rows.size(), " row arrays in, ", recv_rows.size(),
                 " out; at most ", kMaxRowStreams);
  for (size_t i = 0; i < recv_rows.size(); ++i) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> out = recv_rows.get<ffi::AnyBuffer>(i);
    if (!out.has_value()) return Refusal(out.error());
    const ffi::AnyBuffer to = **out;
    RowStream& stream = args.streams[i];
    stream = {.in = nullptr,
              .out = static_cast<std::byte*>(to.untyped_data()),
              .row_bytes = RowBytes(to)};
    JAX_EP_REQUIRE(Dim(to, 0) == recv_capacity, context.op(), ": row array ", i,
                   " does not fit recv_capacity");
    if (i == 1 && num_scales == 1) continue;  // the scales are made here
    const ffi::ErrorOr<ffi::AnyBuffer> in = rows.get<ffi::AnyBuffer>(i > 1 ? i - num_scales : i);
    if (!in.has_value()) return Refusal(in.error());
    stream.in = static_cast<const std::byte*>(in->untyped_data());
    JAX_EP_REQUIRE(Dim(*in, 0) == tokens_per_rank, context.op(), ": row array ", i,
                   " does not fit topk_idx");
    if (i == 0 && num_scales == 1) {
      ffi::Error error = DecodeDType(context.op(), *in, args.dtype);
      if (error.failure()) return Refusal(error);
      JAX_EP_REQUIRE(
          args.dtype != DType::kI32 && Dim(*in, 1) == Dim(to, 1) && Dim(to, 1) % kFp8Block == 0,
          context.op(), ": rows cannot be rounded to fp8");
      continue;
    }
    JAX_EP_REQUIRE(RowBytes(*in) == stream.row_bytes, context.op(), ": row array ", i,
                   " does not fit its result");
  }
  if (num_scales == 1) {
    const size_t scale_bytes = attrs.quantize == Quantize::kFp8E8m0 ? 1 : sizeof(float);
    JAX_EP_REQUIRE(args.streams[1].row_bytes == args.streams[0].row_bytes / kFp8Block * scale_bytes,
                   context.op(), ": the scales do not fit the rows");
  }
  return run(args);
}

/// The handler. topk_weights are read if has_weights, and rank_mask if has_rank_mask, in the mode
/// low_latency only. Some results may be empty: recv_k in the rank layout, recv_topk_idx in the
/// expert layout, recv_weights without weights.
template <typename Backend>
typename Backend::Status Dispatch(typename Backend::Context context, I32Buffer position,
                                  I32Buffer topk_idx, F32Buffer topk_weights, BoolBuffer rank_mask,
                                  ffi::RemainingArgs rows, I32Result group_sizes,
                                  I32Result num_recv, I32Result num_dropped, I32Result num_invalid,
                                  I32Result recv_src, I32Result recv_k, I32Result send_row,
                                  I32Result recv_topk_idx, F32Result recv_weights,
                                  BoolResult rank_mask_after, ffi::Result<ffi::AnyBuffer> workspace,
                                  ffi::RemainingRets recv_rows, DispatchAttrs attrs) {
  const int num_ranks = context.num_ranks();
  JAX_EP_REQUIRE(!attrs.has_rank_mask || (attrs.mode == ExchangeMode::kLowLatency &&
                                          RankMasksFit(rank_mask, *rank_mask_after, num_ranks)),
                 context.op(), ": rank_mask does not fit num_ranks=", num_ranks);
  return DecodeDispatch<Backend>(
      context, topk_idx, topk_weights, rows, group_sizes, num_recv, num_dropped, num_invalid,
      recv_src, recv_k, send_row, recv_topk_idx, recv_weights, recv_rows, attrs,
      [&](DispatchArgs args) {
        args.rank_mask = attrs.has_rank_mask ? rank_mask.typed_data() : nullptr;
        args.rank_mask_after = attrs.has_rank_mask ? rank_mask_after->typed_data() : nullptr;
        return RunDispatch<Backend>(context, position, args, attrs, *workspace);
      });
}

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_ep::DispatchAttrs, StructMember<std::string_view>("call"),
    StructMember<int64_t>("expert_alignment"), StructMember<int64_t>("expert_stride"),
    StructMember<jax_ep::Fill>("fill"), StructMember<int64_t>("has_rank_mask"),
    StructMember<int64_t>("has_weights"), StructMember<jax_ep::RecvLayout>("layout"),
    StructMember<jax_ep::ExchangeMode>("mode"), StructMember<int64_t>("num_experts"),
    StructMember<int64_t>("num_parts"), StructMember<int64_t>("num_sms"),
    StructMember<jax_ep::Quantize>("quantize"));
