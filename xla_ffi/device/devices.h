// The GPUs of this process as the CUDA runtime has them: traits, and what they can do together.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "device/endpoint.h"

namespace jax_ep {

/// Throws std::runtime_error, with the name of the CUDA function, for an error.
void CheckCuda(const char* what, cudaError_t status);

DeviceTraits TraitsOf(int64_t device);

/// A number of a GPU, the same for all processes of a host.
uint64_t GpuOf(int64_t device);

/// Whether 16 bytes that a device stores in the memory of a peer arrive at once, as far as is
/// known: packets rely on it. Between devices without native atomics, on PCIe, 8 bytes do.
bool HaveNativeAtomics(const std::vector<uint64_t>& gpus, const std::vector<int>& devices);

/// Loads what kernels the current device will run, and lowers the traits to what they were compiled
/// for. They must be there before a peer waits.
using LoadKernels = std::function<void(DeviceTraits&)>;

/// The same on each device. Throws what load_kernels throws.
void LoadKernelsOn(const std::vector<int64_t>& devices, const LoadKernels& load_kernels);

/// Throws std::runtime_error, saying why, unless every device can read every other one's memory.
void RequirePeers(const std::vector<int64_t>& devices);

}  // namespace jax_ep
