// Blocks of 128 elements that are rounded to fp8 with a scale each, in the lanes of a warp and in
// packets.
#pragma once

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "core/limits.h"
#include "core/types.h"
#include "device/packets.cuh"
#include "device/signals.cuh"

namespace jax_ep {

/// Scales of a group of vectors: 96 vectors of 16 fp8 elements are 12 blocks of 128.
inline constexpr int kLanesOfBlock = 8;
inline constexpr int kGroupScales = kGroupVectors / kLanesOfBlock;
inline constexpr int kPacketScales = 3;  // f32 scales, or 12 exponent bytes
static_assert(kGroupScales == kPacketScales * 4);
static_assert(kLanesOfBlock * kVectorBytes == kFp8Block);

/// Lanes that hold scales of a group, in a packet each.
__device__ inline int ScaleLanes(Quantize how) {
  return how == Quantize::kNone ? 0 : how == Quantize::kFp8E8m0 ? 1 : 4;
}

/// The scale of a block, from the bits of its largest magnitude, and the factor of its elements.
/// The operations are those of quantize_fp8, so the bits are, too.
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

/// Rounds 16 elements to fp8. NaN stays NaN.
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

/// A lane's part of a block: 16 elements in fp8, and the scale of the block as it is stored.
struct RoundedBlock {
  uint4 vector;
  uint32_t scale;
};

/// Rounds 16 elements of each lane; 8 neighbouring lanes have a block. For a whole warp.
__device__ inline RoundedBlock RoundBlock(const float (&values)[kVectorBytes], Quantize how) {
  uint32_t most = 0;
#pragma unroll
  for (int e = 0; e < kVectorBytes; ++e) {
    most = max(most, __float_as_uint(values[e]) & 0x7fffffffu);
  }
#pragma unroll
  for (int lane = 1; lane < kLanesOfBlock; lane *= 2) {
    most = max(most, __shfl_xor_sync(~0u, most, lane));
  }
  const BlockScale scale = ScaleOf(most, how);
  return {RoundToFp8(values, scale.inverse), scale.stored};
}

/// Puts the scales of all blocks of a group into the words of packets. Block b is in lanes b % 4 *
/// 8 and onwards, in the vector b / 4.
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

/// Stores the scales of a group, from GatherScales, as packets; `to`: this lane's. For a whole
/// warp.
__device__ inline void StoreScales(std::byte* to, uint32_t epoch, Quantize how,
                                   const uint32_t (&scales)[kPacketScales]) {
  if (PacketLane() >= ScaleLanes(how)) return;
  StorePacket(to, {.low = uint64_t{scales[1]} << 32 | scales[0],
                   .high = uint64_t{epoch} << 32 | scales[2]});
}

/// Waits for the scales of a group, whose rows have come. False if the group fails first.
template <typename Call>
__device__ bool AwaitScales(const Endpoint& self, const Call& call, int source,
                            const std::byte* from, Quantize how,
                            uint32_t (&scales)[kPacketScales]) {
  if (PacketLane() >= ScaleLanes(how)) return true;
  Packet packet;
  const bool is_there = AwaitPackets(self, call, source, [&] {
    packet = LoadPacket(from);
    return packet.high >> 32 == call.epoch;
  });
  scales[0] = static_cast<uint32_t>(packet.low);
  scales[1] = static_cast<uint32_t>(packet.low >> 32);
  scales[2] = static_cast<uint32_t>(packet.high);
  return is_there;
}

}  // namespace jax_ep
