// The CPU's side of every handler: the group of a call, and the way into the group's exchange.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "ops/op_site.h"
#include "runtime/group.h"

namespace jax_ep {

using HostSite = OpSite<Group>;

/// XLA's context of the call of one device.
struct HostContext {
  using Parts = ContextParts<ffi::State<HostSite>, ffi::RunId, ffi::DeviceOrdinal>;
  HostSite* site;
  ffi::RunId run;
  int64_t device_id;
  int num_ranks() const { return site->num_ranks; }
  const std::string& op() const { return site->op; }
};

struct HostLocalContext {
  using Parts = ContextParts<>;
};

/// The back end `cpu`: a handler returns a future, which waits for the peers.
struct Cpu {
  using Context = HostContext;
  using Status = ffi::Future;
  using LocalContext = HostLocalContext;
};

/// Joins the call. The future completes when the results of this rank are written.
template <typename Call>
ffi::Future JoinGroup(const HostContext& context, I32Buffer position,
                      const typename Call::Args& args) {
  ffi::Promise promise;
  ffi::Future future(promise);
  const std::string& op = context.op();
  const std::shared_ptr<Group> group = context.site->GroupOf(context.run.run_id);
  const Member member = group->Locate(op, context.device_id, position.typed_data()[0]);
  CallSites& sites = Registry<Group>::Get().sites();
  CallSite& call = context.site->call();
  sites.Settle(call);
  group->exchange().Join<Call>({op, call, sites.newest(), context.run.run_id, member}, args,
                               [promise]() mutable { promise.SetAvailable(); });
  return future;
}

}  // namespace jax_ep
