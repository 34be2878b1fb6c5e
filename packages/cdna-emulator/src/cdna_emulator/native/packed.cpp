// Packed instructions (two f16, two 16-bit integers or two f32 per lane), dot products and the
// mixed-precision multiply-adds.
//
// op_sel bit k names the half of source k that the low result reads, op_sel_hi the half for the
// high result; neg_lo and neg_hi negate the same halves of floats. A constant has its value in the
// low half (an integer's sign fills the high one).
//
// Source: AMD CDNA3 and CDNA4 ISA documents, VOP3P instructions and V_DOT*C of VOP2.
#include <utility>

#include "floats.h"
#include "lanewise.h"

namespace cdna {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;

// --- 16-bit halves ---

// The halves of N sources that one half of the result reads.
template <int N>
struct Halves {
  Lanes lanes[N];
  const u32* s[N];
  Halves(const u32* const* words, u32 select, u32 negate) {
    for (int k = 0; k < N; ++k) {
      int shift = select >> k & 1 ? 16 : 0;
      u32 sign = negate >> k & 1 ? 0x8000 : 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[k].lane[lane] = (words[k][lane] >> shift & 0xffff) ^ sign;
      }
      s[k] = lanes[k].lane;
    }
  }
};

template <int N>
struct Words {
  Lanes buffer[N];
  const u32* s[N];
  Words(Wave& w, const Instruction& in) {
    for (int k = 0; k < N; ++k) s[k] = fetch32(w, in, in.op[1 + k], k, buffer[k]);
  }
};

void put_halves(Wave& w, const Instruction& in, const Lanes& low, const Lanes& high) {
  Lanes result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = (low.lane[lane] & 0xffff) | high.lane[lane] << 16;
  }
  write32(w, in, in.op[0], result.lane);
}

template <int N, auto F, auto Saturating>
void packed_integers(Wave& w, const Instruction& in) {
  Words<N> words(w, in);
  Halves<N> low(words.s, in.op_sel, 0), high(words.s, in.op_sel_hi, 0);
  Lanes low_result, high_result;
  if (in.flags & kClamp) {
    apply_lanes<N, Saturating, u32>(low.s, low_result.lane);
    apply_lanes<N, Saturating, u32>(high.s, high_result.lane);
  } else {
    apply_lanes<N, F, u32>(low.s, low_result.lane);
    apply_lanes<N, F, u32>(high.s, high_result.lane);
  }
  put_halves(w, in, low_result, high_result);
}

// `Compute` fills the f16 results of one half.
template <int N, auto Compute>
void packed_halves(Wave& w, const Instruction& in) {
  Words<N> words(w, in);
  Halves<N> low(words.s, in.op_sel, in.neg_lo), high(words.s, in.op_sel_hi, in.neg_hi);
  Lanes low_result, high_result;
  for (auto [half, result] : {std::pair{&low, &low_result}, std::pair{&high, &high_result}}) {
    if (w.mode.flush_inputs64) {
      for (Lanes& lanes : half->lanes) {
        for (u32& x : lanes.lane) x = flush16(x);
      }
    }
    Compute(w.mode, half->s, result->lane);
    finish_f16(w, in, result->lane);
  }
  put_halves(w, in, low_result, high_result);
}

template <int N, auto F>
constexpr auto kArithmetic = [](const Mode& mode, const u32* const* s, u32* r) {
  arithmetic_f16<N, F>(mode, s, r);
};

template <bool Maximum>
constexpr auto kSelect = [](const Mode& mode, const u32* const* s, u32* r) {
  for (int lane = 0; lane < kLanes; ++lane) {
    r[lane] = select_number<F16, Maximum>(s[0][lane], s[1][lane], mode.ieee);
  }
};

template <bool Maximum>
constexpr auto kSelectPropagating = [](const Mode&, const u32* const* s, u32* r) {
  for (int lane = 0; lane < kLanes; ++lane) {
    u32 first = select_propagating<F16, Maximum>(s[0][lane], s[1][lane]);
    r[lane] = select_propagating<F16, Maximum>(first, s[2][lane]);
  }
};

