// The kernels without XLA: R ranks as R streams, on one GPU or spread over all of them, against the
// host's plan and sums.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "core/plan.h"
#include "tests/cuda/all_reduce_test.cuh"
#include "tests/cuda/failures_test.cuh"
#include "tests/cuda/flights_test.cuh"
#include "tests/cuda/masked_calls_test.cuh"
#include "tests/cuda/packets_test.cuh"
#include "tests/cuda/ragged_all_to_all_test.cuh"
#include "tests/cuda/ranks.cuh"
#include "tests/cuda/round_trip_test.cuh"
#include "tests/test.h"

namespace jax_ep {
namespace {

// Calls with masks: of more and more ranks, of a rank that makes no calls, and of one that makes no
// combine.
void TestMasks(int num_devices) {
  constexpr std::chrono::milliseconds kTimeout{1500};
  int seed = 0;
  for (const int num_ranks : {2, 3}) {
    const uint32_t all = (1u << num_ranks) - 1;
    const uint32_t last = 1u << (num_ranks - 1);
    const auto run = [&](const Ranks& ranks, uint32_t asked, uint32_t dead, uint32_t dying) {
      for (const RecvLayout layout : {RecvLayout::kRank, RecvLayout::kExpert}) {
        Case c{.layout = layout,
               .num_ranks = num_ranks,
               .num_tokens = 12,
               .num_topk = 3,
               .num_local_experts = 8,
               .capacity = 12 * num_ranks * (layout == RecvLayout::kRank ? 1 : 3)};
        c.row_bytes = seed % 2 == 0 ? 512 : 2064;
        c.mode = ExchangeMode::kLowLatency;
        c.has_mask = true;
        c.asked = asked;
        c.dead = dead;
        c.dying = dying;
        c.repeats = layout == RecvLayout::kExpert && seed % 3 == 0;
        TestRoundTrip<BF16>(c, DType::kBF16, ranks, 1 + seed % 4, seed);
        ++seed;
        // From now on the rank is known to be dead.
        dead |= dying;
        dying = 0;
      }
    };
    {
      const Ranks ranks(num_ranks, num_devices, std::chrono::seconds(20));
      for (const uint32_t asked : {all, all, all & ~last, 1u, 0u}) run(ranks, asked, 0, 0);
    }
    for (const bool dies_late : {false, true}) {
      const Ranks ranks(num_ranks, num_devices, kTimeout);
      run(ranks, all, 0, 0);
      run(ranks, all, dies_late ? 0 : last, dies_late ? last : 0);
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < 3; ++i) run(ranks, all, last, 0);
      // Nobody waits for the dead rank any more.
      CHECK(std::chrono::steady_clock::now() - start < 5 * kTimeout, num_ranks);
    }
  }
  std::printf("%d cases with masks\n", seed);
  std::fflush(stdout);
}

// Round trips with the tokens of several sources on each rank. The capacity ends in every part.
void TestParts(int num_devices, bool is_small) {
  int seed = 0;
  for (const int num_ranks : {1, 2, 3}) {
    const Ranks ranks(num_ranks, num_devices, std::chrono::seconds(20));
    for (const int num_parts : {2, 3}) {
      for (const RecvLayout layout : {RecvLayout::kRank, RecvLayout::kExpert}) {
        const bool is_rank = layout == RecvLayout::kRank;
        for (const int64_t num_tokens : {1, 13, is_small ? 90 : 700}) {
          for (const double share : {1.0, 0.5, 0.1}) {
            Case c{.layout = layout,
                   .num_ranks = num_ranks,
                   .num_tokens = num_tokens,
                   .num_topk = std::vector<int>{3, 8, 1}[seed % 3],
                   .num_local_experts = 5,
                   .capacity = 0,
                   .alignment = is_rank ? 1 : std::vector<int64_t>{1, 4}[seed % 2],
                   .row_bytes = std::vector<size_t>{16, 528, 4096}[seed % 3],
                   .fill = static_cast<Fill>(seed % 3)};
            c.num_parts = num_parts;
            c.repeats = seed % 4 == 0;
            c.is_skewed = seed % 5 == 0;
            const int64_t each = is_rank ? 1 : std::min(c.num_topk, c.num_local_experts);
            const int64_t most = c.num_sources() * num_tokens * each;
            c.capacity = static_cast<int64_t>(static_cast<double>(most) * share) +
                         c.num_local_experts * (c.alignment - 1) + 1;
            TestRoundTrip<BF16>(c, DType::kBF16, ranks, 1 + seed * 3 % 8, seed);
            ++seed;
          }
        }
      }
    }
  }
  std::printf("%d cases with parts\n", seed);
  std::fflush(stdout);
}

// `is_small`: for tools that make everything a hundred times slower.
void TestMatrix(int num_devices, bool is_small) {
  int seed = 0;
  const std::vector<int> all_num_ranks = {1, 2, 3, 4, 8};
  const std::vector<int64_t> all_num_tokens = {1, 12, 77, 600};
  const std::vector<int> all_num_topk = {1, 8, 32};
  const auto some = [is_small](const auto& all, size_t first, size_t count) {
    const auto begin = all.begin() + (is_small ? first : 0);
    return std::vector(begin, is_small ? begin + count : all.end());
  };
  for (const int num_ranks : some(all_num_ranks, 1, 2)) {
    const Ranks ranks(num_ranks, num_devices, std::chrono::seconds(20));
    const int most_sms = num_ranks > 4 ? 6 : 8;
    const auto num_sms = [&] { return 1 + seed * 7 % most_sms; };
    for (const RecvLayout layout : {RecvLayout::kRank, RecvLayout::kExpert}) {
      for (const int64_t num_tokens : some(all_num_tokens, 1, 2)) {
        for (const int num_topk : some(all_num_topk, 1, 1)) {
          const int num_local = std::max(2, 64 / num_ranks);
          Case c{.layout = layout,
                 .num_ranks = num_ranks,
                 .num_tokens = num_tokens,
                 .num_topk = num_topk,
                 .num_local_experts = num_local,
                 .capacity = 0};
          c.alignment = layout == RecvLayout::kExpert && seed % 2 ? 8 : 1;
          const int64_t most =
              num_tokens * num_ranks *
                  (layout == RecvLayout::kRank ? 1 : std::min(num_topk, num_local)) +
              num_local * (c.alignment - 1);
          c.is_skewed = seed % 3 == 0;
          c.fill = static_cast<Fill>(seed % 3);
          for (const double share : {1.0, 0.1}) {
            c.capacity = std::max<int64_t>(1, static_cast<int64_t>(most * share));
            c.row_bytes = std::vector<size_t>{16, 528, 4096, 512}[seed % 4];
            TestRoundTrip<BF16>(c, DType::kBF16, ranks, num_sms(), seed++);
          }
          c.capacity = most;
          TestRoundTrip<float>(c, DType::kF32, ranks, num_sms(), seed++);
          TestRoundTrip<F16>(c, DType::kF16, ranks, num_sms(), seed++);
          TestFewTokens(ranks, c, num_sms(), seed);
        }
      }
    }
    // Rows of several pieces, many experts, a ring whose places are filled many times.
    Case wide{.layout = RecvLayout::kExpert,
              .num_ranks = num_ranks,
              .num_tokens = 33,
              .num_topk = 4,
              .num_local_experts = 8,
              .capacity = 33 * num_ranks * 4};
    wide.row_bytes = 40000;
    TestRoundTrip<BF16>(wide, DType::kBF16, ranks, num_sms(), seed++);
    TestFewTokens(ranks, wide, num_sms(), seed);
    Case many{.layout = RecvLayout::kExpert,
              .num_ranks = num_ranks,
              .num_tokens = is_small ? 60 : 600,
              .num_topk = 8,
              .num_local_experts = 4096 / num_ranks,
              .capacity = is_small ? 200 : 2000};
    TestRoundTrip<BF16>(many, DType::kBF16, ranks, num_sms(), seed++);
    Case deep{.layout = RecvLayout::kExpert,
              .num_ranks = num_ranks,
              .num_tokens = 300,
              .num_topk = 4,
              .num_local_experts = 4,
              .capacity = 1200};
    deep.row_bytes = 64 * 1024;
    deep.share_masked = 0.3;
    const bool is_deep = num_ranks > 3 && !is_small;
    if (is_deep) TestRoundTrip<BF16>(deep, DType::kBF16, ranks, num_sms(), seed++);
    // Of eight ranks, with places for half of the warps.
    Case narrow = deep;
    narrow.num_tokens = 20;
    narrow.capacity = 80;
    narrow.row_bytes = 512 * 1024;
    if (is_deep) TestRoundTrip<BF16>(narrow, DType::kBF16, ranks, most_sms, seed++);
    const int num_reductions = TestReductions(ranks, is_small);
    const int num_ragged = TestRaggedAllToAll(ranks, is_small);
    std::printf("R=%d: %d cases, %d reductions, %d ragged\n", num_ranks, seed, num_reductions,
                num_ragged);
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace jax_ep

// `kernels_test`, or `kernels_test small`; behind it, on how many devices, if not on 1, 2, ...
int main(int argc, char** argv) {
  const bool is_small = argc > 1 && std::string(argv[1]) == "small";
  int num_devices = 0;
  jax_ep::Cuda(cudaGetDeviceCount(&num_devices));
  for (int device = 0; device < num_devices; ++device) {
    jax_ep::Cuda(cudaSetDevice(device));
    for (int peer = 0; peer < num_devices; ++peer) {
      if (peer != device) jax_ep::Cuda(cudaDeviceEnablePeerAccess(peer, 0));
    }
  }
  const int only = argc > 1 + is_small ? std::atoi(argv[1 + is_small]) : 0;
  for (int d = 1; d <= num_devices; ++d) {
    if (only != 0 && d != only) continue;
    std::printf("on %d devices\n", d);
    jax_ep::TestMatrix(d, is_small);
    jax_ep::TestParts(d, is_small);
    jax_ep::TestMasks(d);
    jax_ep::TestMaskedCalls(d);
    jax_ep::TestMisuse(d);
    jax_ep::TestFailures(d);
    jax_ep::TestPackets(d);
    jax_ep::TestFlights(d);
  }
  std::printf("ok\n");
  return 0;
}
