// The native half of jax_ep.Group on GPUs: its positions, and the memory that its ranks share.
//
// Executables hold a shared_ptr to it, so a closed group lives until the last executable is gone.
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
  /// `asked`: rooms for the packets of low-latency exchanges and of flights.
  DeviceGroup(std::string identity, std::vector<MeshPosition> positions, int num_ranks,
              std::chrono::milliseconds timeout, const LoadKernels& load_kernels,
              std::vector<bool> is_here = {}, size_t staging_bytes = 0, bool stages_all = false,
              AskedRooms asked = {});
  ~DeviceGroup() override;
  DeviceGroup(const DeviceGroup&) = delete;
  DeviceGroup& operator=(const DeviceGroup&) = delete;

  const std::string& identity() const { return identity_; }
  int num_ranks() const { return num_ranks_; }

  /// A device of the group, as kernels see it.
  struct Member {
    Endpoint endpoint;
    DeviceTraits traits;
    PeerPool pool = {};             // memory that peers can read, for as long as XLA lives
    std::vector<int> readers = {};  // devices to ask the driver about; none: peers read `pool` only
    std::byte* staging = nullptr;
    size_t staging_bytes = 0;
  };
  /// Null for a device that is not in the group.
  const Member* Find(int64_t device_id) const;

  /// Where all members are of this process: what peers may read of the memory that XLA gives, by an
  /// address of any buffer of it on the device of a position. False where they may not.
  bool FindPool(int index, uint64_t address);

  /// Data by which another process reaches a device of this process.
  struct Exported {
    DeviceTraits traits;
    uint64_t gpu;  // GpuOf the device
    int control;   // descriptor; the receiver closes both
    size_t control_bytes;
    ExportedAllocation pool;  // without descriptor if all operands are staged
  };
  /// Exports the device of a position. `address`: of any buffer of XLA on it.
  Exported Export(int index, uint64_t address);
  /// Imports a device of another process. Takes the descriptors over.
  void Import(int index, const Exported& exported);
  /// Completes the group after all imports.
  void Complete();

  std::optional<ErrorRecord> error() const;

  /// Abandons the group after another process was lost: an XLA collective that waits for it may
  /// never end. From now on the destructor waits for no device. So it keeps memory that kernels may
  /// still use until the end of the process.
  void Abandon();

  /// Opens the group again in the same memory, which captured programs refer to. All processes call
  /// it, when no call of the group runs in any of them.
  void Reopen(std::chrono::milliseconds timeout);
  /// Whether the group goes on without other processes: an interrupt of this one then ends its own
  /// ranks' calls only.
  void set_survives(bool survives) { survives_ = survives; }
  /// Ranks that a device here leaves out of calls with a mask. It copies beside the work on the
  /// devices.
  std::vector<int> LeftOut() const;

  /// Notes that another group has taken this group's identity, in other memory.
  void Supersede() { is_superseded_ = true; }
  bool is_superseded() const { return is_superseded_; }
  bool stages_all() const { return stages_all_; }
  size_t staging_bytes() const { return staging_bytes_; }
  const AskedRooms& asked() const { return asked_; }
  /// Whether packets may be sent between this process's devices and all others; when complete.
  bool has_native_atomics() const { return has_native_atomics_; }

  /// Interrupts by the user. A call that runs on a device here waits for peers if it has not
  /// advanced between NoteWaits and EndNotedWaits. It ends as by a failure of this rank, and the
  /// group has failed on all ranks of the slice. All three methods copy beside the work on the
  /// devices.
  void NoteWaits() override;
  void EndNotedWaits() override;
  bool IsWaiting() override;

  /// For tests: calls of `rank` end at once, poisoned, and never reach the peers. kNoIndex undoes
  /// this.
  void SkipRank(int rank);
  /// For tests: sets the epoch, and the flights of each slot, as if so many calls had been made.
  /// All processes call it, between two calls of the group, with no flight under way.
  void SetEpoch(uint32_t epoch);

 private:
  /// Epochs as RunningEpoch gives them: of calls, and of the kernels of flights.
  struct Running {
    uint32_t call;
    uint32_t flight;
    bool operator==(const Running&) const = default;
  };

  void Open(uint64_t timeout_ns, const LoadKernels& load_kernels);
  void Release();
  std::vector<int> DevicesHere() const;
  bool IsAlone() const { return DevicesHere().size() == positions_.size(); }
  /// The failure that a peer has told the device of a position here, even if no call reads it any
  /// more.
  std::optional<FailureRecord> ToldTo(size_t index) const;
  /// The epochs of the calls that run on the device of a position here, if one does.
  std::optional<Running> RunningAt(size_t index) const;
  /// Records a failure that the host has found on a position here, and ends every wait of its
  /// slice, or if the group survives those of the slice's devices here.
  void FailAt(size_t index, FailureRecord record);
  ControlBlock* ControlAt(size_t index) const;
  void CopyBeside(size_t index, void* to, const void* from, size_t bytes,
                  cudaMemcpyKind kind) const;

  std::string identity_;
  int num_ranks_;
  std::vector<MeshPosition> positions_;
  size_t staging_bytes_;
  bool stages_all_;
  AskedRooms asked_;
  std::vector<bool> is_here_;             // by position, as is all that follows
  std::vector<Member> members_;           // of devices elsewhere only the traits are known
  std::vector<uint64_t> gpus_;            // GpuOf each device
  std::vector<ShareableMemory> control_;  // each begins with a ControlBlock
  std::vector<ShareableMemory> pools_;    // of devices elsewhere
  std::vector<PeerPool> maps_;
  std::vector<cudaStream_t> copies_;  // streams for copies beside work that waits on the device
  FailureRecord* records_ = nullptr;  // by position, in pinned host memory
  std::unordered_map<int64_t, int> index_of_device_;
  std::atomic<bool> is_abandoned_ = false;
  std::atomic<bool> is_superseded_ = false;
  std::atomic<bool> survives_ = false;
  bool has_native_atomics_ = false;
  HomeProcess home_;
  std::vector<std::optional<Running>> noted_;  // from RunningAt; for the watching thread only
};

}  // namespace jax_ep
