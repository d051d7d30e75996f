// What both modules tell Python: which handlers they hold, and how they were built.
#pragma once

#include <nanobind/nanobind.h>

#include "xla/ffi/api/c_api.h"

namespace jax_ep {

namespace nb = nanobind;

template <typename T>
nb::capsule Capsule(T* pointer) {
  return nb::capsule(reinterpret_cast<void*>(pointer));
}

inline nb::dict BuildInfo() {
  nb::dict info;
  info["compiler"] = __VERSION__;
  info["ffi_api"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  return info;
}

}  // namespace jax_ep
