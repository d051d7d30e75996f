// Arguments of the kernel that moves rows from the ranks' arrays to their final places in this
// rank's results.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/row_stream.h"
#include "core/types.h"
#include "device/call.cuh"
#include "device/rows.cuh"

namespace jax_ep {

struct SourceRow {
  int rank;
  int64_t row;
};

/// Spreads items over sources in a fixed but irregular order. A warp that takes every n-th item
/// finds all sources equally often, whatever n is, and all links are busy at all times.
__device__ inline uint32_t Rotation(uint32_t n) { return n * 0x9e3779b1u >> 16; }

// Items give the place of each source row on this rank. WriteRoutingResults is work that threads do
// while rows are on their way.

/// Items are the tokens of all ranks, and ranks alternate.
struct TokenItems {
  const int32_t* row_of;  // [num_ranks * num_tokens, num_slots] row here, or kNoIndex
  int num_slots;
  uint32_t num_ranks;
  uint32_t num_tokens;

  __device__ uint32_t count() const { return num_ranks * num_tokens; }
  __device__ SourceRow Source(uint32_t item) const {
    const uint32_t token = item / num_ranks;
    return {static_cast<int>((item + Rotation(token)) % num_ranks), token};
  }
  __device__ int32_t Place(uint32_t item, int slot) const {
    const SourceRow source = Source(item);
    return row_of[(source.rank * int64_t{num_tokens} + source.row) * num_slots + slot];
  }
  __device__ void WriteRoutingResults(const PeerAddresses&, int, int) const {}
};

/// Items are the rows of the result, with a stride, since neighbours mostly come from one rank.
struct IndexItems {
  static constexpr uint32_t kStreams = 16;
  static constexpr int num_slots = 1;

  const int32_t* index;  // [num_pulled] rank * num_rows + row, or kNoIndex
  uint32_t num_pulled;
  uint32_t num_ranks;
  uint32_t num_rows;

  __device__ uint32_t per_stream() const { return (num_pulled + kStreams - 1) / kStreams; }
  __device__ uint32_t count() const { return per_stream() * kStreams; }
  __device__ uint32_t Row(uint32_t item) const {
    const uint32_t row = item / kStreams;
    return (item + Rotation(row)) % kStreams * per_stream() + row;
  }
  __device__ SourceRow Source(uint32_t item) const {
    const uint32_t from = index[Row(item)];
    return {static_cast<int>(from / num_rows), from % num_rows};
  }
  __device__ int32_t Place(uint32_t item, int) const {
    const uint32_t row = Row(item);
    if (row >= num_pulled) return kNoIndex;
    const int64_t from = index[row];
    return from >= 0 && from < int64_t{num_ranks} * num_rows ? static_cast<int32_t>(row) : kNoIndex;
  }
  __device__ void WriteRoutingResults(const PeerAddresses&, int, int) const {}
};

/// Rows that may hold no token, and which of them are zeroed.
struct FillRows {
  const int32_t* source;  // [capacity] no token if negative, or `source_end` or more
  int64_t source_end;
  int64_t capacity;
  const int32_t* num_recv;  // read for Fill::kPadding
  Fill fill;
};

template <typename Items>
struct MoveArgs {
  Endpoint self;
  OpId op;
  const int32_t* position;  // null: an earlier kernel has opened the call
  OwnAddresses own;
  int first_address;  // of the streams
  int num_streams;
  RowStream streams[kMaxRowStreams];
  Items items;
  FillRows fill;
  Results results;  // of the whole call
};

}  // namespace jax_ep
