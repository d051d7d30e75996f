// What every CUDA twin needs to become a collective: the group it belongs to, and its place in it.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "device/device_group.h"
#include "ops/op_site.h"

namespace jax_ep {

using DeviceSite = OpSite<DeviceGroup>;

/// The contexts that a handler gets, in this order: site, stream, device.
inline auto DeviceBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<DeviceSite>>()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>();
}

inline ffi::Error CudaError(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string(op) + ": CUDA launch: " + cudaGetErrorString(status));
}

/// The device of a call, and the SMs it may use: `num_sms`, or all where the device has fewer.
struct DeviceCall {
  const DeviceGroup::Member* member = nullptr;
  Endpoint endpoint;
  int num_sms = 0;
};

inline ffi::Error FindDevice(const char* op, const DeviceSite* site, int32_t device_id,
                             int64_t num_sms, DeviceCall& call) {
  call.member = site->group->Find(device_id);
  JAX_EP_REQUIRE(call.member != nullptr, op, ": device ", device_id, " is not in group ",
                 site->group->identity());
  JAX_EP_REQUIRE(num_sms > 0, op, ": num_sms=", num_sms, " must be positive");
  call.endpoint = call.member->endpoint;
  call.endpoint.site = static_cast<uint32_t>(site->site);
  call.num_sms = static_cast<int>(std::min<int64_t>(num_sms, call.member->traits.num_sms));
  return ffi::Error::Success();
}

}  // namespace jax_ep
