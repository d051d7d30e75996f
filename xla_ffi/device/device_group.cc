#include "device/device_group.h"

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "runtime/registry.h"

namespace jax_ep {
namespace {

void Check(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not left behind for whoever asks next
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

DeviceTraits TraitsOf(int64_t device) {
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    Check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, name, static_cast<int>(device)));
    return value;
  };
  int lowest = 0;
  int highest = 0;
  Check("cudaDeviceGetStreamPriorityRange", cudaDeviceGetStreamPriorityRange(&lowest, &highest));
  return {
      .num_sms = attribute(cudaDevAttrMultiProcessorCount),
      .max_shared_bytes = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
      .has_bulk_copy = attribute(cudaDevAttrComputeCapabilityMajor) >= 9,
      .highest_priority = highest};
}

// The same for all processes of a host.
uint64_t GpuOf(int64_t device) {
  uint64_t place = 0;
  for (const cudaDeviceAttr name :
       {cudaDevAttrPciDomainId, cudaDevAttrPciBusId, cudaDevAttrPciDeviceId}) {
    int value = 0;
    Check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, name, static_cast<int>(device)));
    place = place << 16 | static_cast<uint32_t>(value);
  }
  return place;
}

// Whether 16 bytes that a device stores in the memory of a peer arrive at once, as far as is known:
// packets rely on it. Between devices without native atomics, on PCIe, 8 bytes do.
bool HaveNativeAtomics(const std::vector<uint64_t>& gpus, const std::vector<int>& devices) {
  int num_devices = 0;
  Check("cudaGetDeviceCount", cudaGetDeviceCount(&num_devices));
  for (int peer = 0; peer < num_devices; ++peer) {
    if (std::find(gpus.begin(), gpus.end(), GpuOf(peer)) == gpus.end()) continue;
    for (const int device : devices) {
      if (device == peer) continue;
      int value = 0;
      Check("cudaDeviceGetP2PAttribute",
            cudaDeviceGetP2PAttribute(&value, cudaDevP2PAttrNativeAtomicSupported, device, peer));
      if (value == 0) return false;
    }
  }
  return true;
}

void Close(const DeviceGroup::Exported& exported) {
  close(exported.control);
  if (exported.pool.descriptor >= 0) close(exported.pool.descriptor);
}

// The public operation that a call is a part of, which the host knows by the call's site.
std::string OpOf(const FailureRecord& record) {
  // The host cannot tell which call it was.
  if (record.kind == FailureKind::kInterrupted) return "call";
  const std::string op = Registry<DeviceGroup>::Get().OpOf(record.site);
  if (!op.empty()) return op;
  // A peer that calls something else may know a site that this process does not.
  return record.op == OpId::kPullRows ? "dispatch or combine" : NameOf(record.op);
}

}  // namespace

void LoadKernelsOn(const std::vector<int64_t>& devices, const LoadKernels& load_kernels) {
  for (const int64_t device : devices) {
    const OnDevice on_device(device);
    DeviceTraits traits = TraitsOf(device);
    load_kernels(traits);
  }
}

void RequirePeers(const std::vector<int64_t>& devices) {
  for (const int64_t device : devices) {
    for (const int64_t peer : devices) {
      if (device == peer) continue;
      int can_access = 0;
      Check("cudaDeviceCanAccessPeer",
            cudaDeviceCanAccessPeer(&can_access, static_cast<int>(device), static_cast<int>(peer)));
      if (can_access) continue;
      throw std::runtime_error("device " + std::to_string(device) +
                               " cannot read the memory of device " + std::to_string(peer));
    }
  }
}

DeviceGroup::DeviceGroup(std::string identity, std::vector<MeshPosition> positions, int num_ranks,
                         std::chrono::milliseconds timeout, const LoadKernels& load_kernels,
                         std::vector<bool> is_here, size_t staging_bytes, bool stages_all)
    : identity_(std::move(identity)),
      num_ranks_(num_ranks),
      positions_(std::move(positions)),
      staging_bytes_(staging_bytes),
      stages_all_(stages_all),
      is_here_(is_here.empty() ? std::vector<bool>(positions_.size(), true) : std::move(is_here)) {
  if (num_ranks > kMaxRanks) {
    throw std::runtime_error("a group has at most " + std::to_string(kMaxRanks) + " ranks, got " +
                             std::to_string(num_ranks));
  }
  try {
    Open(std::chrono::nanoseconds(timeout).count(), load_kernels);
  } catch (...) {
    Release();
    throw;
  }
}

DeviceGroup::~DeviceGroup() { Release(); }

std::vector<int> DeviceGroup::DevicesHere() const {
  std::vector<int> devices;
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (is_here_[i]) devices.push_back(static_cast<int>(positions_[i].device_id));
  }
  return devices;
}

