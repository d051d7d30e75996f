// The handler of all_reduce_residual_rmsnorm for both back ends: operands, results and attributes
// in their order.
#pragma once

#include <string_view>

#include "ops/all_reduce/all_reduce_ffi.h"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm.h"
#include "ops/ffi_checks.h"

namespace jax_ep {

/// Attributes, which the primitive of all_reduce_residual_rmsnorm sets in Python.
struct RmsNormAttrs {
  Algorithm algorithm;
  std::string_view call;
  float eps;
};

/// Runs the operation; each back end defines it.
template <typename Backend>
typename Backend::Status RunRmsNorm(const typename Backend::Context& context, I32Buffer position,
                                    const RmsNormArgs& args, const RmsNormAttrs& attrs);

template <typename Backend>
typename Backend::Status RmsNorm(typename Backend::Context context, I32Buffer position,
                                 ffi::AnyBuffer x, ffi::AnyBuffer residual, ffi::AnyBuffer scale,
                                 ffi::Result<ffi::AnyBuffer> normed,
                                 ffi::Result<ffi::AnyBuffer> new_residual, RmsNormAttrs attrs) {
  RmsNormArgs args{.dtype = DType::kF32,
                   .has_f32_scale = scale.element_type() == ffi::F32,
                   .num_ranks = context.num_ranks(),
                   .num_rows = Dim(x, 0),
                   .hidden = Dim(x, 1),
                   .eps = attrs.eps,
                   .in = static_cast<const std::byte*>(x.untyped_data()),
                   .residual = static_cast<const std::byte*>(residual.untyped_data()),
                   .scale = static_cast<const std::byte*>(scale.untyped_data()),
                   .normed = static_cast<std::byte*>(normed->untyped_data()),
                   .new_residual = static_cast<std::byte*>(new_residual->untyped_data())};
  ffi::Error error = DecodeDType(context.op(), x, args.dtype);
  if (error.failure()) return Refusal(error);
  JAX_EP_REQUIRE(args.dtype != DType::kI32, context.op(), ": elements must be bf16, f16 or f32");
  JAX_EP_REQUIRE(x.dimensions().size() == 2 && args.hidden > 0, context.op(),
                 ": x must be [rows, hidden]");
  for (const ffi::AnyBuffer& like_x : {residual, *normed, *new_residual}) {
    JAX_EP_REQUIRE(
        like_x.element_type() == x.element_type() && like_x.element_count() == x.element_count(),
        context.op(), ": residual and results must be like x");
  }
  JAX_EP_REQUIRE(scale.element_count() == static_cast<size_t>(args.hidden) &&
                     (args.has_f32_scale || scale.element_type() == x.element_type()),
                 context.op(), ": scale must be [hidden], f32 or of the dtype of x");
  return RunRmsNorm<Backend>(context, position, args, attrs);
}

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_ep::RmsNormAttrs,
                                      StructMember<jax_ep::Algorithm>("algorithm"),
                                      StructMember<std::string_view>("call"),
                                      StructMember<float>("eps"));
