// GPUs as the CUDA runtime describes them: traits, and what devices can do together.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "device/endpoint.h"

namespace jax_ep {

/// Throws std::runtime_error for an error, with `what`, the name of the CUDA function.
void CheckCuda(const char* what, cudaError_t status);

DeviceTraits TraitsOf(int64_t device);

/// A number of a GPU, the same for all processes of a host.
uint64_t GpuOf(int64_t device);

/// Whether 16 bytes that a device stores in the memory of a peer arrive at once, as far as is
/// known. Packets rely on it. Between devices without native atomics, on PCIe, only 8 bytes arrive
/// at once.
bool HaveNativeAtomics(const std::vector<uint64_t>& gpus, const std::vector<int>& devices);

/// Loads the kernels that the current device will run, and lowers the traits to those that they
/// were compiled for. Kernels must be loaded before a peer waits.
using LoadKernels = std::function<void(DeviceTraits&)>;

/// Calls load_kernels on each device. Throws what load_kernels throws.
void LoadKernelsOn(const std::vector<int64_t>& devices, const LoadKernels& load_kernels);

/// Throws std::runtime_error, saying why, unless every device can read every other one's memory.
void RequirePeers(const std::vector<int64_t>& devices);

}  // namespace jax_ep
