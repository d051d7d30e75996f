// The border of combine: operands, results and attributes in their order, for all twins.
#pragma once

#include <utility>

#include "ops/combine/combine.h"
#include "ops/ffi_checks.h"

namespace jax_ep {

/// Appends what combine takes and gives to a binding that already names the twin's contexts.
template <typename Binding>
auto BindCombine(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<I32Buffer>()       // position [1]
      .template Arg<I32Buffer>()       // send_rank, read in the expert layout
      .template Arg<I32Buffer>()       // send_row
      .template Arg<F32Buffer>()       // weights, read if has_weights
      .template Arg<ffi::AnyBuffer>()  // rows
      .RemainingArgs()                 // biases
      .template Ret<ffi::AnyBuffer>()  // out
      .template Ret<ffi::AnyBuffer>()  // workspace, of the twins that need one
      .template Attr<std::string_view>("call")
      .template Attr<int64_t>("has_weights")
      .template Attr<int64_t>("layout")
      .template Attr<int64_t>("num_sms");
}

/// The operands and results as XLA hands them over; the order is that of BindCombine.
struct CombineBuffers {
  I32Buffer send_rank, send_row;
  F32Buffer weights;
  ffi::AnyBuffer rows;
  ffi::RemainingArgs biases;
  ffi::AnyBuffer out;
  int64_t has_weights;
  int64_t layout;
};

inline ffi::Error DecodeCombine(CombineBuffers b, int num_ranks, CombineArgs& args) {
  ffi::Error error = DecodeDType("combine", b.rows, args.dtype);
  if (error.failure()) return error;
  JAX_EP_REQUIRE(args.dtype != DType::kI32, "combine: rows must be bf16, f16 or f32");
  args.layout = static_cast<RecvLayout>(b.layout);
  args.num_ranks = num_ranks;
  args.num_tokens = Dim(b.send_row, 0);
  args.num_slots = static_cast<int>(Dim(b.send_row, 1));
  args.recv_capacity = Dim(b.rows, 0);
  args.hidden = Dim(b.rows, 1);
  const bool is_rank_layout = args.layout == RecvLayout::kRank;
  JAX_EP_REQUIRE(is_rank_layout ? args.num_slots == num_ranks
                                : b.send_rank.element_count() == b.send_row.element_count(),
                 "combine: send_rank and send_row do not fit the layout");
  JAX_EP_REQUIRE(
      !b.has_weights || b.weights.element_count() == static_cast<size_t>(args.recv_capacity),
      "combine: weights has ", b.weights.element_count(), " elements, recv_capacity is ",
      args.recv_capacity);
  JAX_EP_REQUIRE(Dim(b.out, 0) == args.num_tokens && Dim(b.out, 1) == args.hidden &&
                     b.out.element_type() == b.rows.element_type(),
                 "combine: the result does not fit rows and send_row");
  JAX_EP_REQUIRE(b.biases.size() <= kMaxBiases, "combine: ", b.biases.size(), " biases; at most ",
                 kMaxBiases);
  args.send_rank = is_rank_layout ? nullptr : b.send_rank.typed_data();
  args.send_row = b.send_row.typed_data();
  args.weights = b.has_weights ? b.weights.typed_data() : nullptr;
  args.rows = b.rows.untyped_data();
  args.out = b.out.untyped_data();
  args.num_biases = static_cast<int>(b.biases.size());
  for (int i = 0; i < args.num_biases; ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> bias = b.biases.get<ffi::AnyBuffer>(i);
    if (!bias.has_value()) return bias.error();
    JAX_EP_REQUIRE(bias->element_count() == b.out.element_count() &&
                       bias->element_type() == b.out.element_type(),
                   "combine: bias ", i, " does not fit the result");
    args.biases[i] = bias->untyped_data();
  }
  return ffi::Error::Success();
}

}  // namespace jax_ep
