#include "runtime/registry.h"

#include <map>
#include <mutex>
#include <utility>

namespace jax_ep {

struct Registry::State {
  std::mutex mutex;
  std::map<std::string, std::shared_ptr<Group>> groups;
};

Registry::Registry() : state_(new State) {}

Registry& Registry::Get() {
  static Registry* registry = new Registry;
  return *registry;
}

bool Registry::Add(std::shared_ptr<Group> group) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const std::string identity = group->identity();
  return state_->groups.emplace(identity, std::move(group)).second;
}

void Registry::Remove(const std::string& identity) {
  std::shared_ptr<Group> last;  // destroyed after the lock is released
  std::lock_guard<std::mutex> lock(state_->mutex);
  const auto found = state_->groups.find(identity);
  if (found == state_->groups.end()) return;
  last = std::move(found->second);
  state_->groups.erase(found);
}

std::shared_ptr<Group> Registry::Find(const std::string& identity) const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const auto found = state_->groups.find(identity);
  return found == state_->groups.end() ? nullptr : found->second;
}

std::vector<std::string> Registry::OpenGroups() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  std::vector<std::string> identities;
  for (const auto& [identity, group] : state_->groups) identities.push_back(identity);
  return identities;
}

}  // namespace jax_ep
