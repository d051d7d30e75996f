#include <dlfcn.h>
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
#include <vector>

#include "bindings/capsules.h"
#include "bindings/groups.h"
#include "bindings/limits.h"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_cuda.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/cuda_op.h"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "ops/get_dispatch_layout/get_dispatch_layout_cuda.cuh"
#include "ops/handlers.h"
#include "ops/pull_rows/pull_rows_cuda.cuh"
#include "ops/ragged_all_to_all/ragged_all_to_all_cuda.cuh"
#include "ops/read_clock/read_clock_cuda.cuh"
#include "runtime/interrupt.h"

namespace jax_ep {

namespace {

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpInstantiateDeviceSite, InstantiateSite<DeviceGroup>,
                              SiteBinding());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpInitializeDeviceSite, RefuseSuperseded, InitializeBinding());

auto site_info = ffi::MakeTypeInfo<DeviceSite>();

Dict CollectiveOnDevice(XLA_FFI_Error* (*execute)(XLA_FFI_CallFrame*)) {
  Dict stages = Collective(JaxEpInstantiateDeviceSite, execute);
  stages["initialize"] = Capsule(JaxEpInitializeDeviceSite);
  return stages;
}

Dict Registrations() {
  Dict targets;
#define JAX_EP_COLLECTIVE(Stem, name) \
  targets["jax_ep." name] = CollectiveOnDevice(JaxEp##Stem##Cuda);
#define JAX_EP_LOCAL(Stem, name) targets["jax_ep." name] = Capsule(JaxEp##Stem##Cuda);
#include "core/ops.def"
  return targets;
}

Dict Types() { return TypeCapsules("jax_ep.OpSite.cuda", &DeviceSite::id, &site_info); }

void RequireLoaded(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("loading kernels of ") + op + ": " +
                           cudaGetErrorString(status));
}

void LoadKernels(DeviceTraits& device) {
#define JAX_EP_COLLECTIVE(Stem, name) RequireLoaded(name, Load##Stem##Kernels(device));
#define JAX_EP_LOCAL(Stem, name) JAX_EP_COLLECTIVE(Stem, name)
#include "core/ops.def"
}

// Deletes a group without Python's lock. Its destructor waits for devices, where a callback may
// wait for the lock.
void DeleteWithoutLock(DeviceGroup* group) {
  // The function is not in the stable ABI, but in every Python.
  static const auto has_lock = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
  std::optional<nb::gil_scoped_release> no_lock;
  if (Py_IsInitialized() && has_lock != nullptr && has_lock() == 1) no_lock.emplace();
  delete group;
}

std::shared_ptr<DeviceGroup> OpenGroup(std::string identity,
                                       const std::vector<PositionTuple>& positions, int,
                                       int num_ranks, int64_t timeout_ms,
                                       const std::vector<bool>& is_here, size_t staging_bytes,
                                       bool stages_all, size_t low_latency_bytes,
                                       size_t in_flight_bytes) {
  if (const auto closed = Registry<DeviceGroup>::Get().FindClosed(identity)) closed->Supersede();
  return Opened(std::shared_ptr<DeviceGroup>(
      new DeviceGroup(std::move(identity), PositionsOf(positions), num_ranks,
                      std::chrono::milliseconds(timeout_ms), LoadKernels, is_here, staging_bytes,
                      stages_all, {.low_latency = low_latency_bytes, .in_flight = in_flight_bytes}),
      DeleteWithoutLock));
}

std::shared_ptr<DeviceGroup> FindClosed(const std::string& identity) {
  const auto closed = Registry<DeviceGroup>::Get().FindClosed(identity);
  return closed == nullptr || closed->is_superseded() ? nullptr : closed;
}

std::shared_ptr<DeviceGroup> ReopenGroup(const std::shared_ptr<DeviceGroup>& group,
                                         int64_t timeout_ms) {
  group->Reopen(std::chrono::milliseconds(timeout_ms));
  return Opened(group);
}

// Numbers that are sent to another process; descriptors travel beside them, and -1 stands for none.
using Numbers = std::vector<uint64_t>;

std::tuple<Numbers, int, int> Export(DeviceGroup& group, int index, uint64_t address) {
  const DeviceGroup::Exported e = group.Export(index, address);
  const Numbers numbers = {static_cast<uint64_t>(e.traits.num_sms),
                           e.traits.max_shared_bytes,
                           e.traits.has_bulk_copy,
                           e.gpu,
                           e.control_bytes,
                           e.pool.begin,
                           e.pool.bytes};
  return {numbers, e.control, e.pool.descriptor};
}

