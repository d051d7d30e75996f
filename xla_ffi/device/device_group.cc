#include "device/device_group.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace jax_ep {
namespace {

void Check(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not left behind for whoever asks next
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device current, and the one before it again at the end.
class OnDevice {
 public:
  explicit OnDevice(int64_t device) {
    Check("cudaGetDevice", cudaGetDevice(&before_));
    Check("cudaSetDevice", cudaSetDevice(static_cast<int>(device)));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

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

// XLA's own pool is mapped for every device of the process; our blocks need the same.
void EnablePeerAccess(int64_t device, int64_t peer) {
  const OnDevice on_device(device);
  const cudaError_t status = cudaDeviceEnablePeerAccess(static_cast<int>(peer), 0);
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return;
  }
  Check("cudaDeviceEnablePeerAccess", status);
}

ErrorRecord::Kind KindOf(FailureRecord::Kind kind) {
  switch (kind) {
    case FailureRecord::Kind::kPeerTimeout:
      return ErrorRecord::Kind::kPeerTimeout;
    case FailureRecord::Kind::kMeshMismatch:
      return ErrorRecord::Kind::kMeshMismatch;
    case FailureRecord::Kind::kCallMismatch:
      return ErrorRecord::Kind::kCallMismatch;
    case FailureRecord::Kind::kOverlap:
      return ErrorRecord::Kind::kArrivedTwice;
  }
  return ErrorRecord::Kind::kArrivedTwice;
}

const char* NameOf(OpId op) {
  switch (op) {
    case OpId::kDispatch:
      return "dispatch";
    case OpId::kCombine:
      return "combine";
    case OpId::kPullRows:
      return "pull_rows";
  }
  return "unknown";
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

DeviceGroup::DeviceGroup(std::string identity, std::vector<Seat> seats, int num_ranks,
                         std::chrono::milliseconds timeout, const LoadKernels& load_kernels)
    : identity_(std::move(identity)), num_ranks_(num_ranks), seats_(std::move(seats)) {
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

void DeviceGroup::Open(int64_t timeout_ns, const LoadKernels& load_kernels) {
  const size_t size = seats_.size();
  for (const Seat& a : seats_) {
    for (const Seat& b : seats_) {
      const bool are_peers = a.member.slice == b.member.slice && a.device_id != b.device_id;
      if (are_peers) EnablePeerAccess(a.device_id, b.device_id);
    }
  }
  Check("cudaHostAlloc",
        cudaHostAlloc(reinterpret_cast<void**>(&records_), size * sizeof(FailureRecord),
                      cudaHostAllocPortable | cudaHostAllocMapped));
  for (size_t i = 0; i < size; ++i) records_[i] = {};
  control_.resize(size);
  for (size_t i = 0; i < size; ++i) {
    const OnDevice on_device(seats_[i].device_id);
    Check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&control_[i]), sizeof(ControlBlock)));
    Check("cudaMemset", cudaMemset(control_[i], 0, sizeof(ControlBlock)));
    Check("cudaDeviceSynchronize", cudaDeviceSynchronize());
  }
  members_.resize(size);
  for (size_t i = 0; i < size; ++i) {
    const OnDevice on_device(seats_[i].device_id);
    Member& member = members_[i];
    member.traits = TraitsOf(seats_[i].device_id);
    member.endpoint = {.rank = seats_[i].member.rank,
                       .num_ranks = num_ranks_,
                       .position = static_cast<int32_t>(i),
                       .site = 0,
                       .timeout_ns = static_cast<uint64_t>(timeout_ns),
                       .control = {},
                       .record = &records_[i]};
    for (size_t j = 0; j < size; ++j) {
      if (seats_[j].member.slice == seats_[i].member.slice) {
        member.endpoint.control[seats_[j].member.rank] = control_[j];
      }
    }
    position_of_device_[seats_[i].device_id] = static_cast<int>(i);
    load_kernels(member.traits);
  }
  // Ranks share work by what a device can do: all of them count on the least.
  DeviceTraits least = members_.front().traits;
  for (const Member& member : members_) {
    const DeviceTraits& t = member.traits;
    least.num_sms = std::min(least.num_sms, t.num_sms);
    least.max_shared_bytes = std::min(least.max_shared_bytes, t.max_shared_bytes);
    least.has_bulk_copy = least.has_bulk_copy && t.has_bulk_copy;
  }
  for (Member& member : members_) {
    least.highest_priority = member.traits.highest_priority;
    member.traits = least;
  }
}

void DeviceGroup::Release() {
  for (size_t i = 0; i < control_.size(); ++i) {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(static_cast<int>(seats_[i].device_id));
    cudaFree(control_[i]);
    cudaSetDevice(before);
  }
  control_.clear();
  cudaFreeHost(records_);
  records_ = nullptr;
}

const DeviceGroup::Member* DeviceGroup::Find(int64_t device_id) const {
  const auto found = position_of_device_.find(device_id);
  return found == position_of_device_.end() ? nullptr : &members_[found->second];
}

std::optional<ErrorRecord> DeviceGroup::error() const {
  for (size_t i = 0; i < seats_.size(); ++i) {
    const volatile FailureRecord& record = records_[i];
    if (record.is_set == 0) continue;
    std::atomic_thread_fence(std::memory_order_acquire);
    return ErrorRecord{.kind = KindOf(record.kind),
                       .op = NameOf(record.op),
                       .rank = seats_[i].member.rank,
                       .peer = record.peer,
                       .expected = record.expected,
                       .seen = record.seen};
  }
  return std::nullopt;
}

void DeviceGroup::SkipRank(int rank) {
  for (size_t i = 0; i < seats_.size(); ++i) {
    const OnDevice on_device(seats_[i].device_id);
    const uint32_t skip = seats_[i].member.rank == rank ? 1 : 0;
    Check("cudaMemcpy",
          cudaMemcpy(&control_[i]->skip, &skip, sizeof(skip), cudaMemcpyHostToDevice));
  }
}

}  // namespace jax_ep
