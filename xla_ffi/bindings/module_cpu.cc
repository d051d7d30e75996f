#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/capsules.h"
#include "bindings/groups.h"
#include "bindings/limits.h"
#include "ops/handlers.h"
#include "ops/host_op.h"
#include "runtime/interrupt.h"
#include "runtime/peer_memory.h"

namespace jax_ep {

namespace {

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpInstantiateSite, InstantiateSite<Group>, SiteBinding());

auto site_info = ffi::MakeTypeInfo<HostSite>();

Dict Registrations() {
  Dict targets;
#define JAX_EP_COLLECTIVE(Stem, name) \
  targets["jax_ep." name] = Collective(JaxEpInstantiateSite, JaxEp##Stem##Cpu);
#define JAX_EP_LOCAL(Stem, name) targets["jax_ep." name] = Capsule(JaxEp##Stem##Cpu);
#include "core/ops.def"
  return targets;
}

Dict Types() { return TypeCapsules("jax_ep.OpSite.cpu", &HostSite::id, &site_info); }

using LinkTuple = std::tuple<int, int, int>;  // process, pid, descriptor

std::shared_ptr<Group> OpenGroup(std::string identity, const std::vector<PositionTuple>& tuples,
                                 int num_slices, int num_ranks, int64_t timeout_ms,
                                 const std::vector<int>& processes, int own_process,
                                 const std::vector<LinkTuple>& links) {
  const std::vector<MeshPosition> positions = PositionsOf(tuples);
  RankMap rank_map{.num_slices = num_slices, .num_ranks = num_ranks, .own_process = own_process};
  if (!links.empty()) {
    rank_map.process_of.resize(num_slices * num_ranks);
    for (size_t i = 0; i < positions.size(); ++i) {
      const Member& member = positions[i].member;
      rank_map.process_of[member.slice * num_ranks + member.rank] = processes.at(i);
    }
    AllowReaders();
  }
  for (const auto& [process, pid, fd] : links) rank_map.links.push_back({process, pid, fd});
  return Opened(std::make_shared<Group>(std::move(identity), positions, std::move(rank_map),
                                        std::chrono::milliseconds(timeout_ms)));
}

// The interrupts of this module, for other modules, which share its thread and its handler.
nb::capsule InterruptsCapsule() { return {&Interrupts::Get(), kInterruptsName}; }

// Ends the process with the interpreter. Otherwise destructors of CUDA and XLA would wait for the
// work on the devices, and for ever for a collective whose peer has gone.
void ExitWithoutTeardown() {
  const auto exit_now = [](int code, void*) {
    std::fflush(stdout);
    _exit(code);
  };
  if (on_exit(exit_now, nullptr) != 0) throw std::runtime_error("on_exit has no room");
}

// Reads memory of another process as an exchange does.
std::optional<std::string> TryReading(int pid, uint64_t address, uint64_t expected) {
  uint64_t found = 0;
  const char* problem =
      ReadProcess(pid, reinterpret_cast<const void*>(address), &found, sizeof(found));
  if (problem != nullptr) return problem;
  if (found != expected) return "other bytes than expected";
  return std::nullopt;
}

}  // namespace
}  // namespace jax_ep

NB_MODULE(_jax_ep_cpu, m) {
  using jax_ep::Group;
  m.doc() = "Host twins of jax_ep's operations, and the native half of its groups.";
  m.def("registrations", &jax_ep::Registrations, "Target name to handler capsules.");
  m.def("types", &jax_ep::Types, "FFI type name to its capsules.");
  m.def("build_info", &jax_ep::BuildInfo, "Sources, compilers and FFI API version of this build.");
  jax_ep::DefineLimits(m);
  nanobind::class_<Group>(m, "Group", "Who is who in a group, and the exchange between them.")
      .def(
          "error", [](const Group& group) { return jax_ep::ErrorDict(group.exchange().error()); },
          "The first failure on a device, or None.")
      .def(
          "has_other_processes",
          [](const Group& group) { return group.exchange().HasOtherProcesses(); },
          "Whether another process of the group is still there, as far as is known.")
      .def(
          "skip_rank", [](Group& group, int rank) { group.exchange().SkipRank(rank); },
          nanobind::arg("rank"),
          "For tests: keeps the calls of a rank from its peers; -1 ends it.");
  m.def("open_group", &jax_ep::OpenGroup, nanobind::arg("identity"), nanobind::arg("positions"),
        nanobind::arg("num_slices"), nanobind::arg("num_ranks"), nanobind::arg("timeout_ms"),
        nanobind::arg("processes") = std::vector<int>(), nanobind::arg("own_process") = 0,
        nanobind::arg("links") = std::vector<jax_ep::LinkTuple>(),
        "Opens a group. Positions are (device id, slice, rank, position in the mesh), of whole "
        "slices,\n"
        "and processes whose they are. Links are (process, pid, descriptor of a stream socket),\n"
        "which the group takes over.");
  m.def(
      "has_closed_group",
      [](const std::string& identity) {
        return jax_ep::Registry<Group>::Get().FindClosed(identity) != nullptr;
      },
      nanobind::arg("identity"),
      "Whether executables hold a group of this identity that was closed.");
  m.def(
      "begin_program", [] { jax_ep::Registry<Group>::Get().sites().BeginProgram(); },
      "When a program is lowered: what is loaded next belongs to another executable than before.");
  m.def("allow_readers", &jax_ep::AllowReaders,
        "Lets other processes of the user read the memory of this one.");
  m.def("exit_without_teardown", &jax_ep::ExitWithoutTeardown,
        "From now on the process ends with the interpreter, and runs no destructors.");
  m.def(
      "watch_interrupts", [] { jax_ep::Interrupts::Get().Watch(); },
      "From now on an interrupt (SIGINT) ends calls that wait for peers, if the signal has a\n"
      "handler: once more after that handler was replaced.");
  m.def(
      "num_interrupts", [] { return jax_ep::Interrupts::Get().count(); },
      "Interrupts so far, since they are watched.");
  m.def(
      "leave_by_interrupt", [] { jax_ep::Interrupts::Get().Leave(); },
      "From now on the process ends: calls that wait are ended as by interrupts.");
  m.def(
      "any_waits", [] { return jax_ep::Interrupts::Get().AnyWaits(); },
      nanobind::call_guard<nanobind::gil_scoped_release>(),  // it may copy from devices
      "Whether a call of a group waits in this process.");
  m.def("interrupts", &jax_ep::InterruptsCapsule, "What the groups of other modules join.");
  m.def("try_reading", &jax_ep::TryReading, nanobind::arg("pid"), nanobind::arg("address"),
        nanobind::arg("expected"),
        "Why 8 bytes of another process cannot be read, or None if they are as expected.");
  m.def(
      "close_group",
      [](const std::string& identity) { jax_ep::Registry<Group>::Get().Remove(identity); },
      nanobind::arg("identity"), "Forgets a group; executables that hold it keep it alive.");
}
