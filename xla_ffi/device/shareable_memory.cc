#include "device/shareable_memory.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace jax_ep {
namespace {

void CheckDriver(const char* what, CUresult status) {
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(what) + ": CUDA driver error " + std::to_string(status));
  }
}

// Finds a function of the driver when it is needed: the module must load on machines without
// driver.
template <typename Function>
Function FindOrNull(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  const bool is_there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return is_there ? reinterpret_cast<Function>(found) : nullptr;
}

template <typename Function>
Function FindInDriver(const char* name) {
  const auto found = FindOrNull<Function>(name);
  if (found == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  return found;
}

// Calls a function of the driver by the name and the type that cuda.h declares.
#define JAX_EP_DRIVER(name, ...) \
  CheckDriver(#name, FindInDriver<decltype(&name)>(#name)(__VA_ARGS__))

CUmemAllocationProp PropertiesOn(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  return properties;
}

int ExportHandle(CUmemGenericAllocationHandle handle) {
  int descriptor = -1;
  JAX_EP_DRIVER(cuMemExportToShareableHandle, &descriptor, handle,
                CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  // Otherwise a program that this process starts would keep the memory.
  fcntl(descriptor, F_SETFD, FD_CLOEXEC);
  return descriptor;
}

}  // namespace

ShareableMemory ShareableMemory::Create(int device, size_t bytes, const std::vector<int>& readers) {
  const CUmemAllocationProp properties = PropertiesOn(device);
  size_t granularity = 0;
  JAX_EP_DRIVER(cuMemGetAllocationGranularity, &granularity, &properties,
                CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  ShareableMemory memory;
  memory.bytes_ = (bytes + granularity - 1) / granularity * granularity;
  CUmemGenericAllocationHandle handle = 0;
  JAX_EP_DRIVER(cuMemCreate, &handle, memory.bytes_, &properties, 0);
  memory.handle_ = handle;
  std::vector<int> all = readers;
  all.push_back(device);
  memory.Map(all, Use::kReadAndWrite);
  JAX_EP_DRIVER(cuMemsetD8, memory.address_, 0, memory.bytes_);
  return memory;
}

ShareableMemory ShareableMemory::Import(int descriptor, size_t bytes,
                                        const std::vector<int>& readers, Use use) {
  ShareableMemory memory;
  memory.bytes_ = bytes;
  CUmemGenericAllocationHandle handle = 0;
  JAX_EP_DRIVER(cuMemImportFromShareableHandle, &handle,
                reinterpret_cast<void*>(static_cast<intptr_t>(descriptor)),
                CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  memory.handle_ = handle;
  memory.Map(readers, use);
  return memory;
}

void ShareableMemory::Map(const std::vector<int>& readers, Use use) {
  CUdeviceptr address = 0;
  JAX_EP_DRIVER(cuMemAddressReserve, &address, bytes_, 0, 0, 0);
  const CUresult status =
      FindInDriver<decltype(&cuMemMap)>("cuMemMap")(address, bytes_, 0, handle_, 0);
  if (status != CUDA_SUCCESS) {
    FindInDriver<decltype(&cuMemAddressFree)>("cuMemAddressFree")(address, bytes_);
    CheckDriver("cuMemMap", status);
  }
  address_ = address;
  const auto allow = [&](CUmemAccess_flags flags) {
    std::vector<CUmemAccessDesc> access;
    for (const int reader : readers) {
      access.push_back(
          {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = reader}, .flags = flags});
    }
    return FindInDriver<decltype(&cuMemSetAccess)>("cuMemSetAccess")(address_, bytes_,
                                                                     access.data(), access.size());
  };
  // Not every driver knows mappings for reading alone.
  if (use == Use::kRead && allow(CU_MEM_ACCESS_FLAGS_PROT_READ) == CUDA_SUCCESS) return;
  CheckDriver("cuMemSetAccess", allow(CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
}

ShareableMemory::ShareableMemory(ShareableMemory&& other) noexcept { *this = std::move(other); }

ShareableMemory& ShareableMemory::operator=(ShareableMemory&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(address_, other.address_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

ShareableMemory::~ShareableMemory() {
  // Errors are ignored: nothing can be done about them here.
  const auto unmap = FindOrNull<decltype(&cuMemUnmap)>("cuMemUnmap");
  const auto free_address = FindOrNull<decltype(&cuMemAddressFree)>("cuMemAddressFree");
  const auto release = FindOrNull<decltype(&cuMemRelease)>("cuMemRelease");
  if (unmap == nullptr || free_address == nullptr || release == nullptr) return;
  if (address_ != 0) {
    unmap(address_, bytes_);
    free_address(address_, bytes_);
  }
  if (handle_ != 0) release(handle_);
}

int ShareableMemory::Export() const { return ExportHandle(handle_); }

ExportedAllocation ExportAllocationOf(uint64_t address) {
  CUdeviceptr begin = 0;
  ExportedAllocation exported{};
  JAX_EP_DRIVER(cuMemGetAddressRange, &begin, &exported.bytes, address);
  exported.begin = begin;
  CUmemGenericAllocationHandle handle = 0;
  JAX_EP_DRIVER(cuMemRetainAllocationHandle, &handle, reinterpret_cast<void*>(begin));
  try {
    exported.descriptor = ExportHandle(handle);
  } catch (...) {
    FindInDriver<decltype(&cuMemRelease)>("cuMemRelease")(handle);
    throw;
  }
  FindInDriver<decltype(&cuMemRelease)>("cuMemRelease")(handle);
  return exported;
}

ExportedAllocation ReadableAllocationOf(uint64_t address, const std::vector<int>& readers) {
  CUdeviceptr begin = 0;
  size_t bytes = 0;
  JAX_EP_DRIVER(cuMemGetAddressRange, &begin, &bytes, address);
  if (!CanRead(begin, bytes, readers)) bytes = 0;
  return {.begin = begin, .bytes = bytes, .descriptor = -1};
}

bool CanRead(uint64_t address, size_t bytes, const std::vector<int>& readers) {
  static const auto find_range =
      FindOrNull<decltype(&cuMemGetAddressRange)>("cuMemGetAddressRange");
  static const auto get_access = FindOrNull<decltype(&cuMemGetAccess)>("cuMemGetAccess");
  if (find_range == nullptr || get_access == nullptr) return false;
  for (uint64_t at = address; at < address + bytes;) {  // by allocation
    CUdeviceptr begin = 0;
    size_t size = 0;
    if (find_range(&begin, &size, at) != CUDA_SUCCESS || size == 0) return false;
    for (const int reader : readers) {
      const CUmemLocation location{.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = reader};
      unsigned long long flags = 0;
      const bool is_known = get_access(&flags, &location, begin) == CUDA_SUCCESS;
      if (!is_known || (flags & CU_MEM_ACCESS_FLAGS_PROT_READ) == 0) return false;
    }
    at = begin + size;
  }
  return true;
}

int DeviceOfAddress(uint64_t address) {
  int num_devices = 0;
  JAX_EP_DRIVER(cuDeviceGetCount, &num_devices);
  for (int device = 0; device < num_devices; ++device) {
    unsigned flags = 0;
    int is_active = 0;
    JAX_EP_DRIVER(cuDevicePrimaryCtxGetState, device, &flags, &is_active);
    if (!is_active) continue;
    // The driver answers for any device, but not without a context.
    const OnDevice on_device(device);
    int found = -1;
    JAX_EP_DRIVER(cuPointerGetAttribute, &found, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address);
    return found;
  }
  throw std::runtime_error("no CUDA device has a context");
}

OnDevice::OnDevice(int64_t device) {
  CUcontext before = nullptr;
  JAX_EP_DRIVER(cuCtxGetCurrent, &before);
  before_ = before;
  const cudaError_t status = cudaSetDevice(static_cast<int>(device));
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not left behind for whoever asks next
  throw std::runtime_error(std::string("cudaSetDevice: ") + cudaGetErrorString(status));
}

OnDevice::~OnDevice() {
  const auto set_current = FindOrNull<decltype(&cuCtxSetCurrent)>("cuCtxSetCurrent");
  if (set_current != nullptr) set_current(static_cast<CUcontext>(before_));
}

}  // namespace jax_ep