// --- pairs of 32-bit values ---

// The low or high word of a source, as `high` says.
const u32* fetch_word(Wave& w, const Operand& o, int source, bool high, Lanes& buffer) {
  if (o.kind == kVgpr) return w.v[vgpr_number(w, o, source) + high].lane;
  u64 value = scalar64(w, o);
  u32 word = static_cast<u32>(high ? value >> 32 : value);
  for (u32& lane : buffer.lane) lane = word;
  return buffer.lane;
}

void put_words(Wave& w, const Instruction& in, const Lanes& low, const Lanes& high) {
  int number = vgpr_number(w, in.op[0], kDestination);
  store_lanes(w.v[number].lane, low.lane, w.exec());
  store_lanes(w.v[number + 1].lane, high.lane, w.exec());
}

template <int N, auto F>
void packed_floats(Wave& w, const Instruction& in) {
  Lanes result[2];
  for (int half = 0; half < 2; ++half) {
    u32 select = half ? in.op_sel_hi : in.op_sel, negate = half ? in.neg_hi : in.neg_lo;
    Lanes lanes[N];
    const u32* s[N];
    for (int k = 0; k < N; ++k) {
      s[k] = fetch_word(w, in.op[1 + k], k, select >> k & 1, lanes[k]);
      if (negate >> k & 1) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[k].lane[lane] = s[k][lane] ^ F32::kSign;
        s[k] = lanes[k].lane;
      }
      if (w.mode.flush_inputs32) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[k].lane[lane] = flush32(s[k][lane]);
        s[k] = lanes[k].lane;
      }
    }
    arithmetic_f32<N, F>(w.mode, s, result[half].lane);
    finish_f32(w, in, result[half].lane);
  }
  put_words(w, in, result[0], result[1]);
}

// The low result comes from source 0 and the high one from source 1; op_sel names their words.
void packed_move(Wave& w, const Instruction& in) {
  Lanes low_buffer, high_buffer;
  Lanes low, high;
  std::memcpy(low.lane, fetch_word(w, in.op[1], 0, in.op_sel & 1, low_buffer), sizeof low.lane);
  std::memcpy(high.lane, fetch_word(w, in.op[2], 1, in.op_sel >> 1 & 1, high_buffer),
              sizeof high.lane);
  put_words(w, in, low, high);
}

// --- dot products ---

// Source 2 and its number: operand 3, or the destination of the accumulating forms.
template <bool Accumulate>
const u32* fetch_summand(Wave& w, const Instruction& in, Lanes& buffer) {
  if (Accumulate) return fetch32(w, in, in.op[0], kDestination, buffer);
  return fetch32(w, in, in.op[3], 2, buffer);
}

// Accumulating forms have no selectors: the low result reads low halves.
template <bool Accumulate>
u32 low_select(const Instruction& in) {
  return Accumulate ? 0 : in.op_sel;
}

template <bool Accumulate>
u32 high_select(const Instruction& in) {
  return Accumulate ? 3 : in.op_sel_hi;
}

float bf16_to_float(u32 x) { return as_float(x << 16); }

// Products of two f16 or bf16 are exact in f32; the sums round to nearest one after the other.
// Denormals of f32 are flushed whatever MODE says, which LLVM knows of v_dot2_f32_f16.
enum class Order { kSummandFirst, kSummandLast };

