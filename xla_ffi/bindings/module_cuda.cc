#include <nanobind/nanobind.h>

#include "bindings/capsules.h"
#include "ops/cuda_handlers.h"

namespace {

jax_ep::Dict Registrations() {
  jax_ep::Dict targets;
  targets["jax_ep.get_dispatch_layout"] = jax_ep::Capsule(jax_ep::JaxEpGetDispatchLayoutCuda);
  return targets;
}

}  // namespace

NB_MODULE(_jax_ep_cuda, m) {
  m.doc() = "CUDA twins of jax_ep's operations.";
  m.def("registrations", &Registrations, "Target name to handler capsules.");
  m.def("build_info", &jax_ep::BuildInfo, "Compiler and FFI API version of this build.");
}
