#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/capsules.h"
#include "ops/cpu_handlers.h"
#include "ops/host_op.h"

namespace jax_ep {

ffi::TypeId OpSite::id = {};

namespace {

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpInstantiateSite, InstantiateSite, SiteBinding());

auto op_site_info = ffi::MakeTypeInfo<OpSite>();

Dict Collective(XLA_FFI_Error* (*execute)(XLA_FFI_CallFrame*)) {
  Dict stages;
  stages["instantiate"] = Capsule(JaxEpInstantiateSite);
  stages["execute"] = Capsule(execute);
  return stages;
}

Dict Registrations() {
  Dict targets;
  targets["jax_ep.combine"] = Collective(JaxEpCombineCpu);
  targets["jax_ep.dispatch"] = Collective(JaxEpDispatchCpu);
  targets["jax_ep.get_dispatch_layout"] = Capsule(JaxEpGetDispatchLayoutCpu);
  targets["jax_ep.pull_rows"] = Collective(JaxEpPullRowsCpu);
  return targets;
}

Dict Types() {
  Dict op_site;
  op_site["type_id"] = Capsule(&OpSite::id);
  op_site["type_info"] = Capsule(&op_site_info);
  Dict types;
  types["jax_ep.OpSite.cpu"] = op_site;
  return types;
}

const char* KindName(ErrorRecord::Kind kind) {
  switch (kind) {
    case ErrorRecord::Kind::kPeerTimeout:
      return "peer_timeout";
    case ErrorRecord::Kind::kMeshMismatch:
      return "mesh_mismatch";
    case ErrorRecord::Kind::kArrivedTwice:
      return "arrived_twice";
  }
  return "unknown";
}

using SeatTuple = std::tuple<int64_t, int, int>;  // device id, slice, rank

std::shared_ptr<Group> OpenGroup(std::string identity, const std::vector<SeatTuple>& seats,
                                 int num_slices, int num_ranks, int64_t timeout_ms) {
  std::vector<Seat> table;
  for (const auto& [device_id, slice, rank] : seats) table.push_back({device_id, {slice, rank}});
  auto group = std::make_shared<Group>(std::move(identity), std::move(table), num_slices, num_ranks,
                                       std::chrono::milliseconds(timeout_ms));
  if (!Registry::Get().Add(group)) {
    throw std::invalid_argument("a group of this identity is open: " + group->identity());
  }
  return group;
}

std::optional<Dict> GroupError(const Group& group) {
  const std::optional<ErrorRecord> error = group.exchange().error();
  if (!error) return std::nullopt;
  Dict record;
  record["kind"] = KindName(error->kind);
  record["op"] = error->op;
  record["rank"] = error->rank;
  record["peer"] = error->peer;
  record["expected"] = error->expected;
  record["seen"] = error->seen;
  return record;
}

}  // namespace
}  // namespace jax_ep

NB_MODULE(_jax_ep_cpu, m) {
  using jax_ep::Group;
  m.doc() = "Host twins of jax_ep's operations, and the native half of its groups.";
  m.def("registrations", &jax_ep::Registrations, "Target name to handler capsules.");
  m.def("types", &jax_ep::Types, "FFI type name to its capsules.");
  m.def("build_info", &jax_ep::BuildInfo, "Compiler and FFI API version of this build.");
  nanobind::class_<Group>(m, "Group", "Who is who in a group, and the exchange between them.")
      .def("error", &jax_ep::GroupError, "The first failure on a device, or None.")
      .def(
          "skip_rank", [](Group& group, int rank) { group.exchange().SkipRank(rank); },
          nanobind::arg("rank"),
          "For tests: keeps the calls of a rank from its peers; -1 ends it.");
  m.def("open_group", &jax_ep::OpenGroup, nanobind::arg("identity"), nanobind::arg("seats"),
        nanobind::arg("num_slices"), nanobind::arg("num_ranks"), nanobind::arg("timeout_ms"),
        "Opens a group. Seats are (device id, slice, rank) in the row-major order of the mesh.");
  m.def(
      "close_group", [](const std::string& identity) { jax_ep::Registry::Get().Remove(identity); },
      nanobind::arg("identity"), "Forgets a group; executables that hold it keep it alive.");
}
