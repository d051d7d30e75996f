// ragged_all_to_all: every rank reads pieces of its peers' arrays, each a run of rows of any
// length.
//
// K pieces arrive at a rank, K / num_ranks from each, ordered by the rank that they come from. A
// piece has a first row at its source, a first row here (its place), and a number of rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/row_stream.h"
#include "core/types.h"

namespace jax_ep {

/// Sources of the pieces.
///   kGiven    The sender has first rows and places, both sides have sizes.
///   kPacked   The sender has one size for each rank. Pieces lie side by side at both ends, in the
///             order of the ranks at the other end.
///   kBack     From the places where an exchange has put the rows, to where they came from. This
///             rank has the first rows (input_offsets) and the places (output_offsets) of what it
///             had sent, each peer has the sizes. Rows that several pieces have are added up.
/// The values cross the FFI border (bindings/limits.h exports them).
enum class Pieces : int64_t { kGiven = 0, kPacked = 1, kBack = 2 };

/// Elements that the sums of kBack consist of.
enum class Summand : int8_t { kNone, kBF16, kF16, kF32, kF64 };

/// The operands and results of one rank. Arrays of pieces are [num_pieces], ordered by the rank at
/// the other end.
struct RaggedAllToAllArgs {
  Pieces pieces;
  int num_ranks;
  int64_t num_pieces;
  int64_t num_rows;    // of each rank's arrays
  int64_t num_places;  // rows of each result
  bool keeps_rows;     // results hold the rows that no piece covers already; false: zeros

  // Read by peers, except in kBack; null in kPacked.
  const int32_t* input_offsets;
  const int32_t* output_offsets;
  const int32_t* sizes;       // read by peers
  const int32_t* recv_sizes;  // kGiven

  // Of kGiven and kPacked: where each piece was put here, and how many of its rows.
  int32_t* places;
  int32_t* counts;
  // Of kPacked, [num_ranks]: where each rank puts this rank's piece, and what it has sent here.
  int32_t* send_places;
  int32_t* all_recv_sizes;

  int num_streams;
  RowStream streams[kMaxRowStreams];
  Summand summands[kMaxRowStreams];

  JAX_EP_HOST_DEVICE int64_t per_peer() const { return num_pieces / num_ranks; }
};

/// A piece that arrives here.
struct ArrivingPiece {
  int64_t first;  // row at the source
  int64_t place;  // row here
  int64_t count;

  JAX_EP_HOST_DEVICE int64_t end() const { return place + count; }
  JAX_EP_HOST_DEVICE bool Covers(int64_t row) const { return place <= row && row < end(); }
};

/// The piece without the rows that lie outside the arrays. All memory accesses rely on it.
JAX_EP_HOST_DEVICE constexpr ArrivingPiece ClipPiece(int64_t first, int64_t place, int64_t size,
                                                     int64_t num_rows, int64_t num_places) {
  int64_t count = size;
  if (count > num_rows - first) count = num_rows - first;
  if (count > num_places - place) count = num_places - place;
  if (first < 0 || place < 0 || count < 0) count = 0;
  return {first, place, count};
}

}  // namespace jax_ep
