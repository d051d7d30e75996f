// The CUDA twins, as XLA calls them. Each is defined beside its op.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace jax_ep {

extern "C" {
XLA_FFI_Error* JaxEpAllReduceCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxEpAllReduceResidualRmsnormCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxEpCombineCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxEpDispatchCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxEpGetDispatchLayoutCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxEpPullRowsCuda(XLA_FFI_CallFrame* call_frame);
}

}  // namespace jax_ep
