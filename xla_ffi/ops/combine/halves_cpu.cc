#include "ops/combine/combine_cpu.h"
#include "ops/combine/halves_ffi.h"
#include "ops/handlers.h"
#include "ops/host_flights.h"

namespace jax_ep {

template <>
ffi::Future RunCombineSend<Cpu>(const HostContext& context, I32Buffer position, const CombineArgs&,
                                int32_t* flight, const CombineSendAttrs&) {
  return SendFlight(context, position, flight);
}

template <>
ffi::Future RunCombineRecv<Cpu>(const HostContext& context, I32Buffer position,
                                const CombineArgs& args, const int32_t* flight,
                                const CombineAttrs&) {
  EndFlight(context, position, flight);
  return JoinCombine(context, position, args);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineSendCpu, CombineSend<Cpu>, BindingOf(CombineSend<Cpu>));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineRecvCpu, CombineRecv<Cpu>, BindingOf(CombineRecv<Cpu>));

}  // namespace jax_ep
