// The border of pull_rows: operands, results and attributes in their order, for all twins.
#pragma once

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
      .template Arg<ffi::AnyBuffer>()  // rows
      .template Ret<ffi::AnyBuffer>()  // out
      .template Attr<std::string_view>("group")
      .template Attr<int64_t>("num_sms");
}

inline ffi::Error DecodePullRows(I32Buffer index, ffi::AnyBuffer rows, ffi::AnyBuffer out,
                                 int num_ranks, PullRowsArgs& args) {
  args = {.num_ranks = num_ranks,
          .num_rows = Dim(rows, 0),
          .num_pulled = Dim(index, 0),
          .row_bytes = RowBytes(rows),
          .index = index.typed_data(),
          .rows = static_cast<const std::byte*>(rows.untyped_data()),
          .out = static_cast<std::byte*>(out.untyped_data())};
  JAX_EP_REQUIRE(Dim(out, 0) == args.num_pulled && RowBytes(out) == args.row_bytes,
                 "pull_rows: the result does not fit index and rows");
  return ffi::Error::Success();
}

}  // namespace jax_ep
