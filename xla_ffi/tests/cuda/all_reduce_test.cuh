// all_reduce and its fusion with R ranks as R streams, against the host's sums.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/numerics.h"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce/sum_cpu.h"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_cuda.cuh"
#include "tests/cuda/ranks.cuh"
#include "tests/test.h"

namespace jax_ep {

using Bytes = std::vector<std::byte>;

inline Bytes RandomElements(DType dtype, int64_t bytes, std::mt19937& rng) {
  Bytes values(bytes);
  std::normal_distribution<float> normal;
  const auto fill = [&](auto* to, auto&& make) {
    for (int64_t i = 0; i < bytes / static_cast<int64_t>(sizeof(*to)); ++i) to[i] = make();
  };
  void* data = values.data();
  switch (dtype) {
    case DType::kBF16:
      fill(static_cast<BF16*>(data), [&] { return FromF32<BF16>(normal(rng)); });
      break;
    case DType::kF16:
      fill(static_cast<F16*>(data), [&] { return FromF32<F16>(normal(rng)); });
      break;
    case DType::kF32:
      fill(static_cast<float*>(data), [&] { return normal(rng); });
      break;
    case DType::kI32:
      fill(static_cast<uint32_t*>(data), [&] { return static_cast<uint32_t>(rng()); });
      break;
  }
  return values;
}

// Makes some vectors equal to what an empty slot holds, to what stands for that, or nearly so.
inline void PlantSentinels(Bytes& values, std::mt19937& rng) {
  for (size_t begin = 0; begin + kSlotBytes <= values.size(); begin += kSlotBytes) {
    const uint32_t kind = rng() % 64;
    if (kind >= 6) continue;
    std::fill_n(values.begin() + begin, kSlotBytes, std::byte{kAbsentByte});
    // Byte 8 is the lowest of the upper half, as in kStandInWord.
    if (kind >= 2) values[begin + 8] ^= std::byte{1};
    if (kind >= 4) values[begin + rng() % kSlotBytes] ^= std::byte{1};
  }
}

struct Reduction {
  Movement movement;
  Algorithm algorithm;
  DType dtype;
  int64_t count;  // from each rank

