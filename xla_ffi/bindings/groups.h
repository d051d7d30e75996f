// Groups of either kind, as Python sees them.
#pragma once

#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "bindings/capsules.h"
#include "runtime/error_record.h"
#include "runtime/mesh_position.h"
#include "runtime/registry.h"

namespace jax_ep {

using PositionTuple = std::tuple<int64_t, int, int, int64_t>;  // device id, slice, rank, position

inline std::vector<MeshPosition> PositionsOf(const std::vector<PositionTuple>& tuples) {
  std::vector<MeshPosition> positions;
  for (const auto& [device_id, slice, rank, position] : tuples) {
    positions.push_back({device_id, {slice, rank}, position});
  }
  return positions;
}

/// Registers a group. Throws if its identity is taken.
template <typename GroupT>
std::shared_ptr<GroupT> Opened(std::shared_ptr<GroupT> group) {
  if (!Registry<GroupT>::Get().Add(group)) {
    throw std::invalid_argument("a group of this identity is open: " + group->identity());
  }
  return group;
}

inline std::optional<Dict> ErrorDict(const std::optional<ErrorRecord>& error) {
  if (!error) return std::nullopt;
  Dict record;
  record["kind"] = NameOf(error->kind);
  record["op"] = error->op;
  record["rank"] = error->rank;
  record["peer"] = error->peer;
  record["expected"] = error->expected;
  record["seen"] = error->seen;
  record["place"] = error->place;
  record["slice"] = error->slice;
  return record;
}

}  // namespace jax_ep
