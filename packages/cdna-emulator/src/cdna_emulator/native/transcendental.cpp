// Transcendental instructions: exp, log, reciprocal, square roots, sine and cosine.
//
// f32 results are computed in double precision and rounded once, so they differ from the correctly
// rounded value by less than one part in a thousand of the last place; hardware promises one unit
// of it. f16 results are rounded once from the same double, f64 results are the host's.
//
// f32 forms ignore the denormal mode: denormal inputs count as zero and denormal results become
// zero, which is why LLVM scales around them. f16 and f64 forms follow the mode. Rounding is to
// nearest even whatever MODE says.
//
// Source: AMD "CDNA3 ISA", vector instructions; LLVM's lowering of exp2, log2 and sqrt.

#include "operands.h"

namespace cdna {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr double kNan = std::bit_cast<double>(0x7ff8000000000000ull);

// Every function takes a double that holds an f32 or f16 exactly, and must be free of branches:
// loops over lanes become vector code.

inline double exp2_of(double x) {
  // 2^x is 0 or infinity in f32 well within these bounds.
  double bounded = x < -200.0 ? -200.0 : x > 200.0 ? 200.0 : x;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  double shifted = bounded + kRound;
  double f = bounded - (shifted - kRound);
  // Taylor series of 2^f for |f| <= 1/2; the first term left out is below 1e-11.
  double p = 1.0178086009239696e-07;
  p = p * f + 1.3215486790144305e-06;
  p = p * f + 1.5252733804059838e-05;
  p = p * f + 0.00015403530393381606;
  p = p * f + 0.0013333558146428441;
  p = p * f + 0.009618129107628477;
  p = p * f + 0.055504108664821576;
  p = p * f + 0.2402265069591007;
  p = p * f + 0.6931471805599453;
  p = p * f + 1.0;
  uint64_t n = as_bits(shifted) << 52;  // the integer sits in the low bits: into the exponent
  double r = as_double(as_bits(p) + n);
  return x == x ? r : x;
}

inline double log2_of(double x) {
  uint64_t bits = as_bits(x);
  // Mantissa in [sqrt(1/2), sqrt(2)): the exponent is that of x / sqrt(1/2).
  uint64_t offset = bits - 0x3fe6a09e667f3bcdull;
  int64_t exponent = static_cast<int64_t>(offset) >> 52;
  double m = as_double(bits - (static_cast<uint64_t>(exponent) << 52));
  double t = (m - 1.0) / (m + 1.0), s = t * t;
  // 2 / ln 2 times the series of atanh; |t| < 0.172.
  double p = 0.16972882833987804;
  p = p * s + 0.19235933878519512;
  p = p * s + 0.22195308321368667;
  p = p * s + 0.2623081892525388;
  p = p * s + 0.3205988979753252;
  p = p * s + 0.4121985831111324;
  p = p * s + 0.5770780163555853;
  p = p * s + 0.9617966939259756;
  p = p * s + 2.8853900817779268;
  // Small enough to convert exactly by the same trick as in exp2_of.
  constexpr double kRound = 6755399441055744.0;
  double n = as_double(as_bits(kRound) + static_cast<uint64_t>(exponent)) - kRound;
  double r = p * t + n;
  r = x == kInfinity ? x : r;
  r = x == 0.0 ? -kInfinity : r;
  r = x < 0.0 ? kNan : r;
  return x == x ? r : x;
}

inline double rcp_of(double x) { return 1.0 / x; }

inline double sqrt_of(double x) { return __builtin_sqrt(x); }

// Infinity with the sign of a zero.
inline double rsq_of(double x) { return 1.0 / __builtin_sqrt(x); }

// sin(2 pi x): the input counts revolutions.
inline double sine_of_turns(double x) {
  constexpr double kRound = 6755399441055744.0;
  double shifted = 2.0 * x + kRound;
  double s = x - 0.5 * (shifted - kRound);  // within a quarter turn of a multiple of a half
  uint64_t flip = as_bits(shifted) << 63;
  double t = s * s;
  // Taylor series of sin(2 pi s) / s; the first term left out is below 1e-13 of the result.
  double p = 0.10422916220813978;
  p = p * t - 0.7181223017785001;
  p = p * t + 3.8199525848482803;
  p = p * t - 15.094642576822984;
  p = p * t + 42.058693944897634;
  p = p * t - 76.70585975306136;
  p = p * t + 81.60524927607504;
  p = p * t - 41.341702240399755;
  p = p * t + 6.283185307179586;
  return as_double(as_bits(p * s) ^ flip);
}

// Beyond 256 revolutions hardware gives up: the sine is 0 and the cosine 1.
inline double sin_of(double x) {
  double r = sine_of_turns(x);
  r = x == 0.0 ? x : r;
  r = __builtin_fabs(x) > 256.0 ? 0.0 : r;
  return x - x == 0.0 ? r : kNan;
}

inline double cos_of(double x) {
  double r = sine_of_turns(x + 0.25);
  r = __builtin_fabs(x) > 256.0 ? 1.0 : r;
  return x - x == 0.0 ? r : kNan;
}

// --- handlers ---

// A NaN that the function made, not the input, is positive; host instructions differ in its sign.
inline uint32_t nan32(uint32_t input, uint32_t result) {
  bool made = (result & 0x7fffffff) > 0x7f800000 && (input & 0x7fffffff) <= 0x7f800000;
  return made ? 0x7fc00000 : result;
}

inline uint32_t nan16(uint32_t input, uint32_t result) {
  bool made = (result & 0x7fff) > 0x7c00 && (input & 0x7fff) <= 0x7c00;
  return made ? 0x7e00 : result;
}

inline uint64_t nan64(uint64_t input, uint64_t result) {
  constexpr uint64_t kLast = 0x7ff0000000000000;
  bool made = (result & ~(1ull << 63)) > kLast && (input & ~(1ull << 63)) <= kLast;
  return made ? 0x7ff8000000000000 : result;
}

template <double (*kFunction)(double)>
void unary_f32(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch_f32_bits(w, in, in.op[1], 0, buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    double value = as_float(flush32(x[lane]));
    uint32_t bits = flush32(as_bits(static_cast<float>(kFunction(value))));
    result.lane[lane] = nan32(x[lane], bits);
  }
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}

template <double (*kFunction)(double)>
void unary_f16(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch_f16(w, in, in.op[1], 0, buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    double value = kFunction(half_to_float(x[lane]));
    result.lane[lane] = nan16(x[lane], float_to_half(double_to_odd_float(value)));
  }
  finish_f16(w, in, result.lane);
  write16(w, in, in.op[0], result.lane);
}

template <double (*kFunction)(double)>
void unary_f64(Wave& w, const Instruction& in) {
  WideLanes buffer, result;
  const uint64_t* x = fetch_f64(w, in, in.op[1], 0, buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = nan64(x[lane], as_bits(kFunction(as_double(x[lane]))));
  }
  finish_f64(w, in, result.lane);
  write64(w, in, in.op[0], result.lane);
}

const NamedHandler kHandlers[] = {
    {"v_exp_f32", unary_f32<exp2_of>},
    {"v_exp_legacy_f32", unary_f32<exp2_of>},
    {"v_log_f32", unary_f32<log2_of>},
    {"v_log_legacy_f32", unary_f32<log2_of>},
    {"v_rcp_f32", unary_f32<rcp_of>},
    {"v_rcp_iflag_f32", unary_f32<rcp_of>},
    {"v_rsq_f32", unary_f32<rsq_of>},
    {"v_sqrt_f32", unary_f32<sqrt_of>},
    {"v_sin_f32", unary_f32<sin_of>},
    {"v_cos_f32", unary_f32<cos_of>},
    {"v_exp_f16", unary_f16<exp2_of>},
    {"v_log_f16", unary_f16<log2_of>},
    {"v_rcp_f16", unary_f16<rcp_of>},
    {"v_rsq_f16", unary_f16<rsq_of>},
    {"v_sqrt_f16", unary_f16<sqrt_of>},
    {"v_sin_f16", unary_f16<sin_of>},
    {"v_cos_f16", unary_f16<cos_of>},
    {"v_rcp_f64", unary_f64<rcp_of>},
    {"v_rsq_f64", unary_f64<rsq_of>},
    {"v_sqrt_f64", unary_f64<sqrt_of>},
};

}  // namespace

HandlerTable transcendental_handlers() {
  return {kHandlers, sizeof(kHandlers) / sizeof(kHandlers[0])};
}

}  // namespace cdna