template <bool Accumulate, auto Convert, Order O>
void dot_floats(Wave& w, const Instruction& in) {
  Lanes buffer[2], summand_buffer, products[2], result;
  const u32* words[2];
  for (int k = 0; k < 2; ++k) words[k] = fetch32(w, in, in.op[1 + k], k, buffer[k]);
  const u32* summand = fetch_summand<Accumulate>(w, in, summand_buffer);
  Halves<2> low(words, low_select<Accumulate>(in), in.neg_lo);
  Halves<2> high(words, high_select<Accumulate>(in), in.neg_hi);
  for (int lane = 0; lane < kLanes; ++lane) {
    products[0].lane[lane] = as_bits(Convert(low.s[0][lane]) * Convert(low.s[1][lane]));
    products[1].lane[lane] = as_bits(Convert(high.s[0][lane]) * Convert(high.s[1][lane]));
  }
  for (Lanes& product : products) {
    for (u32& x : product.lane) x = flush32(x);
  }
  Lanes third;
  u32 sign = !Accumulate && (in.neg_lo & 4) ? F32::kSign : 0;
  for (int lane = 0; lane < kLanes; ++lane) third.lane[lane] = flush32(summand[lane] ^ sign);
  const u32 *p = products[0].lane, *q = products[1].lane, *c = third.lane;
  const u32* summand_first[3] = {c, p, q};
  const u32* summand_last[3] = {p, q, c};
  constexpr auto kSum = [](float x, float y, float z) { return x + y + z; };
  const u32* const* s = O == Order::kSummandFirst ? summand_first : summand_last;
  arithmetic_f32<3, kSum>(Mode{}, s, result.lane);
  for (u32& x : result.lane) x = flush32(x);
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}

// Element `i` of `Bits` bits.
template <int Bits, bool Signed>
i64 element(u32 x, int i) {
  u32 value = x >> (Bits * i) & ((1u << Bits) - 1);
  if (!Signed) return value;
  return static_cast<int32_t>(value << (32 - Bits)) >> (32 - Bits);
}

template <int Bits, bool Signed, bool Accumulate>
void dot_integers(Wave& w, const Instruction& in) {
  Lanes buffer[2], summand_buffer, result;
  const u32* s[2];
  for (int k = 0; k < 2; ++k) s[k] = fetch32(w, in, in.op[1 + k], k, buffer[k]);
  const u32* summand = fetch_summand<Accumulate>(w, in, summand_buffer);
  bool clamp = in.flags & kClamp;
  for (int lane = 0; lane < kLanes; ++lane) {
    i64 sum = Signed ? i64{static_cast<int32_t>(summand[lane])} : i64{summand[lane]};
    for (int i = 0; i < 32 / Bits; ++i) {
      sum += element<Bits, Signed>(s[0][lane], i) * element<Bits, Signed>(s[1][lane], i);
    }
    u32 clamped = Signed ? clamp_signed32(sum) : clamp_unsigned32(sum);
    result.lane[lane] = clamp ? clamped : static_cast<u32>(sum);
  }
  write32(w, in, in.op[0], result.lane);
}

// 16-bit elements can be selected, as in the packed instructions.
template <bool Signed, bool Accumulate>
void dot_halves(Wave& w, const Instruction& in) {
  Lanes buffer[2], summand_buffer, result;
  const u32* words[2];
  for (int k = 0; k < 2; ++k) words[k] = fetch32(w, in, in.op[1 + k], k, buffer[k]);
  const u32* summand = fetch_summand<Accumulate>(w, in, summand_buffer);
  Halves<2> low(words, low_select<Accumulate>(in), 0), high(words, high_select<Accumulate>(in), 0);
  bool clamp = in.flags & kClamp;
  for (int lane = 0; lane < kLanes; ++lane) {
    i64 sum = Signed ? i64{static_cast<int32_t>(summand[lane])} : i64{summand[lane]};
    sum += element<16, Signed>(low.s[0][lane], 0) * element<16, Signed>(low.s[1][lane], 0);
    sum += element<16, Signed>(high.s[0][lane], 0) * element<16, Signed>(high.s[1][lane], 0);
    u32 clamped = Signed ? clamp_signed32(sum) : clamp_unsigned32(sum);
    result.lane[lane] = clamp ? clamped : static_cast<u32>(sum);
  }
  write32(w, in, in.op[0], result.lane);
}

// --- mixed precision ---