void Import(DeviceGroup& group, int index, const Numbers& n, int control, int pool) {
  group.Import(index, {.traits = {.num_sms = static_cast<int>(n.at(0)),
                                  .max_shared_bytes = n.at(1),
                                  .has_bulk_copy = n.at(2) != 0,
                                  .highest_priority = 0},
                       .gpu = n.at(3),
                       .control = control,
                       .control_bytes = n.at(4),
                       .pool = {.begin = n.at(5), .bytes = n.at(6), .descriptor = pool}});
}

// The interrupts of the CPU module call this group, so both modules must have the same header.
void JoinInterrupts(const std::shared_ptr<DeviceGroup>& group, const nb::capsule& interrupts) {
  static_cast<Interrupts*>(interrupts.data(kInterruptsName))->Add(group);
}

void CheckDevices(const std::vector<int64_t>& devices) {
  RequirePeers(devices);
  LoadKernelsOn(devices, LoadKernels);
}

size_t WorkspaceBytes(int64_t layout, int num_experts, int num_ranks, int64_t num_tokens,
                      int num_topk, int num_parts) {
  return DispatchWorkspaceBytes({.layout = static_cast<RecvLayout>(layout),
                                 .experts = {.num_experts = num_experts, .num_ranks = num_ranks},
                                 .num_tokens = num_tokens,
                                 .num_topk = num_topk,
                                 .recv_capacity = 0,
                                 .expert_alignment = 1,
                                 .num_parts = num_parts});
}

size_t TableBytes(int64_t layout, int num_experts, int num_ranks, int64_t num_tokens,
                  int num_topk) {
  return LowLatencyTableBytes({.layout = static_cast<RecvLayout>(layout),
                               .experts = {.num_experts = num_experts, .num_ranks = num_ranks},
                               .num_tokens = num_tokens,
                               .num_topk = num_topk,
                               .recv_capacity = 0,
                               .expert_alignment = 1});
}

size_t RingBytes(int64_t layout, int num_ranks, int64_t num_tokens, int num_slots,
                 size_t row_bytes) {
  return PartialRing::Of(static_cast<RecvLayout>(layout), num_ranks, num_tokens, num_slots,
                         row_bytes)
      .Bytes(num_ranks, row_bytes);
}

}  // namespace
}  // namespace jax_ep

