// The native half of jax_ep.Group: who is who, and the exchange between them.
//
// Executables hold a shared_ptr to it, so a closed group lives until the last of them is gone.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime/exchange.h"
#include "runtime/mesh_position.h"

namespace jax_ep {

class Group {
 public:
  /// `positions`: of whole slices; those of the mesh that this process has to do with.
  Group(std::string identity, std::vector<MeshPosition> positions, RankMap rank_map,
        std::chrono::milliseconds timeout);

  const std::string& identity() const { return identity_; }
  int num_ranks() const { return num_ranks_; }
  Exchange& exchange() { return exchange_; }
  const Exchange& exchange() const { return exchange_; }

  /// The member at `position` of the mesh. A device that is not the one the group has there means
  /// that the program runs over another mesh or another device order: the group fails, and the
  /// device's own place (or the first position, for a stranger) is returned.
  Member Locate(const std::string& op, int64_t device_id, int64_t position);

 private:
  std::string identity_;
  int num_ranks_;
  std::vector<MeshPosition> positions_;
  std::unordered_map<int64_t, const MeshPosition*> position_of_device_;
  Exchange exchange_;
};

}  // namespace jax_ep
