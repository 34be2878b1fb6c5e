// Vector floating-point instructions on f16, f32 and f64.
//
// Source: AMD CDNA3 and CDNA4 ISA documents, VOP1, VOP2 and VOP3 instructions.
#include "floats.h"

namespace cdna {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

// --- fetching N sources and writing a result of one format ---

// The sources of an instruction: operands 1 to N; or operands 1, 2 and the destination; or a
// register, then a register and a literal in either order, as v_fmamk and v_fmaak have them.
enum class Sources { kFollow, kAccumulate, kLiteral };

template <Sources S>
const Operand& source_operand(const Instruction& in, int k) {
  return in.op[S == Sources::kAccumulate && k == 2 ? 0 : 1 + k];
}

template <Sources S>
int source_number(int k) {
  if (S == Sources::kAccumulate && k == 2) return kDestination;
  return S == Sources::kLiteral && k == 2 ? 1 : k;
}

template <int N, Sources S = Sources::kFollow>
struct Sources32 {
  Lanes buffer[N];
  const u32* s[N];
  Sources32(Wave& w, const Instruction& in) {
    for (int k = 0; k < N; ++k) {
      const Operand& operand = source_operand<S>(in, k);
      s[k] = fetch_f32(w, in, operand, source_number<S>(k), buffer[k]);
    }
  }
};

template <int N, Sources S = Sources::kFollow>
struct Sources16 {
  Lanes buffer[N];
  const u32* s[N];
  Sources16(Wave& w, const Instruction& in) {
    for (int k = 0; k < N; ++k) {
      const Operand& operand = source_operand<S>(in, k);
      s[k] = fetch_f16(w, in, operand, source_number<S>(k), buffer[k]);
    }
  }
};

template <int N, Sources S = Sources::kFollow>
struct Sources64 {
  WideLanes buffer[N];
  const u64* s[N];
  Sources64(Wave& w, const Instruction& in) {
    for (int k = 0; k < N; ++k) {
      const Operand& operand = source_operand<S>(in, k);
      s[k] = fetch_f64(w, in, operand, source_number<S>(k), buffer[k]);
    }
  }
};

void put_f32(Wave& w, const Instruction& in, Lanes& result) {
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}

void put_f16(Wave& w, const Instruction& in, Lanes& result, OtherHalf other = OtherHalf::kZero) {
  finish_f16(w, in, result.lane);
  write16(w, in, in.op[0], result.lane, other);
}

void put_f64(Wave& w, const Instruction& in, WideLanes& result) {
  finish_f64(w, in, result.lane);
  write64(w, in, in.op[0], result.lane);
}

// --- arithmetic: rounded functions of float or double ---

template <int N, auto F, Sources S = Sources::kFollow>
void float32(Wave& w, const Instruction& in) {
  Sources32<N, S> from(w, in);
  Lanes result;
  arithmetic_f32<N, F>(w.mode, from.s, result.lane);
  put_f32(w, in, result);
}

template <int N, auto F, Sources S = Sources::kFollow, OtherHalf O = OtherHalf::kZero>
void float16(Wave& w, const Instruction& in) {
  Sources16<N, S> from(w, in);
  Lanes result;
  arithmetic_f16<N, F>(w.mode, from.s, result.lane);
  put_f16(w, in, result, O);
}

template <int N, auto F, Sources S = Sources::kFollow>
void float64(Wave& w, const Instruction& in) {
  Sources64<N, S> from(w, in);
  WideLanes result;
  arithmetic_f64<N, F>(w.mode, from.s, result.lane);
  put_f64(w, in, result);
}

template <Sources S, OtherHalf O>
void fma16(Wave& w, const Instruction& in) {
  Sources16<3, S> from(w, in);
  Lanes result;
  fma_f16(w.mode, from.s, result.lane);
  put_f16(w, in, result, O);
}

// The product of v_mad_f16 and its forms is rounded before the addition.
template <Sources S, OtherHalf O>
void mad16(Wave& w, const Instruction& in) {
  constexpr auto kFunction = [](float a, float b, float c) {
    return half_to_float(float_to_half(a * b)) + c;
  };
  float16<3, kFunction, S, O>(w, in);
}

// --- functions of bits, which MODE's rounding does not touch ---

template <int N, auto F>
void bits32(Wave& w, const Instruction& in) {
  Sources32<N> from(w, in);
  Lanes result;
  bool ieee = w.mode.ieee;
  for (int lane = 0; lane < kLanes; ++lane) {
    if constexpr (N == 2) {
      result.lane[lane] = F(from.s[0][lane], from.s[1][lane], ieee);
    } else {
      result.lane[lane] = F(from.s[0][lane], from.s[1][lane], from.s[2][lane], ieee);
    }
  }
  put_f32(w, in, result);
}

template <int N, auto F>
void bits16(Wave& w, const Instruction& in) {
  Sources16<N> from(w, in);
  Lanes result;
  bool ieee = w.mode.ieee;
  for (int lane = 0; lane < kLanes; ++lane) {
    if constexpr (N == 2) {
      result.lane[lane] = F(from.s[0][lane], from.s[1][lane], ieee);
    } else {
      result.lane[lane] = F(from.s[0][lane], from.s[1][lane], from.s[2][lane], ieee);
    }
  }
  put_f16(w, in, result);
}

template <auto F>
void bits64(Wave& w, const Instruction& in) {
  Sources64<2> from(w, in);
  WideLanes result;
  bool ieee = w.mode.ieee;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = F(from.s[0][lane], from.s[1][lane], ieee);
  }
  put_f64(w, in, result);
}

