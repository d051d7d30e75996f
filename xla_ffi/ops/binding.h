// Bindings of handlers: XLA's operands, results and attributes come in the order of a handler's
// parameters.
//
// A handler is a template over the back end, Cpu (ops/host_op.h) or Cuda (ops/cuda_op.h). The back
// end names the handler's Context, which comes first, and its Status. Attributes come last, in one
// struct.
#pragma once

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/types.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

namespace ffi = xla::ffi;

/// The parts of a handler's context, as XLA's bindings name them. A context has one member for each
/// part, and this type as its `Parts`.
template <typename... Bound>
struct ContextParts {
  template <typename Context>
  static std::optional<Context> Decode([[maybe_unused]] const XLA_FFI_Api* api,
                                       [[maybe_unused]] XLA_FFI_ExecutionContext* context,
                                       [[maybe_unused]] ffi::DiagnosticEngine& diagnostic) {
    // Braces: XLA decodes from left to right.
    const std::tuple<std::optional<typename ffi::CtxDecoding<Bound>::Type>...> parts{
        ffi::CtxDecoding<Bound>::Decode(api, context, diagnostic)...};
    return std::apply(
        [](const auto&... part) -> std::optional<Context> {
          if (!(part.has_value() && ...)) return std::nullopt;
          return Context{*part...};
        },
        parts);
  }
};

/// Appends one parameter to a binding.
template <typename Param, typename Binding>
auto BindParam(Binding&& binding) {
  if constexpr (std::is_same_v<Param, ffi::RemainingArgs>) {
    return std::forward<Binding>(binding).RemainingArgs();
  } else if constexpr (std::is_same_v<Param, ffi::RemainingRets>) {
    return std::forward<Binding>(binding).RemainingRets();
  } else if constexpr (!std::is_void_v<typename ffi::ArgBinding<Param>::Arg>) {
    return std::forward<Binding>(binding).template Arg<typename ffi::ArgBinding<Param>::Arg>();
  } else if constexpr (!std::is_void_v<typename ffi::RetBinding<Param>::Ret>) {
    return std::forward<Binding>(binding).template Ret<typename ffi::RetBinding<Param>::Ret>();
  } else if constexpr (!std::is_void_v<typename ffi::AttrsBinding<Param>::Attrs>) {
    return std::forward<Binding>(binding).template Attrs<Param>();
  } else {
    return std::forward<Binding>(binding).template Ctx<typename ffi::CtxBinding<Param>::Ctx>();
  }
}

/// Appends all parameters. No binding is stored in a variable: XLA's bindings cannot be moved.
template <typename Param, typename... Rest, typename Binding>
auto BindParams(Binding&& binding) {
  if constexpr (sizeof...(Rest) == 0) {
    return BindParam<Param>(std::forward<Binding>(binding));
  } else {
    return BindParams<Rest...>(BindParam<Param>(std::forward<Binding>(binding)));
  }
}

/// The binding of a handler. XLA's own Ffi::BindTo does not know the remaining operands.
template <typename Status, typename... Params>
auto BindingOf(Status (*)(Params...)) {
  return BindParams<Params...>(ffi::Ffi::Bind());
}

}  // namespace jax_ep

namespace xla::ffi {

template <typename Context>
  requires requires { typename Context::Parts; }
struct CtxBinding<Context> {
  using Ctx = Context;
};

template <typename Context>
  requires requires { typename Context::Parts; }
struct CtxDecoding<Context> {
  using Type = Context;
  static std::optional<Context> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                       DiagnosticEngine& diagnostic) {
    return Context::Parts::template Decode<Context>(api, context, diagnostic);
  }
};

}  // namespace xla::ffi

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(jax_ep::RecvLayout);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(jax_ep::Fill);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(jax_ep::ExchangeMode);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(jax_ep::Quantize);
