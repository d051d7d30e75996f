// The handler of pull_rows for both back ends: operands, results and attributes in their order.
#pragma once

#include <string_view>

#include "ops/ffi_checks.h"
#include "ops/pull_rows/pull_rows.h"

namespace jax_ep {

/// Attributes, which the primitive of pull_rows sets in Python.
struct PullRowsAttrs {
  std::string_view call;
  int64_t num_sms;
};

/// Runs the operation; each back end defines it.
template <typename Backend>
typename Backend::Status RunPullRows(const typename Backend::Context& context, I32Buffer position,
                                     const PullRowsArgs& args, const PullRowsAttrs& attrs);

/// The handler. `places` is empty if rows are pulled one by one; otherwise `slot` is read.
template <typename Backend>
typename Backend::Status PullRows(typename Backend::Context context, I32Buffer position,
                                  I32Buffer index, I32Buffer slot, ffi::AnyBuffer rows,
                                  ffi::Result<ffi::AnyBuffer> out, I32Result places,
                                  PullRowsAttrs attrs) {
  const int num_ranks = context.num_ranks();
  const PullRowsArgs args{.num_ranks = num_ranks,
                          .num_rows = Dim(rows, 0),
                          .num_pulled = Dim(index, 0),
                          .row_bytes = RowBytes(rows),
                          .index = index.typed_data(),
                          .slot = slot.typed_data(),
                          .num_slots = static_cast<int>(Dim(*places, 1)),
                          .places = DataOrNull(*places),
                          .rows = static_cast<const std::byte*>(rows.untyped_data()),
                          .out = static_cast<std::byte*>(out->untyped_data())};
  JAX_EP_REQUIRE(args.num_pulled <= INT32_MAX && args.num_rows <= INT32_MAX / num_ranks,
                 context.op(),
                 ": rows of all ranks and of the result must be countable in int32, got num_rows=",
                 args.num_rows, " of ", num_ranks, " ranks, num_pulled=", args.num_pulled);
  JAX_EP_REQUIRE(Dim(*out, 0) == args.num_pulled && RowBytes(*out) == args.row_bytes, context.op(),
                 ": the result does not fit index and rows");
  JAX_EP_REQUIRE(
      args.places == nullptr || (Dim(*places, 0) == num_ranks * args.num_rows &&
                                 slot.element_count() == static_cast<size_t>(args.num_pulled)),
      context.op(), ": slot and places do not fit index and rows");
  return RunPullRows<Backend>(context, position, args, attrs);
}

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_ep::PullRowsAttrs, StructMember<std::string_view>("call"),
                                      StructMember<int64_t>("num_sms"));