void DeviceGroup::Open(uint64_t timeout_ns, const LoadKernels& load_kernels) {
  const size_t size = positions_.size();
  {
    const OnDevice on_device(DevicesHere().front());  // else it were device 0, maybe another's
    Check("cudaHostAlloc",
          cudaHostAlloc(reinterpret_cast<void**>(&records_), size * sizeof(FailureRecord),
                        cudaHostAllocPortable | cudaHostAllocMapped));
  }
  for (size_t i = 0; i < size; ++i) records_[i] = {};
  members_.resize(size);
  gpus_.resize(size);
  control_.resize(size);
  pools_.resize(size);
  maps_.resize(size);
  copies_.resize(size);
  for (size_t i = 0; i < size; ++i) {
    if (!is_here_[i]) continue;
    const int64_t device = positions_[i].device_id;
    const OnDevice on_device(device);
    Check("cudaFree", cudaFree(nullptr));  // makes the context, if nobody has
    const size_t staging_offset = SharedBytes(num_ranks_);
    control_[i] = ShareableMemory::Create(static_cast<int>(device), staging_offset + staging_bytes_,
                                          DevicesHere());
    Check("cudaMemcpy", cudaMemcpy(&reinterpret_cast<ControlBlock*>(control_[i].data())->timeout_ns,
                                   &timeout_ns, sizeof(timeout_ns), cudaMemcpyHostToDevice));
    Check("cudaDeviceSynchronize", cudaDeviceSynchronize());
    Check("cudaStreamCreateWithFlags",
          cudaStreamCreateWithFlags(&copies_[i], cudaStreamNonBlocking));
    members_[i].traits = TraitsOf(device);
    gpus_[i] = GpuOf(device);
    members_[i].endpoint = {.rank = positions_[i].member.rank,
                            .num_ranks = num_ranks_,
                            .position = static_cast<int32_t>(positions_[i].position),
                            .site = 0,
                            .rooms = RoomsOf(num_ranks_),
                            .control = {},
                            .control_bytes = control_[i].bytes(),
                            .record = &records_[i]};
    members_[i].pool.bytes = 0;  // until FindPool or Export
    if (IsAlone() && !stages_all_) members_[i].readers = DevicesHere();
    members_[i].staging = control_[i].data() + staging_offset;
    members_[i].staging_bytes = control_[i].bytes() - staging_offset;
    index_of_device_[device] = static_cast<int>(i);
    load_kernels(members_[i].traits);
  }
  if (IsAlone()) Complete();
}

bool DeviceGroup::FindPool(int index, uint64_t address) {
  const OnDevice on_device(positions_.at(index).device_id);
  const ExportedAllocation pool = ReadableAllocationOf(address, DevicesHere());
  members_.at(index).pool = {.begin = pool.begin, .bytes = pool.bytes, .here = 0};
  return pool.bytes > 0;
}

DeviceGroup::Exported DeviceGroup::Export(int index, uint64_t address) {
  Member& member = members_.at(index);
  const OnDevice on_device(positions_.at(index).device_id);
  Exported exported{.traits = member.traits,
                    .gpu = gpus_.at(index),
                    .control = control_.at(index).Export(),
                    .control_bytes = control_.at(index).bytes(),
                    .pool = {.begin = 0, .bytes = 0, .descriptor = -1}};
  if (stages_all_) return exported;
  try {
    exported.pool = ExportAllocationOf(address);
  } catch (...) {
    close(exported.control);
    throw;
  }
  member.pool = {.begin = exported.pool.begin, .bytes = exported.pool.bytes, .here = 0};
  return exported;
}

void DeviceGroup::Import(int index, const Exported& exported) {
  const OnDevice on_device(DevicesHere().front());
  try {
    members_.at(index).traits = exported.traits;
    gpus_.at(index) = exported.gpu;
    control_.at(index) =
        ShareableMemory::Import(exported.control, exported.control_bytes, DevicesHere(),
                                ShareableMemory::Use::kReadAndWrite);
    if (exported.pool.descriptor >= 0) {
      pools_.at(index) = ShareableMemory::Import(exported.pool.descriptor, exported.pool.bytes,
                                                 DevicesHere(), ShareableMemory::Use::kRead);
    }
  } catch (...) {
    Close(exported);
    throw;
  }
  Close(exported);
  maps_.at(index) = {.begin = exported.pool.begin,
                     .bytes = exported.pool.bytes,
                     .here = reinterpret_cast<uint64_t>(pools_.at(index).data())};
}

