// The CPU's side of every handler: the group of a call, and the way into its exchange.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "ops/op_site.h"
#include "runtime/group.h"

namespace jax_ep {

using HostSite = OpSite<Group>;

/// What XLA says about the call of one device.
struct HostContext {
  HostSite* site;
  int64_t run_id;
  int64_t device_id;
  int num_ranks() const { return site->num_ranks; }
  const std::string& op() const { return site->op; }
};

struct HostLocalContext {};

/// The back end `cpu`: the results of a call are there when its peers have come.
struct Cpu {
  using Context = HostContext;
  using Status = ffi::Future;
  using LocalContext = HostLocalContext;
};

/// Enters the call; the future completes when the results of this rank are written.
template <typename Call>
ffi::Future JoinGroup(const HostContext& context, I32Buffer position,
                      const typename Call::Args& args) {
  ffi::Promise promise;
  ffi::Future future(promise);
  const std::string& op = context.op();
  const std::shared_ptr<Group> group = context.site->GroupOf(context.run_id);
  const Member member = group->Locate(op, context.device_id, position.typed_data()[0]);
  CallSites& sites = Registry<Group>::Get().sites();
  CallSite& call = context.site->call();
  sites.Settle(call);
  group->exchange().Join<Call>({op, call, sites.newest(), context.run_id, member}, args,
                               [promise]() mutable { promise.SetAvailable(); });
  return future;
}

}  // namespace jax_ep

namespace xla::ffi {

template <>
struct CtxBinding<jax_ep::HostContext> {
  using Ctx = jax_ep::HostContext;
};

template <>
struct CtxDecoding<jax_ep::HostContext> {
  using Type = jax_ep::HostContext;
  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto site = CtxDecoding<State<jax_ep::HostSite>>::Decode(api, context, diagnostic);
    const auto run = CtxDecoding<RunId>::Decode(api, context, diagnostic);
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    if (!site || !run || !device) return std::nullopt;
    return Type{*site, run->run_id, *device};
  }
};

template <>
struct CtxBinding<jax_ep::HostLocalContext> {
  using Ctx = jax_ep::HostLocalContext;
};

template <>
struct CtxDecoding<jax_ep::HostLocalContext> {
  using Type = jax_ep::HostLocalContext;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return Type{};
  }
};

}  // namespace xla::ffi
