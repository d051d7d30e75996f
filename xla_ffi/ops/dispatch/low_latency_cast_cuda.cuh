// Rows of a low-latency dispatch on their way: as they are, or rounded to fp8 with a scale for each
// 128 elements.
#pragma once

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "device/packets.cuh"
#include "device/vector.cuh"
#include "ops/dispatch/low_latency_choices_cuda.cuh"

namespace jax_ep {

// Stands for the elements of rows that are moved as bytes.
struct Unchanged {};

// Scales of a group of vectors: 96 vectors of 16 fp8 elements are 12 blocks of 128.
inline constexpr int kLanesOfBlock = 8;
inline constexpr int kGroupScales = kGroupVectors / kLanesOfBlock;
inline constexpr int kPacketScales = 3;  // f32 scales, or 12 exponent bytes
static_assert(kGroupScales == kPacketScales * 4);

// A group of a row, in the lanes of a warp.
template <typename Source>
struct GroupOfRow {
  static constexpr bool kIsCast = !std::is_same_v<Source, Unchanged>;
  uint4 vectors[kPacketVectors];
  // Scales in the form of a packet: three words in each of the first lanes.
  uint32_t scales[kPacketScales];
};

// Lanes that hold scales of a group, in a packet each.
__device__ inline int ScaleLanes(Quantize how) {
  return how == Quantize::kNone ? 0 : how == Quantize::kFp8E8m0 ? 1 : 4;
}

// The scale of a block, from the bits of its largest magnitude, and the factor of its elements. The
// operations are those of quantize_fp8, so the bits are, too.
struct BlockScale {
  uint32_t stored;  // f32 bits, or an exponent byte
  float inverse;
};

__device__ inline BlockScale ScaleOf(uint32_t most, Quantize how) {
  constexpr float kLargest = 448.0f;
  if (how == Quantize::kFp8) {
    const float scale = __fmul_rn(__uint_as_float(most), 1.0f / kLargest);
    const float stored = scale < FLT_MIN ? FLT_MIN : scale;
    return {__float_as_uint(stored), __fdiv_rn(1.0f, stored)};
  }
  // The least power of two that is not below most / kLargest. A mantissa above that of kLargest
  // carries into the exponent.
  constexpr int kMantissaBits = 23;
  constexpr uint32_t kLargestBits = 0x43e00000;
  constexpr uint32_t kMantissa = kLargestBits & ((1u << kMantissaBits) - 1);
  constexpr int kExponent = static_cast<int>(kLargestBits >> kMantissaBits) - 127;
  const uint32_t ceiling = (most + ((1u << kMantissaBits) - 1 - kMantissa)) >> kMantissaBits;
  const int byte = max(static_cast<int>(ceiling) - kExponent, 1);
  const float inverse = __uint_as_float(static_cast<uint32_t>(254 - byte) << kMantissaBits);
  const bool is_finite = most < 0x7f800000;
  if (how == Quantize::kFp8E8m0) return {is_finite ? static_cast<uint32_t>(byte) : 255u, inverse};
  return {is_finite ? static_cast<uint32_t>(byte) << kMantissaBits : 0x7fc00000u, inverse};
}

// Rounds 16 elements to fp8. NaN stays NaN.
__device__ inline uint4 RoundToFp8(const float (&values)[kVectorBytes], float inverse) {
  uint4 vector;
  auto* bytes = reinterpret_cast<__nv_fp8_storage_t*>(&vector);
#pragma unroll
  for (int e = 0; e < kVectorBytes; ++e) {
    const float scaled = __fmul_rn(values[e], inverse);
    const float bounded = scaled > 448.0f ? 448.0f : scaled < -448.0f ? -448.0f : scaled;
    bytes[e] = __nv_cvt_float_to_fp8(bounded, __NV_SATFINITE, __NV_E4M3);
  }
  return vector;
}

// Puts the scales of all blocks of a group into the words of packets. Block b is in lanes b % 4 * 8
// and onwards, in the vector b / 4.
__device__ inline void GatherScales(Quantize how, const uint32_t (&stored)[kPacketVectors],
                                    uint32_t (&scales)[kPacketScales]) {
  const bool is_byte = how == Quantize::kFp8E8m0;
#pragma unroll
  for (int j = 0; j < kPacketScales; ++j) scales[j] = 0;
#pragma unroll
  for (int b = 0; b < kGroupScales; ++b) {
    const uint32_t scale = __shfl_sync(~0u, stored[b / 4], b % 4 * kLanesOfBlock);
    if (is_byte) {
      scales[b / 4] |= scale << (b % 4 * 8);
    } else if (PacketLane() == b / kPacketScales) {
      scales[b % kPacketScales] = scale;
    }
  }
}

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
      uint32_t most = 0;
#pragma unroll
      for (int e = 0; e < kVectorBytes; ++e) {
        most = max(most, __float_as_uint(values[e]) & 0x7fffffffu);
      }
#pragma unroll
      for (int lane = 1; lane < kLanesOfBlock; lane *= 2) {
        most = max(most, __shfl_xor_sync(~0u, most, lane));
      }
      const BlockScale scale = ScaleOf(most, a.quantize);
      stored[v] = scale.stored;
      loaded.vectors[v] = RoundToFp8(values, scale.inverse);
    }
    GatherScales(a.quantize, stored, loaded.scales);
  }
}

// This lane's packet of the scales of a group: in the places of the scales' own groups, which are
// large enough.
__device__ inline std::byte* ScalesAt(const LowLatencyDispatch& launch, int holder, int source,
                                      uint32_t epoch, int unit) {
  const int num_groups = launch.groups.count();
  const int group = unit % num_groups;
  const int scales = unit - group + launch.groups.first[1];
  const int packet = group * ScaleLanes(launch.args.quantize);
  return PlaceOf(launch, holder, source, epoch, scales) + packet * kVectorBytes;
}

__device__ inline void SendScales(const LowLatencyDispatch& launch, uint32_t epoch, int peer,
                                  int unit, const uint32_t (&scales)[kPacketScales]) {
  if (PacketLane() >= ScaleLanes(launch.args.quantize)) return;
  StorePacket(
      ScalesAt(launch, peer, launch.self.rank, epoch, unit),
      {.low = uint64_t{scales[1]} << 32 | scales[0], .high = uint64_t{epoch} << 32 | scales[2]});
}

// Waits for the scales of a group, whose rows have come. False if the group fails first.
__device__ inline bool ReceiveScales(const LowLatencyDispatch& launch, const PushCall& call,
                                     int source, int unit, uint32_t (&scales)[kPacketScales]) {
  if (PacketLane() >= ScaleLanes(launch.args.quantize)) return true;
  const std::byte* from = ScalesAt(launch, launch.self.rank, source, call.epoch, unit);
  Packet packet;
  const bool is_there = AwaitPackets(launch.self, call, source, [&] {
    packet = LoadPacket(from);
    return packet.high >> 32 == call.epoch;
  });
  scales[0] = static_cast<uint32_t>(packet.low);
  scales[1] = static_cast<uint32_t>(packet.low >> 32);
  scales[2] = static_cast<uint32_t>(packet.high);
  return is_there;
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
