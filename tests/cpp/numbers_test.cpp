// Tests what every rule and backend shares, without torch: number conversions over all half
// patterns and the small helpers.
#include "core/numbers.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "core/control.h"
#include "rules/common.h"

namespace fusedopt {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A small floating-point format, by its definition.
struct Format {
  int mantissa;
  int lowest;    // exponent of the smallest normal number
  double limit;  // what rounds to infinity from here on
};
constexpr Format kHalf{10, -14, 65520.0};
const Format kBrain{7, -126, std::ldexp(511.0 / 256.0, 127)};

double decode(uint16_t bits, const Format& format) {
  const int magnitude = bits & 0x7fff;
  const int exponent = magnitude >> format.mantissa;
  const double fraction = magnitude & ((1 << format.mantissa) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (magnitude >> format.mantissa == 0x7fff >> format.mantissa) {
    return fraction != 0.0 ? kNan : sign * kInf;
  }
  const double unit = std::ldexp(1.0, -format.mantissa);
  if (exponent == 0) return sign * std::ldexp(fraction * unit, format.lowest);
  return sign * std::ldexp(1.0 + fraction * unit, format.lowest + exponent - 1);
}

double nearest(double x, const Format& format) {
  if (std::isnan(x)) return x;
  if (std::fabs(x) >= format.limit) return std::copysign(kInf, x);
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 1, format.lowest) - format.mantissa);
  return std::copysign(std::nearbyint(x / unit) * unit, x);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <typename Narrow>
void check_narrow(float x, const Format& format) {
  Narrow narrow;
  store_as(narrow, x);
  const double expected = nearest(x, format);
  CHECK(same(decode(narrow.bits, format), expected), "%a became %a, expected %a", x,
        decode(narrow.bits, format), expected);
}

template <typename Narrow>
void test_conversions(const Format& format) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const Narrow narrow{static_cast<uint16_t>(bits)};
    const double value = decode(narrow.bits, format);
    CHECK(same(load_as<float>(narrow), value), "pattern %04x", bits);
    CHECK(same(load_as<double>(narrow), value), "pattern %04x", bits);
    Narrow back;
    store_as(back, load_as<float>(narrow));
    CHECK(back.bits == narrow.bits || std::isnan(value), "%04x came back as %04x", bits, back.bits);
    // Its neighbours in float, and the point half way to the next, where ties are.
    const float here = static_cast<float>(value);
    const double next = decode(static_cast<uint16_t>(bits + 1), format);
    const float middle = static_cast<float>((value + next) / 2);
    for (const float x : {here, middle}) {
      check_narrow<Narrow>(x, format);
      check_narrow<Narrow>(std::nextafter(x, INFINITY), format);
      check_narrow<Narrow>(std::nextafter(x, -INFINITY), format);
    }
  }
  // A prime step visits every exponent with all kinds of fractions.
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 9973) {
    check_narrow<Narrow>(bit_cast<float>(static_cast<uint32_t>(bits)), format);
  }
}

void test_helpers() {
  for (const double base : {0.0, 0.5, 0.9, 0.999, 1.0, 1.5}) {
    for (const int n : {0, 1, 2, 3, 7, 10, 63, 1000}) {
      const double expected = static_cast<double>(powl(base, n));
      const double found = rules::power(base, n);
      CHECK(std::fabs(found - expected) <= (n + 1) * 1.2e-16 * expected, "%g^%d = %.17g", base, n,
            found);
    }
  }
  CHECK(rules::power(0.999, 16777216.0) == 0.0, "underflows to zero after 2^24 steps");
  CHECK(rules::power(2.0, 30.0) == 1073741824.0, "exact powers are exact");
  CHECK(rules::power(0.9, kInf) == 0.0 && rules::power(0.9, 1e20) == 0.0, "endless");
  CHECK(rules::power(1.0, kInf) == 1.0, "one");
  CHECK(std::isnan(rules::power(0.9, kNan)), "NaN");
  for (const double base : {0.0, 0.5, 0.9, 0.999, 1.0}) {
    for (const double x : {0.25, 0.5, 1.0 / 3.0, 2.75, 100.1, 1e-300}) {
      const double expected = static_cast<double>(powl(base, x));
      const double found = rules::power(base, x);
      CHECK(std::fabs(found - expected) <= (x + 54) * 1.2e-16 * expected, "%g^%g = %.17g", base, x,
            found);
    }
  }

  CHECK(rules::maximum(1.0f, 2.0f) == 2.0f && rules::maximum(2.0f, 1.0f) == 2.0f, "larger");
  CHECK(std::isnan(rules::maximum(kNan, 1.0)) && std::isnan(rules::maximum(1.0, kNan)), "NaN");
  CHECK(rules::maximum(-kInf, kInf) == kInf, "infinities");

  for (const double x : {-kInf, -2.0, -0.5, 0.0, 0.5, 2.0, kInf}) {
    CHECK(clamp_value(x, 0.75) == std::fmin(std::fmax(x, -0.75), 0.75), "%g", x);
    CHECK(clamp_value(x, kInf) == x, "%g is within infinity", x);
  }
  CHECK(std::isnan(clamp_value(kNan, 1.0)) && std::isnan(clamp_value(float(kNan), 1.0f)), "NaN");

  CHECK(clip_coefficient(2.0, 1.0) == 1.0 / (2.0 + 1e-6), "torch's formula");
  CHECK(clip_coefficient(0.5, 1.0) == 1.0 && clip_coefficient(0.0, 1.0) == 1.0, "no amplification");
  CHECK(clip_coefficient(kInf, 1.0) == 0.0 && std::isnan(clip_coefficient(kNan, 1.0)),
        "propagates");
  CHECK(clip_coefficient(kInf, kInf) == 1.0 && clip_coefficient(kNan, kInf) == 1.0,
        "only measures");

  const GradTransform<double> transform{0.5, 3.0, 0.25, 0.125};
  CHECK(transform(4.0) == 2.0 * 0.25 * 0.125 && transform(-8.0) == -3.0 * 0.25 * 0.125, "order");
}

}  // namespace
}  // namespace fusedopt

int main() {
  using namespace fusedopt;
  test_conversions<Float16>(kHalf);
  test_conversions<BFloat16>(kBrain);
  test_helpers();
  return report();
}
