// pull_rows: every rank reads single rows of its peers' arrays, by index.
//
// With the indices of a handle it dispatches other data along the same routing, and it moves
// weights and their gradients between tokens and rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_ep {

/// The operands and results of one rank.
struct PullRowsArgs {
  int num_ranks;
  int64_t num_rows;  // of each rank's array
  int64_t num_pulled;
  size_t row_bytes;

  const int32_t* index;  // [num_pulled] rank * num_rows + row, or kNoIndex
  // The slot of each pulled row among the num_slots copies of its source row, or null. With slots,
  // a row that is pulled several times crosses the link once.
  const int32_t* slot;
  int num_slots;
  int32_t* places;  // scratch [num_ranks * num_rows, num_slots]; null: each row is pulled by itself
  const std::byte* rows;  // [num_rows, row_bytes]
  std::byte* out;         // [num_pulled, row_bytes], zero where the index is kNoIndex
};

}  // namespace jax_ep
