// Calls that leave ranks out, where a peer comes at about the time when the others give up: all
// blocks of a rank must take the same ranks.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/plan.h"
#include "ops/combine/combine_cuda.cuh"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "tests/cuda/ranks.cuh"
#include "tests/test.h"

namespace jax_ep {

// One dispatch of three ranks, of which the last comes late.
class LateDispatch {
 public:
  static constexpr int kNumRanks = 3;
  static constexpr int kLate = kNumRanks - 1;
  static constexpr int64_t kNumTokens = 24;
  static constexpr int kNumTopk = 4;
  static constexpr size_t kRowBytes = 512;

  LateDispatch(int num_devices, RecvLayout layout, std::chrono::milliseconds timeout, int seed)
      : layout_(layout), ranks_(kNumRanks, num_devices, timeout) {
    std::mt19937 rng(seed);
    for (int r = 0; r < kNumRanks; ++r) {
      ranks_.Select(r);
      std::vector<int32_t> ids;
      std::vector<int32_t> x;
      for (int64_t i = 0; i < kNumTokens; ++i) {
        for (int k = 0; k < kNumTopk; ++k) {
          ids.push_back(static_cast<int32_t>(k * 3 + rng() % 3));  // none twice
        }
        // The same word in a whole row, never zero.
        x.insert(x.end(), kRowBytes / 4, static_cast<int32_t>(r * kNumTokens + i + 1));
      }
      for (uint32_t ranks = 0; ranks < 1u << kNumRanks; ++ranks) {
        ids_by_ranks_[ranks].push_back(ids);
        for (int32_t& id : ids_by_ranks_[ranks][r]) {
          const uint32_t both = 1u << r | 1u << shape().experts.RankOf(id);
          if ((ranks & both) != both) id = kNoIndex;
        }
      }
      buffers_.push_back({Device(ids), Device(x), Device<int32_t>(Capacity() * kRowBytes / 4),
                          Device(std::vector<uint8_t>(kNumRanks, 1)), Device<uint8_t>(kNumRanks),
                          Device<int32_t>(shape().experts.num_local_experts()), Device<int32_t>(3),
                          Device<int32_t>(Capacity()), Device<int32_t>(Capacity()),
                          Device<int32_t>(kNumTokens * shape().num_send_slots()),
                          Device<int32_t>(Capacity() * kNumTopk)});
      Cuda(cudaDeviceSynchronize());
    }
  }

  void Run(std::chrono::microseconds delay) {
    for (int r = 0; r < kNumRanks; ++r) {
      if (r == kLate) std::this_thread::sleep_for(delay);
      Launch(r);
    }
    ranks_.Synchronize();
  }

  // The late rank is in time here, but reaches no memory of rank 1, and makes no combine. The
  // others do, rank 1 a pause later. Returns the masks that they have then.
  std::vector<std::vector<uint8_t>> RunCut(std::chrono::milliseconds pause) {
    ranks_.Select(kLate);
    const Device<uint8_t> nowhere(std::vector<uint8_t>(SharedBytes(kNumRanks, kAskedRooms), 0));
    std::vector<Device<uint8_t>> masks;
    std::vector<Device<int32_t>> sums;
    for (int r = 0; r < kNumRanks; ++r) {
      ranks_.Select(r);
      masks.emplace_back(kNumRanks);
      sums.emplace_back(kNumTokens * kRowBytes / 4);
      Cuda(cudaDeviceSynchronize());
    }
    for (const int r : {0, kLate, 1}) {
      Endpoint endpoint = ranks_.endpoint(r);
      if (r == kLate) endpoint.control[1] = reinterpret_cast<ControlBlock*>(nowhere.get());
      ranks_.Select(r);
      Launch(r, endpoint);
      if (r == kLate) continue;
      // Not by waiting for the stream: under a sanitizer that waits for rank 0, too.
      if (r == 1) std::this_thread::sleep_for(pause);
      const Buffers& b = buffers_[r];
      const CombineArgs args{.layout = layout_,
                             .dtype = DType::kF32,
                             .num_ranks = kNumRanks,
                             .num_slots = kNumRanks,
                             .num_tokens = kNumTokens,
                             .recv_capacity = Capacity(),
                             .hidden = kRowBytes / 4,
                             .send_rank = nullptr,
                             .send_row = b.send_row.get(),
                             .recv_src = b.recv_src.get(),
                             .weights = nullptr,
                             .rows = b.out.get(),
                             .num_biases = 0,
                             .biases = {},
                             .out = sums[r].get(),
                             .rank_mask = reinterpret_cast<const bool*>(b.mask_after.get()),
                             .rank_mask_after = reinterpret_cast<bool*>(masks[r].get())};
      Cuda(LaunchLowLatencyCombine(MakeLowLatencyCombine(endpoint, ranks_.position(r), args, 4),
                                   ranks_.traits(), ranks_.stream(r)));
    }
    ranks_.Synchronize();
    CHECK(!ranks_.HasFailed(), ranks_.Failure());
    return {masks[0].Read(), masks[1].Read()};
  }

