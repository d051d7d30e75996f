// Dispatches and combines there and back with R ranks as R streams, against the host's plan and
// sums.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/numerics.h"
#include "core/plan.h"
#include "ops/combine/combine_cuda.cuh"
#include "ops/combine/sum_rows_cpu.h"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "ops/pull_rows/pull_rows_cuda.cuh"
#include "tests/cuda/ranks.cuh"
#include "tests/test.h"

namespace jax_ep {

struct Case {
  RecvLayout layout;
  int num_ranks;
  int64_t num_tokens;
  int num_topk;
  int num_local_experts;
  int64_t capacity;
  int64_t alignment = 1;
  size_t row_bytes = 256;
  Fill fill = Fill::kZeros;
  double share_masked = 0.1;
  bool is_skewed = false;
  bool repeats = false;  // tokens may name an expert twice
  ExchangeMode mode = ExchangeMode::kThroughput;
  bool is_halved = false;  // of few tokens: sent and received apart
  int num_parts = 1;       // of a rank's tokens: num_tokens are those of a part
  // Calls with a mask of ranks. All three are ranks as bits.
  bool has_mask = false;
  uint32_t asked = ~0u;  // the mask
  uint32_t dead = 0;     // make no calls, although the mask has them
  uint32_t dying = 0;    // make no combine, although the mask has them

  uint32_t living() const { return asked & ~dead; }
  static bool Has(uint32_t ranks, int rank) { return (ranks >> rank & 1) != 0; }
  DispatchShape shape() const {
    return {.layout = layout,
            .experts = {.num_experts = num_ranks * num_local_experts, .num_ranks = num_ranks},
            .num_tokens = num_tokens,
            .num_topk = num_topk,
            .recv_capacity = capacity,
            .expert_alignment = alignment,
            .num_parts = num_parts};
  }
  int64_t tokens_per_rank() const { return num_parts * num_tokens; }
  int num_sources() const { return num_parts * num_ranks; }
  // Where the operands of all ranks, rank behind rank, have a token of a source.
  int64_t PlaceOf(int64_t recv_src) const {
    const int64_t src = recv_src / num_tokens;
    return (src % num_ranks * num_parts + src / num_ranks) * num_tokens + recv_src % num_tokens;
  }
  std::string Name() const {
    return std::string(layout == RecvLayout::kRank ? "rank" : "expert") + " R" +
           std::to_string(num_ranks) + " T" + std::to_string(num_tokens) + " K" +
           std::to_string(num_topk) + " L" + std::to_string(num_local_experts) + " C" +
           std::to_string(capacity) + " A" + std::to_string(alignment) + " B" +
           std::to_string(row_bytes) + (num_parts > 1 ? " P" + std::to_string(num_parts) : "") +
           (repeats ? " repeats" : "") +
           (is_halved                           ? " halved"
            : mode == ExchangeMode::kLowLatency ? " low_latency"
                                                : "") +
           (has_mask ? " mask " + std::to_string(asked) + " dead " + std::to_string(dead) +
                           " dying " + std::to_string(dying)
                     : "");
  }
};

inline std::vector<int32_t> MakeIds(const Case& c, std::mt19937& rng) {
  std::vector<int32_t> ids(c.tokens_per_rank() * c.num_topk, kNoIndex);
  const int num_experts = c.num_ranks * c.num_local_experts;
  std::uniform_real_distribution<double> uniform;
  for (int64_t t = 0; t < c.tokens_per_rank(); ++t) {
    std::vector<int32_t> chosen;
    for (int k = 0; k < c.num_topk; ++k) {
      if (uniform(rng) < c.share_masked) {
        ids[t * c.num_topk + k] = uniform(rng) < 0.5 ? kNoIndex : num_experts + k;
        continue;
      }
      const double u = uniform(rng);
      const auto id = static_cast<int32_t>((c.is_skewed ? u * u * u : u) * num_experts);
      if (!c.repeats && std::find(chosen.begin(), chosen.end(), id) != chosen.end()) continue;
      chosen.push_back(id);
      ids[t * c.num_topk + k] = id;
    }
  }
  return ids;
}

template <typename T>
void Same(const Case& c, const char* what, int rank, const std::vector<T>& got,
          const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::memcmp(&got[i], &expected[i], sizeof(T)) != 0) {
      std::fprintf(stderr, "%s: %s of rank %d differs at %zu\n", c.Name().c_str(), what, rank, i);
      CHECK(false, i);
      return;
    }
  }
}

