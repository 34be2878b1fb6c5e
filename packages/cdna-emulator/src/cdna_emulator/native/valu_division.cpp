// The three helpers of correctly rounded division: v_div_scale, v_div_fmas and v_div_fixup.
//
// Compilers divide n by d with a reciprocal and Newton-Raphson steps between these. v_div_scale
// multiplies n or d by a power of two where a step would overflow or meet denormals, and sets a
// mask bit where the quotient is then off by such a power; v_div_fmas is the last step and
// takes that power back; v_div_fixup puts in the sign and the special cases.
//
// Source: AMD CDNA3 and CDNA4 ISA documents. They differ from what makes divisions come out right
// in three places, where this file does the latter: a denominator whose reciprocal is denormal is
// scaled down also where the quotient is denormal; v_div_fmas multiplies by 2^64 (2^128 for f64) or
// divides by it, depending on which side of 1 the estimate lies; and v_div_fixup takes a quotient
// that is NaN, while numerator and denominator are finite, for one that overflowed in a step.
#include "floats.h"

namespace cdna {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

template <class F>
struct Scaling;
template <>
struct Scaling<F32> {
  static constexpr int kExponent = 64, kNearOverflow = 96, kTinyNumerator = 23, kUnderflow = 150;
};
template <>
struct Scaling<F64> {
  static constexpr int kExponent = 128, kNearOverflow = 768, kTinyNumerator = 53, kUnderflow = 1075;
};

template <class F>
typename F::Value value(typename F::Bits x) {
  return std::bit_cast<typename F::Value>(x);
}

template <class F>
typename F::Bits bits(typename F::Value x) {
  return std::bit_cast<typename F::Bits>(x);
}

// Whether a / b is a denormal; neither is zero.
template <class F>
bool quotient_is_denormal(typename F::Bits a, typename F::Bits b) {
  if (magnitude<F>(a) >= F::kInfinity || magnitude<F>(b) >= F::kInfinity) return false;
  int a_exponent, b_exponent, exponent;
  auto ratio = std::frexp(std::fabs(value<F>(a)), &a_exponent) /
               std::frexp(std::fabs(value<F>(b)), &b_exponent);
  std::frexp(ratio, &exponent);
  return exponent + a_exponent - b_exponent < 2 - F::kBias;
}

template <class F>
struct Scaled {
  typename F::Bits result;
  bool postscale;
};

// x is the denominator or the numerator.
template <class F>
Scaled<F> scale(typename F::Bits x, typename F::Bits denominator, typename F::Bits numerator) {
  using S = Scaling<F>;
  auto scaled = [&](int exponent) { return bits<F>(std::scalbn(value<F>(x), exponent)); };
  if (!magnitude<F>(numerator) || !magnitude<F>(denominator)) {
    return {F::kInfinity | F::kQuiet, false};
  }
  bool is_denominator = value<F>(x) == value<F>(denominator);
  bool is_numerator = value<F>(x) == value<F>(numerator);
  int numerator_exponent = exponent_field<F>(numerator);
  int denominator_exponent = exponent_field<F>(denominator);
  if (numerator_exponent - denominator_exponent >= S::kNearOverflow) {
    return {is_denominator ? scaled(S::kExponent) : x, true};
  }
  if (denominator_exponent == 0) return {scaled(S::kExponent), false};
  bool reciprocal_denormal = quotient_is_denormal<F>(F::kOne, denominator);
  bool denormal = quotient_is_denormal<F>(numerator, denominator);
  if (reciprocal_denormal && denormal) {
    return {is_denominator ? scaled(-S::kExponent) : x, true};
  }
  if (reciprocal_denormal) return {scaled(-S::kExponent), false};
  if (denormal) return {is_numerator ? scaled(S::kExponent) : x, true};
  if (numerator_exponent <= S::kTinyNumerator) return {scaled(S::kExponent), false};
  return {x, false};
}

// x * 2^exponent, rounded to nearest even as if x had not been rounded before: `error` has the sign
// of what x lacks.
template <class F>
typename F::Bits scale_once(typename F::Bits x, typename F::Value error, int exponent) {
  auto plain = bits<F>(std::scalbn(value<F>(x), exponent));
  int lost = 1 - (exponent_field<F>(x) + exponent);  // bits that a denormal result drops
  if (lost <= 0 || lost > F::kFraction + 1 || is_nan<F>(x) || is_infinite<F>(x)) return plain;
  constexpr auto kOne = typename F::Bits{1};
  auto fraction = (x & ((kOne << F::kFraction) - 1)) | kOne << F::kFraction;
  auto kept = fraction >> lost, dropped = fraction & ((kOne << lost) - 1);
  auto half = kOne << (lost - 1);
  bool larger = (x & F::kSign) ? error < 0 : error > 0;  // the unrounded magnitude
  bool tie = dropped == half && error == 0;
  bool up = dropped > half || (dropped == half && larger) || (tie && (kept & 1));
  return (x & F::kSign) | (kept + up);
}

// The exact a * b + c minus its rounded value `sum`: only its sign is used.
template <class T>
T fma_error(T a, T b, T c, T sum) {
  T product = a * b, product_error = std::fma(a, b, -product);
  T outer = product + c, part = outer - product;
  T outer_error = (product - (outer - part)) + (c - part);
  return ((outer - sum) + outer_error) + product_error;
}

template <class F>
typename F::Bits fma_postscaled(typename F::Bits a, typename F::Bits b, typename F::Bits c,
                                bool postscale, bool nearest) {
  auto sum = std::fma(value<F>(a), value<F>(b), value<F>(c));
  if (!postscale) return bits<F>(sum);
  int exponent = exponent_field<F>(c) > F::kBias ? Scaling<F>::kExponent : -Scaling<F>::kExponent;
  if (!nearest) return bits<F>(std::scalbn(sum, exponent));
  return scale_once<F>(bits<F>(sum), fma_error(value<F>(a), value<F>(b), value<F>(c), sum), exponent);
}

// What an underflowing quotient rounds to.
template <class F>
typename F::Bits underflow(bool negative, uint8_t round) {
  bool away = negative ? round == 2 : round == 1;
  return (negative ? F::kSign : 0) | (away ? 1 : 0);
}

// What an overflowing quotient rounds to.
template <class F>
typename F::Bits overflow(bool negative, uint8_t round) {
  bool inward = round == 3 || round == (negative ? 1 : 2);
  return (negative ? F::kSign : 0) | (F::kInfinity - (inward ? 1 : 0));
}

template <class F>
typename F::Bits fix_up(typename F::Bits quotient, typename F::Bits denominator,
                        typename F::Bits numerator, uint8_t round) {
  bool negative = (numerator ^ denominator) & F::kSign;
  auto sign = negative ? F::kSign : typename F::Bits{0};
  auto n = magnitude<F>(numerator), d = magnitude<F>(denominator);
  if (is_nan<F>(numerator)) return numerator | F::kQuiet;
  if (is_nan<F>(denominator)) return denominator | F::kQuiet;
  bool invalid = (n == 0 && d == 0) || (n == F::kInfinity && d == F::kInfinity);
  if (invalid) return F::kSign | F::kInfinity | F::kQuiet;
  if (d == 0 || n == F::kInfinity) return sign | F::kInfinity;
  if (d == F::kInfinity || n == 0) return sign;
  if constexpr (F::kFraction != F16::kFraction) {
    int difference = exponent_field<F>(numerator) - exponent_field<F>(denominator);
    if (difference < -Scaling<F>::kUnderflow) return underflow<F>(negative, round);
    if (is_nan<F>(quotient)) return overflow<F>(negative, round);
  }
  return sign | magnitude<F>(quotient);
}

// --- handlers ---

// Operand 1 is the mask. Denormals are scaled whatever MODE says: that is what scaling is for.
void div_scale32(Wave& w, const Instruction& in) {
  Lanes buffer[3], result, flags;
  const u32* s[3];
  for (int k = 0; k < 3; ++k) s[k] = fetch_f32_bits(w, in, in.op[2 + k], k, buffer[k]);
  for (int lane = 0; lane < kLanes; ++lane) {
    auto [scaled, postscale] = scale<F32>(s[0][lane], s[1][lane], s[2][lane]);
    result.lane[lane] = scaled;
    flags.lane[lane] = postscale;
  }
  write32(w, in, in.op[0], result.lane);
  write_lane_mask(w, in, in.op[1], gather_bits(flags.lane));
}

void div_scale64(Wave& w, const Instruction& in) {
  WideLanes buffer[3], result;
  Lanes flags;
  const u64* s[3];
  for (int k = 0; k < 3; ++k) s[k] = fetch_f64_bits(w, in, in.op[2 + k], k, buffer[k]);
  for (int lane = 0; lane < kLanes; ++lane) {
    auto [scaled, postscale] = scale<F64>(s[0][lane], s[1][lane], s[2][lane]);
    result.lane[lane] = scaled;
    flags.lane[lane] = postscale;
  }
  write64(w, in, in.op[0], result.lane);
  write_lane_mask(w, in, in.op[1], gather_bits(flags.lane));
}

void div_fmas32(Wave& w, const Instruction& in) {
  Lanes buffer[3], result;
  const u32* s[3];
  for (int k = 0; k < 3; ++k) s[k] = fetch_f32_bits(w, in, in.op[1 + k], k, buffer[k]);
  u64 vcc = w.vcc();
  bool nearest = w.mode.round32 == 0;
  with_rounding(w.mode.round32, s, 3, result.lane, [&] {
    for (int lane = 0; lane < kLanes; ++lane) {
      result.lane[lane] =
          fma_postscaled<F32>(s[0][lane], s[1][lane], s[2][lane], vcc >> lane & 1, nearest);
    }
  });
  settle_nan<F32, 3>(s, result.lane);
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}

void div_fmas64(Wave& w, const Instruction& in) {
  WideLanes buffer[3], result;
  const u64* s[3];
  for (int k = 0; k < 3; ++k) s[k] = fetch_f64_bits(w, in, in.op[1 + k], k, buffer[k]);
  u64 vcc = w.vcc();
  bool nearest = w.mode.round64 == 0;
  with_rounding(w.mode.round64, s, 3, result.lane, [&] {
    for (int lane = 0; lane < kLanes; ++lane) {
      result.lane[lane] =
          fma_postscaled<F64>(s[0][lane], s[1][lane], s[2][lane], vcc >> lane & 1, nearest);
    }
  });
  settle_nan<F64, 3>(s, result.lane);
  finish_f64(w, in, result.lane);
  write64(w, in, in.op[0], result.lane);
}

void div_fixup32(Wave& w, const Instruction& in) {
  Lanes buffer[3], result;
  const u32* s[3];
  for (int k = 0; k < 3; ++k) s[k] = fetch_f32(w, in, in.op[1 + k], k, buffer[k]);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = fix_up<F32>(s[0][lane], s[1][lane], s[2][lane], w.mode.round32);
  }
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}