NB_MODULE(_jax_ep_cuda, m) {
  using jax_ep::DeviceGroup;
  // Programs on the devices may call back into Python meanwhile.
  using NoGil = nanobind::call_guard<nanobind::gil_scoped_release>;
  m.doc() = "CUDA twins of jax_ep's operations, and the native half of groups on GPUs.";
  m.def("registrations", &jax_ep::Registrations, "Target name to handler capsules.");
  m.def("types", &jax_ep::Types, "FFI type name to its capsules.");
  m.def("build_info", &jax_ep::BuildInfo, "Sources, compilers and FFI API version of this build.");
  jax_ep::DefineLimits(m);
  nanobind::class_<DeviceGroup>(m, "Group", "Who is who in a group, and where they meet.")
      .def(
          "error",
          [](const DeviceGroup& group) {
            std::optional<jax_ep::ErrorRecord> found;
            {
              const nanobind::gil_scoped_release no_gil;  // it may copy from devices
              found = group.error();
            }
            return jax_ep::ErrorDict(found);
          },
          "The first failure on a device, or None.")
      .def("find_pool", &DeviceGroup::FindPool, nanobind::arg("index"), nanobind::arg("address"),
           "Whether peers of this process can read the memory at an address of a position.")
      .def_prop_ro("has_native_atomics", &DeviceGroup::has_native_atomics,
                   "Whether 16 bytes arrive at once at all peers, which packets rely on.")
      .def_prop_ro("stages_all", &DeviceGroup::stages_all, "Whether all operands are copied.")
      .def_prop_ro("staging_bytes", &DeviceGroup::staging_bytes, "Room for copies of operands.")
      .def_prop_ro(
          "low_latency_bytes", [](const DeviceGroup& group) { return group.asked().low_latency; },
          "Room for packets of low-latency exchanges.")
      .def_prop_ro(
          "in_flight_bytes", [](const DeviceGroup& group) { return group.asked().in_flight; },
          "Room for packets of flights: exchanges that are sent and received apart.")
      .def("export_position", &jax_ep::Export, nanobind::arg("index"), nanobind::arg("address"),
           "What another process needs to reach a device of this one: numbers, and descriptors of\n"
           "its signals and of the pool that an address of it lies in; -1 where all is staged.")
      .def("import_position", &jax_ep::Import, nanobind::arg("index"), nanobind::arg("numbers"),
           nanobind::arg("control"), nanobind::arg("pool"),
           "The same of a device elsewhere; takes the descriptors over.")
      .def("complete", &DeviceGroup::Complete, "After all imports: the group may be used.")
      .def(
          "abandon", &DeviceGroup::Abandon,
          "After another process was lost: what runs on the devices may never end, so the group's\n"
          "end will not wait for it, nor free what it uses.")
      .def(
          "join_interrupts", &jax_ep::JoinInterrupts, nanobind::arg("interrupts"),
          "From now on calls that wait end when the process is interrupted, as the capsule of the\n"
          "CPU module tells.")
      .def("set_survives", &DeviceGroup::set_survives, nanobind::arg("survives"),
           "Whether the group goes on without other processes: an interrupt of this one then ends\n"
           "its own ranks' calls only.")
      .def("left_out", &DeviceGroup::LeftOut, NoGil(),
           "Ranks that a device here leaves out of calls with a mask.")
      .def("set_epoch", &DeviceGroup::SetEpoch, nanobind::arg("epoch"),
           "For tests: as if so many calls had been made; all processes, between two calls.")
      .def("skip_rank", &DeviceGroup::SkipRank, nanobind::arg("rank"),
           "For tests: keeps the calls of a rank from its peers; -1 ends it.");
  m.def("open_group", &jax_ep::OpenGroup, nanobind::arg("identity"), nanobind::arg("positions"),
        nanobind::arg("num_slices"), nanobind::arg("num_ranks"), nanobind::arg("timeout_ms"),
        nanobind::arg("is_here") = std::vector<bool>(), nanobind::arg("staging_bytes") = 0,
        nanobind::arg("stages_all") = false, nanobind::arg("low_latency_bytes") = 0,
        nanobind::arg("in_flight_bytes") = 0, NoGil(),
        "Opens a group. Positions are (CUDA device, slice, rank, position in the mesh), of whole "
        "slices.\n"
        "is_here says which of them are this process's; empty: all. staging_bytes of each device\n"
        "hold copies of operands that peers have not mapped, of all operands where stages_all.\n"
        "low_latency_bytes hold packets of low-latency exchanges, in_flight_bytes those of "
        "flights.");
  m.def("find_closed_group", &jax_ep::FindClosed, nanobind::arg("identity"), NoGil(),
        "The group of an identity that was closed and that executables hold, or None.");
  m.def("reopen_group", &jax_ep::ReopenGroup, nanobind::arg("group"), nanobind::arg("timeout_ms"),
        NoGil(),
        "Opens a closed group again in its memory, which captured programs refer to; when nothing\n"
        "of it runs in any process.");
  m.def("device_of", &jax_ep::DeviceOfAddress, nanobind::arg("address"),
        "The CUDA device that an address lies on.");
  m.def("check_devices", &jax_ep::CheckDevices, nanobind::arg("devices"), NoGil(),
        "Raises RuntimeError, saying why, unless the CUDA devices can form a group.");
  m.def(
      "close_group",
      [](const std::string& identity) { jax_ep::Registry<DeviceGroup>::Get().Remove(identity); },
      nanobind::arg("identity"), NoGil(),
      "Forgets a group; executables that hold it keep it alive.");
  m.def("dispatch_workspace_bytes", &jax_ep::WorkspaceBytes, nanobind::arg("layout"),
        nanobind::arg("num_experts"), nanobind::arg("num_ranks"), nanobind::arg("num_tokens"),
        nanobind::arg("num_topk"), nanobind::arg("num_parts") = 1,
        "Scratch of one dispatch; 0 where it cannot be planned. num_tokens are those of a source.");
  m.def("low_latency_table_bytes", &jax_ep::TableBytes, nanobind::arg("layout"),
        nanobind::arg("num_experts"), nanobind::arg("num_ranks"), nanobind::arg("num_tokens"),
        nanobind::arg("num_topk"), "Shared memory of a low-latency dispatch; it has a limit.");
  m.def("combine_workspace_bytes", &jax_ep::RingBytes, nanobind::arg("layout"),
        nanobind::arg("num_ranks"), nanobind::arg("num_tokens"), nanobind::arg("num_slots"),
        nanobind::arg("row_bytes"), "Scratch of one combine: the rings of partial sums.");
}
