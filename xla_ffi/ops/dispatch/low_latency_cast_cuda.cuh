// Rows of a low-latency dispatch on their way: as they are, or rounded to fp8 with a scale for each
// 128 elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "device/fp8_blocks.cuh"
#include "device/packets.cuh"
#include "device/vector.cuh"
#include "ops/dispatch/low_latency_choices_cuda.cuh"

namespace jax_ep {

// Stands for the elements of rows that are moved as bytes.
struct Unchanged {};

// A group of a row, in the lanes of a warp.
template <typename Source>
struct GroupOfRow {
  static constexpr bool kIsCast = !std::is_same_v<Source, Unchanged>;
  uint4 vectors[kPacketVectors];
  // Scales in the form of a packet: three words in each of the first lanes.
  uint32_t scales[kPacketScales];
};

// Loads a group of a row of this rank, and rounds it. For a whole warp. `row`: the row of the
// operand.
template <typename Source>
__device__ void LoadGroup(const DispatchArgs& a, const RowGroup& group, const std::byte* row,
                          GroupOfRow<Source>& loaded) {
  if constexpr (!GroupOfRow<Source>::kIsCast) {
    LoadVectors<1>(row, group.vectors, group.row_bytes, loaded.vectors);
  } else {
    if (group.stream != 0) {
      LoadVectors<1>(row, group.vectors, group.row_bytes, loaded.vectors);
      return;
    }
    using Values = Vector<Source>;
    constexpr int kParts = kVectorBytes / Values::kSize;  // vectors of the operand for one of fp8
    const int64_t row_bytes = group.row_bytes * (kVectorBytes / Values::kSize);
    uint32_t stored[kPacketVectors];
#pragma unroll
    for (int v = 0; v < kPacketVectors; ++v) {
      const int64_t i = group.vectors.at(v);
      float values[kVectorBytes] = {};
      if (i < group.vectors.end) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          const uint4 part =
              LoadVector<kVectorBytes / Values::kSize>(row, i * kParts + p, row_bytes);
          Values::Load(part, values + p * Values::kSize);
        }
      }
      const RoundedBlock block = RoundBlock(values, a.quantize);
      stored[v] = block.scale;
      loaded.vectors[v] = block.vector;
    }
    GatherScales(a.quantize, stored, loaded.scales);
  }
}

// This lane's packet of the scales of a group: in the places of the scales' own groups, which are
// large enough.
template <typename Call>
__device__ std::byte* ScalesAt(const LowLatencyDispatch& launch, const Call& call, int holder,
                               int source, int unit) {
  const int num_groups = launch.groups.count();
  const int group = unit % num_groups;
  const int scales = unit - group + launch.groups.first[1];
  const int packet = group * ScaleLanes(launch.args.quantize);
  return PlaceOf(launch, call, holder, source, scales) + packet * kVectorBytes;
}

template <typename Call>
__device__ void SendScales(const LowLatencyDispatch& launch, const Call& call, int peer, int unit,
                           const uint32_t (&scales)[kPacketScales]) {
  StoreScales(ScalesAt(launch, call, peer, launch.self.rank, unit), call.epoch,
              launch.args.quantize, scales);
}

// Waits for the scales of a group, whose rows have come. False as in AwaitScales.
template <typename Call>
__device__ bool ReceiveScales(const LowLatencyDispatch& launch, const Call& call, int source,
                              int unit, uint32_t (&scales)[kPacketScales]) {
  return AwaitScales(launch.self, call, source,
                     ScalesAt(launch, call, launch.self.rank, source, unit), launch.args.quantize,
                     scales);
}

// Stores a group of a row of the result.
template <typename Source>
__device__ void StoreRowOfResult(const DispatchArgs& a, const RowGroup& group, int64_t row,
                                 const GroupOfRow<Source>& loaded) {
  StoreVectors<1>(a.streams[group.stream].out + row * group.row_bytes, group.vectors,
                  group.row_bytes, loaded.vectors);
  if constexpr (GroupOfRow<Source>::kIsCast) {
    if (group.stream != 0 || PacketLane() >= ScaleLanes(a.quantize)) return;
    std::byte* to = a.streams[1].out + row * static_cast<int64_t>(a.streams[1].row_bytes);
    const int64_t first = group.vectors.first / kGroupVectors * kGroupScales;
    const bool is_byte = a.quantize == Quantize::kFp8E8m0;
    const auto num_scales = static_cast<int64_t>(a.streams[1].row_bytes) / (is_byte ? 1 : 4);
#pragma unroll
    for (int j = 0; j < kPacketScales; ++j) {
      if (is_byte) {
        for (int b = 0; b < 4; ++b) {
          const int64_t i = first + j * 4 + b;
          if (i < num_scales) to[i] = static_cast<std::byte>(loaded.scales[j] >> (b * 8));
        }
      } else {
        const int64_t i = first + PacketLane() * kPacketScales + j;
        if (i < num_scales) reinterpret_cast<uint32_t*>(to)[i] = loaded.scales[j];
      }
    }
  }
}

}  // namespace jax_ep