void DeviceGroup::Complete() {
  // Ranks share work by what a device can do: all of them count on the least.
  DeviceTraits least = members_.front().traits;
  for (const Member& member : members_) {
    const DeviceTraits& t = member.traits;
    least.num_sms = std::min(least.num_sms, t.num_sms);
    least.max_shared_bytes = std::min(least.max_shared_bytes, t.max_shared_bytes);
    least.has_bulk_copy = least.has_bulk_copy && t.has_bulk_copy;
  }
  // Ranks of several processes may share a GPU: the blocks of all of them must fit at once, since
  // they wait for one another.
  int most_ranks = 1;
  for (const uint64_t gpu : gpus_) {
    most_ranks = std::max<int>(most_ranks, std::count(gpus_.begin(), gpus_.end(), gpu));
  }
  least.num_sms = std::max(1, least.num_sms / most_ranks);
  has_native_atomics_ = HaveNativeAtomics(gpus_, DevicesHere());
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (!is_here_[i]) continue;
    Member& member = members_[i];
    for (size_t j = 0; j < positions_.size(); ++j) {
      if (positions_[j].member.slice != positions_[i].member.slice) continue;
      const int rank = positions_[j].member.rank;
      member.endpoint.control[rank] = reinterpret_cast<ControlBlock*>(control_[j].data());
      member.endpoint.pools[rank] = maps_[j];
      if (stages_all_) member.endpoint.pools[rank].bytes = 0;
    }
    least.highest_priority = member.traits.highest_priority;
    member.traits = least;
  }
}

void DeviceGroup::Abandon() { is_abandoned_ = true; }

void DeviceGroup::Release() {
  if (is_abandoned_ || !home_.IsThis()) {
    static_cast<void>(new std::vector<ShareableMemory>(std::move(control_)));
    static_cast<void>(new std::vector<ShareableMemory>(std::move(pools_)));
    return;
  }
  // Unmapping waits for nobody, and what fails here is too late to be told.
  for (const int device : DevicesHere()) {
    try {
      const OnDevice on_device(device);
      cudaDeviceSynchronize();
    } catch (const std::runtime_error&) {
    }
  }
  for (size_t i = 0; i < copies_.size(); ++i) {
    if (copies_[i] != nullptr) cudaStreamDestroy(copies_[i]);
  }
  copies_.clear();
  control_.clear();
  pools_.clear();
  if (records_ == nullptr) return;
  try {
    const OnDevice on_device(DevicesHere().front());
    cudaFreeHost(records_);
  } catch (const std::runtime_error&) {
  }
  records_ = nullptr;
}

void DeviceGroup::Reopen(std::chrono::milliseconds timeout) {
  const uint64_t timeout_ns = std::chrono::nanoseconds(timeout).count();
  is_abandoned_ = false;
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (!is_here_[i]) continue;
    const OnDevice on_device(positions_[i].device_id);
    // What was pushed may stay: its signals are gone.
    Check("cudaMemset", cudaMemsetAsync(control_[i].data(), 0, kPushedOffset, copies_[i]));
    Check("cudaMemcpy",
          cudaMemcpyAsync(&reinterpret_cast<ControlBlock*>(control_[i].data())->timeout_ns,
                          &timeout_ns, sizeof(timeout_ns), cudaMemcpyHostToDevice, copies_[i]));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(copies_[i]));
    records_[i] = {};
  }
}

const DeviceGroup::Member* DeviceGroup::Find(int64_t device_id) const {
  // XLA has made the device of a call current, and may count those that a process was given from 0.
  int current = -1;
  if (cudaGetDevice(&current) != cudaSuccess) current = static_cast<int>(device_id);
  const auto found = index_of_device_.find(current);
  return found == index_of_device_.end() ? nullptr : &members_[found->second];
}

std::optional<ErrorRecord> DeviceGroup::error() const {
  std::optional<FailureRecord> found;
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (!is_here_[i]) continue;
    const volatile FailureRecord& record = records_[i];
    std::optional<FailureRecord> own;
    if (record.is_set != 0) {
      std::atomic_thread_fence(std::memory_order_acquire);
      own = FailureRecord{.is_set = 1,
                          .kind = record.kind,
                          .op = record.op,
                          .site = record.site,
                          .rank = record.rank,
                          .peer = record.peer,
                          .expected = record.expected,
                          .seen = record.seen};
    } else if (!IsAlone()) {
      own = ToldTo(i);
    }
    // A call beside another one makes its peers see a call that is not theirs: not the cause.
    if (own && (!found || own->kind == FailureKind::kArrivedTwice)) found = own;
  }
  if (!found) return std::nullopt;
  return ErrorRecord{.kind = found->kind,
                     .op = OpOf(*found),
                     .rank = found->rank,
                     .peer = found->peer,
                     .expected = found->expected,
                     .seen = found->seen};
}

