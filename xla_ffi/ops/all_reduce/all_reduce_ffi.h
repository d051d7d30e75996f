// The handler of all_reduce for both back ends: operands, results and attributes in their order.
#pragma once

#include <string_view>

#include "ops/all_reduce/all_reduce.h"
#include "ops/ffi_checks.h"

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(jax_ep::Algorithm);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(jax_ep::Movement);

namespace jax_ep {

/// Attributes, which the primitive of all_reduce sets in Python.
struct AllReduceAttrs {
  Algorithm algorithm;
  std::string_view call;
  Movement movement;
};

/// Runs the operation; each back end defines it.
template <typename Backend>
typename Backend::Status RunAllReduce(const typename Backend::Context& context, I32Buffer position,
                                      const AllReduceArgs& args, const AllReduceAttrs& attrs);

template <typename Backend>
typename Backend::Status AllReduce(typename Backend::Context context, I32Buffer position,
                                   ffi::AnyBuffer in, ffi::Result<ffi::AnyBuffer> out,
                                   AllReduceAttrs attrs) {
  AllReduceArgs args{.movement = attrs.movement,
                     .dtype = DType::kF32,
                     .num_ranks = context.num_ranks(),
                     .bytes = static_cast<int64_t>(in.size_bytes()),
                     .in = static_cast<const std::byte*>(in.untyped_data()),
                     .out = static_cast<std::byte*>(out->untyped_data())};
  if (args.movement == Movement::kReduceScatter) args.bytes /= args.num_ranks;
  if (args.movement != Movement::kAllGather) {
    ffi::Error error = DecodeDType(context.op(), in, args.dtype);
    if (error.failure()) return Refusal(error);
  }
  JAX_EP_REQUIRE(in.element_type() == out->element_type() &&
                     args.in_bytes() == static_cast<int64_t>(in.size_bytes()) &&
                     args.out_bytes() == static_cast<int64_t>(out->size_bytes()),
                 context.op(), ": the result does not fit the operand");
  return RunAllReduce<Backend>(context, position, args, attrs);
}

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_ep::AllReduceAttrs,
                                      StructMember<jax_ep::Algorithm>("algorithm"),
                                      StructMember<std::string_view>("call"),
                                      StructMember<jax_ep::Movement>("movement"));
