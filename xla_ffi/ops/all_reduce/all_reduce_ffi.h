// The border of all_reduce: operands, results and attributes in their order, for all twins.
#pragma once

#include <utility>

#include "ops/all_reduce/all_reduce.h"
#include "ops/ffi_checks.h"

namespace jax_ep {

/// Appends what all_reduce takes and gives to a binding that already names the twin's contexts.
template <typename Binding>
auto BindAllReduce(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<I32Buffer>()       // position [1]
      .template Arg<ffi::AnyBuffer>()  // in
      .template Ret<ffi::AnyBuffer>()  // out
      .template Attr<int64_t>("algorithm")
      .template Attr<std::string_view>("call")
      .template Attr<int64_t>("movement");
}

inline ffi::Error DecodeAllReduce(ffi::AnyBuffer in, ffi::AnyBuffer out, int64_t movement,
                                  int num_ranks, AllReduceArgs& args) {
  args = {.movement = static_cast<Movement>(movement),
          .dtype = DType::kF32,
          .num_ranks = num_ranks,
          .bytes = static_cast<int64_t>(in.size_bytes()),
          .in = static_cast<const std::byte*>(in.untyped_data()),
          .out = static_cast<std::byte*>(out.untyped_data())};
  if (args.movement == Movement::kReduceScatter) args.bytes /= num_ranks;
  if (args.movement != Movement::kAllGather) {
    ffi::Error error = DecodeDType("all_reduce", in, args.dtype);
    if (error.failure()) return error;
  }
  JAX_EP_REQUIRE(in.element_type() == out.element_type() &&
                     args.in_bytes() == static_cast<int64_t>(in.size_bytes()) &&
                     args.out_bytes() == static_cast<int64_t>(out.size_bytes()),
                 "all_reduce: the result does not fit the operand");
  return ffi::Error::Success();
}

}  // namespace jax_ep
