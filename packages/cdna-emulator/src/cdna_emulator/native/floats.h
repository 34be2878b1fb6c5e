// Floating-point rules shared by the files of vector instructions.
//
// NaN: an invalid operation returns the negative quiet NaN without payload, as the documents'
// examples do (V_SQRT_F32, V_LOG_F32, V_DIV_FIXUP_F32). They do not say which of several NaN sources
// an operation returns: here it is the first, made quiet, with its own sign. Minimum and
// maximum return the other source, as IEEE 754-2008 minNum and maxNum do; a signalling NaN is
// returned, made quiet, where MODE.IEEE is set (CDNA4 ISA, V_MIN_F32 and V_MAX_F32).
//
// Arithmetic runs in the host's default rounding mode, which loops over lanes keep to SIMD
// instructions, and in another only while MODE asks for it.
#pragma once

#include "operands.h"

namespace cdna {

struct F16 {
  using Bits = uint32_t;  // 16 bits in the low half
  using Ordered = int32_t;
  static constexpr Bits kSign = 0x8000, kInfinity = 0x7c00, kQuiet = 0x200, kOnes = 0xffff;
  static constexpr Bits kOne = 0x3c00;
  static constexpr int kFraction = 10, kBias = 15;
};

struct F32 {
  using Bits = uint32_t;
  using Ordered = int32_t;
  using Value = float;
  static constexpr Bits kSign = 0x80000000, kInfinity = 0x7f800000, kQuiet = 0x400000;
  static constexpr Bits kOnes = 0xffffffff, kOne = 0x3f800000;
  static constexpr int kFraction = 23, kBias = 127;
};

struct F64 {
  using Bits = uint64_t;
  using Ordered = int64_t;
  using Value = double;
  static constexpr Bits kSign = 1ull << 63, kInfinity = 0x7ff0000000000000;
  static constexpr Bits kQuiet = 1ull << 51, kOnes = ~0ull, kOne = 0x3ff0000000000000;
  static constexpr int kFraction = 52, kBias = 1023;
};

template <class F>
constexpr typename F::Bits magnitude(typename F::Bits x) {
  return x & (F::kOnes ^ F::kSign);
}

template <class F>
constexpr bool is_nan(typename F::Bits x) {
  return magnitude<F>(x) > F::kInfinity;
}

template <class F>
constexpr bool is_signalling(typename F::Bits x) {
  return is_nan<F>(x) && !(x & F::kQuiet);
}

template <class F>
constexpr bool is_infinite(typename F::Bits x) {
  return magnitude<F>(x) == F::kInfinity;
}

// The exponent field, as the documents' exponent().
template <class F>
constexpr int exponent_field(typename F::Bits x) {
  return static_cast<int>(magnitude<F>(x) >> F::kFraction);
}

// An integer that orders numbers as floats do, with -0 below +0.
template <class F>
constexpr typename F::Ordered ordered(typename F::Bits x) {
  using Ordered = typename F::Ordered;
  constexpr int kUnused = F::kSign == 0x8000 ? 16 : 0;
  Ordered value = static_cast<Ordered>(x << kUnused) >> kUnused;
  return value ^ (value < 0 ? static_cast<Ordered>(F::kOnes ^ F::kSign) : 0);
}

template <class F, bool Maximum>
constexpr typename F::Bits select_number(typename F::Bits a, typename F::Bits b, bool ieee) {
  bool first = Maximum ? ordered<F>(a) >= ordered<F>(b) : ordered<F>(a) < ordered<F>(b);
  auto result = first ? a : b;
  result = is_nan<F>(b) ? a : result;
  result = is_nan<F>(a) ? b : result;
  result = ieee && is_signalling<F>(b) ? b | F::kQuiet : result;
  return ieee && is_signalling<F>(a) ? a | F::kQuiet : result;
}

// Minimum and maximum of IEEE 754-2019: any NaN is the result, made quiet.
template <class F, bool Maximum>
constexpr typename F::Bits select_propagating(typename F::Bits a, typename F::Bits b) {
  bool first = Maximum ? ordered<F>(a) >= ordered<F>(b) : ordered<F>(a) < ordered<F>(b);
  auto result = first ? a : b;
  result = is_nan<F>(b) ? b | F::kQuiet : result;
  return is_nan<F>(a) ? a | F::kQuiet : result;
}

// Equal as numbers, which neither is NaN.
template <class F>
constexpr bool same_number(typename F::Bits a, typename F::Bits b) {
  return a == b || !magnitude<F>(a | b);
}

// The larger of the two that are left when one that equals the largest is taken away.
template <class F>
constexpr typename F::Bits median(typename F::Bits a, typename F::Bits b, typename F::Bits c,
                                  bool ieee) {
  auto ab = select_number<F, true>(a, b, ieee), largest = select_number<F, true>(ab, c, ieee);
  auto middle = same_number<F>(largest, b) ? select_number<F, true>(a, c, ieee) : ab;
  middle = same_number<F>(largest, a) ? select_number<F, true>(b, c, ieee) : middle;
  bool any_nan = is_nan<F>(a) || is_nan<F>(b) || is_nan<F>(c);
  auto smallest = select_number<F, false>(select_number<F, false>(a, b, ieee), c, ieee);
  return any_nan ? smallest : middle;
}

// Replaces NaN results by the ones described above.
template <class F, int N>
void settle_nan(const typename F::Bits* const* s, typename F::Bits* r) {
  typename F::Bits any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= is_nan<F>(r[lane]) ? 1 : 0;
  if (!any) return;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!is_nan<F>(r[lane])) continue;
    r[lane] = F::kSign | F::kInfinity | F::kQuiet;
    for (int k = N - 1; k >= 0; --k) {
      if (is_nan<F>(s[k][lane])) r[lane] = s[k][lane] | F::kQuiet;
    }
  }
}

