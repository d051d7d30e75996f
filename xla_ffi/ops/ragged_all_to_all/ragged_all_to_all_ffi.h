// The handler of ragged_all_to_all for both back ends: operands, results and attributes in their
// order.
#pragma once

#include <string_view>

#include "ops/ffi_checks.h"
#include "ops/ragged_all_to_all/ragged_all_to_all.h"

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(jax_ep::Pieces);

namespace jax_ep {

/// Attributes, which the primitive of ragged_all_to_all sets in Python.
struct RaggedAllToAllAttrs {
  std::string_view call;
  int64_t has_output;
  int64_t num_sms;
  Pieces pieces;
};

/// Runs the operation; each back end defines it.
template <typename Backend>
typename Backend::Status RunRaggedAllToAll(const typename Backend::Context& context,
                                           I32Buffer position, const RaggedAllToAllArgs& args,
                                           const RaggedAllToAllAttrs& attrs);

inline Summand SummandOf(ffi::AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case ffi::BF16:
      return Summand::kBF16;
    case ffi::F16:
      return Summand::kF16;
    case ffi::F32:
    case ffi::C64:
      return Summand::kF32;
    case ffi::F64:
    case ffi::C128:
      return Summand::kF64;
    default:
      return Summand::kNone;
  }
}

/// The handler. `rows` are the arrays to move, and behind them the output if has_output. Operands
/// and results that an exchange does not have are not looked at.
template <typename Backend>
typename Backend::Status RaggedAllToAll(typename Backend::Context context, I32Buffer position,
                                        I32Buffer input_offsets, I32Buffer sizes,
                                        I32Buffer output_offsets, I32Buffer recv_sizes,
                                        ffi::RemainingArgs rows, I32Result places, I32Result counts,
                                        I32Result send_places, I32Result all_recv_sizes,
                                        ffi::RemainingRets moved, RaggedAllToAllAttrs attrs) {
  const std::string& op = context.op();
  const int num_ranks = context.num_ranks();
  const bool has_output = attrs.has_output != 0;
  const bool is_packed = attrs.pieces == Pieces::kPacked;
  const bool is_back = attrs.pieces == Pieces::kBack;
  const size_t num_pieces = sizes.element_count();
  JAX_EP_REQUIRE(num_pieces > 0 && num_pieces <= INT32_MAX && num_pieces % num_ranks == 0, op,
                 ": there are ", num_pieces, " pieces for ", num_ranks, " ranks");
  JAX_EP_REQUIRE(!is_packed || num_pieces == static_cast<size_t>(num_ranks), op, ": there are ",
                 num_pieces, " sizes for ", num_ranks, " ranks");
  JAX_EP_REQUIRE(is_packed || (input_offsets.element_count() == num_pieces &&
                               output_offsets.element_count() == num_pieces),
                 op, ": the offsets do not fit the sizes");
  JAX_EP_REQUIRE(attrs.pieces != Pieces::kGiven || recv_sizes.element_count() == num_pieces, op,
                 ": recv_sizes do not fit the sizes");
  JAX_EP_REQUIRE(
      is_back || (places->element_count() == num_pieces && counts->element_count() == num_pieces),
      op, ": the results do not fit the sizes");
  JAX_EP_REQUIRE(!is_packed || (send_places->element_count() == num_pieces &&
                                all_recv_sizes->element_count() == num_pieces),
                 op, ": the results do not fit the sizes");
  JAX_EP_REQUIRE(moved.size() >= 1 && moved.size() <= kMaxRowStreams &&
                     rows.size() == moved.size() + has_output && (!has_output || moved.size() == 1),
                 op, ": ", rows.size(), " row arrays in, ", moved.size(), " out");
  RaggedAllToAllArgs args{
      .pieces = attrs.pieces,
      .num_ranks = num_ranks,
      .num_pieces = static_cast<int64_t>(num_pieces),
      .num_rows = 0,
      .num_places = 0,
      .keeps_rows = has_output,
      .input_offsets = is_packed ? nullptr : input_offsets.typed_data(),
      .output_offsets = is_packed ? nullptr : output_offsets.typed_data(),
      .sizes = sizes.typed_data(),
      .recv_sizes = attrs.pieces == Pieces::kGiven ? recv_sizes.typed_data() : nullptr,
      .places = is_back ? nullptr : places->typed_data(),
      .counts = is_back ? nullptr : counts->typed_data(),
      .send_places = is_packed ? send_places->typed_data() : nullptr,
      .all_recv_sizes = is_packed ? all_recv_sizes->typed_data() : nullptr,
      .num_streams = static_cast<int>(moved.size()),
      .streams = {},
      .summands = {}};
  for (size_t i = 0; i < moved.size(); ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> in = rows.get<ffi::AnyBuffer>(i);
    if (!in.has_value()) return Refusal(in.error());
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> out = moved.get<ffi::AnyBuffer>(i);
    if (!out.has_value()) return Refusal(out.error());
    const ffi::AnyBuffer to = **out;
    if (i == 0) {
      args.num_rows = Dim(*in, 0);
      args.num_places = Dim(to, 0);
    }
    args.streams[i] = {.in = static_cast<const std::byte*>(in->untyped_data()),
                       .out = static_cast<std::byte*>(to.untyped_data()),
                       .row_bytes = RowBytes(to)};
    args.summands[i] = SummandOf(to);
    JAX_EP_REQUIRE(Dim(*in, 0) == args.num_rows && Dim(to, 0) == args.num_places &&
                       RowBytes(*in) == args.streams[i].row_bytes,
                   op, ": row array ", i, " does not fit its result");
    JAX_EP_REQUIRE(!is_back || args.summands[i] != Summand::kNone, op, ": row array ", i,
                   " cannot be added up");
  }
  JAX_EP_REQUIRE(args.num_rows > 0 && args.num_places > 0 && args.num_places <= INT32_MAX &&
                     args.num_rows <= INT32_MAX / num_ranks,
                 op, ": rows of all ranks and of the result must be countable in int32, got ",
                 args.num_rows, " of ", num_ranks, " ranks, ", args.num_places, " of the result");
  if (has_output) {
    const ffi::ErrorOr<ffi::AnyBuffer> output = rows.get<ffi::AnyBuffer>(1);
    if (!output.has_value()) return Refusal(output.error());
    JAX_EP_REQUIRE(output->untyped_data() == args.streams[0].out, op,
                   ": XLA has not put the result over the output");
  }
  return RunRaggedAllToAll<Backend>(context, position, args, attrs);
}

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_ep::RaggedAllToAllAttrs,
                                      StructMember<std::string_view>("call"),
                                      StructMember<int64_t>("has_output"),
                                      StructMember<int64_t>("num_sms"),
                                      StructMember<jax_ep::Pieces>("pieces"));
