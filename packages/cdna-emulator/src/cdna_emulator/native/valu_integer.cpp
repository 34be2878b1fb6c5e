// Vector integer and bit instructions.
//
// Source: AMD CDNA3 and CDNA4 ISA documents, VOP1, VOP2 and VOP3 instructions.
#include <bit>

#include "lanewise.h"

namespace cdna {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;

// --- scalar functions of one lane ---

u32 reverse_bits(u32 x) {
  x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
  x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
  x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
  return __builtin_bswap32(x);
}

u32 leading_zeros(u32 x) { return x ? u32(std::countl_zero(x)) : ~0u; }

u32 leading_same(u32 x) {
  u32 flipped = x ^ u32(i32(x) >> 31);
  return flipped ? u32(std::countl_zero(flipped)) : ~0u;
}

u32 trailing_zeros(u32 x) { return x ? u32(std::countr_zero(x)) : ~0u; }

i32 signed24(u32 x) { return i32(x << 8) >> 8; }
u32 unsigned24(u32 x) { return x & 0xffffff; }

u32 bit_field(u32 x, u32 offset, u32 width) {
  return x >> (offset & 31) & ((1u << (width & 31)) - 1);
}

u32 signed_bit_field(u32 x, u32 offset, u32 width) {
  width &= 31;
  if (width == 0) return 0;
  u32 value = u32(i32(x) >> (offset & 31));
  return u32(i32(value << (32 - width)) >> (32 - width));
}

u32 middle_signed(u32 a, u32 b, u32 c) {
  i32 x = i32(a), y = i32(b), z = i32(c);
  i32 low = x < y ? x : y, high = x < y ? y : x;
  return u32(z < low ? low : z > high ? high : z);
}

u32 middle_unsigned(u32 a, u32 b, u32 c) {
  u32 low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c > high ? high : c;
}

u32 middle_signed16(u32 a, u32 b, u32 c) {
  return middle_signed(u32(signed16(a)), u32(signed16(b)), u32(signed16(c)));
}

// One byte of v_perm_b32: a byte of the pair.
u32 selected_byte(u32 high, u32 low, u32 select) {
  return (select & 4 ? high : low) >> (8 * (select & 3)) & 0xff;
}

// The same with all selectors: from 8 on the sign of every second byte repeated, 12 zeros, the rest
// ones.
u32 selected_pattern(u32 high, u32 low, u32 select) {
  u32 sign = (select & 2 ? high : low) >> (select & 1 ? 31 : 15) & 1;
  u32 pattern = select > 12 ? 0xff : select == 12 ? 0 : 0xff * sign;
  return select < 8 ? selected_byte(high, low, select) : pattern;
}

template <auto F>
u32 permute_bytes(u32 high, u32 low, u32 selects) {
  return F(high, low, selects & 0xff) | F(high, low, selects >> 8 & 0xff) << 8 |
         F(high, low, selects >> 16 & 0xff) << 16 | F(high, low, selects >> 24) << 24;
}

u32 difference(u32 a, u32 b) { return a > b ? a - b : b - a; }

u32 sum_of_byte_differences(u32 a, u32 b) {
  u32 sum = 0;
  for (int byte = 0; byte < 4; ++byte) {
    sum += difference(a >> (8 * byte) & 0xff, b >> (8 * byte) & 0xff);
  }
  return sum;
}

// Bytes whose reference, in the second source, is zero do not count.
u32 masked_sum_of_byte_differences(u32 a, u32 b) {
  u32 sum = 0;
  for (int byte = 0; byte < 4; ++byte) {
    u32 reference = b >> (8 * byte) & 0xff;
    sum += reference ? difference(a >> (8 * byte) & 0xff, reference) : 0;
  }
  return sum;
}

u32 average_bytes(u32 a, u32 b, u32 rounding) {
  u32 result = 0;
  for (int shift = 0; shift < 32; shift += 8) {
    u32 sum = (a >> shift & 0xff) + (b >> shift & 0xff) + (rounding >> shift & 1);
    result |= (sum >> 1) << shift;
  }
  return result;
}

u32 saturate_byte(i32 x, i32 low, i32 high) { return u32(x < low ? low : x > high ? high : x) & 0xff; }

// --- handlers of other shapes ---

// Operand 1 is the mask that receives a carry of each lane; sources follow it.
template <auto F, auto Saturating>
void carry_out(Wave& w, const Instruction& in) {
  Lanes a_buffer, b_buffer, result, carry;
  const u32* a = fetch32(w, in, in.op[2], 0, a_buffer);
  const u32* b = fetch32(w, in, in.op[3], 1, b_buffer);
  // Instructions with a carry-in have it as a fifth operand.
  u64 carry_in = in.op_count > 4 ? scalar64(w, in.op[4]) : 0;
  bool clamp = in.flags & kClamp;
  for (int lane = 0; lane < kLanes; ++lane) {
    u64 sum = F(a[lane], b[lane], u32(carry_in >> lane & 1));
    carry.lane[lane] = u32(sum >> 32) & 1;
    result.lane[lane] = u32(sum);
  }
  if (clamp) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (carry.lane[lane]) result.lane[lane] = Saturating();
    }
  }
  write32(w, in, in.op[0], result.lane);
  write_lane_mask(w, in, in.op[1], gather_bits(carry.lane));
}

