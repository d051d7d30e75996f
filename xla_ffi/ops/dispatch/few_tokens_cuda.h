// What the handlers of dispatches of few tokens on GPUs refuse.
#pragma once

#include <string>

#include "ops/dispatch/dispatch_cuda.cuh"
#include "ops/ffi_checks.h"

namespace jax_ep {

inline ffi::Error CheckRowBytes(const std::string& op, const DispatchArgs& args) {
  for (int i = 0; i < args.num_streams; ++i) {
    JAX_EP_REQUIRE(args.streams[i].row_bytes <= kMaxRowBytes, op, ": a row of array ", i, " has ",
                   args.streams[i].row_bytes, " bytes, at most ", kMaxRowBytes);
  }
  return ffi::Error::Success();
}

/// `room`: bytes that one rank can send to another.
inline ffi::Error CheckSentTokens(const std::string& op, const LowLatencyDispatch& launch,
                                  int64_t room) {
  const DispatchShape& shape = launch.args.shape;
  JAX_EP_REQUIRE(launch.room() <= room, op, ": a rank sends ", launch.room(),
                 " bytes to another, the group has room for ", room);
  JAX_EP_REQUIRE(shape.num_topk > 0 && shape.num_topk <= kMaxTopk &&
                     shape.experts.num_experts < kMaxPacketExperts,
                 op, ": low_latency takes 1 to ", kMaxTopk, " choices and at most ",
                 kMaxPacketExperts - 1, " experts, got ", shape.num_topk, " and ",
                 shape.experts.num_experts);
  return ffi::Error::Success();
}

inline ffi::Error CheckReceivedTokens(const std::string& op, const LowLatencyDispatch& launch) {
  const DispatchShape& shape = launch.args.shape;
  JAX_EP_REQUIRE(LowLatencyTableBytes(shape) <= kMaxLowLatencyTable, op,
                 ": the table of choices has ", LowLatencyTableBytes(shape), " bytes, at most ",
                 kMaxLowLatencyTable);
  JAX_EP_REQUIRE(shape.recv_capacity >= shape.worst_capacity(), op,
                 ": recv_capacity=", shape.recv_capacity, " must be at least ",
                 shape.worst_capacity());
  return ffi::Error::Success();
}

}  // namespace jax_ep
