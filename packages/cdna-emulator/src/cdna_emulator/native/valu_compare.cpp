// Vector comparisons: v_cmp_* write one bit per lane to a pair of scalar registers, v_cmpx_* to
// EXEC as well.
//
// Source: AMD CDNA3 and CDNA4 ISA documents, VOPC instructions.
#include "floats.h"

namespace cdna {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

// Bits of lanes that EXEC disables become 0.
template <bool WritesExec>
void put_mask(Wave& w, const Instruction& in, const Lanes& flags) {
  u64 mask = gather_bits(flags.lane) & write_mask(w, in);
  w.set_pair(in.op[0].index, mask);
  if (WritesExec) w.set_pair(kExec, mask);
}

// How lanes of a type are fetched and what the comparison gets.
struct Single {
  using Buffer = Lanes;
  static constexpr auto fetch = fetch_f32;
  static float value(u32 x) { return as_float(x); }
};
struct Half {
  using Buffer = Lanes;
  static constexpr auto fetch = fetch_f16;
  static float value(u32 x) { return half_to_float(x); }
};
struct Double {
  using Buffer = WideLanes;
  static constexpr auto fetch = fetch_f64;
  static double value(u64 x) { return as_double(x); }
};
struct Unsigned32 {
  using Buffer = Lanes;
  static constexpr auto fetch = fetch32;
  static u32 value(u32 x) { return x; }
};
struct Signed32 {
  using Buffer = Lanes;
  static constexpr auto fetch = fetch32;
  static int32_t value(u32 x) { return static_cast<int32_t>(x); }
};
struct Unsigned16 {
  using Buffer = Lanes;
  static constexpr auto fetch = fetch16;
  static u32 value(u32 x) { return x; }
};
struct Signed16 {
  using Buffer = Lanes;
  static constexpr auto fetch = fetch16;
  static int32_t value(u32 x) { return static_cast<int16_t>(x); }
};
struct Unsigned64 {
  using Buffer = WideLanes;
  static constexpr auto fetch = fetch64;
  static u64 value(u64 x) { return x; }
};
struct Signed64 {
  using Buffer = WideLanes;
  static constexpr auto fetch = fetch64;
  static int64_t value(u64 x) { return static_cast<int64_t>(x); }
};

template <class Type, auto F, bool WritesExec>
void compare(Wave& w, const Instruction& in) {
  typename Type::Buffer a_buffer, b_buffer;
  Lanes flags;
  auto* a = Type::fetch(w, in, in.op[1], 0, a_buffer);
  auto* b = Type::fetch(w, in, in.op[2], 1, b_buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    flags.lane[lane] = F(Type::value(a[lane]), Type::value(b[lane]));
  }
  put_mask<WritesExec>(w, in, flags);
}

// Bit of the class mask that x belongs to.
template <class F>
int class_bit(typename F::Bits x) {
  auto size = magnitude<F>(x);
  bool negative = x & F::kSign;
  if (size > F::kInfinity) return x & F::kQuiet ? 1 : 0;
  if (size == F::kInfinity) return negative ? 2 : 9;
  if (exponent_field<F>(x) > 0) return negative ? 3 : 8;
  if (size) return negative ? 4 : 7;
  return negative ? 5 : 6;
}

// Classes are of the bits as they stand: a denormal is one whatever MODE flushes.
template <bool WritesExec>
void class32(Wave& w, const Instruction& in) {
  Lanes a_buffer, b_buffer, flags;
  const u32* a = fetch_f32_bits(w, in, in.op[1], 0, a_buffer);
  const u32* b = fetch32(w, in, in.op[2], 1, b_buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    flags.lane[lane] = b[lane] >> class_bit<F32>(a[lane]) & 1;
  }
  put_mask<WritesExec>(w, in, flags);
}

template <bool WritesExec>
void class16(Wave& w, const Instruction& in) {
  Lanes a_buffer, b_buffer, flags;
  const u32* a = fetch_f16_bits(w, in, in.op[1], 0, a_buffer);
  const u32* b = fetch32(w, in, in.op[2], 1, b_buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    flags.lane[lane] = b[lane] >> class_bit<F16>(a[lane]) & 1;
  }
  put_mask<WritesExec>(w, in, flags);
}

template <bool WritesExec>
void class64(Wave& w, const Instruction& in) {
  WideLanes a_buffer;
  Lanes b_buffer, flags;
  const u64* a = fetch_f64_bits(w, in, in.op[1], 0, a_buffer);
  const u32* b = fetch32(w, in, in.op[2], 1, b_buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    flags.lane[lane] = b[lane] >> class_bit<F64>(a[lane]) & 1;
  }
  put_mask<WritesExec>(w, in, flags);
}

constexpr auto kNever = [](auto, auto) { return false; };
constexpr auto kAlways = [](auto, auto) { return true; };
constexpr auto kLess = [](auto a, auto b) { return a < b; };
constexpr auto kEqual = [](auto a, auto b) { return a == b; };
constexpr auto kLessEqual = [](auto a, auto b) { return a <= b; };
constexpr auto kGreater = [](auto a, auto b) { return a > b; };
constexpr auto kGreaterEqual = [](auto a, auto b) { return a >= b; };
constexpr auto kNotEqual = [](auto a, auto b) { return a != b; };
// Less or greater: unlike "not equal", false for NaN.
constexpr auto kLessGreater = [](auto a, auto b) { return a < b || a > b; };
constexpr auto kOrdered = [](auto a, auto b) { return a == a && b == b; };
constexpr auto kUnordered = [](auto a, auto b) { return a != a || b != b; };
constexpr auto kNotLess = [](auto a, auto b) { return !(a < b); };
constexpr auto kNotLessEqual = [](auto a, auto b) { return !(a <= b); };
constexpr auto kNotGreater = [](auto a, auto b) { return !(a > b); };
constexpr auto kNotGreaterEqual = [](auto a, auto b) { return !(a >= b); };
constexpr auto kNotLessGreater = [](auto a, auto b) { return !(a < b || a > b); };

#define INTEGER_ROWS(prefix, type, Type, X)              \
  {prefix "f_" type, compare<Type, kNever, X>},          \
  {prefix "lt_" type, compare<Type, kLess, X>},          \
  {prefix "eq_" type, compare<Type, kEqual, X>},         \
  {prefix "le_" type, compare<Type, kLessEqual, X>},     \
  {prefix "gt_" type, compare<Type, kGreater, X>},       \
  {prefix "ne_" type, compare<Type, kNotEqual, X>},      \
  {prefix "ge_" type, compare<Type, kGreaterEqual, X>},  \
  {prefix "t_" type, compare<Type, kAlways, X>}

#define FLOAT_ROWS(prefix, type, Type, X)                    \
  {prefix "f_" type, compare<Type, kNever, X>},              \
  {prefix "lt_" type, compare<Type, kLess, X>},              \
  {prefix "eq_" type, compare<Type, kEqual, X>},             \
  {prefix "le_" type, compare<Type, kLessEqual, X>},         \
  {prefix "gt_" type, compare<Type, kGreater, X>},           \
  {prefix "lg_" type, compare<Type, kLessGreater, X>},       \
  {prefix "ge_" type, compare<Type, kGreaterEqual, X>},      \
  {prefix "o_" type, compare<Type, kOrdered, X>},            \
  {prefix "u_" type, compare<Type, kUnordered, X>},          \
  {prefix "nge_" type, compare<Type, kNotGreaterEqual, X>},  \
  {prefix "nlg_" type, compare<Type, kNotLessGreater, X>},   \
  {prefix "ngt_" type, compare<Type, kNotGreater, X>},       \
  {prefix "nle_" type, compare<Type, kNotLessEqual, X>},     \
  {prefix "neq_" type, compare<Type, kNotEqual, X>},         \
  {prefix "nlt_" type, compare<Type, kNotLess, X>},          \
  {prefix "tru_" type, compare<Type, kAlways, X>}

#define ALL_ROWS(prefix, X)                  \
  INTEGER_ROWS(prefix, "i32", Signed32, X),  \
  INTEGER_ROWS(prefix, "u32", Unsigned32, X),\
  INTEGER_ROWS(prefix, "i16", Signed16, X),  \
  INTEGER_ROWS(prefix, "u16", Unsigned16, X),\
  INTEGER_ROWS(prefix, "i64", Signed64, X),  \
  INTEGER_ROWS(prefix, "u64", Unsigned64, X),\
  FLOAT_ROWS(prefix, "f32", Single, X),      \
  FLOAT_ROWS(prefix, "f16", Half, X),        \
  FLOAT_ROWS(prefix, "f64", Double, X),      \
  {prefix "class_f32", class32<X>},          \
  {prefix "class_f16", class16<X>},          \
  {prefix "class_f64", class64<X>}

constexpr NamedHandler kRows[] = {ALL_ROWS("v_cmp_", false), ALL_ROWS("v_cmpx_", true)};

}  // namespace

HandlerTable valu_compare_handlers() { return {kRows, sizeof kRows / sizeof kRows[0]}; }

}  // namespace cdna
