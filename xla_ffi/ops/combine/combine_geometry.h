// The division of rows between the warps of combine's kernel, and of rings of partial sums between
// tokens.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/types.h"
#include "device/layout.h"

namespace jax_ep {

inline constexpr size_t kMaxRingBytes = 32 * 1024 * 1024;
/// The most parts of a row, which different warps add.
inline constexpr int kMaxRowParts = 4;

/// A ring for each peer, in scratch of the call, expert layout only. A rank stores there, for each
/// token of the peer, the sum of the token's rows that it holds. So one row crosses to the token's
/// rank instead of several.
///
/// Token t has place t % num_tokens. PartialCells says of each part of a place when it is filled,
/// and when it may be filled again.
struct PartialRing {
  int32_t num_tokens = 0;  // number of places; 0: rows cross one by one

  static PartialRing Of(RecvLayout layout, int num_ranks, int64_t num_tokens, int num_slots,
                        size_t row_bytes) {
    if (layout == RecvLayout::kRank || num_ranks == 1 || num_slots == 1) return {};
    const int64_t room = kMaxRingBytes / ((num_ranks - 1) * row_bytes);
    const int64_t most = std::min<int64_t>(room, kMaxPartialCells / (num_ranks * kMaxRowParts));
    return {static_cast<int32_t>(std::min(num_tokens, most))};
  }
  /// Bytes of all rings of one rank.
  size_t Bytes(int num_ranks, size_t row_bytes) const {
    return num_tokens == 0 ? 0 : (num_ranks - 1) * static_cast<size_t>(num_tokens) * row_bytes;
  }

  /// The row, in the rings of `holder`, of the partial sum for token `token` of rank `owner`.
  JAX_EP_HOST_DEVICE int64_t Row(int holder, int owner, uint32_t token) const {
    return int64_t{owner < holder ? owner : owner - 1} * num_tokens + token % num_tokens;
  }
};

/// The most vectors of 16 bytes that a piece of a row has for each lane: as many as fit into
/// registers.
template <RecvLayout kLayout>
inline constexpr int kMaxVectorsOf = kLayout == RecvLayout::kRank ? 8 : 7;
inline constexpr int kMaxVectors = 8;

/// The parts of rows. An item is a part of a token; in a turn each warp takes one item.
struct RowParts {
  int count;
  uint32_t bytes;  // of each part but the last: whole pieces
  uint32_t piece_bytes;
  uint32_t lag;  // see TermLister

  static constexpr uint32_t kVectorBytes = 16 * kWarpSize;
  JAX_EP_HOST_DEVICE int num_vectors() const {
    return static_cast<int>(piece_bytes / kVectorBytes);
  }
};

/// The launch of a combine, the same on all ranks.
struct CombineGeometry {
  int num_blocks;
  int num_warps;  // of a block
  RowParts parts;
};

/// Cuts rows into enough parts that the warps do not end far apart, and that few tokens keep all
/// of them busy. `most_warps`: of a block.
///
/// A ring has room for the items of one turn, at least. Item i takes the place of item i minus
/// `ring.num_tokens * parts.count`, and waits until the owner of the earlier item has read it. With
/// room for two turns the own tokens lag behind by one turn (TermLister). Without room for one
/// turn, warps would only wait for each other's places. So rows are cut further if half of the
/// warps would wait, and no warp is started that has no place.
inline CombineGeometry MakeCombineGeometry(RecvLayout layout, int64_t num_tokens, size_t row_bytes,
                                           PartialRing ring, int num_sms, int most_warps) {
  constexpr int64_t kItemsOfWarp = 8;
  constexpr int64_t kVectorBytes = RowParts::kVectorBytes;
  const int64_t most_vectors = layout == RecvLayout::kRank ? kMaxVectorsOf<RecvLayout::kRank>
                                                           : kMaxVectorsOf<RecvLayout::kExpert>;
  const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  // Equal pieces, so that no stage is half empty.
  const int64_t num_vectors = divide(row_bytes, kVectorBytes);
  const int64_t num_pieces = divide(num_vectors, most_vectors);
  const int64_t piece_bytes = divide(num_vectors, num_pieces) * kVectorBytes;
  int64_t num_warps = int64_t{num_sms} * most_warps;
  const int64_t wanted = divide(kItemsOfWarp * num_warps, std::max<int64_t>(1, num_tokens));
  const int64_t most_parts = std::min<int64_t>(num_pieces, kMaxRowParts);
  int64_t pieces_of_part = divide(num_pieces, std::min(wanted, most_parts));
  const auto count = [&] { return divide(num_pieces, pieces_of_part); };
  const auto num_places = [&] { return ring.num_tokens * count(); };
  CombineGeometry g{.num_blocks = num_sms, .num_warps = most_warps, .parts = {}};
  const bool has_room_for_all = ring.num_tokens == 0 || ring.num_tokens >= num_tokens;
  if (!has_room_for_all) {
    for (int64_t parts = count() + 1; parts <= most_parts && 2 * num_places() < num_warps;
         ++parts) {
      pieces_of_part = divide(num_pieces, parts);
    }
    g.num_blocks = static_cast<int>(std::min<int64_t>(num_sms, num_places()));
    g.num_warps = static_cast<int>(std::min<int64_t>(most_warps, num_places() / g.num_blocks));
    num_warps = int64_t{g.num_blocks} * g.num_warps;
  }
  g.parts = {.count = static_cast<int>(count()),
             .bytes = static_cast<uint32_t>(pieces_of_part * piece_bytes),
             .piece_bytes = static_cast<uint32_t>(piece_bytes),
             .lag = num_places() >= 2 * num_warps ? 1u : 0u};
  return g;
}

}  // namespace jax_ep
