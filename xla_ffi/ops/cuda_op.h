// The GPU's side of every handler: the group of a call, the position of its device, and memory that
// peers can read.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "device/device_group.h"
#include "ops/op_site.h"

namespace jax_ep {

using DeviceSite = OpSite<DeviceGroup>;

/// Bulk copies need addresses that are multiples of this.
inline constexpr size_t kOperandAlignment = 16;

/// XLA's context of the call of one device.
struct DeviceContext {
  using Parts =
      ContextParts<ffi::State<DeviceSite>, ffi::PlatformStream<cudaStream_t>, ffi::DeviceOrdinal>;
  DeviceSite* site;
  cudaStream_t stream;
  int32_t device_id;
  int num_ranks() const { return site->num_ranks; }
  const std::string& op() const { return site->op; }
};

struct DeviceLocalContext {
  using Parts = ContextParts<ffi::PlatformStream<cudaStream_t>>;
  cudaStream_t stream;
};

/// The back end `cuda`: a handler launches kernels.
struct Cuda {
  using Context = DeviceContext;
  using Status = ffi::Error;
  using LocalContext = DeviceLocalContext;
};

inline ffi::Error CudaError(const std::string& op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, op + ": CUDA launch: " + cudaGetErrorString(status));
}

/// The device of a call, and the number of SMs that the call may use.
struct DeviceCall {
  const DeviceGroup::Member* member = nullptr;
  Endpoint endpoint;
  int num_sms = 0;
};

inline ffi::Error FindDevice(const DeviceContext& context, int64_t num_sms, DeviceCall& call) {
  const DeviceSite* site = context.site;
  const std::string& op = site->op;
  call.member = site->group().Find(context.device_id);
  JAX_EP_REQUIRE(call.member != nullptr, op, ": device ", context.device_id, " is not in group ",
                 site->group().identity());
  JAX_EP_REQUIRE(num_sms > 0, op, ": num_sms=", num_sms, " must be positive");
  call.endpoint = call.member->endpoint;
  call.endpoint.site = static_cast<uint32_t>(site->call().name);
  call.num_sms = static_cast<int>(std::min<int64_t>(num_sms, call.member->traits.num_sms));
  return ffi::Error::Success();
}

/// Gives peers operands and scratch that they can read. Operands that they cannot read in place, or
/// whose address the bulk engine does not take, are copied into the group's memory. Scratch is
/// taken from there. The calls of a rank use that room one after the other: each call ends when no
/// peer reads it any more. If there is no room, peers find kUnreadable, and the call fails when it
/// opens (kNotMapped).
class Staging {
 public:
  Staging(const DeviceCall& call, cudaStream_t stream) : member_(*call.member), stream_(stream) {}

  template <typename T>
  void Copy(T*& operand, size_t bytes) {
    const void* from = operand;
    void* place = Place(from, bytes);
    if (place == from || status_ != cudaSuccess) return;
    if (place != nullptr) {
      status_ = cudaMemcpyAsync(place, from, bytes, cudaMemcpyDefault, stream_);
    }
    operand = place != nullptr ? static_cast<T*>(place) : reinterpret_cast<T*>(kUnreadable);
  }
  // Empty scratch is null, which peers never read.
  void Replace(void*& scratch, size_t bytes) {
    if (bytes == 0) scratch = nullptr;
    void* place = Place(scratch, bytes);
    scratch = place != nullptr || scratch == nullptr ? place : reinterpret_cast<void*>(kUnreadable);
  }
  cudaError_t status() const { return status_; }

 private:
  // The data itself if peers can read it, otherwise room in the group's memory; null if there is
  // none.
  void* Place(const void* data, size_t bytes) {
    if (data == nullptr || bytes == 0 || IsReadable(data, bytes)) return const_cast<void*>(data);
    const size_t size = (bytes + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
    if (size > member_.staging_bytes - used_) return nullptr;
    used_ += size;
    return member_.staging + used_ - size;
  }

  bool IsReadable(const void* data, size_t bytes) const {
    const auto address = reinterpret_cast<uint64_t>(data);
    // Peers cannot read what has an address that cannot be sent.
    if (address % kOperandAlignment != 0 || address + bytes > kInControl) return false;
    const uint64_t offset = address - member_.pool.begin;
    if (offset < member_.pool.bytes && bytes <= member_.pool.bytes - offset) return true;
    return !member_.readers.empty() && CanRead(address, bytes, member_.readers);
  }

  const DeviceGroup::Member& member_;
  cudaStream_t stream_;
  size_t used_ = 0;
  cudaError_t status_ = cudaSuccess;
};

/// The initialize stage. XLA runs it at each launch, even if a command buffer replays the call.
inline ffi::Error RefuseSuperseded(const DeviceSite* site) {
  if (!site->group().is_superseded()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                    "jax_ep: this program was compiled with group " + site->group().identity() +
                        ", which was closed and opened again in other memory: compile it again "
                        "(jax.clear_caches())");
}

inline auto InitializeBinding() { return ffi::Ffi::BindInitialize().Ctx<ffi::State<DeviceSite>>(); }

}  // namespace jax_ep
