#include "device/devices.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "device/shareable_memory.h"

namespace jax_ep {

void CheckCuda(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error for later callers
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

DeviceTraits TraitsOf(int64_t device) {
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    CheckCuda("cudaDeviceGetAttribute",
              cudaDeviceGetAttribute(&value, name, static_cast<int>(device)));
    return value;
  };
  int lowest = 0;
  int highest = 0;
  CheckCuda("cudaDeviceGetStreamPriorityRange",
            cudaDeviceGetStreamPriorityRange(&lowest, &highest));
  return {
      .num_sms = attribute(cudaDevAttrMultiProcessorCount),
      .max_shared_bytes = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
      .has_bulk_copy = attribute(cudaDevAttrComputeCapabilityMajor) >= 9,
      .highest_priority = highest};
}

uint64_t GpuOf(int64_t device) {
  uint64_t place = 0;
  for (const cudaDeviceAttr name :
       {cudaDevAttrPciDomainId, cudaDevAttrPciBusId, cudaDevAttrPciDeviceId}) {
    int value = 0;
    CheckCuda("cudaDeviceGetAttribute",
              cudaDeviceGetAttribute(&value, name, static_cast<int>(device)));
    place = place << 16 | static_cast<uint32_t>(value);
  }
  return place;
}

bool HaveNativeAtomics(const std::vector<uint64_t>& gpus, const std::vector<int>& devices) {
  int num_devices = 0;
  CheckCuda("cudaGetDeviceCount", cudaGetDeviceCount(&num_devices));
  for (int peer = 0; peer < num_devices; ++peer) {
    if (std::find(gpus.begin(), gpus.end(), GpuOf(peer)) == gpus.end()) continue;
    for (const int device : devices) {
      if (device == peer) continue;
      int value = 0;
      CheckCuda(
          "cudaDeviceGetP2PAttribute",
          cudaDeviceGetP2PAttribute(&value, cudaDevP2PAttrNativeAtomicSupported, device, peer));
      if (value == 0) return false;
    }
  }
  return true;
}

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
      CheckCuda(
          "cudaDeviceCanAccessPeer",
          cudaDeviceCanAccessPeer(&can_access, static_cast<int>(device), static_cast<int>(peer)));
      if (can_access) continue;
      throw std::runtime_error("device " + std::to_string(device) +
                               " cannot read the memory of device " + std::to_string(peer));
    }
  }
}

}  // namespace jax_ep
