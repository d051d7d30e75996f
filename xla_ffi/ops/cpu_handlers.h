// The host twins, as XLA calls them. Each is defined beside its op.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace jax_ep {

extern "C" {
XLA_FFI_Error* JaxEpAllReduceCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxEpAllReduceResidualRmsnormCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxEpCombineCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxEpDispatchCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxEpGetDispatchLayoutCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxEpPullRowsCpu(XLA_FFI_CallFrame* call_frame);
}

}  // namespace jax_ep