inline std::vector<uint8_t> BytesOf(uint32_t ranks, int num_ranks) {
  std::vector<uint8_t> bytes;
  for (int r = 0; r < num_ranks; ++r) bytes.push_back(Case::Has(ranks, r) ? 1 : 0);
  return bytes;
}

// The ids of a rank without choices that lead to or from ranks that are left out.
inline std::vector<int32_t> WithoutOthers(const Case& c, int rank, std::vector<int32_t> ids) {
  const ExpertMap experts = c.shape().experts;
  for (int32_t& id : ids) {
    if (!experts.IsExpert(id)) continue;
    if (!Case::Has(c.living(), rank) || !Case::Has(c.living(), experts.RankOf(id))) id = kNoIndex;
  }
  return ids;
}

template <typename T>
struct TestRow {
  // In [-2, 2), of all magnitudes that matter to a sum, and quickly.
  static T Make(std::mt19937& rng) {
    return FromF32<T>(static_cast<float>(static_cast<int32_t>(rng())) * 0x1p-30f);
  }
};

// Dispatch, the dispatch's rows pulled once more along recv_src, and combine of other rows.
template <typename T>
void TestRoundTrip(const Case& c, DType dtype, const Ranks& ranks, int num_sms, int seed) {
  std::mt19937 rng(seed);
  const DispatchShape shape = c.shape();
  const int num_ranks = c.num_ranks;
  const int64_t num_tokens = c.tokens_per_rank();
  const int64_t hidden = c.row_bytes / sizeof(T);
  const bool is_rank = c.layout == RecvLayout::kRank;
  const int slots = shape.num_send_slots();
  const size_t scale_bytes = 20;
  const int num_biases = seed % 3;
  const bool crosses_in_fp8 =
      c.mode == ExchangeMode::kLowLatency && hidden % kFp8Block == 0 && seed % 2 == 0;
  const bool has_weights = !is_rank && seed % 5 != 0;

  std::vector<std::vector<int32_t>> ids;
  std::vector<std::vector<float>> weights;
  std::vector<std::vector<T>> x, y;
  std::vector<std::vector<std::byte>> scales;
  for (int r = 0; r < num_ranks; ++r) {
    ids.push_back(MakeIds(c, rng));
    std::vector<float> w(ids[r].size());
    for (float& v : w) v = std::uniform_real_distribution<float>(-1, 1)(rng);
    weights.push_back(w);
    x.emplace_back(num_tokens * hidden);
    y.emplace_back(c.capacity * hidden);
    for (T& v : x[r]) v = TestRow<T>::Make(rng);
    for (T& v : y[r]) v = TestRow<T>::Make(rng);
    scales.emplace_back(num_tokens * scale_bytes);
    for (std::byte& b : scales[r]) b = static_cast<std::byte>(rng());
  }
  DispatchPlan plan(shape);
  std::vector<std::vector<int32_t>> routed;
  for (int r = 0; r < num_ranks; ++r) {
    routed.push_back(c.has_mask ? WithoutOthers(c, r, ids[r]) : ids[r]);
    plan.List(r, routed[r].data());
  }
  for (int r = 0; r < num_ranks; ++r) plan.Admit(r);

  struct Buffers {
    Device<int32_t> ids;
    Device<float> weights;
    Device<T> x, y, out, back, again;
    Device<std::byte> scales, out_scales, workspace, partials;
    Device<int32_t> flight, group_sizes, counts, recv_src, recv_k, send_row, send_rank,
        recv_topk_idx, places, index;
    Device<float> recv_weights;
    Device<uint8_t> mask, masks_after;
  };
  const PartialRing ring = PartialRing::Of(c.layout, num_ranks, num_tokens, slots, c.row_bytes);
  std::vector<Buffers> buffers;
  const size_t choices = c.capacity * c.num_topk;
  // The token of each row, as recv_src counts it.
  std::vector<std::vector<int32_t>> sources_of(num_ranks);
  for (int dst = 0; dst < num_ranks; ++dst) {
    sources_of[dst].assign(c.capacity, kNoIndex);
    for (int src = 0; src < c.num_sources(); ++src) {
      plan.ForEachRow(src, dst, [&](int32_t token, int32_t, int32_t row) {
        sources_of[dst][row] = static_cast<int32_t>(src * c.num_tokens + token);
      });
    }
  }
  for (int r = 0; r < num_ranks; ++r) {
    ranks.Select(r);
    std::vector<int32_t> send_rank;
    std::vector<int32_t> index;
    for (const int32_t from : sources_of[r]) {
      index.push_back(from < 0 ? kNoIndex : static_cast<int32_t>(c.PlaceOf(from)));
    }
    for (const int32_t id : ids[r]) {
      send_rank.push_back(shape.experts.IsExpert(id) ? shape.experts.RankOf(id) : kNoIndex);
    }
    buffers.push_back({Device(ids[r]),
                       Device(weights[r]),
                       Device(x[r]),
                       Device(y[r]),
                       Device<T>(c.capacity * hidden),
                       Device<T>(num_tokens * hidden),
                       Device<T>(c.capacity * hidden),
                       Device(scales[r]),
                       Device<std::byte>(c.capacity * scale_bytes),
                       Device<std::byte>(DispatchWorkspaceBytes(shape)),
                       Device<std::byte>(ring.Bytes(num_ranks, c.row_bytes)),
                       Device<int32_t>(kFlightWords),
                       Device<int32_t>(c.num_local_experts),
                       Device<int32_t>(3),
                       Device<int32_t>(c.capacity),
                       Device<int32_t>(c.capacity),
                       Device<int32_t>(num_tokens * slots),
                       Device(send_rank),
                       Device<int32_t>(choices),
                       Device<int32_t>(num_ranks * num_tokens * c.num_topk),
                       Device(index),
                       Device<float>(is_rank ? choices : c.capacity),
                       Device(BytesOf(c.asked, num_ranks)),
                       Device<uint8_t>(2 * num_ranks)});
    Cuda(cudaDeviceSynchronize());
  }
  for (int r = 0; r < num_ranks; ++r) {
    if (Case::Has(c.dead, r)) continue;
    const Buffers& b = buffers[r];
    const auto* mask = c.has_mask ? reinterpret_cast<const bool*>(b.mask.get()) : nullptr;
    auto* mask_after = c.has_mask ? reinterpret_cast<bool*>(b.masks_after.get()) : nullptr;
    ranks.Select(r);
    DispatchLaunch launch{.self = ranks.endpoint(r),
                          .position = ranks.position(r),
                          .args = {.shape = shape,
                                   .fill = c.fill,
                                   .topk_idx = b.ids.get(),
                                   .topk_weights = b.weights.get(),
                                   .num_streams = 2,
                                   .streams = {},
                                   .group_sizes = b.group_sizes.get(),
                                   .num_recv = b.counts.get(),
                                   .num_dropped = b.counts.get() + 1,
                                   .num_invalid = b.counts.get() + 2,
                                   .recv_src = b.recv_src.get(),
                                   .recv_k = is_rank ? nullptr : b.recv_k.get(),
                                   .send_row = b.send_row.get(),
                                   .recv_topk_idx = is_rank ? b.recv_topk_idx.get() : nullptr,
                                   .recv_weights = b.recv_weights.get(),
                                   .rank_mask = mask,
                                   .rank_mask_after = mask_after},
                          .workspace = b.workspace.get()};
    launch.args.streams[0] = {reinterpret_cast<const std::byte*>(b.x.get()),
                              reinterpret_cast<std::byte*>(b.out.get()), c.row_bytes};
    launch.args.streams[1] = {b.scales.get(), b.out_scales.get(), scale_bytes};
    if (c.mode == ExchangeMode::kLowLatency) {
      const LowLatencyDispatch few =
          MakeLowLatencyDispatch(launch.self, launch.position, launch.args);
      if (c.is_halved) {
        Cuda(LaunchDispatchSend(few, b.flight.get(), ranks.traits(), num_sms, ranks.stream(r)));
        Cuda(LaunchDispatchRecv(few, b.flight.get(), ranks.traits(), num_sms, ranks.stream(r)));
      } else {
        Cuda(LaunchLowLatencyDispatch(few, ranks.traits(), num_sms, ranks.stream(r)));
      }
    } else {
      Cuda(LaunchDispatch(launch, ranks.traits(), num_sms, ranks.stream(r)));
    }
    const PullRowsLaunch pull{
        .self = ranks.endpoint(r),
        .position = ranks.position(r),
        .args = {.num_ranks = num_ranks,
                 .num_rows = num_tokens,
                 .num_pulled = c.capacity,
                 .row_bytes = c.row_bytes,
                 .index = c.num_parts == 1 ? b.recv_src.get() : b.index.get(),
                 .slot = is_rank ? nullptr : b.recv_k.get(),
                 .num_slots = is_rank ? 0 : c.num_topk,
                 .places = is_rank || seed % 4 == 0 ? nullptr : b.places.get(),
                 .rows = launch.args.streams[0].in,
                 .out = reinterpret_cast<std::byte*>(b.again.get())}};
    if ((c.dead | c.dying) == 0) {
      Cuda(LaunchPullRows(pull, ranks.traits(), num_sms, ranks.stream(r)));
    }
    if (Case::Has(c.dying, r)) continue;
    CombineLaunch combine{.self = ranks.endpoint(r),
                          .position = ranks.position(r),
                          .args = {.layout = c.layout,
                                   .dtype = dtype,
                                   .num_ranks = num_ranks,
                                   .num_slots = slots,
                                   .num_tokens = num_tokens,
                                   .recv_capacity = c.capacity,
                                   .hidden = hidden,
                                   .wire = crosses_in_fp8 ? Quantize::kFp8 : Quantize::kNone,
                                   .send_rank = is_rank ? nullptr : b.send_rank.get(),
                                   .send_row = b.send_row.get(),
                                   .recv_src = b.recv_src.get(),
                                   .recv_k = is_rank ? nullptr : b.recv_k.get(),
                                   .weights = has_weights ? b.recv_weights.get() : nullptr,
                                   .rows = b.y.get(),
                                   .num_biases = num_biases,
                                   .biases = {b.x.get(), b.x.get()},
                                   .out = b.back.get(),
                                   .rank_mask = mask,
                                   .rank_mask_after = mask ? mask_after + num_ranks : nullptr},
                          .workspace = b.partials.get()};
    if (c.mode == ExchangeMode::kLowLatency) {
      const LowLatencyCombine few =
          MakeLowLatencyCombine(combine.self, combine.position, combine.args, num_sms);
      if (c.is_halved) {
        Cuda(LaunchCombineSend(few, b.flight.get(), ranks.traits(), ranks.stream(r)));
        Cuda(LaunchCombineRecv(few, b.flight.get(), ranks.traits(), ranks.stream(r)));
      } else {
        Cuda(LaunchLowLatencyCombine(few, ranks.traits(), ranks.stream(r)));
      }
    } else {
      Cuda(LaunchCombine(combine, ranks.traits(), num_sms, ranks.stream(r)));
    }
  }
  ranks.Synchronize();
  CHECK(!ranks.HasFailed(), c.Name() + ": " + ranks.Failure());

  std::vector<std::vector<float>> recv_weights(num_ranks);
  for (int dst = 0; dst < num_ranks; ++dst) {
    if (Case::Has(c.dead, dst)) continue;
    const Buffers& b = buffers[dst];
    const std::vector<int32_t>& src_of = sources_of[dst];
    std::vector<int32_t> k_of(c.capacity, kNoIndex);
    std::vector<int32_t> topk(choices, kNoIndex);
    std::vector<float> w(is_rank ? choices : c.capacity, 0.0f);
    for (int src = 0; src < c.num_sources(); ++src) {
      const int rank = src % num_ranks;
      plan.ForEachRow(src, dst, [&](int32_t token, int32_t k, int32_t row) {
        k_of[row] = k;
        const int64_t first = (src / num_ranks * c.num_tokens + token) * c.num_topk;
        if (!is_rank) {
          w[row] = weights[rank][first + k];
          return;
        }
        for (int j = 0; j < c.num_topk; ++j) {
          const int32_t id = ids[rank][first + j];
          if (!shape.experts.IsExpert(id) || shape.experts.RankOf(id) != dst) continue;
          topk[int64_t{row} * c.num_topk + j] = shape.experts.LocalOf(id);
          w[int64_t{row} * c.num_topk + j] = weights[rank][first + j];
        }
      });
    }
    Same(c, "recv_src", dst, b.recv_src.Read(), src_of);
    if (!is_rank) Same(c, "recv_k", dst, b.recv_k.Read(), k_of);
    if (is_rank) Same(c, "recv_topk_idx", dst, b.recv_topk_idx.Read(), topk);
    Same(c, "recv_weights", dst, b.recv_weights.Read(), w);
    Same(c, "group_sizes", dst, b.group_sizes.Read(), plan.group_sizes(dst));
    Same(c, "counts", dst, b.counts.Read(),
         {plan.num_recv(dst), plan.num_dropped(dst), plan.num_invalid(dst)});
    recv_weights[dst] = w;
    const std::vector<T> out = b.out.Read();
    const std::vector<T> again = b.again.Read();
    const std::vector<std::byte> out_scales = b.out_scales.Read();
    for (int64_t row = 0; row < c.capacity; ++row) {
      const int64_t from = src_of[row] < 0 ? kNoIndex : c.PlaceOf(src_of[row]);
      std::vector<T> zero(hidden, T{});
      std::vector<std::byte> no_scales(scale_bytes);
      const T* wanted = from < 0 ? zero.data() : &x[from / num_tokens][from % num_tokens * hidden];
      const std::byte* wanted_scales =
          from < 0 ? no_scales.data() : &scales[from / num_tokens][from % num_tokens * scale_bytes];
      CHECK((c.dead | c.dying) != 0 || std::memcmp(&again[row * hidden], wanted, c.row_bytes) == 0,
            c.Name(), dst, row);
      const bool is_open = from < 0 && (c.fill == Fill::kNone ||
                                        (c.fill == Fill::kPadding && row >= plan.num_recv(dst)));
      if (is_open) continue;
      CHECK(std::memcmp(&out[row * hidden], wanted, c.row_bytes) == 0, c.Name(), dst, row);
      CHECK(std::memcmp(&out_scales[row * scale_bytes], wanted_scales, scale_bytes) == 0, c.Name(),
            dst, row);
    }
  }
  for (int src = 0; src < num_ranks; ++src) {
    if (Case::Has(c.dead, src)) continue;
    const Buffers& b = buffers[src];
    std::vector<int32_t> send_row(num_tokens * slots, kNoIndex);
    for (int part = 0; part < c.num_parts; ++part) {
      for (int dst = 0; dst < num_ranks; ++dst) {
        plan.ForEachRow(part * num_ranks + src, dst, [&](int32_t token, int32_t k, int32_t row) {
          send_row[(part * c.num_tokens + token) * slots + (is_rank ? dst : k)] = row;
        });
      }
    }
    Same(c, "send_row", src, b.send_row.Read(), send_row);
    if (Case::Has(c.dying, src)) continue;
    if (c.has_mask) {
      std::vector<uint8_t> masks = BytesOf(c.living(), num_ranks);
      const std::vector<uint8_t> later = BytesOf(c.living() & ~c.dying, num_ranks);
      masks.insert(masks.end(), later.begin(), later.end());
      Same(c, "masks", src, b.masks_after.Read(), masks);
    }
    const std::vector<T> back = b.back.Read();
    for (int64_t t = 0; t < num_tokens; ++t) {
      std::vector<std::pair<int, int32_t>> places;
      for (int s = 0; s < slots; ++s) {
        const int32_t row = send_row[t * slots + s];
        if (row < 0) continue;
        if (Case::Has(c.dying, is_rank ? s : shape.experts.RankOf(ids[src][t * c.num_topk + s]))) {
          continue;
        }
        places.emplace_back(is_rank ? s : shape.experts.RankOf(ids[src][t * c.num_topk + s]), row);
      }
      std::sort(places.begin(), places.end());
      std::vector<RowTerm> terms;
      for (size_t i = 0; i < places.size(); ++i) {
        const auto& [rank, row] = places[i];
        terms.push_back({reinterpret_cast<const std::byte*>(&y[rank][row * hidden]),
                         has_weights ? recv_weights[rank][row] : 1.0f,
                         !is_rank && i > 0 && places[i - 1].first == rank,
                         crosses_in_fp8 && rank != src});
      }
      for (int i = 0; i < num_biases; ++i) {
        terms.push_back({reinterpret_cast<const std::byte*>(&x[src][t * hidden]), 1.0f, false});
      }
      std::vector<T> sum(hidden);
      SumRows(dtype, terms, hidden, reinterpret_cast<std::byte*>(sum.data()));
      CHECK(std::memcmp(&back[t * hidden], sum.data(), c.row_bytes) == 0, c.Name(), src, t);
    }
  }
}

