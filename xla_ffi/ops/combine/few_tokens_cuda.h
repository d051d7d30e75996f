// What the handlers of combines of few tokens on GPUs refuse.
#pragma once

#include <string>

#include "ops/combine/combine_cuda.cuh"
#include "ops/ffi_checks.h"

namespace jax_ep {

inline ffi::Error CheckRows(const std::string& op, const CombineArgs& args, size_t row_bytes) {
  JAX_EP_REQUIRE(args.num_slots <= kMaxTopk, op, ": num_topk=", args.num_slots, " must be at most ",
                 kMaxTopk);
  JAX_EP_REQUIRE(row_bytes > 0 && row_bytes % kRowBytesMultiple == 0, op,
                 ": a row must be a multiple of ", kRowBytesMultiple, " bytes");
  JAX_EP_REQUIRE(row_bytes <= kMaxRowBytes, op, ": a row has ", row_bytes, " bytes, at most ",
                 kMaxRowBytes);
  return ffi::Error::Success();
}

/// `room`: bytes that one rank can send to another.
inline ffi::Error CheckFewTokens(const std::string& op, const LowLatencyCombine& launch,
                                 int64_t room) {
  JAX_EP_REQUIRE(launch.args.num_tokens > 0, op, ": there are no tokens");
  JAX_EP_REQUIRE(launch.room() <= room, op, ": a rank sends ", launch.room(),
                 " bytes to another, the group has room for ", room);
  JAX_EP_REQUIRE(LowLatencyCombineSharedBytes(launch) <= kMaxLowLatencyTable, op,
                 ": the table of rows has ", LowLatencyCombineSharedBytes(launch),
                 " bytes, at most ", kMaxLowLatencyTable);
  return ffi::Error::Success();
}

}  // namespace jax_ep
