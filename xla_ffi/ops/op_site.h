// The instantiate stage of every collective: an executable that is being loaded finds its group.
#pragma once

#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>

#include "ops/ffi_checks.h"
#include "runtime/registry.h"

namespace jax_ep {

/// One call site of one executable. XLA makes it when the executable is loaded, shares it between
/// the devices, and destroys it with the executable.
template <typename GroupT>
struct OpSite {
  static inline ffi::TypeId id = {};
  std::shared_ptr<GroupT> group;
  uint64_t site;
};

template <typename GroupT>
ffi::ErrorOr<std::unique_ptr<OpSite<GroupT>>> InstantiateSite(ffi::Dictionary attrs) {
  const ffi::ErrorOr<std::string_view> identity = attrs.get<std::string_view>("group");
  if (!identity.has_value()) return ffi::Unexpected(identity.error());
  const Registry<GroupT>& registry = Registry<GroupT>::Get();
  std::shared_ptr<GroupT> group = registry.Find(std::string(*identity));
  if (group == nullptr) {
    std::ostringstream message;
    message << "jax_ep: group " << *identity << " is not open; open groups:";
    for (const std::string& open : registry.OpenGroups()) message << " " << open;
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kFailedPrecondition, message.str()));
  }
  const uint64_t site = group->NewSite();
  return std::make_unique<OpSite<GroupT>>(OpSite<GroupT>{std::move(group), site});
}

inline auto SiteBinding() { return ffi::Ffi::BindInstantiate().Attrs(); }

}  // namespace jax_ep