  int64_t bytes() const { return count * (dtype == DType::kBF16 || dtype == DType::kF16 ? 2 : 4); }
  std::string Name() const {
    return "movement " + std::to_string(static_cast<int>(movement)) + " algorithm " +
           std::to_string(static_cast<int>(algorithm)) + " dtype " +
           std::to_string(static_cast<int>(dtype)) + " count " + std::to_string(count);
  }
};

// `times` calls one behind the other.
inline void TestReduction(const Reduction& c, const Ranks& ranks, int seed, int times) {
  std::mt19937 rng(seed);
  std::vector<AllReduceArgs> args;
  std::vector<Bytes> in;
  std::vector<Device<std::byte>> ins, outs;
  for (int r = 0; r < ranks.size(); ++r) {
    AllReduceArgs a{.movement = c.movement,
                    .dtype = c.dtype,
                    .num_ranks = ranks.size(),
                    .bytes = c.bytes(),
                    .in = nullptr,
                    .out = nullptr};
    ranks.Select(r);
    in.push_back(RandomElements(c.dtype, a.in_bytes(), rng));
    PlantSentinels(in[r], rng);
    ins.emplace_back(in[r]);
    outs.emplace_back(a.out_bytes());
    a.in = ins[r].get();
    a.out = outs[r].get();
    args.push_back(a);
  }
  for (int r = 0; r < ranks.size(); ++r) {
    ranks.Select(r);
    const AllReduceLaunch launch{
        .self = ranks.endpoint(r), .position = ranks.position(r), .args = args[r]};
    for (int i = 0; i < times; ++i) {
      Cuda(LaunchAllReduce(launch, c.algorithm, ranks.traits(), ranks.stream(r)));
    }
  }
  ranks.Synchronize();
  CHECK(!ranks.HasFailed(), c.Name() + ": " + ranks.Failure());
  for (int r = 0; r < ranks.size(); ++r) {
    Bytes expected(args[r].out_bytes());
    std::vector<const std::byte*> terms;
    for (int peer = 0; peer < ranks.size(); ++peer) {
      terms.push_back(in[peer].data() + r * args[r].in_stride());
      if (c.movement == Movement::kAllGather) {
        std::copy(in[peer].begin(), in[peer].end(), expected.begin() + peer * c.bytes());
      }
    }
    if (c.movement != Movement::kAllGather) {
      SumArrays(c.dtype, terms, c.bytes(), expected.data());
    }
    CHECK(outs[r].Read() == expected, c.Name() + " rank " + std::to_string(r));
  }
}

// The sum exactly; what the host's own mean square gives, nearly.
inline void TestRmsNorm(Algorithm algorithm, int64_t num_rows, int64_t hidden, const Ranks& ranks,
                        int seed) {
  std::mt19937 rng(seed);
  const int64_t bytes = num_rows * hidden * 4;
  const Bytes residual = RandomElements(DType::kF32, bytes, rng);
  const Bytes scale = RandomElements(DType::kF32, hidden * 4, rng);
  std::vector<Bytes> in;
  std::vector<Device<std::byte>> memory;
  for (int r = 0; r < ranks.size(); ++r) {
    ranks.Select(r);
    in.push_back(RandomElements(DType::kF32, bytes, rng));
    for (const Bytes* operand : std::initializer_list<const Bytes*>{&in[r], &residual, &scale})
      memory.emplace_back(*operand);
    for (int result = 0; result < 2; ++result) memory.emplace_back(bytes);
  }
  for (int r = 0; r < ranks.size(); ++r) {
    ranks.Select(r);
    const Device<std::byte>* own = &memory[5 * r];
    const RmsNormLaunch launch{.self = ranks.endpoint(r),
                               .position = ranks.position(r),
                               .args = {.dtype = DType::kF32,
                                        .has_f32_scale = true,
                                        .num_ranks = ranks.size(),
                                        .num_rows = num_rows,
                                        .hidden = hidden,
                                        .eps = 1e-3f,
                                        .in = own[0].get(),
                                        .residual = own[1].get(),
                                        .scale = own[2].get(),
                                        .normed = own[3].get(),
                                        .new_residual = own[4].get()}};
    for (int i = 0; i < 3; ++i) {
      Cuda(LaunchRmsNorm(launch, algorithm, ranks.traits(), ranks.stream(r)));
    }
  }
  ranks.Synchronize();
  const std::string name = "rmsnorm " + std::to_string(num_rows) + " x " + std::to_string(hidden);
  CHECK(!ranks.HasFailed(), name + ": " + ranks.Failure());
  std::vector<const std::byte*> terms;
  for (const Bytes& operand : in) terms.push_back(operand.data());
  Bytes sums(bytes);
  SumArrays(DType::kF32, terms, bytes, sums.data());
  const Bytes first = memory[3].Read();
  for (int r = 0; r < ranks.size(); ++r) {
    const Bytes got = memory[5 * r + 4].Read();
    const Bytes normed = memory[5 * r + 3].Read();
    CHECK(normed == first, name + ": ranks differ");
    const auto at = [](const Bytes& array, int64_t i) {
      return reinterpret_cast<const float*>(array.data())[i];
    };
    for (int64_t row = 0; row < num_rows; ++row) {
      double squares = 0;
      for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
        CHECK(at(got, i) == at(sums, i) + at(residual, i), name);
        squares += double{at(got, i)} * at(got, i);
      }
      const double factor = 1 / std::sqrt(squares / hidden + 1e-3);
      for (int64_t i = 0; i < hidden; ++i) {
        const double expected = at(got, row * hidden + i) * factor * at(scale, i);
        CHECK(std::abs(at(normed, row * hidden + i) - expected) < 1e-5 * (1 + std::abs(expected)),
              name);
      }
    }
  }
}