template <class F, bool Maximum>
typename F::Bits select_of_three(typename F::Bits a, typename F::Bits b, typename F::Bits c,
                                 bool ieee) {
  return select_number<F, Maximum>(select_number<F, Maximum>(a, b, ieee), c, ieee);
}

template <bool Maximum>
u32 propagating_of_three(u32 a, u32 b, u32 c, bool) {
  return select_propagating<F32, Maximum>(select_propagating<F32, Maximum>(a, b), c);
}

// --- exponents ---

// Position of the leading fraction bit of a denormal, as shift to the place of the implicit one.
template <class F>
int denormal_shift(typename F::Bits fraction) {
  constexpr int kWidth = static_cast<int>(8 * sizeof(typename F::Bits));
  return std::countl_zero(fraction) - (kWidth - 1 - F::kFraction);
}

// Of x = m * 2^e with m in [0.5, 1); 0 for zeros, infinities and NaN.
template <class F>
int frexp_exponent(typename F::Bits x) {
  auto size = magnitude<F>(x);
  if (size == 0 || size >= F::kInfinity) return 0;
  int field = exponent_field<F>(x);
  if (field == 0) field = 1 - denormal_shift<F>(size);
  return field - F::kBias + 1;
}

template <class F>
typename F::Bits frexp_mantissa(typename F::Bits x) {
  auto size = magnitude<F>(x);
  if (size > F::kInfinity) return x | F::kQuiet;
  if (size == 0 || size == F::kInfinity) return x;
  if (exponent_field<F>(x) == 0) size <<= denormal_shift<F>(size);
  constexpr auto kFractionMask = (typename F::Bits{1} << F::kFraction) - 1;
  auto half = static_cast<typename F::Bits>(F::kBias - 1) << F::kFraction;
  return (x & F::kSign) | half | (size & kFractionMask);
}

void frexp_mantissa32(Wave& w, const Instruction& in) {
  Sources32<1> from(w, in);
  Lanes result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = frexp_mantissa<F32>(from.s[0][lane]);
  }
  put_f32(w, in, result);
}

void frexp_mantissa16(Wave& w, const Instruction& in) {
  Sources16<1> from(w, in);
  Lanes result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = frexp_mantissa<F16>(from.s[0][lane]);
  }
  put_f16(w, in, result);
}

void frexp_mantissa64(Wave& w, const Instruction& in) {
  Sources64<1> from(w, in);
  WideLanes result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = frexp_mantissa<F64>(from.s[0][lane]);
  }
  put_f64(w, in, result);
}

void frexp_exponent32(Wave& w, const Instruction& in) {
  Sources32<1> from(w, in);
  Lanes result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = u32(frexp_exponent<F32>(from.s[0][lane]));
  }
  write32(w, in, in.op[0], result.lane);
}

void frexp_exponent16(Wave& w, const Instruction& in) {
  Sources16<1> from(w, in);
  Lanes result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = u32(frexp_exponent<F16>(from.s[0][lane])) & 0xffff;
  }
  write16(w, in, in.op[0], result.lane);
}

