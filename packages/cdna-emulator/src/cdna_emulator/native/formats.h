// Narrow floating-point formats: decoding, and encoding with every rounding.
//
// A format is data (`Format`); `decode` and `encode` work for all of them. `encode` takes a double,
// into which every source of a conversion fits exactly, also after a power-of-two scale, so that it
// rounds once. `encode_nearest` is the quick form for whole vectors of f32.
//
// Sources: OCP "8-bit Floating Point Specification" and "Microscaling Formats (MX)" for OCP formats,
// AMD "CDNA3 ISA" for the FNUZ forms of gfx942: one more in the bias, no infinities and no negative
// zero, whose code is the only NaN.
#pragma once

#include <bit>
#include <cstdint>

namespace cdna {

enum class Specials : uint8_t {
  kInfinityAndNan,   // the last exponent, as in IEEE 754
  kNan,              // all ones alone; no infinities
  kNegativeZeroNan,  // FNUZ
  kNone,             // every code is a number
};

struct Format {
  int exponent_bits;
  int mantissa_bits;
  int bias;
  Specials specials;

  constexpr int bits() const { return 1 + exponent_bits + mantissa_bits; }
  constexpr uint32_t sign() const { return 1u << (bits() - 1); }
  // Code of the largest number.
  constexpr uint32_t largest() const {
    if (specials == Specials::kInfinityAndNan) {
      return (((1u << exponent_bits) - 1) << mantissa_bits) - 1;
    }
    return sign() - (specials == Specials::kNan ? 2 : 1);
  }
  constexpr uint32_t infinity() const { return largest() + 1; }  // where the format has one
  // Code of a NaN; formats without one have the largest number instead, by our choice.
  constexpr uint32_t nan(bool negative) const {
    uint32_t signed_bit = negative ? sign() : 0;
    switch (specials) {
      case Specials::kInfinityAndNan: return signed_bit | infinity() | 1u << (mantissa_bits - 1);
      case Specials::kNan: return signed_bit | (sign() - 1);
      case Specials::kNegativeZeroNan: return sign();
      case Specials::kNone: return signed_bit | largest();
    }
    return 0;
  }
};

constexpr Format kFormatF16{5, 10, 15, Specials::kInfinityAndNan};
constexpr Format kFormatBf16{8, 7, 127, Specials::kInfinityAndNan};
constexpr Format kFormatE4M3{4, 3, 7, Specials::kNan};
constexpr Format kFormatE5M2{5, 2, 15, Specials::kInfinityAndNan};
constexpr Format kFormatE4M3Fnuz{4, 3, 8, Specials::kNegativeZeroNan};
constexpr Format kFormatE5M2Fnuz{5, 2, 16, Specials::kNegativeZeroNan};
constexpr Format kFormatE2M3{2, 3, 1, Specials::kNone};
constexpr Format kFormatE3M2{3, 2, 3, Specials::kNone};
constexpr Format kFormatE2M1{2, 1, 1, Specials::kNone};

// Numbered as MODE numbers the rounding of arithmetic; kStochastic is an addition.
enum class Rounding : uint8_t { kNearestEven, kUp, kDown, kTowardZero, kStochastic };

// 2^exponent for normal exponents.
constexpr double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// Value of an E8M0 scale; code 255 is NaN.
constexpr double decode_e8m0(uint32_t code) {
  return (code & 255) == 255 ? std::bit_cast<double>(0x7ff8000000000000ull)
                             : power_of_two(static_cast<int>(code & 255) - 127);
}

constexpr double decode(const Format& f, uint32_t code) {
  bool negative = code & f.sign();
  uint32_t magnitude = code & (f.sign() - 1);
  uint64_t sign_bit = negative ? 1ull << 63 : 0;
  bool is_nan = false;
  if (f.specials == Specials::kInfinityAndNan && magnitude > f.largest()) {
    uint64_t payload = static_cast<uint64_t>(magnitude - f.infinity()) << (52 - f.mantissa_bits);
    return std::bit_cast<double>(sign_bit | 0x7ff0000000000000ull | payload);
  }
  if (f.specials == Specials::kNan) is_nan = magnitude > f.largest();
  if (f.specials == Specials::kNegativeZeroNan) is_nan = code == f.sign();
  if (is_nan) return std::bit_cast<double>(0x7ff8000000000000ull);
  int exponent = static_cast<int>(magnitude >> f.mantissa_bits);
  uint32_t fraction = magnitude & ((1u << f.mantissa_bits) - 1);
  if (exponent > 0) fraction |= 1u << f.mantissa_bits;
  int ulp = (exponent > 0 ? exponent : 1) - f.bias - f.mantissa_bits;
  double value = fraction * power_of_two(ulp);
  return negative ? -value : value;
}

// Rounds once, from any double. `saturate` gives the largest number for a finite value that
// overflows; infinities stay infinities, or NaN in a format without them. Formats without special
// values always saturate. `random` counts 2^-32 of the last place, for stochastic rounding: a
// result is rounded up with the probability of its fraction.
constexpr uint32_t encode(const Format& f, double value, Rounding rounding, bool saturate,
                          uint32_t random = 0) {
  uint64_t bits = std::bit_cast<uint64_t>(value);
  bool negative = bits >> 63;
  uint32_t sign = negative ? f.sign() : 0;
  int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023;
  uint64_t mantissa = bits & 0xfffffffffffffull;
  bool ieee = f.specials == Specials::kInfinityAndNan;
  if (exponent == 1024 && mantissa != 0) {
    // IEEE formats keep what fits of the payload.
    return ieee ? f.nan(negative) | static_cast<uint32_t>(mantissa >> (52 - f.mantissa_bits))
                : f.nan(negative);
  }
  if (exponent == 1024) return ieee ? sign | f.infinity() : f.nan(negative);
  if (exponent > -1023) {
    mantissa |= 1ull << 52;
  } else {
    exponent = -1022;  // a denormal double is far below every format
  }
  int lowest = 1 - f.bias;
  int scale = exponent > lowest ? exponent : lowest;
  int shift = scale - f.mantissa_bits - exponent + 52;
  if (shift > 60) {
    // All of the mantissa lies below half of the last place: only whether it is zero matters.
    mantissa = mantissa != 0;
    shift = 60;
  }
  uint64_t kept = mantissa >> shift;
  uint64_t rest = mantissa & ((1ull << shift) - 1), half = 1ull << (shift - 1);
  switch (rounding) {
    case Rounding::kNearestEven: kept += rest > half || (rest == half && (kept & 1)); break;
    case Rounding::kUp: kept += rest != 0 && !negative; break;
    case Rounding::kDown: kept += rest != 0 && negative; break;
    case Rounding::kTowardZero: break;
    case Rounding::kStochastic:
      kept += (rest + (static_cast<uint64_t>(random) << (shift - 32))) >> shift;
      break;
  }
  uint64_t code = (static_cast<uint64_t>(scale - lowest) << f.mantissa_bits) + kept;
  if (code > f.largest()) {
    bool inward = rounding == Rounding::kTowardZero || (rounding == Rounding::kUp && negative) ||
                  (rounding == Rounding::kDown && !negative);
    if (saturate || inward || f.specials == Specials::kNone) return sign | f.largest();
    return ieee ? sign | f.infinity() : f.nan(negative);
  }
  if (code == 0 && f.specials == Specials::kNegativeZeroNan) return 0;
  return sign | static_cast<uint32_t>(code);
}

// The same for the bits of one f32 and rounding to nearest even, without branches so that loops
// over lanes become vector code. For formats of at most 8 bits, and bf16.
template <Format F>
inline uint32_t encode_nearest(uint32_t bits, bool saturate) {
  constexpr int kDrop = 23 - F.mantissa_bits;
  constexpr uint32_t kRebias = static_cast<uint32_t>(127 - F.bias) << F.mantissa_bits;
  constexpr uint32_t kFirstNormal = static_cast<uint32_t>(128 - F.bias) << 23;
  constexpr bool kIeee = F.specials == Specials::kInfinityAndNan;
  uint32_t magnitude = bits & 0x7fffffff;
  uint32_t sign = bits >> 31 << (F.bits() - 1);
  uint32_t code = ((magnitude + (1u << (kDrop - 1)) - 1 + (magnitude >> kDrop & 1)) >> kDrop);
  if constexpr (F.bias != 127) {
    code -= kRebias;
    // A denormal result is the rounded sum with a number whose last place is the format's own.
    constexpr uint32_t kAnchor = static_cast<uint32_t>(128 - F.bias + kDrop) << 23;
    float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(kAnchor);
    uint32_t denormal = std::bit_cast<uint32_t>(sum) - kAnchor;
    code = magnitude < kFirstNormal ? denormal : code;
  }
  uint32_t overflow = kIeee ? F.infinity() : F.nan(false);
  overflow = saturate || F.specials == Specials::kNone ? F.largest() : overflow;
  code = code > F.largest() ? overflow : code;
  uint32_t special = magnitude > 0x7f800000 ? F.nan(false) : kIeee ? F.infinity() : F.nan(false);
  code = magnitude >= 0x7f800000 ? special : code;
  if constexpr (F.specials == Specials::kNegativeZeroNan) {
    return code == 0 || code == F.sign() ? code : code | sign;
  }
  return code | sign;
}

// The step of the pseudo-random generator (v_prng_b32) that feeds stochastic rounding.
constexpr uint32_t next_random(uint32_t x) { return x << 1 ^ (x >> 31 ? 197u : 0u); }

// Values of all codes of a format of at most 8 bits.
struct DecodeTable {
  float value[256];
};

template <Format F>
constexpr DecodeTable make_decode_table() {
  DecodeTable table{};
  for (uint32_t code = 0; code < 256; ++code) {
    table.value[code] = static_cast<float>(decode(F, code & ((1u << F.bits()) - 1)));
  }
  return table;
}

template <Format F>
inline constexpr DecodeTable kDecodeTable = make_decode_table<F>();

// The 8-bit formats an architecture calls fp8 and bf8.
inline const float* fp8_values(uint32_t arch) {
  return arch == 950 ? kDecodeTable<kFormatE4M3>.value : kDecodeTable<kFormatE4M3Fnuz>.value;
}
inline const float* bf8_values(uint32_t arch) {
  return arch == 950 ? kDecodeTable<kFormatE5M2>.value : kDecodeTable<kFormatE5M2Fnuz>.value;
}
inline const Format& fp8_format(uint32_t arch) {
  return arch == 950 ? kFormatE4M3 : kFormatE4M3Fnuz;
}
inline const Format& bf8_format(uint32_t arch) {
  return arch == 950 ? kFormatE5M2 : kFormatE5M2Fnuz;
}

}  // namespace cdna
