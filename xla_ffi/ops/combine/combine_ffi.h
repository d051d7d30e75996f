// The handler of combine for both back ends: operands, results and attributes in their order.
#pragma once

#include <string_view>

#include "ops/combine/combine.h"
#include "ops/ffi_checks.h"

namespace jax_ep {

/// Attributes, which the primitive of combine sets in Python.
struct CombineAttrs {
  std::string_view call;
  int64_t has_rank_mask;
  int64_t has_weights;
  RecvLayout layout;
  ExchangeMode mode;
  int64_t num_biases;
  int64_t num_sms;
  Quantize wire;
};

/// Runs the operation; each back end defines it. `workspace` is scratch, which `cpu` does not need.
template <typename Backend>
typename Backend::Status RunCombine(const typename Backend::Context& context, I32Buffer position,
                                    const CombineArgs& args, const CombineAttrs& attrs,
                                    ffi::AnyBuffer workspace);

/// Reads the operands and the result of a combine, and calls `run` with them. Operands behind the
/// biases only order the call.
template <typename Backend, typename Run>
typename Backend::Status DecodeCombine(const typename Backend::Context& context,
                                       I32Buffer send_rank, I32Buffer send_row, I32Buffer recv_src,
                                       I32Buffer recv_k, F32Buffer weights, ffi::AnyBuffer rows,
                                       ffi::RemainingArgs biases, ffi::Result<ffi::AnyBuffer> out,
                                       const CombineAttrs& attrs, Run&& run) {
  const bool is_rank_layout = attrs.layout == RecvLayout::kRank;
  CombineArgs args{.layout = attrs.layout,
                   .dtype = DType::kF32,
                   .num_ranks = context.num_ranks(),
                   .num_slots = static_cast<int>(Dim(send_row, 1)),
                   .num_tokens = Dim(send_row, 0),
                   .recv_capacity = Dim(rows, 0),
                   .hidden = Dim(rows, 1),
                   .wire = attrs.wire,
                   .send_rank = is_rank_layout ? nullptr : send_rank.typed_data(),
                   .send_row = send_row.typed_data(),
                   .recv_src = nullptr,
                   .recv_k = nullptr,
                   .weights = attrs.has_weights ? weights.typed_data() : nullptr,
                   .rows = rows.untyped_data(),
                   .num_biases = static_cast<int>(attrs.num_biases),
                   .biases = {},
                   .out = out->untyped_data()};
  ffi::Error error = DecodeDType(context.op(), rows, args.dtype);
  if (error.failure()) return Refusal(error);
  JAX_EP_REQUIRE(args.dtype != DType::kI32, context.op(), ": rows must be bf16, f16 or f32");
  JAX_EP_REQUIRE(is_rank_layout ? args.num_slots == args.num_ranks
                                : send_rank.element_count() == send_row.element_count(),
                 context.op(), ": send_rank and send_row do not fit the layout");
  JAX_EP_REQUIRE(
      !attrs.has_weights || weights.element_count() == static_cast<size_t>(args.recv_capacity),
      context.op(), ": weights has ", weights.element_count(), " elements, recv_capacity is ",
      args.recv_capacity);
  JAX_EP_REQUIRE(Dim(*out, 0) == args.num_tokens && Dim(*out, 1) == args.hidden &&
                     out->element_type() == rows.element_type(),
                 context.op(), ": the result does not fit rows and send_row");
  JAX_EP_REQUIRE(attrs.wire == Quantize::kNone ||
                     (attrs.wire == Quantize::kFp8 && args.hidden % kFp8Block == 0),
                 context.op(), ": sums of ", args.hidden, " elements cannot be rounded so");
  if (attrs.mode == ExchangeMode::kLowLatency) {
    const auto capacity = static_cast<size_t>(args.recv_capacity);
    JAX_EP_REQUIRE(recv_src.element_count() == capacity &&
                       (is_rank_layout || recv_k.element_count() == capacity),
                   context.op(), ": recv_src and recv_k do not fit rows");
    args.recv_src = recv_src.typed_data();
    args.recv_k = is_rank_layout ? nullptr : recv_k.typed_data();
  }
  JAX_EP_REQUIRE(attrs.num_biases >= 0 && attrs.num_biases <= kMaxBiases &&
                     biases.size() >= static_cast<size_t>(attrs.num_biases),
                 context.op(), ": ", attrs.num_biases, " biases; at most ", kMaxBiases);
  for (int i = 0; i < args.num_biases; ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> bias = biases.get<ffi::AnyBuffer>(i);
    if (!bias.has_value()) return Refusal(bias.error());
    JAX_EP_REQUIRE(bias->element_count() == out->element_count() &&
                       bias->element_type() == out->element_type(),
                   context.op(), ": bias ", i, " does not fit the result");
    args.biases[i] = bias->untyped_data();
  }
  return run(args);
}

/// The handler. send_rank and recv_k are read in the expert layout, and weights if has_weights.
/// recv_src, recv_k and, if has_rank_mask, rank_mask are read in the mode low_latency only.
template <typename Backend>
typename Backend::Status Combine(typename Backend::Context context, I32Buffer position,
                                 I32Buffer send_rank, I32Buffer send_row, I32Buffer recv_src,
                                 I32Buffer recv_k, F32Buffer weights, BoolBuffer rank_mask,
                                 ffi::AnyBuffer rows, ffi::RemainingArgs biases,
                                 ffi::Result<ffi::AnyBuffer> out, BoolResult rank_mask_after,
                                 ffi::Result<ffi::AnyBuffer> workspace, CombineAttrs attrs) {
  const int num_ranks = context.num_ranks();
  JAX_EP_REQUIRE(!attrs.has_rank_mask || (attrs.mode == ExchangeMode::kLowLatency &&
                                          RankMasksFit(rank_mask, *rank_mask_after, num_ranks)),
                 context.op(), ": rank_mask does not fit num_ranks=", num_ranks);
  return DecodeCombine<Backend>(
      context, send_rank, send_row, recv_src, recv_k, weights, rows, biases, out, attrs,
      [&](CombineArgs args) {
        args.rank_mask = attrs.has_rank_mask ? rank_mask.typed_data() : nullptr;
        args.rank_mask_after = attrs.has_rank_mask ? rank_mask_after->typed_data() : nullptr;
        return RunCombine<Backend>(context, position, args, attrs, *workspace);
      });
}

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_ep::CombineAttrs, StructMember<std::string_view>("call"),
                                      StructMember<int64_t>("has_rank_mask"),
                                      StructMember<int64_t>("has_weights"),
                                      StructMember<jax_ep::RecvLayout>("layout"),
                                      StructMember<jax_ep::ExchangeMode>("mode"),
                                      StructMember<int64_t>("num_biases"),
                                      StructMember<int64_t>("num_sms"),
                                      StructMember<jax_ep::Quantize>("wire"));
