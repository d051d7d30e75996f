// The native half of jax_ep.Group: its positions, and the exchange between its ranks.
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
#include "runtime/flights.h"
#include "runtime/mesh_position.h"

namespace jax_ep {

class Group {
 public:
  /// `positions`: of whole slices, all those in which this process has ranks or peers.
  Group(std::string identity, std::vector<MeshPosition> positions, RankMap rank_map,
        std::chrono::milliseconds timeout);

  const std::string& identity() const { return identity_; }
  int num_ranks() const { return num_ranks_; }
  Exchange& exchange() { return exchange_; }
  const Exchange& exchange() const { return exchange_; }
  Flights& flights() { return flights_; }

  /// The member at `position` of the mesh. If the group has another device there, the program runs
  /// over another mesh or in another device order. Then the group fails, and the result is the
  /// member of the device, or the first member for a device that is not in the group.
  Member Locate(const std::string& op, int64_t device_id, int64_t position);

 private:
  std::string identity_;
  int num_ranks_;
  std::vector<MeshPosition> positions_;
  std::unordered_map<int64_t, const MeshPosition*> position_of_device_;
  Exchange exchange_;
  Flights flights_;
};

}  // namespace jax_ep
