// The handlers of both modules, as XLA calls them. Each is defined beside its operation.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace jax_ep {

extern "C" {
#define JAX_EP_COLLECTIVE(Stem, name)                  \
  XLA_FFI_Error* JaxEp##Stem##Cpu(XLA_FFI_CallFrame*); \
  XLA_FFI_Error* JaxEp##Stem##Cuda(XLA_FFI_CallFrame*);
#define JAX_EP_LOCAL(Stem, name) JAX_EP_COLLECTIVE(Stem, name)
#include "core/ops.def"
}

}  // namespace jax_ep
