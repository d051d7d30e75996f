// Numbers of the native code that Python needs before a call: both modules export the same.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/limits.h"
#include "core/types.h"
#include "device/layout.h"
#include "device/token_packets.h"
#include "ops/all_reduce/all_reduce.h"
#include "ops/ragged_all_to_all/ragged_all_to_all.h"

namespace jax_ep {

namespace nb = nanobind;

using IntDict = nb::typed<nb::dict, nb::str, nb::int_>;
using IntDicts = nb::typed<nb::dict, nb::str, IntDict>;

inline IntDict Limits() {
  IntDict limits;
#define JAX_EP_LIMIT(Type, kName, NAME, value) limits[#NAME] = kName;
#include "core/limits.def"
  return limits;
}

/// Members of one enum by the names that they have in Python.
template <typename Enum>
IntDict Members(std::initializer_list<std::pair<const char*, Enum>> members) {
  IntDict numbers;
  for (const auto& [name, member] : members) numbers[name] = static_cast<int64_t>(member);
  return numbers;
}

inline IntDicts Enums() {
  IntDicts enums;
  enums["Layout"] =
      Members<RecvLayout>({{"RANK", RecvLayout::kRank}, {"EXPERT", RecvLayout::kExpert}});
  enums["Fill"] =
      Members<Fill>({{"ZEROS", Fill::kZeros}, {"PADDING", Fill::kPadding}, {"NONE", Fill::kNone}});
  enums["Movement"] = Members<Movement>({{"ALL_REDUCE", Movement::kAllReduce},
                                         {"REDUCE_SCATTER", Movement::kReduceScatter},
                                         {"ALL_GATHER", Movement::kAllGather}});
  enums["Algorithm"] = Members<Algorithm>({{"LOW_LATENCY", Algorithm::kLowLatency},
                                           {"ONE_SHOT", Algorithm::kOneShot},
                                           {"TWO_SHOT", Algorithm::kTwoShot}});
  enums["ExchangeMode"] = Members<ExchangeMode>(
      {{"THROUGHPUT", ExchangeMode::kThroughput}, {"LOW_LATENCY", ExchangeMode::kLowLatency}});
  enums["Pieces"] = Members<Pieces>(
      {{"GIVEN", Pieces::kGiven}, {"PACKED", Pieces::kPacked}, {"BACK", Pieces::kBack}});
  enums["Quantize"] = Members<Quantize>({{"NONE", Quantize::kNone},
                                         {"FP8", Quantize::kFp8},
                                         {"FP8_POW2", Quantize::kFp8Pow2},
                                         {"FP8_E8M0", Quantize::kFp8E8m0}});
  return enums;
}

/// A function of the number of ranks, which Python may get wrong.
template <size_t (*kPayload)(int)>
size_t OfRanks(int num_ranks) {
  if (num_ranks < 1) throw std::invalid_argument("num_ranks must be positive");
  return kPayload(num_ranks);
}

/// Bytes of packets that a rank sends to another one in a low-latency exchange.
inline int64_t TokenBytes(int64_t num_tokens, int num_topk, const std::vector<size_t>& row_bytes) {
  if (row_bytes.size() > kMaxRowStreams) throw std::invalid_argument("too many arrays of rows");
  const TokenGroups groups =
      TokenGroups::Of([&](size_t i) { return i < row_bytes.size() ? row_bytes[i] : 0; });
  return TokenPacketBytes(num_tokens, num_topk, groups.count());
}

inline void DefineLimits(nb::module_& m) {
  m.def("limits", &Limits, "Limits of the operations, by name.");
  m.def("enums", &Enums, "Members of the enums that are attributes of custom calls.");
  m.def("slot_payload", &OfRanks<SlotPayload>, nb::arg("num_ranks"),
        "Bytes that one rank can store in the slots of another in one call.");
  m.def("push_payload", &OfRanks<PushPayload>, nb::arg("num_ranks"),
        "Bytes that one rank can push to another in one call.");
  m.def(
      "low_latency_payload", &TokenBytes, nb::arg("num_tokens"), nb::arg("num_topk"),
      nb::arg("row_bytes"),
      "Bytes that one rank sends to another in a low-latency exchange; num_topk of a combine: 0.");
  m.def(
      "low_latency_room",
      [](int num_ranks, size_t bytes) {
        if (num_ranks < 1) throw std::invalid_argument("num_ranks must be positive");
        return LowLatencyPayload(num_ranks, bytes);
      },
      nb::arg("num_ranks"), nb::arg("bytes"),
      "Bytes that one rank can send to another, in a group with so many low_latency_bytes.");
  m.def(
      "in_flight_room",
      [](int num_ranks, size_t bytes) {
        if (num_ranks < 1) throw std::invalid_argument("num_ranks must be positive");
        return InFlightPayload(num_ranks, bytes);
      },
      nb::arg("num_ranks"), nb::arg("bytes"),
      "Bytes that one rank can send to another, in a group with so many in_flight_bytes.");
  m.def("two_shot_payload", &OfRanks<TwoShotPayload>, nb::arg("num_ranks"),
        "Bytes from each rank that a two-shot can push.");
}

}  // namespace jax_ep
