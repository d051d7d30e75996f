// Calls that send packets with R ranks as R streams: a wait for packets is seen from the host, and
// a peer whose call opens by addresses is found to make another call.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_cuda.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "ops/pull_rows/pull_rows_cuda.cuh"
#include "tests/cuda/ranks.cuh"
#include "tests/test.h"

namespace jax_ep {

// Two ranks with operands of every kind, one token or row each.
class PacketCalls {
 public:
  static constexpr int kNumRanks = 2;
  static constexpr int64_t kHidden = 128;
  static constexpr int kNumExperts = 4;

  explicit PacketCalls(int num_devices) : ranks(kNumRanks, num_devices, std::chrono::seconds(5)) {
    for (int r = 0; r < kNumRanks; ++r) {
      ranks.Select(r);
      rows_.emplace_back(std::vector<float>(kRows * kHidden, 1.0f));
      outs_.emplace_back(3 * kRows * kHidden);
      words_.emplace_back(std::vector<int32_t>(64));
      Cuda(cudaDeviceSynchronize());
    }
  }

  struct Call {
    const char* name;
    OpId op;
    bool sends_packets;
    cudaError_t (PacketCalls::*launch)(int rank);
  };
  static std::vector<Call> All() {
    return {{"all_reduce", OpId::kAllReduce, true, &PacketCalls::AllReduce},
            {"rmsnorm", OpId::kAllReduceResidualRmsnorm, true, &PacketCalls::RmsNorm},
            {"dispatch", OpId::kDispatch, true, &PacketCalls::Dispatch},
            {"combine", OpId::kCombine, true, &PacketCalls::Combine},
            {"pull_rows", OpId::kPullRows, false, &PacketCalls::PullRows}};
  }

  Ranks ranks;

 private:
  static constexpr int64_t kRows = kNumRanks;  // rows that a rank can receive
  static constexpr size_t kRowBytes = kHidden * sizeof(float);

  const std::byte* In(int r) const { return reinterpret_cast<const std::byte*>(rows_[r].get()); }
  std::byte* Out(int r, int64_t row = 0) const {
    return reinterpret_cast<std::byte*>(outs_[r].get()) + row * kRowBytes;
  }
  int32_t* Words(int r, int first) const { return words_[r].get() + first; }

  cudaError_t AllReduce(int r) {
    const AllReduceLaunch launch{.self = ranks.endpoint(r),
                                 .position = ranks.position(r),
                                 .args = {.movement = Movement::kAllReduce,
                                          .dtype = DType::kF32,
                                          .num_ranks = kNumRanks,
                                          .bytes = kRowBytes,
                                          .in = In(r),
                                          .out = Out(r)}};
    return LaunchAllReduce(launch, Algorithm::kLowLatency, ranks.traits(), ranks.stream(r));
  }
  cudaError_t RmsNorm(int r) {
    const RmsNormLaunch launch{.self = ranks.endpoint(r),
                               .position = ranks.position(r),
                               .args = {.dtype = DType::kF32,
                                        .has_f32_scale = true,
                                        .num_ranks = kNumRanks,
                                        .num_rows = 1,
                                        .hidden = kHidden,
                                        .eps = 1e-3f,
                                        .in = In(r),
                                        .residual = In(r),
                                        .scale = In(r),
                                        .normed = Out(r),
                                        .new_residual = Out(r, 1)}};
    return LaunchRmsNorm(launch, Algorithm::kLowLatency, ranks.traits(), ranks.stream(r));
  }
  cudaError_t Dispatch(int r) {
    DispatchArgs args{.shape = {.layout = RecvLayout::kExpert,
                                .experts = {.num_experts = kNumExperts, .num_ranks = kNumRanks},
                                .num_tokens = 1,
                                .num_topk = 1,
                                .recv_capacity = kRows,
                                .expert_alignment = 1},
                      .fill = Fill::kNone,
                      .topk_idx = Words(r, 0),
                      .topk_weights = nullptr,
                      .num_streams = 1,
                      .streams = {},
                      .group_sizes = Words(r, 8),
                      .num_recv = Words(r, 16),
                      .num_dropped = Words(r, 17),
                      .num_invalid = Words(r, 18),
                      .recv_src = Words(r, 24),
                      .recv_k = Words(r, 32),
                      .send_row = Words(r, 40),
                      .recv_topk_idx = nullptr,
                      .recv_weights = nullptr};
    args.streams[0] = {In(r), Out(r), kRowBytes};
    return LaunchLowLatencyDispatch(
        MakeLowLatencyDispatch(ranks.endpoint(r), ranks.position(r), args), ranks.traits(), 4,
        ranks.stream(r));
  }
  cudaError_t Combine(int r) {
    // Row 0 of rank 0 belongs to the token of each rank: altered, but with a defined result.
    const CombineArgs args{.layout = RecvLayout::kExpert,
                           .dtype = DType::kF32,
                           .num_ranks = kNumRanks,
                           .num_slots = 1,
                           .num_tokens = 1,
                           .recv_capacity = 1,
                           .hidden = kHidden,
                           .send_rank = Words(r, 0),
                           .send_row = Words(r, 0),
                           .recv_src = Words(r, 0),
                           .recv_k = Words(r, 0),
                           .weights = nullptr,
                           .rows = In(r),
                           .num_biases = 0,
                           .biases = {},
                           .out = Out(r)};
    const CombineArgs own = r == 0 ? ToPeer(args) : args;
    return LaunchLowLatencyCombine(
        MakeLowLatencyCombine(ranks.endpoint(r), ranks.position(r), own, 4), ranks.traits(),
        ranks.stream(r));
  }
  // Of rank 0: its row belongs to the token of rank 1, its own token has none.
  CombineArgs ToPeer(CombineArgs args) const {
    const std::vector<int32_t> peer = {1, kNoIndex};
    Cuda(cudaMemcpy(Words(0, 48), peer.data(), 2 * sizeof(int32_t), cudaMemcpyHostToDevice));
    args.recv_src = Words(0, 48);
    args.send_row = Words(0, 49);
    return args;
  }
  cudaError_t PullRows(int r) {
    const PullRowsLaunch pull{.self = ranks.endpoint(r),
                              .position = ranks.position(r),
                              .args = {.num_ranks = kNumRanks,
                                       .num_rows = 1,
                                       .num_pulled = 1,
                                       .row_bytes = kRowBytes,
                                       .index = Words(r, 0),
                                       .slot = nullptr,
                                       .num_slots = 0,
                                       .places = nullptr,
                                       .rows = In(r),
                                       .out = Out(r)}};
    return LaunchPullRows(pull, ranks.traits(), 4, ranks.stream(r));
  }

