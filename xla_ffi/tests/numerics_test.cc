// The conversions of core/numerics.h against tables of every value.
#include "core/numerics.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/test.h"

namespace jax_ep {
namespace {

struct Format {
  int exponent_bits;
  int mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }
  /// The value of a magnitude; infinity counts as the next power of two, where rounding wants it.
  double Decode(uint32_t magnitude) const {
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const uint32_t mantissa = magnitude & ((1u << mantissa_bits) - 1);
    const uint32_t implicit = exponent == 0 ? 0 : 1u << mantissa_bits;
    return std::ldexp(mantissa + implicit, std::max(exponent, 1) - bias() - mantissa_bits);
  }
};

template <typename T>
void TestFormat(Format format) {
  std::vector<double> values;  // every non-negative value, ascending
  for (uint32_t m = 0; m <= format.infinity(); ++m) values.push_back(format.Decode(m));

  for (uint32_t bits = 0; bits <= 0xffffu; ++bits) {
    const uint32_t magnitude = bits & 0x7fffu;
    const float wide = ToF32(T{static_cast<uint16_t>(bits)});
    const uint32_t back = FromF32<T>(wide).bits;
    CHECK(std::signbit(wide) == (bits >> 15), bits, wide);
    if (magnitude > format.infinity()) {
      CHECK(std::isnan(wide) && (back & 0x7fffu) > format.infinity(), bits, wide, back);
      CHECK(back >> 15 == bits >> 15, bits, back);
      continue;
    }
    if (magnitude == format.infinity()) {
      CHECK(std::isinf(wide), bits, wide);
    } else {
      CHECK(std::fabs(wide) == values[magnitude], bits, wide, values[magnitude]);
    }
    CHECK(back == bits, bits, wide, back);
  }

  const auto check = [&](float value) {
    const uint32_t seen = FromF32<T>(value).bits;
    CHECK(seen >> 15 == std::signbit(value), value, seen);
    const uint32_t magnitude = seen & 0x7fffu;
    if (std::isnan(value)) {
      CHECK(magnitude > format.infinity(), seen);
      return;
    }
    const double wanted = std::fabs(double{value});
    const auto above = std::lower_bound(values.begin(), values.end(), wanted);
    uint32_t nearest = static_cast<uint32_t>(above - values.begin());
    if (above == values.end()) {
      nearest = format.infinity();
    } else if (nearest > 0) {
      const double up = *above - wanted, down = wanted - above[-1];
      if (down < up || (down == up && nearest % 2 == 1)) --nearest;
    }
    CHECK(magnitude == nearest, value, magnitude, nearest);
  };
  for (uint32_t m = 0; m < format.infinity(); ++m) {
    const float tie = static_cast<float>((values[m] + values[m + 1]) / 2);
    for (const float value : {tie, std::nextafterf(tie, 0), std::nextafterf(tie, INFINITY)}) {
      check(value);
      check(-value);
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 300'000; ++i) {
    const uint32_t bits = random();
    check(std::bit_cast<float>(bits));
    // The exponents around those of F16 are a small part of all.
    const uint32_t exponent = 100 + random() % 45;
    check(std::bit_cast<float>((bits & 0x807fffffu) | exponent << 23));
  }
}

void TestNumerics() {
  TestFormat<F16>({.exponent_bits = 5, .mantissa_bits = 10});
  TestFormat<BF16>({.exponent_bits = 8, .mantissa_bits = 7});
  CHECK(FromF32<F16>(65519.99f).bits == 0x7bff, FromF32<F16>(65519.99f).bits);
  CHECK(FromF32<F16>(65520.0f).bits == 0x7c00, FromF32<F16>(65520.0f).bits);
  CHECK(FromF32<BF16>(-INFINITY).bits == 0xff80, FromF32<BF16>(-INFINITY).bits);
}

}  // namespace

Tests NumericsTests() {
  return {
      {"numerics", TestNumerics},
  };
}

}  // namespace jax_ep
