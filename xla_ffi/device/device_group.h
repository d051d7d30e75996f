// The native half of jax_ep.Group on GPUs: who is who, and the memory they meet in.
//
// Executables hold a shared_ptr to it, so a closed group lives until the last of them is gone.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "device/devices.h"
#include "device/endpoint.h"
#include "device/shareable_memory.h"
#include "runtime/error_record.h"
#include "runtime/home_process.h"
#include "runtime/interrupt.h"
#include "runtime/mesh_position.h"

namespace jax_ep {

class DeviceGroup : public Interruptible, public std::enable_shared_from_this<DeviceGroup> {
 public:
  /// `positions`: of whole slices; those of the mesh that this process has to do with. Device ids
  /// are those of the CUDA runtime. Throws std::runtime_error when the devices cannot reach one
  /// another, or CUDA fails otherwise. `is_here`, by position, says whose device is this process's;
  /// empty: all are. A group over several processes may be used when what the others export of
  /// their positions has been imported, and Complete was called. `staging_bytes` of each device
  /// hold copies of operands that peers have not mapped, which all are where `stages_all`.
  DeviceGroup(std::string identity, std::vector<MeshPosition> positions, int num_ranks,
              std::chrono::milliseconds timeout, const LoadKernels& load_kernels,
              std::vector<bool> is_here = {}, size_t staging_bytes = 0, bool stages_all = false);
  ~DeviceGroup() override;
  DeviceGroup(const DeviceGroup&) = delete;
  DeviceGroup& operator=(const DeviceGroup&) = delete;

  const std::string& identity() const { return identity_; }
  int num_ranks() const { return num_ranks_; }

  /// A device of the group as kernels see it; null for a device that is not in it.
  struct Member {
    Endpoint endpoint;
    DeviceTraits traits;
    PeerPool pool = {};  // what peers can read of the device's memory, for as long as XLA lives
    std::vector<int> readers = {};  // of whom else to ask the driver; none: nothing else is read
    std::byte* staging = nullptr;
    size_t staging_bytes = 0;
  };
  const Member* Find(int64_t device_id) const;

  /// Where all members are of this process: what peers may read of the memory that XLA gives, by an
  /// address of any buffer of it on the device of a position. False where they may not.
  bool FindPool(int index, uint64_t address);

  /// What another process needs to reach a device of this one.
  struct Exported {
    DeviceTraits traits;
    uint64_t gpu;  // which it is, on its host
    int control;   // descriptor; the receiver closes both
    size_t control_bytes;
    ExportedAllocation pool;  // no descriptor where all operands are staged
  };
  /// `address`: of any buffer of XLA on the device of a position.
  Exported Export(int index, uint64_t address);
  /// The same of a device elsewhere. Takes the descriptors over.
  void Import(int index, const Exported& exported);
  /// When all have been imported.
  void Complete();

  std::optional<ErrorRecord> error() const;

  /// After another process was lost: a collective of XLA's that waits for it may be on a device and
  /// never end. From now on the destructor waits for no device, and so must leave to the end of the
  /// process what kernels may still use.
  void Abandon();

  /// As if newly opened, in the same memory, which captured programs refer to. In all processes,
  /// when nothing of the group runs any more in any of them.
  void Reopen(std::chrono::milliseconds timeout);
  /// Another group has taken this one's identity, in other memory.
  void Supersede() { is_superseded_ = true; }
  bool is_superseded() const { return is_superseded_; }
  bool stages_all() const { return stages_all_; }
  size_t staging_bytes() const { return staging_bytes_; }
  /// Whether packets may be sent between this process's devices and all others; when complete.
  bool has_native_atomics() const { return has_native_atomics_; }

  /// When the user interrupts the process: calls that run on devices here, and have not advanced
  /// when the second of these methods looks at them, wait for peers. They end as by a failure of
  /// this rank, and the group has failed on all ranks of the slice. All copy beside what runs on
  /// the devices.
  void NoteWaits() override;
  void EndNotedWaits() override;
  bool IsWaiting() override;

  /// For tests: calls of `rank` end at once, poisoned, and never reach the peers. kNoIndex undoes
  /// it.
  void SkipRank(int rank);
  /// For tests: as if so many calls had been made. All processes, between two calls.
  void SetEpoch(uint32_t epoch);

 private:
  void Open(uint64_t timeout_ns, const LoadKernels& load_kernels);
  void Release();
  std::vector<int> DevicesHere() const;
  bool IsAlone() const { return DevicesHere().size() == positions_.size(); }
  /// What a peer has told the device of a position here, also when no call looks at it any more.
  std::optional<FailureRecord> ToldTo(size_t index) const;
  /// The epoch behind which a call runs on the device of a position here, if one does.
  std::optional<uint32_t> RunningAt(size_t index) const;
  /// Records a failure that the host has found on a position here, and ends every wait of its
  /// slice.
  void FailAt(size_t index, FailureRecord record);
  ControlBlock* ControlAt(size_t index) const;
  void CopyBeside(size_t index, void* to, const void* from, size_t bytes,
                  cudaMemcpyKind kind) const;

  std::string identity_;
  int num_ranks_;
  std::vector<MeshPosition> positions_;
  size_t staging_bytes_;
  bool stages_all_;
  std::vector<bool> is_here_;             // by position, as is all that follows
  std::vector<Member> members_;           // without those elsewhere, of which only traits are known
  std::vector<uint64_t> gpus_;            // which each is, on the host
  std::vector<ShareableMemory> control_;  // of a ControlBlock each
  std::vector<ShareableMemory> pools_;    // of those elsewhere
  std::vector<PeerPool> maps_;
  std::vector<cudaStream_t> copies_;  // to the host, beside whatever waits on the device
  FailureRecord* records_ = nullptr;  // by position, in pinned host memory
  std::unordered_map<int64_t, int> index_of_device_;
  std::atomic<bool> is_abandoned_ = false;
  std::atomic<bool> is_superseded_ = false;
  bool has_native_atomics_ = false;
  HomeProcess home_;
  std::vector<std::optional<uint32_t>> noted_;  // what RunningAt found; of the watching thread
};

}  // namespace jax_ep