  std::vector<Device<float>> rows_, outs_;
  std::vector<Device<int32_t>> words_;
};

// A call that waits for a peer is seen to run, until it ends: so interrupts can end it, and another
// call beside it is refused.
inline void TestSeenWaits(int num_devices) {
  for (const PacketCalls::Call& call : PacketCalls::All()) {
    PacketCalls calls(num_devices);
    const Ranks& ranks = calls.ranks;
    cudaStream_t copies;
    ranks.Select(0);
    Cuda(cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking));
    const auto turn = [&](int r) {
      Signal word;
      ranks.Select(r);
      Cuda(cudaMemcpyAsync(&word, &ranks.control(r)->turn, sizeof(word), cudaMemcpyDeviceToHost,
                           r == 0 ? copies : ranks.stream(r)));
      Cuda(cudaStreamSynchronize(r == 0 ? copies : ranks.stream(r)));
      return word;
    };
    ranks.Select(0);
    Cuda((calls.*call.launch)(0));
    const auto start = std::chrono::steady_clock::now();
    while (turn(0).value == 0 && std::chrono::steady_clock::now() - start < ranks.timeout() / 2) {
    }
    CHECK(turn(0).value != 0, call.name, "a wait is not seen");
    // A call that has counted itself out stays like this.
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(turn(0).value != 0, call.name, "a wait is seen no more");
    ranks.Select(1);
    Cuda((calls.*call.launch)(1));
    ranks.Synchronize();
    CHECK(!ranks.HasFailed(), call.name, ranks.Failure());
    for (int r = 0; r < ranks.size(); ++r) CHECK(turn(r).value == 0, call.name, r);
    CHECK(turn(0).epoch == turn(1).epoch, call.name);
    ranks.Select(0);
    Cuda(cudaStreamDestroy(copies));
  }
}

// Each rank makes another call: every pair is a mismatch on both ranks, long before the timeout.
inline void TestMixedCalls(int num_devices) {
  const std::vector<PacketCalls::Call> all = PacketCalls::All();
  for (const PacketCalls::Call& first : all) {
    for (const PacketCalls::Call& second : all) {
      if (first.op == second.op) continue;
      const std::string name = std::string(first.name) + " beside " + second.name;
      PacketCalls calls(num_devices);
      const Ranks& ranks = calls.ranks;
      const auto start = std::chrono::steady_clock::now();
      ranks.Select(0);
      Cuda((calls.*first.launch)(0));
      ranks.Select(1);
      Cuda((calls.*second.launch)(1));
      ranks.Synchronize();
      CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(2), name);
      for (int r = 0; r < ranks.size(); ++r) {
        CHECK(ranks.record(r).is_set && ranks.record(r).kind == FailureKind::kCallMismatch, name, r,
              ranks.Failure());
      }
    }
  }
}

inline void TestPackets(int num_devices) {
  TestSeenWaits(num_devices);
  TestMixedCalls(num_devices);
}

}  // namespace jax_ep