void div_fixup16(Wave& w, const Instruction& in) {
  Lanes buffer[3], result;
  const u32* s[3];
  for (int k = 0; k < 3; ++k) s[k] = fetch_f16(w, in, in.op[1 + k], k, buffer[k]);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = fix_up<F16>(s[0][lane], s[1][lane], s[2][lane], w.mode.round64);
  }
  finish_f16(w, in, result.lane);
  write16(w, in, in.op[0], result.lane, OtherHalf::kKeep);
}

void div_fixup64(Wave& w, const Instruction& in) {
  WideLanes buffer[3], result;
  const u64* s[3];
  for (int k = 0; k < 3; ++k) s[k] = fetch_f64(w, in, in.op[1 + k], k, buffer[k]);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = fix_up<F64>(s[0][lane], s[1][lane], s[2][lane], w.mode.round64);
  }
  finish_f64(w, in, result.lane);
  write64(w, in, in.op[0], result.lane);
}

constexpr NamedHandler kRows[] = {
    {"v_div_scale_f32", div_scale32}, {"v_div_scale_f64", div_scale64},
    {"v_div_fmas_f32", div_fmas32},   {"v_div_fmas_f64", div_fmas64},
    {"v_div_fixup_f32", div_fixup32}, {"v_div_fixup_f16", div_fixup16},
    {"v_div_fixup_f64", div_fixup64},
};

}  // namespace

HandlerTable valu_division_handlers() { return {kRows, sizeof kRows / sizeof kRows[0]}; }

}  // namespace cdna