constexpr auto kAllOnes = [] { return ~0u; };
constexpr auto kZeros = [] { return 0u; };

// 32 x 32 + 64 bits; the mask gets the carry out of bit 63 of the 65-bit sum.
template <bool Signed>
void multiply_add_wide(Wave& w, const Instruction& in) {
  Lanes a_buffer, b_buffer, carry;
  WideLanes c_buffer, result;
  const u32* a = fetch32(w, in, in.op[2], 0, a_buffer);
  const u32* b = fetch32(w, in, in.op[3], 1, b_buffer);
  const u64* c = fetch64(w, in, in.op[4], 2, c_buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    if constexpr (Signed) {
      i64 product = i64{i32(a[lane])} * i32(b[lane]);
      u64 sum = u64(product) + c[lane];
      // Bit 64 of the sum of two sign-extended numbers: its true sign.
      bool overflow = (~(u64(product) ^ c[lane]) & (u64(product) ^ sum)) >> 63;
      carry.lane[lane] = u32(sum >> 63) ^ u32(overflow);
      result.lane[lane] = sum;
      if ((in.flags & kClamp) && overflow) {
        result.lane[lane] = product < 0 ? u64(INT64_MIN) : u64(INT64_MAX);
      }
    } else {
      u64 product = u64{a[lane]} * b[lane], sum = product + c[lane];
      carry.lane[lane] = sum < product;
      result.lane[lane] = (in.flags & kClamp) && sum < product ? ~0ull : sum;
    }
  }
  write64(w, in, in.op[0], result.lane);
  write_lane_mask(w, in, in.op[1], gather_bits(carry.lane));
}

// 32-bit amount first, then the 64-bit value.
template <auto F>
void shift64(Wave& w, const Instruction& in) {
  Lanes amount_buffer;
  WideLanes value_buffer, result;
  const u32* amount = fetch32(w, in, in.op[1], 0, amount_buffer);
  const u64* value = fetch64(w, in, in.op[2], 1, value_buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = u64(F(value[lane], amount[lane] & 63));
  }
  write64(w, in, in.op[0], result.lane);
}

void shift_add64(Wave& w, const Instruction& in) {
  WideLanes a_buffer, c_buffer, result;
  Lanes b_buffer;
  const u64* a = fetch64(w, in, in.op[1], 0, a_buffer);
  const u32* b = fetch32(w, in, in.op[2], 1, b_buffer);
  const u64* c = fetch64(w, in, in.op[3], 2, c_buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    u32 amount = b[lane] & 7;
    // Counts above 4 are not supported and shift by nothing.
    result.lane[lane] = (a[lane] << (amount > 4 ? 0 : amount)) + c[lane];
  }
  write64(w, in, in.op[0], result.lane);
}