void frexp_exponent64(Wave& w, const Instruction& in) {
  Sources64<1> from(w, in);
  Lanes result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = u32(frexp_exponent<F64>(from.s[0][lane]));
  }
  write32(w, in, in.op[0], result.lane);
}

int clamp_exponent(int x, int limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// 2^exponent as a double, for |exponent| at most 1022.
double power_of_two(int exponent) {
  return as_double(static_cast<u64>(exponent + F64::kBias) << F64::kFraction);
}

// The products are exact in double, so that the conversion rounds once.
void ldexp32(Wave& w, const Instruction& in) {
  Lanes a_buffer, b_buffer, result;
  const u32* s[1] = {fetch_f32(w, in, in.op[1], 0, a_buffer)};
  const u32* amount = fetch32(w, in, in.op[2], 1, b_buffer);
  with_rounding(w.mode.round32, s, 1, result.lane, [&] {
    for (int lane = 0; lane < kLanes; ++lane) {
      double scale = power_of_two(clamp_exponent(static_cast<int>(amount[lane]), 400));
      result.lane[lane] = as_bits(static_cast<float>(as_float(s[0][lane]) * scale));
    }
  });
  settle_nan<F32, 1>(s, result.lane);
  put_f32(w, in, result);
}

void ldexp16(Wave& w, const Instruction& in) {
  Lanes a_buffer, b_buffer, result;
  const u32* s[1] = {fetch_f16(w, in, in.op[1], 0, a_buffer)};
  const u32* amount = fetch16(w, in, in.op[2], 1, b_buffer);
  with_rounding(w.mode.round64, s, 1, result.lane, [&] {
    for (int lane = 0; lane < kLanes; ++lane) {
      int exponent = clamp_exponent(static_cast<int16_t>(amount[lane]), 60);
      float scale = static_cast<float>(power_of_two(exponent));
      result.lane[lane] = float_to_half(half_to_float(s[0][lane]) * scale);
    }
  });
  settle_nan<F16, 1>(s, result.lane);
  if (w.mode.saturate16) saturate_f16<1>(s, result.lane);
  put_f16(w, in, result);
}

void ldexp64(Wave& w, const Instruction& in) {
  WideLanes a_buffer, result;
  Lanes b_buffer;
  const u64* s[1] = {fetch_f64(w, in, in.op[1], 0, a_buffer)};
  const u32* amount = fetch32(w, in, in.op[2], 1, b_buffer);
  with_rounding(w.mode.round64, s, 1, result.lane, [&] {
    for (int lane = 0; lane < kLanes; ++lane) {
      int exponent = clamp_exponent(static_cast<int>(amount[lane]), 5000);
      result.lane[lane] = as_bits(std::scalbn(as_double(s[0][lane]), exponent));
    }
  });
  settle_nan<F64, 1>(s, result.lane);
  put_f64(w, in, result);
}

// --- argument reduction ---

// The first 1201 fraction bits of 2 / pi, most significant first; zeros follow.
constexpr u64 kTwoOverPi[] = {
    0xa2f9836e4e441529, 0xfc2757d1f534ddc0, 0xdb6295993c439041, 0xfe5163abdebbc561,
    0xb7246e3a424dd2e0, 0x06492eea09d1921c, 0xfe1deb1cb129a73e, 0xe88235f52ebb4484,
    0xe99c7026b45f7e41, 0x3991d639835339f4, 0x9c845f8bbdf9283b, 0x1ff897ffde05980f,
    0xef2f118b5a0a6d1f, 0x6d367ecf27cb09b7, 0x4f463f669e5fea2d, 0x7527bac7ebe5f17b,
    0x3d0739f78a5292ea, 0x6bfb5fb11f8d5d08, 0x56033046fc7b0000,
};
constexpr int kTwoOverPiWords = sizeof kTwoOverPi / sizeof kTwoOverPi[0];

// 53 bits of 2 / pi from fraction bit `first` on, as an integer.
u64 two_over_pi_segment(int first) {
  int word = first / 64, bit = first % 64;
  u64 high = word < kTwoOverPiWords ? kTwoOverPi[word] : 0;
  u64 low = word + 1 < kTwoOverPiWords ? kTwoOverPi[word + 1] : 0;
  u64 bits = bit ? high << bit | low >> (64 - bit) : high;
  return bits >> 11;
}

void trig_preop64(Wave& w, const Instruction& in) {
  WideLanes a_buffer, result;
  Lanes b_buffer;
  const u64* a = fetch_f64(w, in, in.op[1], 0, a_buffer);
  const u32* segment = fetch32(w, in, in.op[2], 1, b_buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    int exponent = exponent_field<F64>(a[lane]);
    int shift = static_cast<int>(segment[lane] & 31) * 53;
    if (exponent > 1077) shift += exponent - 1077;
    int scale = -53 - shift + (exponent >= 1968 ? 128 : 0);
    double bits = static_cast<double>(two_over_pi_segment(shift));
    result.lane[lane] = as_bits(std::scalbn(bits, scale));
  }
  put_f64(w, in, result);
}

// --- cube maps: which of x, y, z is the major axis ---

enum class Axis { kX, kY, kZ };

Axis major_axis(float x, float y, float z) {
  float ax = std::fabs(x), ay = std::fabs(y), az = std::fabs(z);
  if (az >= ax && az >= ay) return Axis::kZ;
  return ay >= ax ? Axis::kY : Axis::kX;
}

float cube_face(float x, float y, float z) {
  switch (major_axis(x, y, z)) {
    case Axis::kZ: return z < 0 ? 5.0f : 4.0f;
    case Axis::kY: return y < 0 ? 3.0f : 2.0f;
    case Axis::kX: break;
  }
  return x < 0 ? 1.0f : 0.0f;
}

float cube_s(float x, float y, float z) {
  switch (major_axis(x, y, z)) {
    case Axis::kZ: return z < 0 ? -x : x;
    case Axis::kY: return x;
    case Axis::kX: break;
  }
  return x < 0 ? z : -z;
}

float cube_t(float x, float y, float z) {
  if (major_axis(x, y, z) != Axis::kY) return -y;
  return y < 0 ? -z : z;
}

float cube_major(float x, float y, float z) {
  switch (major_axis(x, y, z)) {
    case Axis::kZ: return 2.0f * z;
    case Axis::kY: return 2.0f * y;
    case Axis::kX: break;
  }
  return 2.0f * x;
}

// --- rows ---

constexpr auto kAdd = [](auto a, auto b) { return a + b; };
constexpr auto kSub = [](auto a, auto b) { return a - b; };
constexpr auto kSubrev = [](auto a, auto b) { return b - a; };
constexpr auto kMul = [](auto a, auto b) { return a * b; };
constexpr auto kMulLegacy = [](float a, float b) { return a == 0 || b == 0 ? 0.0f : a * b; };
constexpr auto kFma = [](auto a, auto b, auto c) { return std::fma(a, b, c); };
constexpr auto kTrunc = [](auto a) { return std::trunc(a); };
constexpr auto kCeil = [](auto a) { return std::ceil(a); };
constexpr auto kFloor = [](auto a) { return std::floor(a); };
constexpr auto kRoundEven32 = [](float a) { return __builtin_roundevenf(a); };
constexpr auto kRoundEven64 = [](double a) { return __builtin_roundeven(a); };

// Below one even where the difference rounds up to it.
constexpr auto kFract32 = [](float a) {
  float fraction = a - std::floor(a);
  return fraction >= 1.0f ? as_float(0x3f7fffff) : fraction;
};
constexpr auto kFract16 = [](float a) {
  float fraction = a - std::floor(a), largest = half_to_float(0x3bff);
  return fraction > largest ? largest : fraction;
};
constexpr auto kFract64 = [](double a) {
  double fraction = a - std::floor(a);
  return fraction >= 1.0 ? as_double(0x3fefffffffffffff) : fraction;
};

constexpr Sources kAccumulate = Sources::kAccumulate, kFollow = Sources::kFollow;
constexpr Sources kLiteral = Sources::kLiteral;
constexpr OtherHalf kKeep = OtherHalf::kKeep, kZero = OtherHalf::kZero;

constexpr NamedHandler kRows[] = {
    {"v_add_f32", float32<2, kAdd>},
    {"v_sub_f32", float32<2, kSub>},
    {"v_subrev_f32", float32<2, kSubrev>},
    {"v_mul_f32", float32<2, kMul>},
    {"v_mul_legacy_f32", float32<2, kMulLegacy>},
    {"v_fma_f32", float32<3, kFma>},
    {"v_fmac_f32", float32<3, kFma, kAccumulate>},
    {"v_fmamk_f32", float32<3, kFma, kLiteral>},
    {"v_fmaak_f32", float32<3, kFma, kLiteral>},
    {"v_trunc_f32", float32<1, kTrunc>},
    {"v_ceil_f32", float32<1, kCeil>},
    {"v_floor_f32", float32<1, kFloor>},
    {"v_rndne_f32", float32<1, kRoundEven32>},
    {"v_fract_f32", float32<1, kFract32>},
    {"v_max_f32", bits32<2, select_number<F32, true>>},
    {"v_min_f32", bits32<2, select_number<F32, false>>},
    {"v_max3_f32", bits32<3, select_of_three<F32, true>>},
    {"v_min3_f32", bits32<3, select_of_three<F32, false>>},
    {"v_med3_f32", bits32<3, median<F32>>},
    {"v_maximum3_f32", bits32<3, propagating_of_three<true>>},
    {"v_minimum3_f32", bits32<3, propagating_of_three<false>>},
    {"v_ldexp_f32", ldexp32},
    {"v_frexp_mant_f32", frexp_mantissa32},
    {"v_frexp_exp_i32_f32", frexp_exponent32},
    {"v_cubeid_f32", float32<3, cube_face>},
    {"v_cubesc_f32", float32<3, cube_s>},
    {"v_cubetc_f32", float32<3, cube_t>},
    {"v_cubema_f32", float32<3, cube_major>},

    {"v_add_f16", float16<2, kAdd>},
    {"v_sub_f16", float16<2, kSub>},
    {"v_subrev_f16", float16<2, kSubrev>},
    {"v_mul_f16", float16<2, kMul>},
    {"v_fma_f16", fma16<kFollow, kKeep>},
    {"v_mad_f16", mad16<kFollow, kKeep>},
    {"v_mac_f16", mad16<kAccumulate, kZero>},
    {"v_madmk_f16", mad16<kLiteral, kZero>},
    {"v_madak_f16", mad16<kLiteral, kZero>},
    {"v_trunc_f16", float16<1, kTrunc>},
    {"v_ceil_f16", float16<1, kCeil>},
    {"v_floor_f16", float16<1, kFloor>},
    {"v_rndne_f16", float16<1, kRoundEven32>},
    {"v_fract_f16", float16<1, kFract16>},
    {"v_max_f16", bits16<2, select_number<F16, true>>},
    {"v_min_f16", bits16<2, select_number<F16, false>>},
    {"v_max3_f16", bits16<3, select_of_three<F16, true>>},
    {"v_min3_f16", bits16<3, select_of_three<F16, false>>},
    {"v_med3_f16", bits16<3, median<F16>>},
    {"v_ldexp_f16", ldexp16},
    {"v_frexp_mant_f16", frexp_mantissa16},
    {"v_frexp_exp_i16_f16", frexp_exponent16},

    {"v_add_f64", float64<2, kAdd>},
    {"v_mul_f64", float64<2, kMul>},
    {"v_fma_f64", float64<3, kFma>},
    {"v_fmac_f64", float64<3, kFma, kAccumulate>},
    {"v_trunc_f64", float64<1, kTrunc>},
    {"v_ceil_f64", float64<1, kCeil>},
    {"v_floor_f64", float64<1, kFloor>},
    {"v_rndne_f64", float64<1, kRoundEven64>},
    {"v_fract_f64", float64<1, kFract64>},
    {"v_max_f64", bits64<select_number<F64, true>>},
    {"v_min_f64", bits64<select_number<F64, false>>},
    {"v_ldexp_f64", ldexp64},
    {"v_frexp_mant_f64", frexp_mantissa64},
    {"v_frexp_exp_i32_f64", frexp_exponent64},
    {"v_trig_preop_f64", trig_preop64},
};

}  // namespace

HandlerTable valu_float_handlers() { return {kRows, sizeof kRows / sizeof kRows[0]}; }

}  // namespace cdna
