// The instantiate stage of every collective: XLA loads an executable, which looks up its group.
#pragma once

#include <algorithm>
#include <charconv>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "ops/ffi_checks.h"
#include "runtime/call_site.h"
#include "runtime/registry.h"

namespace jax_ep {

/// One call site of one executable. XLA makes it when the executable is loaded, shares it between
/// the devices, and destroys it with the executable.
template <typename GroupT>
class OpSite {
 public:
  static inline ffi::TypeId id = {};

  OpSite(std::shared_ptr<GroupT> group, std::string op_, std::shared_ptr<CallSite> call)
      : num_ranks(group->num_ranks()),
        op(std::move(op_)),
        call_(std::move(call)),
        group_(std::move(group)) {}

  const int num_ranks;
  /// The public operation that the call belongs to, as errors name it.
  const std::string op;
  CallSite& call() const { return *call_; }
  /// The group that was open when the executable was loaded, or that GroupOf has found since.
  GroupT& group() const { return *group_; }

  /// The group of a launch: the open group of the identity, even if it was opened after the
  /// executable was loaded, or else the last group of the identity. The same on all devices of the
  /// launch.
  std::shared_ptr<GroupT> GroupOf(int64_t launch) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (launch_ != launch) {
      launch_ = launch;
      auto open = Registry<GroupT>::Get().Find(group_->identity());
      if (open != nullptr) group_ = std::move(open);
    }
    return group_;
  }

 private:
  std::shared_ptr<CallSite> call_;
  std::mutex mutex_;
  std::optional<int64_t> launch_;
  std::shared_ptr<GroupT> group_;
};

/// Looks up the group of a call. `call` holds the group's identity, the name of the call in
/// hexadecimal digits, and the public operation, with '#' between them.
template <typename GroupT>
ffi::ErrorOr<std::unique_ptr<OpSite<GroupT>>> InstantiateSite(ffi::Dictionary attrs) {
  const ffi::ErrorOr<std::string_view> call = attrs.get<std::string_view>("call");
  if (!call.has_value()) return ffi::Unexpected(call.error());
  const size_t end = std::min(call->rfind('#'), call->size());
  const size_t begin = std::min(call->substr(0, end).rfind('#'), end);
  const std::string identity(call->substr(0, begin));
  const std::string op(call->substr(std::min(end + 1, call->size())));
  uint64_t name = 0;
  const char* digits = call->data() + std::min(begin + 1, end);
  const auto [rest, problem] = std::from_chars(digits, call->data() + end, name, 16);
  if (problem != std::errc() || rest != call->data() + end || op.empty()) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInvalidArgument,
                                      "jax_ep: not the name of a call: " + std::string(*call)));
  }
  Registry<GroupT>& registry = Registry<GroupT>::Get();
  std::shared_ptr<GroupT> group = registry.Find(identity);
  if (group == nullptr) {
    std::ostringstream message;
    message << "jax_ep: group " << identity << " is not open; open groups:";
    for (const std::string& open : registry.OpenGroups()) message << " " << open;
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kFailedPrecondition, message.str()));
  }
  auto site = registry.sites().Add(name);
  registry.NameCall(name, op);
  return std::make_unique<OpSite<GroupT>>(std::move(group), op, std::move(site));
}

inline auto SiteBinding() { return ffi::Ffi::BindInstantiate().Attrs(); }

}  // namespace jax_ep