  // Checks a rank that came in time: it must have taken one set of ranks in everything. Returns
  // whether the late one was among them. On a busy machine even the other one may come late.
  bool Check(int rank, const std::string& name) const {
    const Buffers& b = buffers_[rank];
    const std::vector<int32_t> recv_src = b.recv_src.Read();
    uint32_t taken = 0;
    for (uint32_t ranks = 1; ranks < 1u << kNumRanks; ++ranks) {
      const bool has_own = (ranks >> rank & 1) != 0;
      if (has_own && recv_src == SourcesOf(PlanWith(ranks), rank)) taken = ranks;
    }
    CHECK(taken != 0, name, "recv_src");
    const DispatchPlan plan = PlanWith(taken);
    const std::vector<int32_t> sources = SourcesOf(plan, rank);
    CHECK(b.group_sizes.Read() == plan.group_sizes(rank), name, "group_sizes");
    CHECK(b.counts.Read()[0] == plan.num_recv(rank), name, "num_recv");
    const int slots = shape().num_send_slots();
    std::vector<int32_t> send_row(kNumTokens * slots, kNoIndex);
    for (int dst = 0; dst < kNumRanks; ++dst) {
      plan.ForEachRow(rank, dst, [&](int32_t token, int32_t k, int32_t row) {
        send_row[int64_t{token} * slots + (layout_ == RecvLayout::kRank ? dst : k)] = row;
      });
    }
    CHECK(b.send_row.Read() == send_row, name, "send_row");
    const std::vector<uint8_t> mask = b.mask_after.Read();
    for (int r = 0; r < kNumRanks; ++r) {
      CHECK(mask[r] <= (taken >> r & 1), name, "mask", r);
    }
    const std::vector<int32_t> out = b.out.Read();
    for (size_t row = 0; row < sources.size(); ++row) {
      if (sources[row] < 0) continue;
      const bool may_miss = mask[sources[row] / kNumTokens] == 0;
      for (size_t i = 0; i < kRowBytes / 4; ++i) {
        const int32_t word = out[row * kRowBytes / 4 + i];
        CHECK(word == sources[row] + 1 || (may_miss && word == 0), name, row, word);
      }
    }
    CHECK(!ranks_.HasFailed(), name, ranks_.Failure());
    return (taken >> kLate & 1) != 0;
  }

 private:
  struct Buffers {
    Device<int32_t> ids, x, out;
    Device<uint8_t> mask, mask_after;
    Device<int32_t> group_sizes, counts, recv_src, recv_k, send_row, recv_topk_idx;
  };

  int64_t Capacity() const {
    return kNumTokens * kNumRanks * (layout_ == RecvLayout::kRank ? 1 : kNumTopk);
  }
  DispatchShape shape() const {
    return {.layout = layout_,
            .experts = {.num_experts = 12, .num_ranks = kNumRanks},
            .num_tokens = kNumTokens,
            .num_topk = kNumTopk,
            .recv_capacity = Capacity(),
            .expert_alignment = 1};
  }

  // The plan of some ranks, as bits; it refers to ids_by_ranks_.
  DispatchPlan PlanWith(uint32_t ranks) const {
    DispatchPlan plan(shape());
    for (int r = 0; r < kNumRanks; ++r) plan.List(r, ids_by_ranks_[ranks][r].data());
    for (int r = 0; r < kNumRanks; ++r) plan.Admit(r);
    return plan;
  }

