// The border of pull_rows: operands, results and attributes in their order, for all twins.
#pragma once

#include <string>
#include <utility>

#include "ops/ffi_checks.h"
#include "ops/pull_rows/pull_rows.h"

namespace jax_ep {

/// Appends what pull_rows takes and gives to a binding that already names the twin's contexts.
template <typename Binding>
auto BindPullRows(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<I32Buffer>()       // position [1]
      .template Arg<I32Buffer>()       // index
      .template Arg<I32Buffer>()       // slot, read if there are places
      .template Arg<ffi::AnyBuffer>()  // rows
      .template Ret<ffi::AnyBuffer>()  // out
      .template Ret<I32Buffer>()       // places, empty when rows are pulled one by one
      .template Attr<std::string_view>("call")
      .template Attr<int64_t>("num_sms");
}

inline ffi::Error DecodePullRows(const std::string& op, I32Buffer index, I32Buffer slot,
                                 ffi::AnyBuffer rows, ffi::AnyBuffer out, I32Buffer places,
                                 int num_ranks, PullRowsArgs& args) {
  args = {.num_ranks = num_ranks,
          .num_rows = Dim(rows, 0),
          .num_pulled = Dim(index, 0),
          .row_bytes = RowBytes(rows),
          .index = index.typed_data(),
          .slot = slot.typed_data(),
          .num_slots = static_cast<int>(Dim(places, 1)),
          .places = DataOrNull(places),
          .rows = static_cast<const std::byte*>(rows.untyped_data()),
          .out = static_cast<std::byte*>(out.untyped_data())};
  JAX_EP_REQUIRE(args.num_pulled <= INT32_MAX && args.num_rows <= INT32_MAX / num_ranks, op,
                 ": rows of all ranks and of the result must be countable in int32, got num_rows=",
                 args.num_rows, " of ", num_ranks, " ranks, num_pulled=", args.num_pulled);
  JAX_EP_REQUIRE(Dim(out, 0) == args.num_pulled && RowBytes(out) == args.row_bytes, op,
                 ": the result does not fit index and rows");
  JAX_EP_REQUIRE(
      args.places == nullptr || (Dim(places, 0) == num_ranks * args.num_rows &&
                                 slot.element_count() == static_cast<size_t>(args.num_pulled)),
      op, ": slot and places do not fit index and rows");
  return ffi::Error::Success();
}

}  // namespace jax_ep
