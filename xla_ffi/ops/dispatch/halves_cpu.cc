#include "ops/dispatch/dispatch_cpu.h"
#include "ops/dispatch/halves_ffi.h"
#include "ops/handlers.h"
#include "ops/host_flights.h"

namespace jax_ep {

template <>
ffi::Future RunDispatchSend<Cpu>(const HostContext& context, I32Buffer position,
                                 const DispatchArgs& args, int32_t* flight,
                                 const DispatchSendAttrs&) {
  JAX_EP_REQUIRE(args.quantize == Quantize::kNone, context.op(), ": rows are rounded before");
  return SendFlight(context, position, flight);
}

template <>
ffi::Future RunDispatchRecv<Cpu>(const HostContext& context, I32Buffer position,
                                 const DispatchArgs& args, const int32_t* flight,
                                 const DispatchAttrs&) {
  EndFlight(context, position, flight);
  return JoinDispatch(context, position, args);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatchSendCpu, DispatchSend<Cpu>,
                              BindingOf(DispatchSend<Cpu>));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatchRecvCpu, DispatchRecv<Cpu>,
                              BindingOf(DispatchRecv<Cpu>));

}  // namespace jax_ep