// Source k as f32: its 32 bits where op_sel_hi has no bit k, else the half that op_sel names. A
// constant is lowered as f32; its half is the f16 of the same value.
void fetch_mixed(Wave& w, const Instruction& in, int k, Lanes& to) {
  Lanes buffer;
  const Operand& o = in.op[1 + k];
  const u32* words = fetch32(w, in, o, k, buffer);
  bool is_half = (in.op_sel_hi >> k & 1) && o.kind != kConstant;
  int shift = in.op_sel >> k & 1 ? 16 : 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    u32 x = words[lane];
    if (is_half) {
      u32 half = x >> shift & 0xffff;
      x = as_bits(half_to_float(w.mode.flush_inputs64 ? flush16(half) : half));
    } else if (w.mode.flush_inputs32) {
      x = flush32(x);
    }
    x = o.flags & kAbs ? x & 0x7fffffff : x;
    to.lane[lane] = o.flags & kNeg ? x ^ 0x80000000 : x;
  }
}

enum class MixResult { kSingle, kLowHalf, kHighHalf };

template <auto F, MixResult R>
void mix(Wave& w, const Instruction& in) {
  Lanes lanes[3], result;
  const u32* s[3] = {lanes[0].lane, lanes[1].lane, lanes[2].lane};
  for (int k = 0; k < 3; ++k) fetch_mixed(w, in, k, lanes[k]);
  arithmetic_f32<3, F>(w.mode, s, result.lane);
  if (R == MixResult::kSingle) {
    finish_f32(w, in, result.lane);
    write32(w, in, in.op[0], result.lane);
    return;
  }
  // The f32 result is rounded to f16 in a second step, as LLVM folds a conversion into it.
  Lanes single = result;
  const u32* from[1] = {single.lane};
  with_rounding(w.mode.round64, from, 1, result.lane, [&] {
    for (int lane = 0; lane < kLanes; ++lane) {
      result.lane[lane] = float_to_half(as_float(from[0][lane]));
    }
  });
  finish_f16(w, in, result.lane);
  uint32_t* to = w.v[vgpr_number(w, in.op[0], kDestination)].lane;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = R == MixResult::kHighHalf ? (to[lane] & 0xffff) | result.lane[lane] << 16
                                                  : (to[lane] & 0xffff0000) | result.lane[lane];
  }
  store_lanes(to, result.lane, w.exec());
}

// --- rows ---

constexpr auto kAdd = [](auto a, auto b) { return a + b; };
constexpr auto kSub = [](u32 a, u32 b) { return a - b; };
constexpr auto kMul = [](auto a, auto b) { return a * b; };
constexpr auto kMulAdd = [](u32 a, u32 b, u32 c) { return a * b + c; };
constexpr auto kFma = [](float a, float b, float c) { return std::fma(a, b, c); };
constexpr auto kAddSigned = [](u32 a, u32 b) { return clamp_signed16(signed16(a) + signed16(b)); };
constexpr auto kSubSigned = [](u32 a, u32 b) { return clamp_signed16(signed16(a) - signed16(b)); };
constexpr auto kAddUnsigned = [](u32 a, u32 b) { return clamp_unsigned16(int32_t(a + b)); };
constexpr auto kSubUnsigned = [](u32 a, u32 b) { return clamp_unsigned16(int32_t(a - b)); };
constexpr auto kMulUnsigned = [](u32 a, u32 b) { return a * b > 0xffff ? 0xffffu : a * b; };
constexpr auto kMulAddSigned = [](u32 a, u32 b, u32 c) {
  i64 sum = i64{signed16(a)} * signed16(b) + signed16(c);
  return static_cast<u32>(sum > INT16_MAX ? INT16_MAX : sum < INT16_MIN ? INT16_MIN : sum);
};
constexpr auto kMulAddUnsigned = [](u32 a, u32 b, u32 c) {
  u64 sum = u64{a} * b + c;
  return sum > 0xffff ? 0xffffu : static_cast<u32>(sum);
};
constexpr auto kMinSigned = [](u32 a, u32 b) { return signed16(a) < signed16(b) ? a : b; };
constexpr auto kMaxSigned = [](u32 a, u32 b) { return signed16(a) >= signed16(b) ? a : b; };
constexpr auto kMinUnsigned = [](u32 a, u32 b) { return a < b ? a : b; };
constexpr auto kMaxUnsigned = [](u32 a, u32 b) { return a >= b ? a : b; };
constexpr auto kShiftLeft = [](u32 a, u32 b) { return b << (a & 15); };
constexpr auto kShiftRight = [](u32 a, u32 b) { return b >> (a & 15); };
constexpr auto kShiftRightSigned = [](u32 a, u32 b) { return u32(signed16(b) >> (a & 15)); };