// Round trips of few tokens, with the kernels for these.
inline void TestFewTokens(const Ranks& ranks, const Case& given, int num_sms, int seed) {
  Case c = given;
  c.mode = ExchangeMode::kLowLatency;
  DispatchArgs args{};
  args.shape = c.shape();
  args.num_streams = 2;
  args.streams[0].row_bytes = c.row_bytes;
  args.streams[1].row_bytes = 20;
  const int64_t room = MakeLowLatencyDispatch({}, nullptr, args).room();
  if (room > ranks.endpoint(0).rooms.low_latency_payload) return;
  TestRoundTrip<BF16>(c, DType::kBF16, ranks, num_sms, seed);
  TestRoundTrip<float>(c, DType::kF32, ranks, num_sms, seed + 1);
  TestRoundTrip<F16>(c, DType::kF16, ranks, num_sms, seed + 2);
  if (room <= ranks.endpoint(0).rooms.in_flight_payload) {
    c.is_halved = true;
    TestRoundTrip<BF16>(c, DType::kBF16, ranks, num_sms, seed + 5);
    c.is_halved = false;
  }
  // Repeated experts have more rows than the worst case of a right routing, and may find no room.
  // They take time with the square of their number.
  c.repeats = true;
  c.num_tokens = std::clamp<int64_t>(2000 / (c.num_topk * c.num_ranks), 1, c.num_tokens);
  TestRoundTrip<BF16>(c, DType::kBF16, ranks, num_sms, seed + 3);
  if (c.layout == RecvLayout::kRank) return;
  const int64_t padding = c.num_local_experts * (c.alignment - 1);
  const int64_t most = c.num_tokens * c.num_ranks * c.num_topk + padding;
  for (const int64_t capacity : {most, (c.capacity - padding) / 3 + padding}) {
    c.capacity = std::max<int64_t>(1, capacity);
    TestRoundTrip<BF16>(c, DType::kBF16, ranks, num_sms, seed + 4);
  }
}

}  // namespace jax_ep