// Ranks that call different things, and a call beside another one of its rank: each is found, by
// whatever is stored at the peers.
inline void TestMisuse(int num_devices) {
  constexpr int kNumRanks = 2;
  using Kind = FailureKind;
  // The small are stored at the peers, the large read where they lie.
  constexpr int64_t kSmall = 5000;
  constexpr int64_t kLarge = 2'500'000;
  struct Way {
    Algorithm algorithm;
    int64_t count;
  };
  for (const auto& [algorithm, count] :
       {Way{Algorithm::kLowLatency, kSmall}, Way{Algorithm::kOneShot, kSmall},
        Way{Algorithm::kTwoShot, kSmall}, Way{Algorithm::kOneShot, kLarge},
        Way{Algorithm::kTwoShot, kLarge}}) {
    for (const Kind misuse : {Kind::kCallMismatch, Kind::kArrivedTwice}) {
      const Ranks ranks(kNumRanks, num_devices, std::chrono::seconds(5));
      const std::string name = "misuse " + std::to_string(static_cast<int>(misuse)) +
                               " algorithm " + std::to_string(static_cast<int>(algorithm)) +
                               " count " + std::to_string(count);
      std::vector<Device<float>> ins, outs;
      cudaStream_t beside;
      for (int r = 0; r < kNumRanks; ++r) {
        ranks.Select(r);
        ins.emplace_back(std::vector<float>(count, 1.0f));
        outs.emplace_back(count);
        Cuda(cudaDeviceSynchronize());
      }
      ranks.Select(0);
      Cuda(cudaStreamCreateWithFlags(&beside, cudaStreamNonBlocking));
      const auto call = [&](int r, uint32_t site, cudaStream_t stream) {
        ranks.Select(r);
        AllReduceLaunch launch{.self = ranks.endpoint(r),
                               .position = ranks.position(r),
                               .args = {.movement = Movement::kAllReduce,
                                        .dtype = DType::kF32,
                                        .num_ranks = kNumRanks,
                                        .bytes = count * 4,
                                        .in = reinterpret_cast<const std::byte*>(ins[r].get()),
                                        .out = reinterpret_cast<std::byte*>(outs[r].get())}};
        launch.self.site = site;
        Cuda(LaunchAllReduce(launch, algorithm, ranks.traits(), stream));
      };
      const bool is_overlap = misuse == Kind::kArrivedTwice;
      call(0, 1, ranks.stream(0));
      // The first waits for the rank that has not come yet, and does not end before.
      if (is_overlap) call(0, 2, beside);
      if (!is_overlap) call(1, 2, ranks.stream(1));
      ranks.Synchronize();
      Cuda(cudaStreamSynchronize(beside));
      Cuda(cudaStreamDestroy(beside));
      for (int r = 0; r < (is_overlap ? 1 : kNumRanks); ++r) {
        CHECK(ranks.record(r).is_set && ranks.record(r).kind == misuse, name, ranks.Failure());
        for (const float value : outs[r].Read()) CHECK(std::isnan(value), name, r);
      }
    }
  }
}

inline int TestReductions(const Ranks& ranks, bool is_small) {
  int seed = 0;
  std::vector<int64_t> counts = {1, 7, 8, 9, 4097, 60001};
  if (is_small) counts = {7, 4097};
  constexpr Movement kMovements[] = {Movement::kAllReduce, Movement::kReduceScatter,
                                     Movement::kAllGather};
  for (const int64_t count : counts) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32, DType::kI32}) {
      for (const Movement movement : kMovements) {
        for (const Algorithm algorithm :
             {Algorithm::kLowLatency, Algorithm::kOneShot, Algorithm::kTwoShot}) {
          if (algorithm == Algorithm::kTwoShot && movement != Movement::kAllReduce) continue;
          TestReduction({movement, algorithm, dtype, count}, ranks, seed++, 3);
        }
      }
    }
    if (!is_small && count == 7) {
      // More than a peer has room for.
      const int64_t many = static_cast<int64_t>(kMaxPushPayload) / 4 + 1;
      for (const Movement movement : kMovements) {
        TestReduction({movement, Algorithm::kOneShot, DType::kF32, many}, ranks, seed++, 2);
        TestReduction({movement, Algorithm::kOneShot, DType::kBF16, 2 * many - 1}, ranks, seed++,
                      2);
      }
      for (const int64_t fitting : {many, static_cast<int64_t>(TwoShotPayload(ranks.size())) / 4}) {
        for (const int64_t more : {0, 1}) {
          TestReduction({Movement::kAllReduce, Algorithm::kTwoShot, DType::kF32, fitting + more},
                        ranks, seed++, 2);
        }
      }
    }
    for (const Algorithm algorithm : {Algorithm::kLowLatency, Algorithm::kOneShot}) {
      TestRmsNorm(algorithm, 1 + count % 5, std::min<int64_t>(count, 8200), ranks, seed++);
    }
  }
  return seed;
}

}  // namespace jax_ep
