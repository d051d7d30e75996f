// What every host twin needs to become a collective: the group it belongs to and the way into its
// exchange.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "ops/ffi_checks.h"
#include "runtime/registry.h"

namespace jax_ep {

/// One call site of one executable. XLA makes it when the executable is loaded, shares it between
/// the devices, and destroys it with the executable.
struct OpSite {
  static ffi::TypeId id;
  std::shared_ptr<Group> group;
  uint64_t site;
};

/// The instantiate stage of every collective: finds the group by its attribute.
inline ffi::ErrorOr<std::unique_ptr<OpSite>> InstantiateSite(ffi::Dictionary attrs) {
  const ffi::ErrorOr<std::string_view> identity = attrs.get<std::string_view>("group");
  if (!identity.has_value()) return ffi::Unexpected(identity.error());
  std::shared_ptr<Group> group = Registry::Get().Find(std::string(*identity));
  if (group == nullptr) {
    std::ostringstream message;
    message << "jax_ep: group " << *identity << " is not open; open groups:";
    for (const std::string& open : Registry::Get().OpenGroups()) message << " " << open;
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kFailedPrecondition, message.str()));
  }
  const uint64_t site = group->NewSite();
  return std::make_unique<OpSite>(OpSite{std::move(group), site});
}

inline auto SiteBinding() { return ffi::Ffi::BindInstantiate().Attrs(); }

/// What XLA says about the call of one device.
struct HostContext {
  OpSite* site;
  int64_t run_id;
  int64_t device_id;
};

/// Enters the call; the future completes when the results of this rank are written.
template <typename Call>
ffi::Future JoinGroup(const char* op, const HostContext& context, I32Buffer position,
                      const typename Call::Args& args) {
  ffi::Promise promise;
  ffi::Future future(promise);
  Group& group = *context.site->group;
  const Member member = group.Locate(op, context.device_id, position.typed_data()[0]);
  group.exchange().Join<Call>({op, context.site->site, context.run_id, member}, args,
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
  return ffi::Ffi::Bind().Ctx<ffi::State<OpSite>>().Ctx<ffi::RunId>().Ctx<ffi::DeviceOrdinal>();
}

}  // namespace jax_ep
