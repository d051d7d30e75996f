// Device memory that other processes of a host map, through descriptors.
//
// XLA's pool is one such allocation per device. So other processes can read its buffers in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace jax_ep {

/// A mapping of device memory into this process; movable. Throws std::runtime_error when the driver
/// refuses. The primary contexts of the devices must exist.
class ShareableMemory {
 public:
  /// Zeroed memory of a device, at least `bytes`, mapped for it and for `readers`.
  static ShareableMemory Create(int device, size_t bytes, const std::vector<int>& readers);
  enum class Use { kRead, kReadAndWrite };
  /// Memory of another process, mapped for `readers`. Does not take the descriptor over.
  static ShareableMemory Import(int descriptor, size_t bytes, const std::vector<int>& readers,
                                Use use);

  ShareableMemory() = default;
  ShareableMemory(ShareableMemory&& other) noexcept;
  ShareableMemory& operator=(ShareableMemory&& other) noexcept;
  ~ShareableMemory();

  std::byte* data() const { return reinterpret_cast<std::byte*>(address_); }
  size_t bytes() const { return bytes_; }
  /// Makes a new descriptor of the memory. The caller closes it.
  int Export() const;

 private:
  void Map(const std::vector<int>& readers, Use use);

  uint64_t handle_ = 0;
  uint64_t address_ = 0;
  size_t bytes_ = 0;
};

/// The allocation that an address of this process lies in.
struct ExportedAllocation {
  uint64_t begin;
  size_t bytes;
  int descriptor;  // the caller closes it
};
ExportedAllocation ExportAllocationOf(uint64_t address);
/// The same without a descriptor, if all of `readers` may read the allocation. Otherwise of no
/// bytes.
ExportedAllocation ReadableAllocationOf(uint64_t address, const std::vector<int>& readers);

/// Whether all of `readers`, devices of this process, may read so many bytes in place. Asks the
/// driver, which also answers while a stream is captured. Memory that was not mapped for several
/// devices counts as readable by its own device alone.
bool CanRead(uint64_t address, size_t bytes, const std::vector<int>& readers);

/// The CUDA device that an address lies on. Needs a context of this process, and makes none.
int DeviceOfAddress(uint64_t address);

/// Makes a device's primary context current, and restores the previous context at the end. To
/// restore it with cudaSetDevice would make a context on the previous device.
class OnDevice {
 public:
  explicit OnDevice(int64_t device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  void* before_ = nullptr;  // CUcontext
};

}  // namespace jax_ep
