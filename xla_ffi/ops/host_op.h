// What every host twin needs to become a collective: the group it belongs to and the way into its
// exchange.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "ops/op_site.h"
#include "runtime/group.h"

namespace jax_ep {

using HostSite = OpSite<Group>;

/// What XLA says about the call of one device.
struct HostContext {
  HostSite* site;
  int64_t run_id;
  int64_t device_id;
};

/// Enters the call; the future completes when the results of this rank are written.
template <typename Call>
ffi::Future JoinGroup(const HostContext& context, I32Buffer position,
                      const typename Call::Args& args) {
  ffi::Promise promise;
  ffi::Future future(promise);
  const std::string& op = context.site->op;
  const std::shared_ptr<Group> group = context.site->GroupOf(context.run_id);
  const Member member = group->Locate(op, context.device_id, position.typed_data()[0]);
  CallSites& sites = Registry<Group>::Get().sites();
  CallSite& call = context.site->call();
  sites.Settle(call);
  group->exchange().Join<Call>({op, call, sites.newest(), context.run_id, member}, args,
                               [promise]() mutable { promise.SetAvailable(); });
  return future;
}

/// A failure that every device of the program meets alike.
inline ffi::Future Failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

/// The contexts that HostContext is made of, in the order handlers take them.
inline auto HostBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::State<HostSite>>().Ctx<ffi::RunId>().Ctx<ffi::DeviceOrdinal>();
}

}  // namespace jax_ep
