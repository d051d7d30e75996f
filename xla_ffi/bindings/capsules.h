// Exports of both modules to Python: handlers, types, and the build.
#pragma once

#include <nanobind/nanobind.h>

#include "core/names.h"
#include "device/layout.h"
#include "runtime/exchange_wire.h"
#include "xla/ffi/api/c_api.h"

namespace jax_ep {

namespace nb = nanobind;

/// A Python dict, typed for the stubs.
using Dict = nb::typed<nb::dict, nb::str, nb::object>;

template <typename T>
nb::capsule Capsule(T* pointer) {
  return nb::capsule(reinterpret_cast<void*>(pointer));
}

/// Name of the capsule by which the modules share Interrupts (runtime/interrupt.h).
inline constexpr char kInterruptsName[] = "jax_ep.interrupts";

/// The stages of a target that belongs to a group.
inline Dict Collective(XLA_FFI_Error* (*instantiate)(XLA_FFI_CallFrame*),
                       XLA_FFI_Error* (*execute)(XLA_FFI_CallFrame*)) {
  Dict stages;
  stages["instantiate"] = Capsule(instantiate);
  stages["execute"] = Capsule(execute);
  return stages;
}

/// An FFI type by name.
template <typename Id, typename Info>
Dict TypeCapsules(const char* name, Id* id, Info* info) {
  Dict type;
  type["type_id"] = Capsule(id);
  type["type_info"] = Capsule(info);
  Dict types;
  types[name] = type;
  return types;
}

/// Version and hash of the sources (cmake/build_id.cmake).
extern const char kBuild[];

inline Dict BuildInfo() {
  Dict sizes;
  sizes["ControlBlock"] = sizeof(ControlBlock);
  sizes["WireMessage"] = sizeof(WireMessage);
  Dict info;
  info["build"] = nb::str(kBuild);
  info["protocol"] = kProtocol;
  info["sizes"] = sizes;
  Dict compilers;
  compilers["C++"] = JAX_EP_CXX_COMPILER;
#ifdef JAX_EP_CUDA_COMPILER
  compilers["CUDA"] = JAX_EP_CUDA_COMPILER;
#endif
  info["compilers"] = compilers;
  info["ffi_api"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  return info;
}

}  // namespace jax_ep
