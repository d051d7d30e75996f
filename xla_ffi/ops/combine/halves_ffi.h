// The handlers of the halves of a combine of few tokens, for both back ends: operands, results and
// attributes in their order. The halves are joined as those of a dispatch
// (ops/dispatch/halves_ffi.h).
#pragma once

#include <string_view>

#include "ops/combine/combine_ffi.h"

namespace jax_ep {

/// Attributes, which the primitive of combine_send sets in Python.
struct CombineSendAttrs {
  std::string_view call;
  int64_t has_weights;
  RecvLayout layout;
  int64_t num_sms;
  Quantize wire;
};

/// Run the operations; each back end defines them. A send has neither result nor biases in `args`.
template <typename Backend>
typename Backend::Status RunCombineSend(const typename Backend::Context& context,
                                        I32Buffer position, const CombineArgs& args,
                                        int32_t* flight, const CombineSendAttrs& attrs);
template <typename Backend>
typename Backend::Status RunCombineRecv(const typename Backend::Context& context,
                                        I32Buffer position, const CombineArgs& args,
                                        const int32_t* flight, const CombineAttrs& attrs);

/// The handler of a send. Behind the rows come operands that only order the call, and those that
/// are passed through: their results lie in the same memory. Of send_row only the shape is read.
template <typename Backend>
typename Backend::Status CombineSend(typename Backend::Context context, I32Buffer position,
                                     I32Buffer send_row, I32Buffer recv_src, I32Buffer recv_k,
                                     F32Buffer weights, ffi::AnyBuffer rows, ffi::RemainingArgs,
                                     I32Result flight, ffi::RemainingRets, CombineSendAttrs attrs) {
  const bool is_rank_layout = attrs.layout == RecvLayout::kRank;
  CombineArgs args{};
  args.layout = attrs.layout;
  args.num_ranks = context.num_ranks();
  args.num_slots = static_cast<int>(Dim(send_row, 1));
  args.num_tokens = Dim(send_row, 0);
  args.recv_capacity = Dim(rows, 0);
  args.hidden = Dim(rows, 1);
  args.wire = attrs.wire;
  args.recv_src = recv_src.typed_data();
  args.recv_k = is_rank_layout ? nullptr : recv_k.typed_data();
  args.weights = attrs.has_weights ? weights.typed_data() : nullptr;
  args.rows = rows.untyped_data();
  ffi::Error error = DecodeDType(context.op(), rows, args.dtype);
  if (error.failure()) return Refusal(error);
  const auto capacity = static_cast<size_t>(args.recv_capacity);
  JAX_EP_REQUIRE(args.dtype != DType::kI32, context.op(), ": rows must be bf16, f16 or f32");
  JAX_EP_REQUIRE(!is_rank_layout || args.num_slots == args.num_ranks, context.op(),
                 ": send_row does not fit the layout");
  JAX_EP_REQUIRE(recv_src.element_count() == capacity &&
                     (is_rank_layout || recv_k.element_count() == capacity) &&
                     (!attrs.has_weights || weights.element_count() == capacity),
                 context.op(), ": recv_src, recv_k and weights do not fit rows");
  JAX_EP_REQUIRE(attrs.wire == Quantize::kNone ||
                     (attrs.wire == Quantize::kFp8 && args.hidden % kFp8Block == 0),
                 context.op(), ": sums of ", args.hidden, " elements cannot be rounded so");
  JAX_EP_REQUIRE(flight->element_count() == kFlightWords, context.op(), ": flight has ",
                 flight->element_count(), " elements");
  return RunCombineSend<Backend>(context, position, args, flight->typed_data(), attrs);
}

/// The handler of a receive: that of a combine, with the flight. Operands behind the biases only
/// order the call.
template <typename Backend>
typename Backend::Status CombineRecv(typename Backend::Context context, I32Buffer position,
                                     I32Buffer flight, I32Buffer send_rank, I32Buffer send_row,
                                     I32Buffer recv_src, I32Buffer recv_k, F32Buffer weights,
                                     ffi::AnyBuffer rows, ffi::RemainingArgs biases,
                                     ffi::Result<ffi::AnyBuffer> out, CombineAttrs attrs) {
  JAX_EP_REQUIRE(flight.element_count() == kFlightWords, context.op(), ": flight has ",
                 flight.element_count(), " elements");
  return DecodeCombine<Backend>(context, send_rank, send_row, recv_src, recv_k, weights, rows,
                                biases, out, attrs, [&](const CombineArgs& args) {
                                  return RunCombineRecv<Backend>(context, position, args,
                                                                 flight.typed_data(), attrs);
                                });
}

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_ep::CombineSendAttrs,
                                      StructMember<std::string_view>("call"),
                                      StructMember<int64_t>("has_weights"),
                                      StructMember<jax_ep::RecvLayout>("layout"),
                                      StructMember<int64_t>("num_sms"),
                                      StructMember<jax_ep::Quantize>("wire"));