std::optional<FailureRecord> DeviceGroup::ToldTo(size_t index) const {
  const OnDevice on_device(positions_[index].device_id);
  const auto* control = reinterpret_cast<const ControlBlock*>(control_[index].data());
  FailureRecord told[kMaxRanks];
  const auto find_first = [&] {
    Check("cudaMemcpyAsync", cudaMemcpyAsync(told, control->told, sizeof(told),
                                             cudaMemcpyDeviceToHost, copies_[index]));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(copies_[index]));
    return std::find_if(std::begin(told), std::end(told),
                        [](const FailureRecord& record) { return record.is_set != 0; });
  };
  if (find_first() == std::end(told)) return std::nullopt;
  // What lies beside the word may have been copied before it was written: once more.
  return *find_first();
}

ControlBlock* DeviceGroup::ControlAt(size_t index) const {
  return reinterpret_cast<ControlBlock*>(control_[index].data());
}

void DeviceGroup::CopyBeside(size_t index, void* to, const void* from, size_t bytes,
                             cudaMemcpyKind kind) const {
  const OnDevice on_device(positions_[index].device_id);
  Check("cudaMemcpyAsync", cudaMemcpyAsync(to, from, bytes, kind, copies_[index]));
  Check("cudaStreamSynchronize", cudaStreamSynchronize(copies_[index]));
}

std::optional<uint32_t> DeviceGroup::RunningAt(size_t index) const {
  Signal turn;
  CopyBeside(index, &turn, &ControlAt(index)->turn, sizeof(turn), cudaMemcpyDeviceToHost);
  return turn.value == 0 ? std::nullopt : std::optional(turn.epoch);
}

void DeviceGroup::NoteWaits() {
  noted_.assign(positions_.size(), std::nullopt);
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (is_here_[i]) noted_[i] = RunningAt(i);
  }
}

void DeviceGroup::EndNotedWaits() {
  for (size_t i = 0; i < noted_.size(); ++i) {
    if (!noted_[i] || noted_[i] != RunningAt(i)) continue;
    FailAt(i, {.is_set = 1,
               .kind = FailureKind::kInterrupted,
               .op = OpId::kDispatch,
               .site = 0,
               .rank = positions_[i].member.rank,
               .peer = kNoIndex,
               .expected = num_ranks_,
               .seen = 0});
  }
}

bool DeviceGroup::IsWaiting() {
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (is_here_[i] && RunningAt(i)) return true;
  }
  return false;
}

void DeviceGroup::FailAt(size_t index, FailureRecord record) {
  uint32_t has_failed = 0;
  CopyBeside(index, &has_failed, &ControlAt(index)->has_failed, sizeof(has_failed),
             cudaMemcpyDeviceToHost);
  if (has_failed != 0) return;  // and it ends the waits itself
  // In the order of Fail (device/signals.cuh). The words of `told` go in front of is_set, which a
  // single copy would not promise.
  record.is_set = 0;
  records_[index] = record;
  std::atomic_thread_fence(std::memory_order_release);
  static_cast<volatile FailureRecord&>(records_[index]).is_set = 1;
  std::vector<size_t> slice;
  for (size_t j = 0; j < positions_.size(); ++j) {
    if (positions_[j].member.slice == positions_[index].member.slice) slice.push_back(j);
  }
  const uint32_t one = 1;
  for (const bool is_whole : {false, true}) {
    for (const size_t j : slice) {
      FailureRecord& told = ControlAt(j)->told[record.rank];
      is_whole ? CopyBeside(index, &told.is_set, &one, sizeof(one), cudaMemcpyHostToDevice)
               : CopyBeside(index, &told, &record, sizeof(record), cudaMemcpyHostToDevice);
    }
  }
  for (const size_t j : slice) {
    CopyBeside(index, &ControlAt(j)->abort, &one, sizeof(one), cudaMemcpyHostToDevice);
  }
}

void DeviceGroup::SetEpoch(uint32_t epoch) {
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (!is_here_[i]) continue;
    const OnDevice on_device(positions_[i].device_id);
    Check("cudaDeviceSynchronize", cudaDeviceSynchronize());
    Check("cudaMemcpy", cudaMemcpy(&reinterpret_cast<ControlBlock*>(control_[i].data())->turn.epoch,
                                   &epoch, sizeof(epoch), cudaMemcpyHostToDevice));
  }
}

void DeviceGroup::SkipRank(int rank) {
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (!is_here_[i]) continue;
    const OnDevice on_device(positions_[i].device_id);
    const uint32_t skip = positions_[i].member.rank == rank ? 1 : 0;
    Check("cudaMemcpy", cudaMemcpy(&reinterpret_cast<ControlBlock*>(control_[i].data())->skip,
                                   &skip, sizeof(skip), cudaMemcpyHostToDevice));
  }
}

}  // namespace jax_ep
