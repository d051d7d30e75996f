// Failures with R ranks as R streams: peers that do not come or come late, operands that nobody can
// read, and where a result may stand nevertheless.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "device/call.cuh"
#include "device/endpoint.h"
#include "device/launch.cuh"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_cuda.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "ops/pull_rows/pull_rows_cuda.cuh"
#include "tests/cuda/ranks.cuh"
#include "tests/test.h"

namespace jax_ep {

// A rank that does not come: the others give up, the record names it, and the device lives.
inline void TestSkippedRank(int num_devices) {
  const Ranks ranks(3, num_devices, std::chrono::milliseconds(200));
  std::vector<Device<float>> rows, outs;
  std::vector<Device<int32_t>> index;
  for (int r = 0; r < 3; ++r) {
    ranks.Select(r);
    rows.emplace_back(std::vector<float>(8, 1.0f));
    outs.emplace_back(8);
    index.emplace_back(std::vector<int32_t>{0, 1, 2, 3});
    Cuda(cudaDeviceSynchronize());
  }
  for (int r = 0; r < 2; ++r) {
    ranks.Select(r);
    const PullRowsLaunch pull{.self = ranks.endpoint(r),
                              .position = ranks.position(r),
                              .args = {.num_ranks = 3,
                                       .num_rows = 2,
                                       .num_pulled = 2,
                                       .row_bytes = 16,
                                       .index = index[r].get(),
                                       .slot = nullptr,
                                       .num_slots = 0,
                                       .places = nullptr,
                                       .rows = reinterpret_cast<const std::byte*>(rows[r].get()),
                                       .out = reinterpret_cast<std::byte*>(outs[r].get())}};
    for (int i = 0; i < 3; ++i) Cuda(LaunchPullRows(pull, ranks.traits(), 4, ranks.stream(r)));
  }
  ranks.Synchronize();
  CHECK(ranks.HasFailed(), "no record");
  int num_records = 0;
  for (int r = 0; r < 2; ++r) {
    const FailureRecord record = ranks.record(r);
    if (!record.is_set) continue;
    ++num_records;
    CHECK(record.peer == 2 && record.expected == 3 && record.seen == 2, record.peer);
    CHECK(record.op == OpId::kPullRows, "op");
  }
  CHECK(num_records > 0, num_records);
  for (int r = 0; r < 2; ++r) {
    for (const float value : outs[r].Read()) CHECK(std::isnan(value), r);
  }
}

// Two ranks of four come to a call whose blocks wait for one another: the record counts them.
inline void TestCountOfPeers(int num_devices) {
  constexpr int kNumRanks = 4;
  constexpr int64_t kCount = 5000;
  const Ranks ranks(kNumRanks, num_devices, std::chrono::milliseconds(200));
  std::vector<Device<float>> ins, outs;
  for (int r = 0; r < 2; ++r) {
    ranks.Select(r);
    ins.emplace_back(std::vector<float>(kCount, 1.0f));
    outs.emplace_back(kCount);
    Cuda(cudaDeviceSynchronize());
  }
  for (int r = 0; r < 2; ++r) {
    ranks.Select(r);
    const AllReduceLaunch launch{.self = ranks.endpoint(r),
                                 .position = ranks.position(r),
                                 .args = {.movement = Movement::kAllReduce,
                                          .dtype = DType::kF32,
                                          .num_ranks = kNumRanks,
                                          .bytes = kCount * 4,
                                          .in = reinterpret_cast<const std::byte*>(ins[r].get()),
                                          .out = reinterpret_cast<std::byte*>(outs[r].get())}};
    Cuda(LaunchAllReduce(launch, Algorithm::kOneShot, ranks.traits(), ranks.stream(r)));
  }
  ranks.Synchronize();
  for (int r = 0; r < 2; ++r) {
    const FailureRecord record = ranks.record(r);
    CHECK(record.is_set && record.kind == FailureKind::kPeerTimeout, r, ranks.Failure());
    CHECK(record.peer >= 2 && record.expected == kNumRanks && record.seen == 2, r, ranks.Failure());
  }
}

// One operand of rank 1 cannot be read by anyone: every rank says so, and no result stands.
inline void TestUnreadable(int num_devices) {
  constexpr int kNumRanks = 3;
  constexpr int kBadRank = 1;
  constexpr int64_t kRows = 4, kHidden = 8;
  constexpr int64_t kLarge = 2'500'000;  // not stored at the peers
  struct Way {
    const char* name;
    int64_t num_results;  // 32-bit words; each is a NaN and kNoIndex afterwards
    cudaError_t (*launch)(const Ranks&, int rank, void* operand, const Device<int32_t>& zeros,
                          void* out);
  };
  static constexpr auto kAllReduce = [](Algorithm algorithm, const Ranks& ranks, int r,
                                        void* operand, void* out) {
    const AllReduceLaunch launch{.self = ranks.endpoint(r),
                                 .position = ranks.position(r),
                                 .args = {.movement = Movement::kAllReduce,
                                          .dtype = DType::kF32,
                                          .num_ranks = kNumRanks,
                                          .bytes = kLarge * 4,
                                          .in = static_cast<const std::byte*>(operand),
                                          .out = static_cast<std::byte*>(out)}};
    return LaunchAllReduce(launch, algorithm, ranks.traits(), ranks.stream(r));
  };
  const Way ways[] = {
      {"one_shot", kLarge,
       [](const Ranks& ranks, int r, void* operand, const Device<int32_t>&, void* out) {
         return kAllReduce(Algorithm::kOneShot, ranks, r, operand, out);
       }},
      {"two_shot", kLarge,
       [](const Ranks& ranks, int r, void* operand, const Device<int32_t>&, void* out) {
         return kAllReduce(Algorithm::kTwoShot, ranks, r, operand, out);
       }},
      {"rmsnorm", kRows * kHidden,
       [](const Ranks& ranks, int r, void* operand, const Device<int32_t>& zeros, void* out) {
         const auto* other = reinterpret_cast<const std::byte*>(zeros.get());
         const RmsNormLaunch launch{
             .self = ranks.endpoint(r),
             .position = ranks.position(r),
             .args = {.dtype = DType::kF32,
                      .has_f32_scale = true,
                      .num_ranks = kNumRanks,
                      .num_rows = kRows / 2,
                      .hidden = kHidden,
                      .eps = 1e-3f,
                      .in = static_cast<const std::byte*>(operand),
                      .residual = other,
                      .scale = other,
                      .normed = static_cast<std::byte*>(out),
                      .new_residual = static_cast<std::byte*>(out) + kRows / 2 * kHidden * 4}};
         return LaunchRmsNorm(launch, Algorithm::kOneShot, ranks.traits(), ranks.stream(r));
       }},
      {"pull_rows", kRows * kHidden,
       [](const Ranks& ranks, int r, void* operand, const Device<int32_t>& zeros, void* out) {
         const PullRowsLaunch launch{.self = ranks.endpoint(r),
                                     .position = ranks.position(r),
                                     .args = {.num_ranks = kNumRanks,
                                              .num_rows = kRows,
                                              .num_pulled = kRows,
                                              .row_bytes = kHidden * 4,
                                              .index = zeros.get(),
                                              .slot = nullptr,
                                              .num_slots = 0,
                                              .places = nullptr,
                                              .rows = static_cast<const std::byte*>(operand),
                                              .out = static_cast<std::byte*>(out)}};
         return LaunchPullRows(launch, ranks.traits(), 4, ranks.stream(r));
       }},
      {"ragged_all_to_all", kRows * kHidden,
       [](const Ranks& ranks, int r, void* operand, const Device<int32_t>& zeros, void* out) {
         RaggedAllToAllLaunch launch{.self = ranks.endpoint(r),
                                     .position = ranks.position(r),
                                     .args = {.pieces = Pieces::kBack,
                                              .num_ranks = kNumRanks,
                                              .num_pieces = kNumRanks,
                                              .num_rows = kRows,
                                              .num_places = kRows,
                                              .keeps_rows = false,
                                              .input_offsets = zeros.get(),
                                              .output_offsets = zeros.get(),
                                              .sizes = zeros.get(),
                                              .recv_sizes = nullptr,
                                              .places = nullptr,
                                              .counts = nullptr,
                                              .send_places = nullptr,
                                              .all_recv_sizes = nullptr,
                                              .num_streams = 1,
                                              .streams = {},
                                              .summands = {Summand::kF32}}};
         launch.args.streams[0] = {static_cast<const std::byte*>(operand),
                                   static_cast<std::byte*>(out), kHidden * 4};
         return LaunchRaggedAllToAll(launch, ranks.traits(), 4, ranks.stream(r));
       }},
      // The slots of the rank layout are read by their own rank alone, and told all the same.
      {"combine", kRows * kHidden,
       [](const Ranks& ranks, int r, void* operand, const Device<int32_t>& zeros, void* out) {
         const CombineLaunch launch{.self = ranks.endpoint(r),
                                    .position = ranks.position(r),
                                    .args = {.layout = RecvLayout::kRank,
                                             .dtype = DType::kF32,
                                             .num_ranks = kNumRanks,
                                             .num_slots = kNumRanks,
                                             .num_tokens = kRows,
                                             .recv_capacity = kRows,
                                             .hidden = kHidden,
                                             .send_rank = nullptr,
                                             .send_row = static_cast<const int32_t*>(operand),
                                             .weights = nullptr,
                                             .rows = zeros.get(),
                                             .num_biases = 0,
                                             .biases = {},
                                             .out = out},
                                    .workspace = nullptr};
         return LaunchCombine(launch, ranks.traits(), 4, ranks.stream(r));
       }}};
  for (const Way& way : ways) {
    const Ranks ranks(kNumRanks, num_devices, std::chrono::seconds(5));
    std::vector<Device<int32_t>> operands, zeros, outs;
    for (int r = 0; r < kNumRanks; ++r) {
      ranks.Select(r);
      operands.emplace_back(std::vector<int32_t>(way.num_results));
      zeros.emplace_back(std::vector<int32_t>(kRows * kHidden));
      outs.emplace_back(way.num_results);
      Cuda(cudaDeviceSynchronize());
    }
    for (int r = 0; r < kNumRanks; ++r) {
      ranks.Select(r);
      void* operand = r == kBadRank ? reinterpret_cast<void*>(kUnreadable) : operands[r].get();
      Cuda(way.launch(ranks, r, operand, zeros[r], outs[r].get()));
    }
    ranks.Synchronize();
    for (int r = 0; r < kNumRanks; ++r) {
      const FailureRecord record = ranks.record(r);
      CHECK(record.is_set && record.kind == FailureKind::kNotMapped, way.name, r, ranks.Failure());
      CHECK(record.peer == kBadRank, way.name, r, record.peer);
      for (const int32_t word : outs[r].Read()) CHECK(word == kNoIndex, way.name, r, word);
    }
  }
}

constexpr int kLateBlocks = 2;
constexpr int32_t kWhole = 0x12121212;

// What a rank does in TestLateReader.
struct LateRead {
  Endpoint self;
  const int32_t* position;
  const int32_t* in;
  uint64_t delay_ns;  // before the last block reads
  int32_t* verdicts;  // [kLateBlocks] 1: good; 2: has read what had been written over
};

// Reads one word of every rank in place, block by block.
static __global__ void LateReadKernel(const __grid_constant__ LateRead call) {
  __shared__ PeerAddresses peers;
  constexpr OpId kOp = OpId::kAllReduce;
  OwnAddresses own;
  own.at[0] = call.in;
  own.count = 1;
  const bool is_open = OpenCall(call.self, kOp, call.position, own, peers);
  const uint64_t start = GlobalTimer();
  while (blockIdx.x == kLateBlocks - 1 && GlobalTimer() - start < call.delay_ns) {
  }
  bool is_whole = true;
  for (int r = 0; is_open && r < call.self.num_ranks; ++r) {
    is_whole &= __ldcg(reinterpret_cast<const int32_t*>(peers.at[0][r])) == kWhole;
  }
  const bool is_good = CloseBlocks(call.self, kOp, is_open);
  if (threadIdx.x == 0) {
    if (!is_good) NotePeerFailure(call.self);
    call.verdicts[blockIdx.x] = (is_good ? 1 : 0) | (is_whole ? 0 : 2);
  }
  EndReading(call.self);
}

// Three ranks part block by block. Rank 1 has been told of a failure and the others have not, as
// when somebody is still telling them. Its first block ends at once, its second later; the second
// of rank 2 reads last, and rank 1 writes over its operand when its call has ended.
// `gives_up`: rank 1 does not wait for that; then it must have told rank 2.
inline void TestLateReader(int num_devices, bool gives_up) {
  constexpr int kNumRanks = 3;
  constexpr uint64_t kDelays[kNumRanks] = {0, 100'000'000, 400'000'000};
  const uint64_t timeout_ns = 100'000'000;
  const Ranks ranks(kNumRanks, num_devices, std::chrono::seconds(10));
  std::vector<Device<int32_t>> ins, verdicts;
  for (int r = 0; r < kNumRanks; ++r) {
    ranks.Select(r);
    ins.emplace_back(1);
    verdicts.emplace_back(kLateBlocks);
    Cuda(cudaMemsetAsync(ins[r].get(), kWhole & 0xff, sizeof(kWhole), ranks.stream(r)));
    cudaFuncAttributes loaded{};
    Cuda(cudaFuncGetAttributes(&loaded, LateReadKernel));
    Cuda(cudaDeviceSynchronize());
  }
  ranks.Select(1);
  const FailureRecord told{.is_set = 1,
                           .kind = FailureKind::kPeerTimeout,
                           .op = OpId::kAllReduce,
                           .site = 0,
                           .rank = 0,
                           .peer = 2,
                           .expected = kNumRanks,
                           .seen = 2};
  Cuda(cudaMemcpy(&ranks.control(1)->told[0], &told, sizeof(told), cudaMemcpyHostToDevice));
  if (gives_up) {
    Cuda(cudaMemcpy(&ranks.control(1)->timeout_ns, &timeout_ns, sizeof(timeout_ns),
                    cudaMemcpyHostToDevice));
  }
  for (int r = 0; r < kNumRanks; ++r) {
    ranks.Select(r);
    const LateRead call{.self = ranks.endpoint(r),
                        .position = ranks.position(r),
                        .in = ins[r].get(),
                        .delay_ns = kDelays[r],
                        .verdicts = verdicts[r].get()};
    Cuda(Launch(LateReadKernel,
                {.num_blocks = kLateBlocks,
                 .num_threads = 128,
                 .shared_bytes = 0,
                 .is_behind = false,
                 .priority = ranks.traits().highest_priority,
                 .stream = ranks.stream(r)},
                call));
  }
  ranks.Select(1);
  Cuda(cudaMemsetAsync(ins[1].get(), 0, sizeof(kWhole), ranks.stream(1)));
  ranks.Synchronize();
  const std::string name = gives_up ? "rank 1 gives up" : "rank 1 waits";
  CHECK(ranks.record(1).is_set, name, ranks.Failure());
  for (const int32_t verdict : verdicts[1].Read()) CHECK(verdict == 0, name, verdict);
  for (const int r : {0, 2}) {
    for (const int32_t verdict : verdicts[r].Read()) {
      CHECK(verdict != 3, name, r, verdict);  // a good result of what had been written over
      CHECK(gives_up || verdict == 1, name, r, verdict);
    }
    CHECK(ranks.record(r).is_set == (gives_up ? 1u : 0u), name, r, ranks.Failure());
  }
}

inline void TestFailures(int num_devices) {
  TestSkippedRank(num_devices);
  TestCountOfPeers(num_devices);
  TestUnreadable(num_devices);
  for (const bool gives_up : {false, true}) TestLateReader(num_devices, gives_up);
}

}  // namespace jax_ep