constexpr NamedHandler kRows[] = {
    {"v_pk_add_f16", packed_halves<2, kArithmetic<2, kAdd>>},
    {"v_pk_mul_f16", packed_halves<2, kArithmetic<2, kMul>>},
    {"v_pk_fma_f16", packed_halves<3, fma_f16>},
    {"v_pk_max_f16", packed_halves<2, kSelect<true>>},
    {"v_pk_min_f16", packed_halves<2, kSelect<false>>},
    {"v_pk_maximum3_f16", packed_halves<3, kSelectPropagating<true>>},
    {"v_pk_minimum3_f16", packed_halves<3, kSelectPropagating<false>>},

    {"v_pk_add_i16", packed_integers<2, kAdd, kAddSigned>},
    {"v_pk_sub_i16", packed_integers<2, kSub, kSubSigned>},
    {"v_pk_add_u16", packed_integers<2, kAdd, kAddUnsigned>},
    {"v_pk_sub_u16", packed_integers<2, kSub, kSubUnsigned>},
    {"v_pk_mul_lo_u16", packed_integers<2, kMul, kMulUnsigned>},
    {"v_pk_mad_i16", packed_integers<3, kMulAdd, kMulAddSigned>},
    {"v_pk_mad_u16", packed_integers<3, kMulAdd, kMulAddUnsigned>},
    {"v_pk_min_i16", packed_integers<2, kMinSigned, kMinSigned>},
    {"v_pk_max_i16", packed_integers<2, kMaxSigned, kMaxSigned>},
    {"v_pk_min_u16", packed_integers<2, kMinUnsigned, kMinUnsigned>},
    {"v_pk_max_u16", packed_integers<2, kMaxUnsigned, kMaxUnsigned>},
    {"v_pk_lshlrev_b16", packed_integers<2, kShiftLeft, kShiftLeft>},
    {"v_pk_lshrrev_b16", packed_integers<2, kShiftRight, kShiftRight>},
    {"v_pk_ashrrev_i16", packed_integers<2, kShiftRightSigned, kShiftRightSigned>},

    {"v_pk_add_f32", packed_floats<2, kAdd>},
    {"v_pk_mul_f32", packed_floats<2, kMul>},
    {"v_pk_fma_f32", packed_floats<3, kFma>},
    {"v_pk_mov_b32", packed_move},

    {"v_dot2_f32_f16", dot_floats<false, half_to_float, Order::kSummandFirst>},
    {"v_dot2_f32_bf16", dot_floats<false, bf16_to_float, Order::kSummandLast>},
    {"v_dot2c_f32_f16", dot_floats<true, half_to_float, Order::kSummandFirst>},
    {"v_dot2c_f32_bf16", dot_floats<true, bf16_to_float, Order::kSummandFirst>},
    {"v_dot2_i32_i16", dot_halves<true, false>},
    {"v_dot2_u32_u16", dot_halves<false, false>},
    {"v_dot2c_i32_i16", dot_halves<true, true>},
    {"v_dot4_i32_i8", dot_integers<8, true, false>},
    {"v_dot4_u32_u8", dot_integers<8, false, false>},
    {"v_dot4c_i32_i8", dot_integers<8, true, true>},
    {"v_dot8_i32_i4", dot_integers<4, true, false>},
    {"v_dot8_u32_u4", dot_integers<4, false, false>},
    {"v_dot8c_i32_i4", dot_integers<4, true, true>},

    {"v_fma_mix_f32", mix<kFma, MixResult::kSingle>},
    {"v_fma_mixlo_f16", mix<kFma, MixResult::kLowHalf>},
    {"v_fma_mixhi_f16", mix<kFma, MixResult::kHighHalf>},
};

}  // namespace

HandlerTable packed_handlers() { return {kRows, sizeof kRows / sizeof kRows[0]}; }

}  // namespace cdna
