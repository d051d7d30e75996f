// R ranks without XLA, as R streams, on one GPU or spread over all of them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "device/clear_shared.h"
#include "device/endpoint.h"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_cuda.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "ops/pull_rows/pull_rows_cuda.cuh"
#include "ops/ragged_all_to_all/ragged_all_to_all_cuda.cuh"

namespace jax_ep {

inline constexpr AskedRooms kAskedRooms{.low_latency = 32 * 1024 * 1024,
                                        .in_flight = 8 * 1024 * 1024};

inline void Cuda(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

// Device memory that frees itself; poisoned, so that what no kernel writes is seen.
template <typename T>
class Device {
 public:
  explicit Device(size_t size) : size_(size) {
    Cuda(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(1, size) * sizeof(T)));
    Cuda(cudaMemset(data_, 0xa5, std::max<size_t>(1, size) * sizeof(T)));
    Cuda(cudaDeviceSynchronize());  // the streams of the ranks do not wait for a memset
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    Cuda(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(Device&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  Device& operator=(Device&&) = delete;
  ~Device() { cudaFree(data_); }
  T* get() const { return data_; }
  std::vector<T> Read() const {
    std::vector<T> values(size_);
    Cuda(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// R ranks, rank r on device r % num_devices, each with a stream of its own.
class Ranks {
 public:
  Ranks(int num_ranks, int num_devices, std::chrono::milliseconds timeout)
      : num_devices_(num_devices), timeout_(timeout) {
    Cuda(cudaHostAlloc(reinterpret_cast<void**>(&records_), num_ranks * sizeof(FailureRecord),
                       cudaHostAllocPortable | cudaHostAllocMapped));
    std::fill_n(records_, num_ranks, FailureRecord{});
    for (int r = 0; r < num_ranks; ++r) {
      Select(r);
      ControlBlock* control = nullptr;
      const size_t bytes = SharedBytes(num_ranks, kAskedRooms);
      Cuda(cudaMalloc(reinterpret_cast<void**>(&control), bytes));
      Cuda(ClearShared(reinterpret_cast<std::byte*>(control), num_ranks, kAskedRooms,
                       /*stream=*/nullptr));
      // The calls of a test go over the end of the epochs.
      const uint32_t epoch = 0xfffffff0u;
      Cuda(cudaMemcpy(&control->turn.epoch, &epoch, sizeof(epoch), cudaMemcpyHostToDevice));
      const uint32_t flights[kMaxInFlight] = {0xfffffff8u, 0xfffffff9u};
      for (uint32_t* words : {control->flights_sent, control->flights_received}) {
        Cuda(cudaMemcpy(words, flights, sizeof(flights), cudaMemcpyHostToDevice));
      }
      const uint64_t timeout_ns = std::chrono::nanoseconds(timeout).count();
      Cuda(cudaMemcpy(&control->timeout_ns, &timeout_ns, sizeof(timeout_ns),
                      cudaMemcpyHostToDevice));
      control_.push_back(control);
      cudaStream_t stream;
      Cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      streams_.push_back(stream);
      int32_t* position = nullptr;
      Cuda(cudaMalloc(reinterpret_cast<void**>(&position), sizeof(int32_t)));
      Cuda(cudaMemcpy(position, &r, sizeof(int32_t), cudaMemcpyHostToDevice));
      positions_.push_back(position);
      int shared = 0;
      Cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                  r % num_devices));
      int major = 0;
      Cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, r % num_devices));
      int num_sms = 0;
      Cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, r % num_devices));
      // The blocks of all ranks of a device wait for one another: they must fit at once.
      const int most_ranks = (num_ranks + num_devices - 1) / num_devices;
      traits_ = {.num_sms = num_sms / most_ranks,
                 .max_shared_bytes = static_cast<size_t>(shared),
                 .has_bulk_copy = major >= 9,
                 .highest_priority = -1};
      Cuda(LoadAllReduceKernels(traits_));
      Cuda(LoadAllReduceResidualRmsnormKernels(traits_));
      Cuda(LoadDispatchKernels(traits_));
      Cuda(LoadCombineKernels(traits_));
      Cuda(LoadDispatchSendKernels(traits_));
      Cuda(LoadDispatchRecvKernels(traits_));
      Cuda(LoadCombineSendKernels(traits_));
      Cuda(LoadCombineRecvKernels(traits_));
      Cuda(LoadPullRowsKernels(traits_));
      Cuda(LoadRaggedAllToAllKernels(traits_));
      Cuda(cudaDeviceSynchronize());
    }
    for (int r = 0; r < num_ranks; ++r) {
      Endpoint endpoint{.rank = r,
                        .num_ranks = num_ranks,
                        .position = r,
                        .site = 0,
                        .rooms = RoomsOf(num_ranks, kAskedRooms),
                        .control = {},
                        .control_bytes = SharedBytes(num_ranks, kAskedRooms),
                        .record = &records_[r]};
      std::copy(control_.begin(), control_.end(), endpoint.control);
      endpoints_.push_back(endpoint);
    }
  }
  ~Ranks() {
    for (int r = 0; r < size(); ++r) {
      Select(r);
      cudaFree(control_[r]);
      cudaFree(positions_[r]);
      cudaStreamDestroy(streams_[r]);
    }
    cudaFreeHost(records_);
  }

  int size() const { return static_cast<int>(control_.size()); }
  void Select(int r) const { Cuda(cudaSetDevice(r % num_devices_)); }
  ControlBlock* control(int r) const { return control_[r]; }
  const Endpoint& endpoint(int r) const { return endpoints_[r]; }
  cudaStream_t stream(int r) const { return streams_[r]; }
  const int32_t* position(int r) const { return positions_[r]; }
  const DeviceTraits& traits() const { return traits_; }
  std::chrono::milliseconds timeout() const { return timeout_; }
  FailureRecord record(int r) const { return records_[r]; }
  // The first record, for messages.
  std::string Failure() const {
    for (int r = 0; r < size(); ++r) {
      const FailureRecord& f = records_[r];
      if (f.is_set == 0) continue;
      return "rank " + std::to_string(r) + " op " + std::to_string(static_cast<int>(f.op)) +
             " kind " + std::to_string(static_cast<int>(f.kind)) + " peer " +
             std::to_string(f.peer) + " expected " + std::to_string(f.expected) + " seen " +
             std::to_string(f.seen);
    }
    return "";
  }
  bool HasFailed() const {
    return std::any_of(records_, records_ + size(), [](const auto& r) { return r.is_set != 0; });
  }
  void Synchronize() const {
    for (int r = 0; r < size(); ++r) {
      Select(r);
      Cuda(cudaStreamSynchronize(streams_[r]));
    }
  }

 private:
  int num_devices_;
  std::chrono::milliseconds timeout_;
  DeviceTraits traits_;
  FailureRecord* records_ = nullptr;
  std::vector<ControlBlock*> control_;
  std::vector<cudaStream_t> streams_;
  std::vector<int32_t*> positions_;
  std::vector<Endpoint> endpoints_;
};

}  // namespace jax_ep
