// The border of all_reduce_residual_rmsnorm: operands, results and attributes in their order.
#pragma once

#include <utility>

#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm.h"
#include "ops/ffi_checks.h"

namespace jax_ep {

/// Appends what it takes and gives to a binding that already names the twin's contexts.
template <typename Binding>
auto BindRmsNorm(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<I32Buffer>()       // position [1]
      .template Arg<ffi::AnyBuffer>()  // x
      .template Arg<ffi::AnyBuffer>()  // residual
      .template Arg<ffi::AnyBuffer>()  // scale
      .template Ret<ffi::AnyBuffer>()  // normed
      .template Ret<ffi::AnyBuffer>()  // new_residual
      .template Attr<int64_t>("algorithm")
      .template Attr<float>("eps")
      .template Attr<std::string_view>("call");
}

struct RmsNormBuffers {
  ffi::AnyBuffer x, residual, scale, normed, new_residual;
  float eps;
};

inline ffi::Error DecodeRmsNorm(RmsNormBuffers b, int num_ranks, RmsNormArgs& args) {
  constexpr const char* kOp = "all_reduce_residual_rmsnorm";
  args = {.dtype = DType::kF32,
          .has_f32_scale = b.scale.element_type() == ffi::F32,
          .num_ranks = num_ranks,
          .num_rows = Dim(b.x, 0),
          .hidden = Dim(b.x, 1),
          .eps = b.eps,
          .in = static_cast<const std::byte*>(b.x.untyped_data()),
          .residual = static_cast<const std::byte*>(b.residual.untyped_data()),
          .scale = static_cast<const std::byte*>(b.scale.untyped_data()),
          .normed = static_cast<std::byte*>(b.normed.untyped_data()),
          .new_residual = static_cast<std::byte*>(b.new_residual.untyped_data())};
  ffi::Error error = DecodeDType(kOp, b.x, args.dtype);
  if (error.failure()) return error;
  JAX_EP_REQUIRE(args.dtype != DType::kI32, kOp, ": elements must be bf16, f16 or f32");
  JAX_EP_REQUIRE(b.x.dimensions().size() == 2 && args.hidden > 0, kOp,
                 ": x must be [rows, hidden]");
  for (const ffi::AnyBuffer& like_x : {b.residual, b.normed, b.new_residual}) {
    JAX_EP_REQUIRE(like_x.element_type() == b.x.element_type() &&
                       like_x.element_count() == b.x.element_count(),
                   kOp, ": residual and results must be like x");
  }
  JAX_EP_REQUIRE(b.scale.element_count() == static_cast<size_t>(args.hidden) &&
                     (args.has_f32_scale || b.scale.element_type() == b.x.element_type()),
                 kOp, ": scale must be [hidden], f32 or of the dtype of x");
  return ffi::Error::Success();
}

}  // namespace jax_ep