// Keeps the compiler from moving work on `memory` across.
inline void pin(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// Runs `compute`, which reads the arrays `s` and writes the array `r`, in a rounding mode of MODE.
template <class Compute, class T>
inline void with_rounding(uint8_t mode, const T* const* s, int count, T* r, Compute compute) {
  if (mode == 0) [[likely]] {
    compute();
    return;
  }
  RoundingScope scope(mode);
  for (int k = 0; k < count; ++k) pin(s[k]);
  compute();
  pin(r);
}

template <int N, auto F, class From, class To, class T>
inline void apply_floats(const T* const* s, T* r, From from, To to) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if constexpr (N == 1) {
      r[lane] = to(F(from(s[0][lane])));
    } else if constexpr (N == 2) {
      r[lane] = to(F(from(s[0][lane]), from(s[1][lane])));
    } else {
      r[lane] = to(F(from(s[0][lane]), from(s[1][lane]), from(s[2][lane])));
    }
  }
}

// r = F(sources) on all lanes, rounded as MODE says; F works on float.
template <int N, auto F>
void arithmetic_f32(const Mode& mode, const uint32_t* const* s, uint32_t* r) {
  with_rounding(mode.round32, s, N, r, [&] {
    apply_floats<N, F>(s, r, as_float, [](float x) { return as_bits(x); });
  });
  settle_nan<F32, N>(s, r);
}

template <int N, auto F>
void arithmetic_f64(const Mode& mode, const uint64_t* const* s, uint64_t* r) {
  with_rounding(mode.round64, s, N, r, [&] {
    apply_floats<N, F>(s, r, as_double, [](double x) { return as_bits(x); });
  });
  settle_nan<F64, N>(s, r);
}

// MODE.FP16_OVFL: results that overflowed from finite sources are the largest finite number.
template <int N>
void saturate_f16(const uint32_t* const* s, uint32_t* r) {
  for (int lane = 0; lane < kLanes; ++lane) {
    bool finite = true;
    for (int k = 0; k < N; ++k) finite &= magnitude<F16>(s[k][lane]) < F16::kInfinity;
    if (finite && is_infinite<F16>(r[lane])) r[lane] -= 1;
  }
}

// F works on float, which is wide enough that rounding its result once more to f16 changes nothing
// for sums and products of two numbers.
template <int N, auto F>
void arithmetic_f16(const Mode& mode, const uint32_t* const* s, uint32_t* r) {
  with_rounding(mode.round64, s, N, r, [&] {
    apply_floats<N, F>(s, r, half_to_float, float_to_half);
  });
  settle_nan<F16, N>(s, r);
  if (mode.saturate16) saturate_f16<N>(s, r);
}

// a * b is exact in double and the sum close enough to exact that rounding it once to odd and then
// to f16 rounds correctly.
inline uint32_t fma_half(uint32_t a, uint32_t b, uint32_t c) {
  double product = static_cast<double>(half_to_float(a)) * half_to_float(b);
  return float_to_half(double_to_odd_float(product + half_to_float(c)));
}

inline void fma_f16(const Mode& mode, const uint32_t* const* s, uint32_t* r) {
  with_rounding(mode.round64, s, 3, r, [&] {
    for (int lane = 0; lane < kLanes; ++lane) {
      r[lane] = fma_half(s[0][lane], s[1][lane], s[2][lane]);
    }
  });
  settle_nan<F16, 3>(s, r);
  if (mode.saturate16) saturate_f16<3>(s, r);
}

}  // namespace cdna