// Counts bits of source 0 that belong to lower lanes; `High` is the half of lanes 32 to 63.
template <bool High>
void count_lower_lanes(Wave& w, const Instruction& in) {
  Lanes a_buffer, b_buffer, result;
  const u32* a = fetch32(w, in, in.op[1], 0, a_buffer);
  const u32* b = fetch32(w, in, in.op[2], 1, b_buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    u64 below = (1ull << lane) - 1;
    result.lane[lane] = b[lane] + u32(std::popcount(a[lane] & u32(High ? below >> 32 : below)));
  }
  write32(w, in, in.op[0], result.lane);
}

// 16-bit factors and a 32-bit summand.
template <bool Signed>
void multiply_add_16_to_32(Wave& w, const Instruction& in) {
  Lanes a_buffer, b_buffer, c_buffer, result;
  const u32* a = fetch16(w, in, in.op[1], 0, a_buffer);
  const u32* b = fetch16(w, in, in.op[2], 1, b_buffer);
  const u32* c = fetch32(w, in, in.op[3], 2, c_buffer);
  bool clamp = in.flags & kClamp;
  for (int lane = 0; lane < kLanes; ++lane) {
    if constexpr (Signed) {
      i64 sum = i64{signed16(a[lane])} * signed16(b[lane]) + i32(c[lane]);
      result.lane[lane] = clamp ? clamp_signed32(sum) : u32(sum);
    } else {
      i64 sum = i64(u64{a[lane]} * b[lane] + c[lane]);
      result.lane[lane] = clamp ? clamp_unsigned32(sum) : u32(sum);
    }
  }
  write32(w, in, in.op[0], result.lane);
}

// v_mad_u16 and v_mad_i16 keep the half of the register that they do not write.
template <auto F, auto Saturating>
void multiply_add16(Wave& w, const Instruction& in) {
  Lanes buffer[3], result;
  const u32* s[3];
  for (int k = 0; k < 3; ++k) s[k] = fetch16(w, in, in.op[1 + k], k, buffer[k]);
  if (in.flags & kClamp) {
    apply_lanes<3, Saturating, u32>(s, result.lane);
  } else {
    apply_lanes<3, F, u32>(s, result.lane);
  }
  for (int lane = 0; lane < kLanes; ++lane) result.lane[lane] &= 0xffff;
  write16(w, in, in.op[0], result.lane, OtherHalf::kKeep);
}

// Selectors of plain bytes are nearly all there are, and quick.
void permute(Wave& w, const Instruction& in) {
  Lanes buffer[3], result;
  const u32* s[3];
  for (int k = 0; k < 3; ++k) s[k] = fetch32(w, in, in.op[1 + k], k, buffer[k]);
  u32 others = 0;
  for (int lane = 0; lane < kLanes; ++lane) others |= s[2][lane] & 0xf8f8f8f8;
  if (others) {
    apply_lanes<3, permute_bytes<selected_pattern>, u32>(s, result.lane);
  } else {
    apply_lanes<3, permute_bytes<selected_byte>, u32>(s, result.lane);
  }
  write32(w, in, in.op[0], result.lane);
}

