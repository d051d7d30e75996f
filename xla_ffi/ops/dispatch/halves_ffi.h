// The handlers of the halves of a dispatch of few tokens, for both back ends: operands, results and
// attributes in their order.
//
// The halves are joined by `flight`, which the send makes and the receive takes, beside the same
// topk_idx, topk_weights and rows. On `cuda` the send is the transfer. On `cpu` the send counts the
// flight, and the receive is the whole exchange.
#pragma once

#include <string_view>

#include "ops/dispatch/dispatch_ffi.h"

namespace jax_ep {

/// Attributes, which the primitive of dispatch_send sets in Python.
struct DispatchSendAttrs {
  std::string_view call;
  int64_t has_weights;
  int64_t num_experts;
  int64_t num_rows;  // arrays of rows
  int64_t num_sms;
  Quantize quantize;
};

/// Run the operations; each back end defines them. A send has no results in `args`.
template <typename Backend>
typename Backend::Status RunDispatchSend(const typename Backend::Context& context,
                                         I32Buffer position, const DispatchArgs& args,
                                         int32_t* flight, const DispatchSendAttrs& attrs);
template <typename Backend>
typename Backend::Status RunDispatchRecv(const typename Backend::Context& context,
                                         I32Buffer position, const DispatchArgs& args,
                                         const int32_t* flight, const DispatchAttrs& attrs);

/// The handler of a send. Behind the rows come operands that only order the call, and those that
/// are passed through: their results lie in the same memory.
template <typename Backend>
typename Backend::Status DispatchSend(typename Backend::Context context, I32Buffer position,
                                      I32Buffer topk_idx, F32Buffer topk_weights,
                                      ffi::RemainingArgs rows, I32Result flight, ffi::RemainingRets,
                                      DispatchSendAttrs attrs) {
  const int num_ranks = context.num_ranks();
  const int64_t num_tokens = Dim(topk_idx, 0);
  JAX_EP_REQUIRE(attrs.num_experts > 0 && attrs.num_experts % num_ranks == 0, context.op(),
                 ": num_experts=", attrs.num_experts,
                 " must be a multiple of num_ranks=", num_ranks);
  JAX_EP_REQUIRE(!attrs.has_weights || topk_weights.element_count() == topk_idx.element_count(),
                 context.op(), ": topk_weights does not fit topk_idx");
  JAX_EP_REQUIRE(flight->element_count() == kFlightWords, context.op(), ": flight has ",
                 flight->element_count(), " elements");
  DispatchArgs args{};
  args.shape.experts = {.num_experts = static_cast<int>(attrs.num_experts), .num_ranks = num_ranks};
  args.shape.num_tokens = num_tokens;
  args.shape.num_topk = static_cast<int>(Dim(topk_idx, 1));
  args.quantize = attrs.quantize;
  args.topk_idx = topk_idx.typed_data();
  args.topk_weights = attrs.has_weights ? topk_weights.typed_data() : nullptr;
  const int64_t num_scales = attrs.quantize == Quantize::kNone ? 0 : 1;
  JAX_EP_REQUIRE(attrs.num_rows >= 1 && attrs.num_rows + num_scales <= kMaxRowStreams &&
                     rows.size() >= static_cast<size_t>(attrs.num_rows),
                 context.op(), ": ", attrs.num_rows, " row arrays; at most ", kMaxRowStreams);
  args.num_streams = static_cast<int>(attrs.num_rows + num_scales);
  for (int64_t i = 0; i < attrs.num_rows; ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> in = rows.get<ffi::AnyBuffer>(i);
    if (!in.has_value()) return Refusal(in.error());
    JAX_EP_REQUIRE(Dim(*in, 0) == num_tokens, context.op(), ": row array ", i,
                   " does not fit topk_idx");
    RowStream& stream = args.streams[i == 0 ? 0 : i + num_scales];
    stream = {.in = static_cast<const std::byte*>(in->untyped_data()),
              .out = nullptr,
              .row_bytes = RowBytes(*in)};
    if (i > 0 || num_scales == 0) continue;
    ffi::Error error = DecodeDType(context.op(), *in, args.dtype);
    if (error.failure()) return Refusal(error);
    const int64_t hidden = Dim(*in, 1);
    JAX_EP_REQUIRE(args.dtype != DType::kI32 && hidden > 0 && hidden % kFp8Block == 0, context.op(),
                   ": rows cannot be rounded to fp8");
    const size_t scale_bytes = attrs.quantize == Quantize::kFp8E8m0 ? 1 : sizeof(float);
    stream.row_bytes = hidden;
    args.streams[1] = {
        .in = nullptr, .out = nullptr, .row_bytes = hidden / kFp8Block * scale_bytes};
  }
  return RunDispatchSend<Backend>(context, position, args, flight->typed_data(), attrs);
}

/// The handler of a receive: that of a dispatch, with the flight. Operands behind the rows only
/// order the call.
template <typename Backend>
typename Backend::Status DispatchRecv(typename Backend::Context context, I32Buffer position,
                                      I32Buffer flight, I32Buffer topk_idx, F32Buffer topk_weights,
                                      ffi::RemainingArgs rows, I32Result group_sizes,
                                      I32Result num_recv, I32Result num_dropped,
                                      I32Result num_invalid, I32Result recv_src, I32Result recv_k,
                                      I32Result send_row, I32Result recv_topk_idx,
                                      F32Result recv_weights, ffi::RemainingRets recv_rows,
                                      DispatchAttrs attrs) {
  JAX_EP_REQUIRE(flight.element_count() == kFlightWords, context.op(), ": flight has ",
                 flight.element_count(), " elements");
  return DecodeDispatch<Backend>(
      context, topk_idx, topk_weights, rows, group_sizes, num_recv, num_dropped, num_invalid,
      recv_src, recv_k, send_row, recv_topk_idx, recv_weights, recv_rows, attrs,
      [&](const DispatchArgs& args) {
        return RunDispatchRecv<Backend>(context, position, args, flight.typed_data(), attrs);
      });
}

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_ep::DispatchSendAttrs,
                                      StructMember<std::string_view>("call"),
                                      StructMember<int64_t>("has_weights"),
                                      StructMember<int64_t>("num_experts"),
                                      StructMember<int64_t>("num_rows"),
                                      StructMember<int64_t>("num_sms"),
                                      StructMember<jax_ep::Quantize>("quantize"));
