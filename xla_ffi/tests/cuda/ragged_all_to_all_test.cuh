// ragged_all_to_all against copies by the host: given offsets, also out of range; the way back;
// pieces side by side.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/numerics.h"
#include "ops/ragged_all_to_all/ragged_all_to_all_cuda.cuh"
#include "tests/cuda/ranks.cuh"
#include "tests/test.h"

namespace jax_ep {

struct RaggedCase {
  int64_t num_rows;
  int64_t num_places;
  int per_peer;
  int hidden;  // elements of bf16
  bool is_bad;

  std::string Name(int num_ranks) const {
    return "ragged R" + std::to_string(num_ranks) + " N" + std::to_string(num_rows) + " M" +
           std::to_string(num_places) + " P" + std::to_string(per_peer) + " H" +
           std::to_string(hidden) + (is_bad ? " bad" : "");
  }
};

using Numbers = std::vector<int32_t>;
using Elements = std::vector<BF16>;

// What all ranks have: one vector each.
struct RaggedData {
  std::vector<Numbers> input_offsets, sizes, output_offsets, recv_sizes;
  std::vector<Elements> rows, kept, cotangents;
};

inline RaggedData MakeRagged(const RaggedCase& c, int num_ranks, std::mt19937& rng) {
  const int num_pieces = num_ranks * c.per_peer;
  const auto below = [&](int64_t end) {
    return static_cast<int32_t>(rng() % static_cast<uint64_t>(std::max<int64_t>(1, end)));
  };
  const auto elements = [&](int64_t count) {
    Elements made(count * c.hidden);
    for (BF16& e : made) e = FromF32<BF16>(static_cast<float>(static_cast<int>(rng() % 63) - 31));
    return made;
  };
  RaggedData d;
  for (int r = 0; r < num_ranks; ++r) {
    for (auto* numbers : {&d.input_offsets, &d.sizes, &d.output_offsets, &d.recv_sizes}) {
      numbers->emplace_back(num_pieces);
    }
    d.rows.push_back(elements(c.num_rows));
    d.kept.push_back(elements(c.num_places));
    d.cotangents.push_back(elements(c.num_places));
  }
  const int64_t most = std::min(c.num_rows, c.num_places) / num_pieces * 2;
  for (int s = 0; s < num_ranks; ++s) {
    for (int i = 0; i < num_pieces; ++i) {
      const int32_t size = rng() % 4 == 0 ? 0 : below(most + 2);
      d.sizes[s][i] = size;
      d.recv_sizes[i / c.per_peer][s * c.per_peer + i % c.per_peer] =
          c.is_bad && rng() % 4 == 0 ? below(most + 2) - 2 : size;
      // Pieces overlap at both ends. Of bad ones, some reach beyond an end, or lie outside.
      d.input_offsets[s][i] = below(c.num_rows - (c.is_bad ? 0 : size));
      d.output_offsets[s][i] = below(c.num_places - (c.is_bad ? 0 : size));
      if (c.is_bad && rng() % 5 == 0) d.input_offsets[s][i] = static_cast<int32_t>(rng());
      if (c.is_bad && rng() % 5 == 0) d.output_offsets[s][i] = static_cast<int32_t>(rng());
    }
  }
  return d;
}

// The pieces that arrive at a rank, as the host has them: a plain copy of the rule in Python.
struct HostPiece {
  int source;
  int64_t first, place, count;
};

inline std::vector<HostPiece> Arriving(const RaggedCase& c, const RaggedData& d, int rank) {
  const int num_ranks = static_cast<int>(d.rows.size());
  std::vector<HostPiece> pieces;
  for (int s = 0; s < num_ranks; ++s) {
    for (int p = 0; p < c.per_peer; ++p) {
      const int there = rank * c.per_peer + p;
      const int64_t first = d.input_offsets[s][there];
      const int64_t place = d.output_offsets[s][there];
      int64_t count = std::min(d.sizes[s][there], d.recv_sizes[rank][s * c.per_peer + p]);
      count = std::min({count, c.num_rows - first, c.num_places - place});
      if (first < 0 || place < 0 || count < 0) count = 0;
      pieces.push_back({s, first, place, count});
    }
  }
  return pieces;
}

inline void SameElements(const std::string& name, const char* what, int rank, const Elements& got,
                         const Elements& expected) {
  CHECK(std::memcmp(got.data(), expected.data(), expected.size() * sizeof(BF16)) == 0, name, what,
        rank);
}

inline RaggedAllToAllLaunch MakeRaggedLaunch(const Ranks& ranks, int r, Pieces pieces,
                                             int64_t num_pieces, int64_t num_rows,
                                             int64_t num_places) {
  RaggedAllToAllLaunch launch{.self = ranks.endpoint(r), .position = ranks.position(r), .args = {}};
  launch.args.pieces = pieces;
  launch.args.num_ranks = ranks.size();
  launch.args.num_pieces = num_pieces;
  launch.args.num_rows = num_rows;
  launch.args.num_places = num_places;
  return launch;
}

inline RowStream StreamOf(const Device<BF16>& in, const Device<BF16>& out, int hidden) {
  return {reinterpret_cast<const std::byte*>(in.get()), reinterpret_cast<std::byte*>(out.get()),
          hidden * sizeof(BF16)};
}

// There, over what the results hold, and back, where rows are added up.
inline void TestGivenPieces(const RaggedCase& c, const Ranks& ranks, int num_sms, int seed) {
  std::mt19937 rng(seed);
  const int num_ranks = ranks.size();
  const int num_pieces = num_ranks * c.per_peer;
  const RaggedData d = MakeRagged(c, num_ranks, rng);
  struct Buffers {
    Device<int32_t> input_offsets, sizes, output_offsets, recv_sizes, places, counts;
    Device<BF16> rows, results, cotangents, bars;
  };
  std::vector<Buffers> buffers;
  for (int r = 0; r < num_ranks; ++r) {
    ranks.Select(r);
    buffers.push_back({Device(d.input_offsets[r]), Device(d.sizes[r]), Device(d.output_offsets[r]),
                       Device(d.recv_sizes[r]), Device<int32_t>(num_pieces),
                       Device<int32_t>(num_pieces), Device(d.rows[r]), Device(d.kept[r]),
                       Device(d.cotangents[r]), Device<BF16>(c.num_rows * c.hidden)});
    Cuda(cudaDeviceSynchronize());
  }
  for (int r = 0; r < num_ranks; ++r) {
    const Buffers& b = buffers[r];
    ranks.Select(r);
    RaggedAllToAllLaunch there =
        MakeRaggedLaunch(ranks, r, Pieces::kGiven, num_pieces, c.num_rows, c.num_places);
    there.args.keeps_rows = true;
    there.args.input_offsets = b.input_offsets.get();
    there.args.output_offsets = b.output_offsets.get();
    there.args.sizes = b.sizes.get();
    there.args.recv_sizes = b.recv_sizes.get();
    there.args.places = b.places.get();
    there.args.counts = b.counts.get();
    there.args.num_streams = 1;
    there.args.streams[0] = StreamOf(b.rows, b.results, c.hidden);
    Cuda(LaunchRaggedAllToAll(there, ranks.traits(), num_sms, ranks.stream(r)));
    RaggedAllToAllLaunch back =
        MakeRaggedLaunch(ranks, r, Pieces::kBack, num_pieces, c.num_places, c.num_rows);
    back.args.input_offsets = b.input_offsets.get();
    back.args.output_offsets = b.output_offsets.get();
    back.args.sizes = b.counts.get();
    back.args.num_streams = 1;
    back.args.streams[0] = StreamOf(b.cotangents, b.bars, c.hidden);
    back.args.summands[0] = Summand::kBF16;
    Cuda(LaunchRaggedAllToAll(back, ranks.traits(), num_sms, ranks.stream(r)));
  }
  ranks.Synchronize();
  const std::string name = c.Name(num_ranks);
  CHECK(!ranks.HasFailed(), name + ": " + ranks.Failure());

  std::vector<std::vector<float>> sums(num_ranks, std::vector<float>(c.num_rows * c.hidden));
  for (int r = 0; r < num_ranks; ++r) {
    Elements expected = d.kept[r];
    const std::vector<HostPiece> pieces = Arriving(c, d, r);
    const Numbers places = buffers[r].places.Read();
    const Numbers counts = buffers[r].counts.Read();
    for (int i = 0; i < num_pieces; ++i) {
      const auto& [source, first, place, count] = pieces[i];
      CHECK(counts[i] == count && (count == 0 || places[i] == place), name, r, i);
      for (int64_t e = 0; e < count * c.hidden; ++e) {
        expected[place * c.hidden + e] = d.rows[source][first * c.hidden + e];
        // Small integers: their sums are exact in any order.
        sums[source][first * c.hidden + e] += ToF32(d.cotangents[r][place * c.hidden + e]);
      }
    }
    SameElements(name, "result", r, buffers[r].results.Read(), expected);
  }
  for (int r = 0; r < num_ranks; ++r) {
    const Elements bars = buffers[r].bars.Read();
    for (size_t e = 0; e < bars.size(); ++e) {
      // A sum of zeros may have either sign.
      CHECK(ToF32(bars[e]) == ToF32(FromF32<BF16>(sums[r][e])), name, "gradient", r, e);
    }
  }
}

// Two arrays of different widths that lie side by side.
inline void TestPackedPieces(const RaggedCase& c, const Ranks& ranks, int num_sms, int seed) {
  std::mt19937 rng(seed);
  const int num_ranks = ranks.size();
  const RaggedData d = MakeRagged(c, num_ranks, rng);
  constexpr int kNarrow = 3;
  struct Buffers {
    Device<int32_t> sizes, places, counts, send_places, recv_sizes;
    Device<BF16> wide, narrow, wide_out, narrow_out;
  };
  std::vector<Buffers> buffers;
  std::vector<Numbers> sizes;
  std::vector<Elements> narrow;
  for (int r = 0; r < num_ranks; ++r) {
    ranks.Select(r);
    sizes.emplace_back(num_ranks);
    for (int32_t& size : sizes[r])
      size = static_cast<int32_t>(rng() % (c.num_rows / num_ranks + 1));
    narrow.emplace_back(d.rows[r].begin(), d.rows[r].begin());
    narrow[r].resize(c.num_rows * kNarrow);
    for (BF16& e : narrow[r]) e.bits = static_cast<uint16_t>(rng());
    buffers.push_back({Device(sizes[r]), Device<int32_t>(num_ranks), Device<int32_t>(num_ranks),
                       Device<int32_t>(num_ranks), Device<int32_t>(num_ranks), Device(d.rows[r]),
                       Device(narrow[r]), Device<BF16>(c.num_places * c.hidden),
                       Device<BF16>(c.num_places * kNarrow)});
    Cuda(cudaDeviceSynchronize());
  }
  for (int r = 0; r < num_ranks; ++r) {
    const Buffers& b = buffers[r];
    ranks.Select(r);
    RaggedAllToAllLaunch launch =
        MakeRaggedLaunch(ranks, r, Pieces::kPacked, num_ranks, c.num_rows, c.num_places);
    launch.args.sizes = b.sizes.get();
    launch.args.places = b.places.get();
    launch.args.counts = b.counts.get();
    launch.args.send_places = b.send_places.get();
    launch.args.all_recv_sizes = b.recv_sizes.get();
    launch.args.num_streams = 2;
    launch.args.streams[0] = StreamOf(b.wide, b.wide_out, c.hidden);
    launch.args.streams[1] = StreamOf(b.narrow, b.narrow_out, kNarrow);
    Cuda(LaunchRaggedAllToAll(launch, ranks.traits(), num_sms, ranks.stream(r)));
  }
  ranks.Synchronize();
  const std::string name = c.Name(num_ranks) + " packed";
  CHECK(!ranks.HasFailed(), name + ": " + ranks.Failure());
  for (int r = 0; r < num_ranks; ++r) {
    const Buffers& b = buffers[r];
    Elements wide(c.num_places * c.hidden), thin(c.num_places * kNarrow);
    int64_t place = 0;
    for (int s = 0; s < num_ranks; ++s) {
      int64_t first = 0;
      for (int other = 0; other < r; ++other) first += sizes[s][other];
      const int64_t count = std::clamp<int64_t>(c.num_places - place, 0, sizes[s][r]);
      std::copy_n(d.rows[s].begin() + first * c.hidden, count * c.hidden,
                  wide.begin() + std::min(place, c.num_places) * c.hidden);
      std::copy_n(narrow[s].begin() + first * kNarrow, count * kNarrow,
                  thin.begin() + std::min(place, c.num_places) * kNarrow);
      CHECK(b.counts.Read()[s] == count && b.places.Read()[s] == place, name, r, s);
      CHECK(b.recv_sizes.Read()[s] == sizes[s][r], name, r, s);
      CHECK(buffers[s].send_places.Read()[r] == place, name, r, s);
      place += sizes[s][r];
    }
    SameElements(name, "wide rows", r, b.wide_out.Read(), wide);
    SameElements(name, "narrow rows", r, b.narrow_out.Read(), thin);
  }
}

/// Returns the number of cases.
inline int TestRaggedAllToAll(const Ranks& ranks, bool is_small) {
  int seed = 0;
  for (const int hidden : {1, 2, 4, 8, 12, is_small ? 40 : 2056}) {
    for (const int per_peer : {1, 5, 120 / ranks.size()}) {
      for (const bool is_bad : {false, true}) {
        const RaggedCase c{.num_rows = 150 + 13 * hidden % 400,
                           .num_places = 170 + 7 * hidden % 300,
                           .per_peer = per_peer,
                           .hidden = hidden,
                           .is_bad = is_bad};
        TestGivenPieces(c, ranks, 1 + seed % 5, seed);
        ++seed;
        if (per_peer == 1) TestPackedPieces(c, ranks, 1 + seed % 3, seed);
      }
    }
  }
  return seed;
}

}  // namespace jax_ep