  std::vector<int32_t> SourcesOf(const DispatchPlan& plan, int dst) const {
    std::vector<int32_t> sources(Capacity(), kNoIndex);
    for (int src = 0; src < kNumRanks; ++src) {
      plan.ForEachRow(src, dst, [&](int32_t token, int32_t, int32_t row) {
        sources[row] = static_cast<int32_t>(src * kNumTokens + token);
      });
    }
    return sources;
  }

  void Launch(int r) const { Launch(r, ranks_.endpoint(r)); }
  void Launch(int r, const Endpoint& endpoint) const {
    const Buffers& b = buffers_[r];
    const bool is_rank = layout_ == RecvLayout::kRank;
    ranks_.Select(r);
    DispatchArgs args{.shape = shape(),
                      .fill = Fill::kPadding,
                      .topk_idx = b.ids.get(),
                      .topk_weights = nullptr,
                      .num_streams = 1,
                      .streams = {},
                      .group_sizes = b.group_sizes.get(),
                      .num_recv = b.counts.get(),
                      .num_dropped = b.counts.get() + 1,
                      .num_invalid = b.counts.get() + 2,
                      .recv_src = b.recv_src.get(),
                      .recv_k = is_rank ? nullptr : b.recv_k.get(),
                      .send_row = b.send_row.get(),
                      .recv_topk_idx = is_rank ? b.recv_topk_idx.get() : nullptr,
                      .recv_weights = nullptr,
                      .rank_mask = reinterpret_cast<const bool*>(b.mask.get()),
                      .rank_mask_after = reinterpret_cast<bool*>(b.mask_after.get())};
    args.streams[0] = {reinterpret_cast<const std::byte*>(b.x.get()),
                       reinterpret_cast<std::byte*>(b.out.get()), kRowBytes};
    Cuda(LaunchLowLatencyDispatch(MakeLowLatencyDispatch(endpoint, ranks_.position(r), args),
                                  ranks_.traits(), 4, ranks_.stream(r)));
  }

  const RecvLayout layout_;
  const Ranks ranks_;
  // Without choices to or from other ranks than some, which are the index, as bits.
  std::vector<std::vector<int32_t>> ids_by_ranks_[1 << kNumRanks];
  std::vector<Buffers> buffers_;
};

// A rank dies when it has reached rank 0 only. Rank 1 waits for it in the dispatch and comes to the
// combine a timeout late: rank 0 must not take it for dead.
inline void TestHalfwayDeath(int num_devices) {
  constexpr std::chrono::milliseconds kTimeout{1000};
  LateDispatch call(num_devices, RecvLayout::kRank, kTimeout, 7);
  const std::vector<uint8_t> living = {1, 1, 0};
  const std::vector<std::vector<uint8_t>> masks = call.RunCut(kTimeout + kTimeout / 4);
  for (int r = 0; r < LateDispatch::kLate; ++r) CHECK(masks[r] == living, r);
}

inline void TestMaskedCalls(int num_devices) {
  TestHalfwayDeath(num_devices);
  constexpr std::chrono::milliseconds kTimeout{40};
  int num_with = 0, num_without = 0;
  for (int i = 0; i < 24; ++i) {
    const RecvLayout layout = i % 2 == 0 ? RecvLayout::kRank : RecvLayout::kExpert;
    LateDispatch call(num_devices, layout, kTimeout, i);
    const std::chrono::microseconds delay = i < 4 ? std::chrono::microseconds{0}
                                            : i >= 20
                                                ? 3 * kTimeout
                                                : kTimeout + std::chrono::milliseconds(i / 2 - 8);
    call.Run(delay);
    for (int r = 0; r < LateDispatch::kLate; ++r) {
      const bool has_late =
          call.Check(r, "late " + std::to_string(i) + " rank " + std::to_string(r));
      ++(has_late ? num_with : num_without);
    }
  }
  std::printf("a late rank: %d with it, %d without it\n", num_with, num_without);
  CHECK(num_with >= 1 && num_without >= 1, num_with, num_without);
}

}  // namespace jax_ep
