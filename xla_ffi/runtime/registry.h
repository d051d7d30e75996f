// Identity to group, for the executables that are being loaded. The only process-wide state.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/group.h"

namespace jax_ep {

class Registry {
 public:
  static Registry& Get();

  /// False when a group of this identity is open.
  bool Add(std::shared_ptr<Group> group);
  /// Forgets the group; executables that hold it keep it alive.
  void Remove(const std::string& identity);
  /// Null when no group of this identity is open.
  std::shared_ptr<Group> Find(const std::string& identity) const;
  std::vector<std::string> OpenGroups() const;

 private:
  Registry();
  struct State;
  // Never destroyed: worker threads may outlive static destruction.
  State* state_;
};

}  // namespace jax_ep