// Bit i of the result is the bit of the truth table that bits i of the sources number.
u32 truth_table(u32 table, u32 a, u32 b, u32 c) {
  u32 result = 0;
  for (u32 row = 0; row < 8; ++row) {
    u32 minterm = (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    result |= table >> row & 1 ? minterm : 0;
  }
  return result;
}

template <bool Half>
void bit_operation3(Wave& w, const Instruction& in) {
  Lanes buffer[3], result;
  const u32* s[3];
  for (int k = 0; k < 3; ++k) {
    s[k] = Half ? fetch16(w, in, in.op[1 + k], k, buffer[k])
                : fetch32(w, in, in.op[1 + k], k, buffer[k]);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = truth_table(in.bitop3, s[0][lane], s[1][lane], s[2][lane]);
    if (Half) result.lane[lane] &= 0xffff;
  }
  if (Half) {
    write16(w, in, in.op[0], result.lane);
  } else {
    write32(w, in, in.op[0], result.lane);
  }
}

// Two sources shifted by the third, saturated to bytes and packed into 16 bits.
template <int Low, int High>
void shift_pack_bytes(Wave& w, const Instruction& in) {
  Lanes buffer[3], result;
  const u32* s[3];
  for (int k = 0; k < 3; ++k) s[k] = fetch32(w, in, in.op[1 + k], k, buffer[k]);
  for (int lane = 0; lane < kLanes; ++lane) {
    u32 amount = s[2][lane] & 31;
    result.lane[lane] = saturate_byte(i32(s[0][lane]) >> amount, Low, High) |
                        saturate_byte(i32(s[1][lane]) >> amount, Low, High) << 8;
  }
  write16(w, in, in.op[0], result.lane);
}

u32 saturate_pack(u32 x) {
  return saturate_byte(signed16(x), 0, 255) | saturate_byte(i32(x) >> 16, 0, 255) << 8;
}

// --- saturating and plain forms ---

constexpr auto kAdd = [](u32 a, u32 b) { return a + b; };
constexpr auto kSub = [](u32 a, u32 b) { return a - b; };
constexpr auto kSubrev = [](u32 a, u32 b) { return b - a; };
constexpr auto kAddUnsigned32 = [](u32 a, u32 b) { return a + b < a ? ~0u : a + b; };
constexpr auto kSubUnsigned32 = [](u32 a, u32 b) { return a < b ? 0 : a - b; };
constexpr auto kSubrevUnsigned32 = [](u32 a, u32 b) { return b < a ? 0 : b - a; };
constexpr auto kAddSigned32 = [](u32 a, u32 b) { return clamp_signed32(i64{i32(a)} + i32(b)); };
constexpr auto kSubSigned32 = [](u32 a, u32 b) { return clamp_signed32(i64{i32(a)} - i32(b)); };
constexpr auto kAddUnsigned16 = [](u32 a, u32 b) { return clamp_unsigned16(i32(a + b)); };
constexpr auto kSubUnsigned16 = [](u32 a, u32 b) { return clamp_unsigned16(i32(a - b)); };
constexpr auto kSubrevUnsigned16 = [](u32 a, u32 b) { return clamp_unsigned16(i32(b - a)); };
constexpr auto kAddSigned16 = [](u32 a, u32 b) { return clamp_signed16(signed16(a) + signed16(b)); };
constexpr auto kSubSigned16 = [](u32 a, u32 b) { return clamp_signed16(signed16(a) - signed16(b)); };
constexpr auto kMul16 = [](u32 a, u32 b) { return a * b; };
constexpr auto kMulUnsigned16 = [](u32 a, u32 b) { return a * b > 0xffff ? 0xffffu : a * b; };
constexpr auto kMad16 = [](u32 a, u32 b, u32 c) { return a * b + c; };
constexpr auto kMadUnsigned16 = [](u32 a, u32 b, u32 c) {
  u64 sum = u64{a} * b + c;
  return sum > 0xffff ? 0xffffu : u32(sum);
};
constexpr auto kMadSigned16 = [](u32 a, u32 b, u32 c) {
  i64 sum = i64{signed16(a)} * signed16(b) + signed16(c);
  return u32(sum > INT16_MAX ? INT16_MAX : sum < INT16_MIN ? INT16_MIN : sum);
};
constexpr auto kMulSigned24 = [](u32 a, u32 b) { return u32(i64{signed24(a)} * signed24(b)); };
constexpr auto kMulSigned24Clamped = [](u32 a, u32 b) {
  return clamp_signed32(i64{signed24(a)} * signed24(b));
};
constexpr auto kMulUnsigned24 = [](u32 a, u32 b) { return unsigned24(a) * unsigned24(b); };
constexpr auto kMulUnsigned24Clamped = [](u32 a, u32 b) {
  return clamp_unsigned32(i64{unsigned24(a)} * unsigned24(b));
};
constexpr auto kMadSigned24 = [](u32 a, u32 b, u32 c) {
  return u32(i64{signed24(a)} * signed24(b)) + c;
};
constexpr auto kMadSigned24Clamped = [](u32 a, u32 b, u32 c) {
  return clamp_signed32(i64{signed24(a)} * signed24(b) + i32(c));
};
constexpr auto kMadUnsigned24 = [](u32 a, u32 b, u32 c) { return unsigned24(a) * unsigned24(b) + c; };
constexpr auto kMadUnsigned24Clamped = [](u32 a, u32 b, u32 c) {
  u64 sum = u64{unsigned24(a)} * unsigned24(b) + c;
  return sum > UINT32_MAX ? ~0u : u32(sum);
};
constexpr auto kMinSigned = [](u32 a, u32 b) { return i32(a) < i32(b) ? a : b; };
constexpr auto kMaxSigned = [](u32 a, u32 b) { return i32(a) >= i32(b) ? a : b; };
constexpr auto kMinUnsigned = [](u32 a, u32 b) { return a < b ? a : b; };
constexpr auto kMaxUnsigned = [](u32 a, u32 b) { return a >= b ? a : b; };
constexpr auto kMinSigned16 = [](u32 a, u32 b) { return signed16(a) < signed16(b) ? a : b; };
constexpr auto kMaxSigned16 = [](u32 a, u32 b) { return signed16(a) >= signed16(b) ? a : b; };

// The difference of the first two sources plus the third.
template <auto F>
constexpr Handler sum_differences =
    clamped32<3, [](u32 a, u32 b, u32 c) { return F(a, b) + c; },
              [](u32 a, u32 b, u32 c) { return clamp_unsigned32(i64{F(a, b)} + c); }>;

template <auto F>
constexpr auto kOfThree = [](u32 a, u32 b, u32 c) { return F(F(a, b), c); };

constexpr NamedHandler kRows[] = {
    {"v_not_b32", lanewise32<1, [](u32 a) { return ~a; }>},
    {"v_bfrev_b32", lanewise32<1, reverse_bits>},
    {"v_ffbh_u32", lanewise32<1, leading_zeros>},
    {"v_ffbh_i32", lanewise32<1, leading_same>},
    {"v_ffbl_b32", lanewise32<1, trailing_zeros>},
    {"v_sat_pk_u8_i16", lanewise32<1, saturate_pack>},

    {"v_add_u32", clamped32<2, kAdd, kAddUnsigned32>},
    {"v_sub_u32", clamped32<2, kSub, kSubUnsigned32>},
    {"v_subrev_u32", clamped32<2, kSubrev, kSubrevUnsigned32>},
    {"v_add_i32", clamped32<2, kAdd, kAddSigned32>},
    {"v_sub_i32", clamped32<2, kSub, kSubSigned32>},
    {"v_min_i32", lanewise32<2, kMinSigned>},
    {"v_max_i32", lanewise32<2, kMaxSigned>},
    {"v_min_u32", lanewise32<2, kMinUnsigned>},
    {"v_max_u32", lanewise32<2, kMaxUnsigned>},
    {"v_and_b32", lanewise32<2, [](u32 a, u32 b) { return a & b; }>},
    {"v_or_b32", lanewise32<2, [](u32 a, u32 b) { return a | b; }>},
    {"v_xor_b32", lanewise32<2, [](u32 a, u32 b) { return a ^ b; }>},
    {"v_xnor_b32", lanewise32<2, [](u32 a, u32 b) { return ~(a ^ b); }>},
    {"v_lshlrev_b32", lanewise32<2, [](u32 a, u32 b) { return b << (a & 31); }>},
    {"v_lshrrev_b32", lanewise32<2, [](u32 a, u32 b) { return b >> (a & 31); }>},
    {"v_ashrrev_i32", lanewise32<2, [](u32 a, u32 b) { return i32(b) >> (a & 31); }>},
    {"v_bfm_b32",
     lanewise32<2, [](u32 a, u32 b) { return ((1u << (a & 31)) - 1) << (b & 31); }>},
    {"v_mul_lo_u32", lanewise32<2, [](u32 a, u32 b) { return a * b; }>},
    {"v_mul_hi_u32", lanewise32<2, [](u32 a, u32 b) { return u64{a} * b >> 32; }>},
    {"v_mul_hi_i32", lanewise32<2, [](u32 a, u32 b) { return i64{i32(a)} * i32(b) >> 32; }>},
    {"v_mul_i32_i24", clamped32<2, kMulSigned24, kMulSigned24Clamped>},
    {"v_mul_hi_i32_i24",
     lanewise32<2, [](u32 a, u32 b) { return i64{signed24(a)} * signed24(b) >> 32; }>},
    {"v_mul_u32_u24", clamped32<2, kMulUnsigned24, kMulUnsigned24Clamped>},
    {"v_mul_hi_u32_u24",
     lanewise32<2, [](u32 a, u32 b) { return u64{unsigned24(a)} * unsigned24(b) >> 32; }>},
    {"v_bcnt_u32_b32", lanewise32<2, [](u32 a, u32 b) { return u32(std::popcount(a)) + b; }>},
    {"v_mbcnt_lo_u32_b32", count_lower_lanes<false>},
    {"v_mbcnt_hi_u32_b32", count_lower_lanes<true>},

    {"v_add_u16", clamped16<2, kAdd, kAddUnsigned16>},
    {"v_sub_u16", clamped16<2, kSub, kSubUnsigned16>},
    {"v_subrev_u16", clamped16<2, kSubrev, kSubrevUnsigned16>},
    {"v_add_i16", clamped16<2, kAdd, kAddSigned16>},
    {"v_sub_i16", clamped16<2, kSub, kSubSigned16>},
    {"v_min_i16", lanewise16<2, kMinSigned16>},
    {"v_max_i16", lanewise16<2, kMaxSigned16>},
    {"v_min_u16", lanewise16<2, kMinUnsigned>},
    {"v_max_u16", lanewise16<2, kMaxUnsigned>},
    {"v_mul_lo_u16", clamped16<2, kMul16, kMulUnsigned16>},
    {"v_lshlrev_b16", lanewise16<2, [](u32 a, u32 b) { return b << (a & 15); }>},
    {"v_lshrrev_b16", lanewise16<2, [](u32 a, u32 b) { return b >> (a & 15); }>},
    {"v_ashrrev_i16", lanewise16<2, [](u32 a, u32 b) { return signed16(b) >> (a & 15); }>},

    {"v_lshlrev_b64", shift64<[](u64 value, u32 amount) { return value << amount; }>},
    {"v_lshrrev_b64", shift64<[](u64 value, u32 amount) { return value >> amount; }>},
    {"v_ashrrev_i64", shift64<[](u64 value, u32 amount) { return i64(value) >> amount; }>},
    {"v_lshl_add_u64", shift_add64},

    {"v_add_co_u32", carry_out<[](u32 a, u32 b, u32) { return u64{a} + b; }, kAllOnes>},
    {"v_sub_co_u32", carry_out<[](u32 a, u32 b, u32) { return u64{a} - b; }, kZeros>},
    {"v_subrev_co_u32", carry_out<[](u32 a, u32 b, u32) { return u64{b} - a; }, kZeros>},
    {"v_addc_co_u32", carry_out<[](u32 a, u32 b, u32 c) { return u64{a} + b + c; }, kAllOnes>},
    {"v_subb_co_u32", carry_out<[](u32 a, u32 b, u32 c) { return u64{a} - b - c; }, kZeros>},
    {"v_subbrev_co_u32", carry_out<[](u32 a, u32 b, u32 c) { return u64{b} - a - c; }, kZeros>},
    {"v_mad_u64_u32", multiply_add_wide<false>},
    {"v_mad_i64_i32", multiply_add_wide<true>},

    {"v_min3_i32", lanewise32<3, kOfThree<kMinSigned>>},
    {"v_max3_i32", lanewise32<3, kOfThree<kMaxSigned>>},
    {"v_med3_i32", lanewise32<3, middle_signed>},
    {"v_min3_u32", lanewise32<3, kOfThree<kMinUnsigned>>},
    {"v_max3_u32", lanewise32<3, kOfThree<kMaxUnsigned>>},
    {"v_med3_u32", lanewise32<3, middle_unsigned>},
    {"v_min3_i16", lanewise16<3, kOfThree<kMinSigned16>>},
    {"v_max3_i16", lanewise16<3, kOfThree<kMaxSigned16>>},
    {"v_med3_i16", lanewise16<3, middle_signed16>},
    {"v_min3_u16", lanewise16<3, kOfThree<kMinUnsigned>>},
    {"v_max3_u16", lanewise16<3, kOfThree<kMaxUnsigned>>},
    {"v_med3_u16", lanewise16<3, middle_unsigned>},
    {"v_bfe_u32", lanewise32<3, bit_field>},
    {"v_bfe_i32", lanewise32<3, signed_bit_field>},
    {"v_bfi_b32", lanewise32<3, [](u32 a, u32 b, u32 c) { return (a & b) | (~a & c); }>},
    {"v_alignbit_b32",
     lanewise32<3, [](u32 a, u32 b, u32 c) { return (u64{a} << 32 | b) >> (c & 31); }>},
    {"v_alignbyte_b32",
     lanewise32<3, [](u32 a, u32 b, u32 c) { return (u64{a} << 32 | b) >> (8 * (c & 3)); }>},
    {"v_perm_b32", permute},
    {"v_add3_u32", lanewise32<3, [](u32 a, u32 b, u32 c) { return a + b + c; }>},
    {"v_add_lshl_u32", lanewise32<3, [](u32 a, u32 b, u32 c) { return (a + b) << (c & 31); }>},
    {"v_lshl_add_u32", lanewise32<3, [](u32 a, u32 b, u32 c) { return (a << (b & 31)) + c; }>},
    {"v_lshl_or_b32", lanewise32<3, [](u32 a, u32 b, u32 c) { return (a << (b & 31)) | c; }>},
    {"v_and_or_b32", lanewise32<3, [](u32 a, u32 b, u32 c) { return (a & b) | c; }>},
    {"v_or3_b32", lanewise32<3, [](u32 a, u32 b, u32 c) { return a | b | c; }>},
    {"v_xad_u32", lanewise32<3, [](u32 a, u32 b, u32 c) { return (a ^ b) + c; }>},
    {"v_mad_i32_i24", clamped32<3, kMadSigned24, kMadSigned24Clamped>},
    {"v_mad_u32_u24", clamped32<3, kMadUnsigned24, kMadUnsigned24Clamped>},
    {"v_mad_u16", multiply_add16<kMad16, kMadUnsigned16>},
    {"v_mad_i16", multiply_add16<kMad16, kMadSigned16>},
    {"v_mad_legacy_u16", clamped16<3, kMad16, kMadUnsigned16>},
    {"v_mad_u32_u16", multiply_add_16_to_32<false>},
    {"v_mad_i32_i16", multiply_add_16_to_32<true>},
    {"v_sad_u8", sum_differences<sum_of_byte_differences>},
    {"v_sad_hi_u8", sum_differences<[](u32 a, u32 b) { return sum_of_byte_differences(a, b) << 16; }>},
    {"v_sad_u16", sum_differences<[](u32 a, u32 b) {
       return difference(a & 0xffff, b & 0xffff) + difference(a >> 16, b >> 16);
     }>},
    {"v_sad_u32", sum_differences<difference>},
    {"v_msad_u8", sum_differences<masked_sum_of_byte_differences>},
    {"v_lerp_u8", lanewise32<3, average_bytes>},
    {"v_bitop3_b32", bit_operation3<false>},
    {"v_bitop3_b16", bit_operation3<true>},
    {"v_ashr_pk_i8_i32", shift_pack_bytes<-128, 127>},
    {"v_ashr_pk_u8_i32", shift_pack_bytes<0, 255>},
};

}  // namespace

HandlerTable valu_integer_handlers() { return {kRows, sizeof kRows / sizeof kRows[0]}; }

}  // namespace cdna
