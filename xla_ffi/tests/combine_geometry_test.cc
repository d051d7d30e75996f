// The launch of combine: whether the rings of partial sums have room for what is on its way.
#include "ops/combine/combine_geometry.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "tests/test.h"

namespace jax_ep {
namespace {

constexpr int kMostWarps = 12;

// Whether two items of `num_turns` turns, one behind the other, have the same place of a ring.
bool HasCollision(const CombineGeometry& g, PartialRing ring, int64_t num_tokens, int num_turns,
                  std::vector<uint32_t>& seen, uint32_t mark) {
  const int64_t num_warps = int64_t{g.num_blocks} * g.num_warps;
  const int64_t first = 3 * num_warps;
  for (int64_t item = first; item < first + num_turns * num_warps; ++item) {
    const int64_t token = item / g.parts.count;
    if (token >= num_tokens) return false;
    const int64_t place = token % ring.num_tokens * g.parts.count + item % g.parts.count;
    if (seen[place] == mark) return true;
    seen[place] = mark;
  }
  return false;
}

void TestCombineGeometry() {
  std::vector<uint32_t> seen(kMaxPartialCells);
  uint32_t mark = 0;
  for (int num_ranks = 1; num_ranks <= kMaxRanks; ++num_ranks) {
    for (const size_t hidden : {64, 512, 2048, 4096, 7168, 16384, 65536, 1 << 19}) {
      for (const size_t element_bytes : {2, 4}) {
        for (const int64_t num_tokens : {1, 100, 1000, 4096, 65536}) {
          const size_t row_bytes = hidden * element_bytes;
          const PartialRing ring =
              PartialRing::Of(RecvLayout::kExpert, num_ranks, num_tokens, 8, row_bytes);
          CHECK(ring.Bytes(num_ranks, row_bytes) <= kMaxRingBytes, num_ranks, row_bytes);
          for (const int num_sms : {8, 16, 20, 24, 32, 48, 64, 96, 132}) {
            const CombineGeometry g = MakeCombineGeometry(RecvLayout::kExpert, num_tokens,
                                                          row_bytes, ring, num_sms, kMostWarps);
            const RowParts& parts = g.parts;
            CHECK(g.num_blocks >= 1 && g.num_blocks <= num_sms, num_ranks, hidden, num_sms);
            CHECK(g.num_warps >= 1 && g.num_warps <= kMostWarps, num_ranks, hidden, num_sms);
            CHECK(parts.count >= 1 && parts.count <= kMaxRowParts, num_ranks, hidden, num_sms);
            CHECK(size_t{parts.bytes} * parts.count >= row_bytes &&
                      size_t{parts.bytes} * (parts.count - 1) < row_bytes,
                  hidden, num_sms, parts.bytes, parts.count);
            CHECK(parts.piece_bytes <= kMaxVectorsOf<RecvLayout::kExpert> * RowParts::kVectorBytes,
                  parts.piece_bytes);
            CHECK(num_ranks * ring.num_tokens * parts.count <= kMaxPartialCells, num_ranks,
                  ring.num_tokens, parts.count);
            if (ring.num_tokens == 0) continue;
            const int num_turns = 1 + static_cast<int>(parts.lag);
            CHECK(!HasCollision(g, ring, num_tokens, num_turns, seen, ++mark), num_ranks, hidden,
                  element_bytes, num_tokens, num_sms, ring.num_tokens, g.num_blocks, g.num_warps,
                  parts.count, parts.lag);
          }
        }
      }
    }
  }
}

// Where two turns have room with all warps, none is left out, and rows are cut for the warps alone.
void TestCombineGeometryOfFewRanks() {
  constexpr size_t kRowBytes = 7168 * 2;
  const auto make = [](int num_ranks, int num_sms) {
    const PartialRing ring = PartialRing::Of(RecvLayout::kExpert, num_ranks, 4096, 8, kRowBytes);
    return MakeCombineGeometry(RecvLayout::kExpert, 4096, kRowBytes, ring, num_sms, kMostWarps);
  };
  for (const int num_ranks : {2, 4}) {
    for (const int num_sms : {20, 64}) {
      const CombineGeometry g = make(num_ranks, num_sms);
      CHECK(g.num_blocks == num_sms && g.num_warps == kMostWarps, num_ranks, num_sms, g.num_warps);
      CHECK(g.parts.count == (num_sms == 20 ? 1 : 2) && g.parts.lag == 1, num_ranks, num_sms,
            g.parts.count, g.parts.lag);
    }
  }
  // 334 places for two parts each.
  const CombineGeometry g = make(8, 64);
  CHECK(g.num_blocks == 64 && g.num_warps == 10 && g.parts.count == 2, g.num_blocks, g.num_warps,
        g.parts.count);
}

}  // namespace

Tests CombineGeometryTests() {
  return {{"combine_geometry", TestCombineGeometry},
          {"combine_geometry_of_few_ranks", TestCombineGeometryOfFewRanks}};
}

}  // namespace jax_ep
