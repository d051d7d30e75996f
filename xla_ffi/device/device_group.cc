#include "device/device_group.h"

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "device/clear_shared.h"
#include "device/devices.h"

namespace jax_ep {
namespace {

void Close(const DeviceGroup::Exported& exported) {
  close(exported.control);
  if (exported.pool.descriptor >= 0) close(exported.pool.descriptor);
}

}  // namespace

DeviceGroup::DeviceGroup(std::string identity, std::vector<MeshPosition> positions, int num_ranks,
                         std::chrono::milliseconds timeout, const LoadKernels& load_kernels,
                         std::vector<bool> is_here, size_t staging_bytes, bool stages_all,
                         AskedRooms asked)
    : identity_(std::move(identity)),
      num_ranks_(num_ranks),
      positions_(std::move(positions)),
      staging_bytes_(staging_bytes),
      stages_all_(stages_all),
      asked_(asked),
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
    const OnDevice on_device(
        DevicesHere().front());  // not device 0, which may be another process's
    CheckCuda("cudaHostAlloc",
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
    CheckCuda("cudaFree", cudaFree(nullptr));  // makes the context if there is none
    const size_t staging_offset = SharedBytes(num_ranks_, asked_);
    control_[i] = ShareableMemory::Create(static_cast<int>(device), staging_offset + staging_bytes_,
                                          DevicesHere());
    CheckCuda("cudaMemset",
              ClearShared(control_[i].data(), num_ranks_, asked_, /*stream=*/nullptr));
    CheckCuda("cudaMemcpy", cudaMemcpy(&ControlAt(i)->timeout_ns, &timeout_ns, sizeof(timeout_ns),
                                       cudaMemcpyHostToDevice));
    CheckCuda("cudaDeviceSynchronize", cudaDeviceSynchronize());
    CheckCuda("cudaStreamCreateWithFlags",
              cudaStreamCreateWithFlags(&copies_[i], cudaStreamNonBlocking));
    members_[i].traits = TraitsOf(device);
    gpus_[i] = GpuOf(device);
    members_[i].endpoint = {.rank = positions_[i].member.rank,
                            .num_ranks = num_ranks_,
                            .position = static_cast<int32_t>(positions_[i].position),
                            .site = 0,
                            .rooms = RoomsOf(num_ranks_, asked_),
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
  // Ranks divide work by the traits of a device. All ranks use the least of each trait.
  DeviceTraits least = members_.front().traits;
  for (const Member& member : members_) {
    const DeviceTraits& t = member.traits;
    least.num_sms = std::min(least.num_sms, t.num_sms);
    least.max_shared_bytes = std::min(least.max_shared_bytes, t.max_shared_bytes);
    least.has_bulk_copy = least.has_bulk_copy && t.has_bulk_copy;
  }
  // Ranks of several processes may share a GPU. Their blocks wait for one another, so the blocks of
  // all ranks must fit at once.
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
      member.endpoint.control[rank] = ControlAt(j);
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
  // Unmapping would not wait for kernels. Errors are ignored: it is too late to report them.
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
    CheckCuda("cudaMemset", ClearShared(control_[i].data(), num_ranks_, asked_, copies_[i]));
    CheckCuda("cudaMemcpy",
              cudaMemcpyAsync(&ControlAt(i)->timeout_ns, &timeout_ns, sizeof(timeout_ns),
                              cudaMemcpyHostToDevice, copies_[i]));
    CheckCuda("cudaStreamSynchronize", cudaStreamSynchronize(copies_[i]));
    records_[i] = {};
  }
}

const DeviceGroup::Member* DeviceGroup::Find(int64_t device_id) const {
  // XLA has made the device of a call current. Its own numbers may count the devices that the
  // process was given from 0.
  int current = -1;
  if (cudaGetDevice(&current) != cudaSuccess) current = static_cast<int>(device_id);
  const auto found = index_of_device_.find(current);
  return found == index_of_device_.end() ? nullptr : &members_[found->second];
}

ControlBlock* DeviceGroup::ControlAt(size_t index) const {
  return reinterpret_cast<ControlBlock*>(control_[index].data());
}

void DeviceGroup::CopyBeside(size_t index, void* to, const void* from, size_t bytes,
                             cudaMemcpyKind kind) const {
  const OnDevice on_device(positions_[index].device_id);
  CheckCuda("cudaMemcpyAsync", cudaMemcpyAsync(to, from, bytes, kind, copies_[index]));
  CheckCuda("cudaStreamSynchronize", cudaStreamSynchronize(copies_[index]));
}

void DeviceGroup::SetEpoch(uint32_t epoch) {
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (!is_here_[i]) continue;
    const OnDevice on_device(positions_[i].device_id);
    CheckCuda("cudaDeviceSynchronize", cudaDeviceSynchronize());
    CheckCuda("cudaMemcpy",
              cudaMemcpy(&ControlAt(i)->turn.epoch, &epoch, sizeof(epoch), cudaMemcpyHostToDevice));
    uint32_t flights[kMaxInFlight];
    for (int slot = 0; slot < kMaxInFlight; ++slot) {
      flights[slot] = epoch / kMaxInFlight * kMaxInFlight + slot;
    }
    for (uint32_t* words : {ControlAt(i)->flights_sent, ControlAt(i)->flights_received}) {
      CheckCuda("cudaMemcpy", cudaMemcpy(words, flights, sizeof(flights), cudaMemcpyHostToDevice));
    }
  }
}

void DeviceGroup::SkipRank(int rank) {
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (!is_here_[i]) continue;
    const OnDevice on_device(positions_[i].device_id);
    const uint32_t skip = positions_[i].member.rank == rank ? 1 : 0;
    CheckCuda("cudaMemcpy",
              cudaMemcpy(&ControlAt(i)->skip, &skip, sizeof(skip), cudaMemcpyHostToDevice));
  }
}

}  // namespace jax_ep
