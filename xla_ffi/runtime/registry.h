// The map from identities to groups, for executables. There is one registry for each kind of group,
// and no other process-wide state.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "runtime/call_site.h"

namespace jax_ep {

template <typename GroupT>
class Registry {
 public:
  static Registry& Get() {
    // Never destroyed: worker threads may outlive static destruction.
    static Registry* registry = new Registry;
    return *registry;
  }

  /// Adds a group. False when a group of this identity is open.
  bool Add(std::shared_ptr<GroupT> group) {
    std::lock_guard<std::mutex> lock(mutex_);
    const std::string identity = group->identity();
    return groups_.emplace(identity, std::move(group)).second;
  }

  /// Forgets the group; executables that hold it keep it alive.
  void Remove(const std::string& identity) {
    std::shared_ptr<GroupT> last;  // destroyed after the lock is released
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = groups_.find(identity);
    if (found == groups_.end()) return;
    last = std::move(found->second);
    closed_[identity] = last;
    groups_.erase(found);
  }

  /// The last group of this identity that was removed, if executables hold it; else null.
  std::shared_ptr<GroupT> FindClosed(const std::string& identity) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = closed_.find(identity);
    return found == closed_.end() ? nullptr : found->second.lock();
  }

  /// Null when no group of this identity is open.
  std::shared_ptr<GroupT> Find(const std::string& identity) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = groups_.find(identity);
    return found == groups_.end() ? nullptr : found->second;
  }

  /// Names the public operation of a call, for OpOf. Kernels know the lower half of the call's
  /// name. Entries are kept for good.
  void NameCall(uint64_t name, const std::string& op) {
    std::lock_guard<std::mutex> lock(mutex_);
    ops_[static_cast<uint32_t>(name)] = op;
  }

  /// The public operation of a call; empty if no such call was loaded.
  std::string OpOf(uint32_t name) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = ops_.find(name);
    return found == ops_.end() ? std::string() : found->second;
  }

  /// The call sites of executables that use groups of this kind.
  CallSites& sites() { return sites_; }

  std::vector<std::string> OpenGroups() const {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::string> identities;
    for (const auto& [identity, group] : groups_) identities.push_back(identity);
    return identities;
  }

 private:
  Registry() = default;

  CallSites sites_;
  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<GroupT>> groups_;
  std::map<std::string, std::weak_ptr<GroupT>> closed_;
  std::unordered_map<uint32_t, std::string> ops_;
};

}  // namespace jax_ep
