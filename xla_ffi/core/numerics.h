// Element types as bits, and their conversion to and from f32. Conversions round to nearest even
// and keep subnormals.
//
// The functions have no branches, so that loops over rows vectorise on any CPU.
#pragma once

#include <bit>
#include <cstdint>

namespace jax_ep {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float ToF32(float value) { return value; }

inline float ToF32(BF16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

inline float ToF32(F16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // The exponent is rebased by a multiplication, which is exact and normalises subnormals.
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return std::bit_cast<float>(sign | (magnitude >= 0x7c00u ? special : finite));
}

template <typename T>
T FromF32(float value);

template <>
inline float FromF32<float>(float value) {
  return value;
}

template <>
inline BF16 FromF32<BF16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
}

template <>
inline F16 FromF32<F16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding one half lines the subnormal's last bit up with the float's, so the addition rounds.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite))};
}

/// Rounds a number of at most 448 to fp8 (e4m3), and keeps it as f32. NaN stays NaN.
inline float RoundToE4M3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) & ~0xfffffu;
  // Adding 2^14 lines the last bit of an fp8 subnormal, 2^-9, up with the float's.
  const float subnormal = (std::bit_cast<float>(magnitude) + 0x1p14f) - 0x1p14f;
  const uint32_t finite = magnitude < 0x3c800000u ? std::bit_cast<uint32_t>(subnormal) : normal;
  return std::bit_cast<float>(magnitude > 0x7f800000u ? bits : sign | finite);
}

}  // namespace jax_ep
