// Numbers of the native code that Python needs before a call: both modules export the same.
#pragma once

#include <nanobind/nanobind.h>

#include <initializer_list>
#include <stdexcept>
#include <utility>

#include "core/limits.h"
#include "core/types.h"
#include "device/layout.h"
#include "ops/all_reduce/all_reduce.h"

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
  return enums;
}

/// A function of the number of ranks, which Python may get wrong.
template <size_t (*kPayload)(int)>
size_t OfRanks(int num_ranks) {
  if (num_ranks < 1) throw std::invalid_argument("num_ranks must be positive");
  return kPayload(num_ranks);
}

inline void DefineLimits(nb::module_& m) {
  m.def("limits", &Limits, "Limits of the operations, by name.");
  m.def("enums", &Enums, "Members of the enums that are attributes of custom calls.");
  m.def("packet_payload", &OfRanks<PacketPayload>, nb::arg("num_ranks"),
        "Bytes that one rank can send to another in packets, in one call.");
  m.def("push_payload", &OfRanks<PushPayload>, nb::arg("num_ranks"),
        "Bytes that one rank can push to another in one call.");
  m.def("two_shot_payload", &OfRanks<TwoShotPayload>, nb::arg("num_ranks"),
        "Bytes from each rank that a two-shot can push.");
}

}  // namespace jax_ep
