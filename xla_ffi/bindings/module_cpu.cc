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
#include "bindings/groups.h"
#include "ops/cpu_handlers.h"
#include "ops/host_op.h"

namespace jax_ep {

namespace {

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpInstantiateSite, InstantiateSite<Group>, SiteBinding());

auto site_info = ffi::MakeTypeInfo<HostSite>();

Dict Registrations() {
  Dict targets;
  targets["jax_ep.combine"] = Collective(JaxEpInstantiateSite, JaxEpCombineCpu);
  targets["jax_ep.dispatch"] = Collective(JaxEpInstantiateSite, JaxEpDispatchCpu);
  targets["jax_ep.get_dispatch_layout"] = Capsule(JaxEpGetDispatchLayoutCpu);
  targets["jax_ep.pull_rows"] = Collective(JaxEpInstantiateSite, JaxEpPullRowsCpu);
  return targets;
}

Dict Types() { return TypeCapsules("jax_ep.OpSite.cpu", &HostSite::id, &site_info); }

std::shared_ptr<Group> OpenGroup(std::string identity, const std::vector<SeatTuple>& seats,
                                 int num_slices, int num_ranks, int64_t timeout_ms) {
  return Opened(std::make_shared<Group>(std::move(identity), SeatsOf(seats), num_slices, num_ranks,
                                        std::chrono::milliseconds(timeout_ms)));
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
      .def(
          "error", [](const Group& group) { return jax_ep::ErrorDict(group.exchange().error()); },
          "The first failure on a device, or None.")
      .def(
          "skip_rank", [](Group& group, int rank) { group.exchange().SkipRank(rank); },
          nanobind::arg("rank"),
          "For tests: keeps the calls of a rank from its peers; -1 ends it.");
  m.def("open_group", &jax_ep::OpenGroup, nanobind::arg("identity"), nanobind::arg("seats"),
        nanobind::arg("num_slices"), nanobind::arg("num_ranks"), nanobind::arg("timeout_ms"),
        "Opens a group. Seats are (device id, slice, rank) in the row-major order of the mesh.");
  m.def(
      "close_group",
      [](const std::string& identity) { jax_ep::Registry<Group>::Get().Remove(identity); },
      nanobind::arg("identity"), "Forgets a group; executables that hold it keep it alive.");
}
