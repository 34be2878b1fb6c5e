// Scalar ALU: arithmetic and logic on scalar registers, EXEC and M0, hardware registers, the
// gpr-index mode.
//
// Source: AMD CDNA3 and CDNA4 ISA documents, chapters "Scalar ALU Operations" and "Instructions".
#include <bit>

#include "operands.h"

namespace cdna {
namespace {

void put32(Wave& w, const Instruction& in, uint32_t value) { w.s[in.op[0].index] = value; }
void put64(Wave& w, const Instruction& in, uint64_t value) { w.set_pair(in.op[0].index, value); }

// `F` gets the source and returns the result; handlers named "Scc" set SCC to "result is not 0".
template <auto F>
void unary32(Wave& w, const Instruction& in) {
  put32(w, in, F(scalar32(w, in.op[1])));
}

template <auto F>
void unary32_scc(Wave& w, const Instruction& in) {
  uint32_t result = F(scalar32(w, in.op[1]));
  put32(w, in, result);
  w.scc = result != 0;
}

template <auto F>
void unary64(Wave& w, const Instruction& in) {
  put64(w, in, F(scalar64(w, in.op[1])));
}

template <auto F>
void unary64_scc(Wave& w, const Instruction& in) {
  uint64_t result = F(scalar64(w, in.op[1]));
  put64(w, in, result);
  w.scc = result != 0;
}

// 64-bit source, 32-bit result.
template <auto F>
void unary64_to_32(Wave& w, const Instruction& in) {
  put32(w, in, F(scalar64(w, in.op[1])));
}

template <auto F>
void unary64_to_32_scc(Wave& w, const Instruction& in) {
  uint32_t result = F(scalar64(w, in.op[1]));
  put32(w, in, result);
  w.scc = result != 0;
}

template <auto F>
void binary32(Wave& w, const Instruction& in) {
  put32(w, in, F(scalar32(w, in.op[1]), scalar32(w, in.op[2])));
}

template <auto F>
void binary32_scc(Wave& w, const Instruction& in) {
  uint32_t result = F(scalar32(w, in.op[1]), scalar32(w, in.op[2]));
  put32(w, in, result);
  w.scc = result != 0;
}

// `F` returns the result in the low half and SCC above.
template <auto F>
void binary32_carry(Wave& w, const Instruction& in) {
  uint64_t result = F(scalar32(w, in.op[1]), scalar32(w, in.op[2]), w.scc);
  put32(w, in, static_cast<uint32_t>(result));
  w.scc = result >> 32 & 1;
}

template <auto F>
void binary64_scc(Wave& w, const Instruction& in) {
  uint64_t result = F(scalar64(w, in.op[1]), scalar64(w, in.op[2]));
  put64(w, in, result);
  w.scc = result != 0;
}

// 64-bit value and a 32-bit amount.
template <auto F>
void shift64_scc(Wave& w, const Instruction& in) {
  uint64_t result = F(scalar64(w, in.op[1]), scalar32(w, in.op[2]));
  put64(w, in, result);
  w.scc = result != 0;
}

template <auto F>
void compare32(Wave& w, const Instruction& in) {
  w.scc = F(scalar32(w, in.op[0]), scalar32(w, in.op[1]));
}

template <auto F>
void compare64(Wave& w, const Instruction& in) {
  w.scc = F(scalar64(w, in.op[0]), scalar64(w, in.op[1]));
}

// s_cmpk_*: 16-bit immediates, extended by sign for i32 and by zeros for u32.
template <auto F>
void compare_signed_immediate(Wave& w, const Instruction& in) {
  int32_t value = static_cast<int16_t>(in.op[1].bits);
  w.scc = F(static_cast<int32_t>(scalar32(w, in.op[0])), value);
}

template <auto F>
void compare_unsigned_immediate(Wave& w, const Instruction& in) {
  w.scc = F(scalar32(w, in.op[0]), static_cast<uint32_t>(in.op[1].bits) & 0xffff);
}

uint32_t signed_immediate(const Instruction& in) {
  return static_cast<uint32_t>(static_cast<int16_t>(in.op[1].bits));
}

// --- bit counting and masks ---

uint32_t leading_same(uint64_t x, int bits) {
  uint64_t flipped = x >> (bits - 1) & 1 ? ~x : x;
  if (bits == 32) flipped &= 0xffffffff;
  if (flipped == 0) return ~0u;
  return static_cast<uint32_t>(std::countl_zero(flipped) - (64 - bits));
}

template <class T>
uint32_t leading_zeros(T x) {
  return x ? static_cast<uint32_t>(std::countl_zero(x)) : ~0u;
}

template <class T>
uint32_t trailing_zeros(T x) {
  return x ? static_cast<uint32_t>(std::countr_zero(x)) : ~0u;
}

template <class T>
T reversed(T x) {
  T result = 0;
  for (unsigned bit = 0; bit < 8 * sizeof(T); ++bit) {
    result = static_cast<T>(result << 1 | (x >> bit & 1));
  }
  return result;
}

// Bit k: whether any bit of quad k is set.
template <class T>
T quad_mask(T x) {
  T result = 0;
  for (unsigned quad = 0; quad < 2 * sizeof(T); ++quad) {
    result |= static_cast<T>((x >> 4 * quad & 15) != 0) << quad;
  }
  return result;
}

// Whole quads: all four bits where any of them is set.
template <class T>
T whole_quads(T x) {
  T any = x | x >> 1;
  any = (any | any >> 2) & static_cast<T>(0x1111111111111111);
  return any * 15;
}

uint64_t replicate_bits(uint32_t x) {
  uint64_t result = 0;
  for (int bit = 0; bit < 32; ++bit) {
    result |= static_cast<uint64_t>(x >> bit & 1) * 3 << (2 * bit);
  }
  return result;
}

template <class T>
T field_mask(uint32_t width) {
  return width >= 8 * sizeof(T) ? ~T{0} : static_cast<T>((T{1} << width) - 1);
}

// Offset in the low bits of `control`, width from bit 16.
template <class T>
T extract_unsigned(T x, uint32_t control) {
  uint32_t offset = control & (8 * sizeof(T) - 1), width = control >> 16 & 0x7f;
  return x >> offset & field_mask<T>(width);
}

template <class T, class Signed>
T extract_signed(T x, uint32_t control) {
  uint32_t offset = control & (8 * sizeof(T) - 1), width = control >> 16 & 0x7f;
  if (width == 0) return 0;
  T value = static_cast<T>(static_cast<Signed>(x) >> offset);
  if (width >= 8 * sizeof(T)) return value;
  uint32_t spare = static_cast<uint32_t>(8 * sizeof(T)) - width;
  return static_cast<T>(static_cast<Signed>(value << spare) >> spare);
}

// --- moves, bits ---

template <bool Wide>
void conditional_move(Wave& w, const Instruction& in) {
  if (!w.scc) return;
  if constexpr (Wide) {
    put64(w, in, scalar64(w, in.op[1]));
  } else {
    put32(w, in, scalar32(w, in.op[1]));
  }
}

template <bool Value, bool Wide>
void bit_set(Wave& w, const Instruction& in) {
  uint32_t amount = scalar32(w, in.op[1]);
  if constexpr (Wide) {
    uint64_t bit = 1ull << (amount & 63), old = w.pair(in.op[0].index);
    put64(w, in, Value ? old | bit : old & ~bit);
  } else {
    uint32_t bit = 1u << (amount & 31), old = w.s[in.op[0].index];
    put32(w, in, Value ? old | bit : old & ~bit);
  }
}

void bit_replicate(Wave& w, const Instruction& in) {
  put64(w, in, replicate_bits(scalar32(w, in.op[1])));
}

void field_mask64(Wave& w, const Instruction& in) {
  uint32_t width = scalar32(w, in.op[1]) & 63, offset = scalar32(w, in.op[2]) & 63;
  put64(w, in, field_mask<uint64_t>(width) << offset);
}

template <bool Wide>
void conditional_select(Wave& w, const Instruction& in) {
  const Operand& from = w.scc ? in.op[1] : in.op[2];
  if constexpr (Wide) {
    put64(w, in, scalar64(w, from));
  } else {
    put32(w, in, scalar32(w, from));
  }
}

// M0 moves the register number of the source (s_movrels) or destination (s_movreld).
template <bool Source, bool Wide>
void relative_move(Wave& w, const Instruction& in) {
  const int width = Wide ? 2 : 1;
  uint64_t number = in.op[Source ? 1 : 0].index + static_cast<uint64_t>(w.s[kM0]);
  if (number + width > kFlatScratch) {
    report(w, FindingKind::kUnsupported, -1, number);
    return;
  }
  int to = Source ? in.op[0].index : static_cast<int>(number);
  if constexpr (Wide) {
    w.set_pair(to, Source ? w.pair(static_cast<int>(number)) : scalar64(w, in.op[1]));
  } else {
    w.s[to] = Source ? w.s[number] : scalar32(w, in.op[1]);
  }
}

// --- EXEC ---

// `F` gets the source and EXEC.
template <auto F>
void save_exec(Wave& w, const Instruction& in) {
  uint64_t source = scalar64(w, in.op[1]), old = w.exec(), result = F(source, old);
  put64(w, in, old);
  w.set_pair(kExec, result);
  w.scc = result != 0;
}

// The new EXEC goes to the destination too.
template <auto F>
void write_exec(Wave& w, const Instruction& in) {
  uint64_t result = F(scalar64(w, in.op[1]), w.exec());
  put64(w, in, result);
  w.set_pair(kExec, result);
  w.scc = result != 0;
}

// --- immediates ---

void move_immediate(Wave& w, const Instruction& in) { put32(w, in, signed_immediate(in)); }

void conditional_move_immediate(Wave& w, const Instruction& in) {
  if (w.scc) put32(w, in, signed_immediate(in));
}

bool add_overflows(uint32_t a, uint32_t b, uint32_t sum) { return (~(a ^ b) & (a ^ sum)) >> 31; }
bool sub_overflows(uint32_t a, uint32_t b, uint32_t diff) { return ((a ^ b) & (a ^ diff)) >> 31; }

void add_immediate(Wave& w, const Instruction& in) {
  uint32_t a = w.s[in.op[0].index], b = signed_immediate(in), sum = a + b;
  put32(w, in, sum);
  w.scc = add_overflows(a, b, sum);
}

void multiply_immediate(Wave& w, const Instruction& in) {
  put32(w, in, w.s[in.op[0].index] * signed_immediate(in));
}

// --- hardware registers ---

enum HardwareRegister : uint32_t {
  kModeRegister = 1, kStatus = 2, kTrapStatus = 3, kHardwareId = 4, kXccId = 20
};

// Bits of MODE that this core acts on: rounding, denormals, DX10_CLAMP, IEEE, FP16_OVFL,
// GPR_IDX_EN. The others enable traps and debugging.
constexpr uint32_t kModeledModeBits = 0x3ff | 1u << 23 | 1u << 27;

uint32_t read_hardware_register(Wave& w, uint32_t id) {
  switch (id) {
    case kModeRegister: return mode_bits(w.mode);
    case kStatus: return w.scc | (w.exec() == 0) << 9 | (w.vcc() == 0) << 10;
    case kTrapStatus: return 0;
    case kHardwareId: return w.id;  // every workgroup seems to run on compute unit 0 of shader 0
    case kXccId: return 0;
  }
  report(w, FindingKind::kUnsupported, -1, id);
  return 0;
}

void get_register(Wave& w, const Instruction& in) {
  uint32_t id = in.immediate & 63, offset = in.immediate >> 6 & 31;
  uint32_t width = (in.immediate >> 11 & 31) + 1;
  put32(w, in, read_hardware_register(w, id) >> offset & field_mask<uint32_t>(width));
}

void set_register_field(Wave& w, uint32_t which, uint32_t value) {
  uint32_t id = which & 63, offset = which >> 6 & 31;
  uint32_t field = field_mask<uint32_t>((which >> 11 & 31) + 1) << offset;
  value = value << offset & field;
  if (id == kTrapStatus) return;  // exceptions do not trap here, so there is nothing to clear
  if (id != kModeRegister || (value & ~kModeledModeBits)) {
    report(w, FindingKind::kUnsupported, -1, id, value);
    return;
  }
  set_mode_bits(w.mode, (mode_bits(w.mode) & ~field) | value);
}

void set_register(Wave& w, const Instruction& in) {
  set_register_field(w, in.immediate, scalar32(w, in.op[1]));
}

void set_register_immediate(Wave& w, const Instruction& in) {
  set_register_field(w, in.immediate, static_cast<uint32_t>(in.op[1].bits));
}

// --- gpr-index mode: M0[7:0] the index, M0[15:12] which operands it moves ---

void set_index(Wave& w, uint32_t index) { w.s[kM0] = (w.s[kM0] & ~0xffu) | (index & 0xff); }

void set_index_operands(Wave& w, uint32_t mask) {
  w.s[kM0] = (w.s[kM0] & ~0xf000u) | (mask & 15) << 12;
}

void gpr_index_on(Wave& w, const Instruction& in) {
  set_index(w, scalar32(w, in.op[0]));
  set_index_operands(w, in.immediate);
  w.mode.gpr_idx = true;
}

void gpr_index_index(Wave& w, const Instruction& in) { set_index(w, scalar32(w, in.op[0])); }

void gpr_index_mode(Wave& w, const Instruction& in) { set_index_operands(w, in.immediate); }

void gpr_index_off(Wave& w, const Instruction&) { w.mode.gpr_idx = false; }

void get_pc(Wave& w, const Instruction& in) { put64(w, in, code_address(w) + 4); }

// --- arithmetic whose SCC is a carry, an overflow or a choice ---

using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;

u64 with_scc(u32 result, bool scc) { return result | u64{scc} << 32; }

u64 absolute_difference(u32 a, u32 b) {
  u32 difference = a - b;
  return difference >> 31 ? 0u - difference : difference;
}

constexpr NamedHandler kRows[] = {
    {"s_mov_b32", unary32<[](u32 a) { return a; }>},
    {"s_mov_b64", unary64<[](u64 a) { return a; }>},
    {"s_brev_b32", unary32<reversed<u32>>},
    {"s_brev_b64", unary64<reversed<u64>>},
    {"s_cmov_b32", conditional_move<false>},
    {"s_cmov_b64", conditional_move<true>},
    {"s_not_b32", unary32_scc<[](u32 a) { return ~a; }>},
    {"s_not_b64", unary64_scc<[](u64 a) { return ~a; }>},
    {"s_quadmask_b32", unary32_scc<quad_mask<u32>>},
    {"s_quadmask_b64", unary64_scc<quad_mask<u64>>},
    {"s_wqm_b32", unary32_scc<whole_quads<u32>>},
    {"s_wqm_b64", unary64_scc<whole_quads<u64>>},
    {"s_abs_i32", unary32_scc<[](u32 a) { return a >> 31 ? 0u - a : a; }>},
    {"s_bcnt0_i32_b32", unary32_scc<[](u32 a) { return u32(32 - std::popcount(a)); }>},
    {"s_bcnt1_i32_b32", unary32_scc<[](u32 a) { return u32(std::popcount(a)); }>},
    {"s_bcnt0_i32_b64", unary64_to_32_scc<[](u64 a) { return u32(64 - std::popcount(a)); }>},
    {"s_bcnt1_i32_b64", unary64_to_32_scc<[](u64 a) { return u32(std::popcount(a)); }>},
    {"s_ff0_i32_b32", unary32<[](u32 a) { return trailing_zeros(~a); }>},
    {"s_ff1_i32_b32", unary32<trailing_zeros<u32>>},
    {"s_ff0_i32_b64", unary64_to_32<[](u64 a) { return trailing_zeros(~a); }>},
    {"s_ff1_i32_b64", unary64_to_32<trailing_zeros<u64>>},
    {"s_flbit_i32_b32", unary32<leading_zeros<u32>>},
    {"s_flbit_i32_b64", unary64_to_32<leading_zeros<u64>>},
    {"s_flbit_i32", unary32<[](u32 a) { return leading_same(a, 32); }>},
    {"s_flbit_i32_i64", unary64_to_32<[](u64 a) { return leading_same(a, 64); }>},
    {"s_sext_i32_i8", unary32<[](u32 a) { return u32(static_cast<int8_t>(a)); }>},
    {"s_sext_i32_i16", unary32<[](u32 a) { return u32(static_cast<int16_t>(a)); }>},
    {"s_bitset0_b32", bit_set<false, false>},
    {"s_bitset1_b32", bit_set<true, false>},
    {"s_bitset0_b64", bit_set<false, true>},
    {"s_bitset1_b64", bit_set<true, true>},
    {"s_bitreplicate_b64_b32", bit_replicate},
    {"s_and_saveexec_b64", save_exec<[](u64 s, u64 e) { return s & e; }>},
    {"s_or_saveexec_b64", save_exec<[](u64 s, u64 e) { return s | e; }>},
    {"s_xor_saveexec_b64", save_exec<[](u64 s, u64 e) { return s ^ e; }>},
    {"s_andn1_saveexec_b64", save_exec<[](u64 s, u64 e) { return ~s & e; }>},
    {"s_andn2_saveexec_b64", save_exec<[](u64 s, u64 e) { return s & ~e; }>},
    {"s_orn1_saveexec_b64", save_exec<[](u64 s, u64 e) { return ~s | e; }>},
    {"s_orn2_saveexec_b64", save_exec<[](u64 s, u64 e) { return s | ~e; }>},
    {"s_nand_saveexec_b64", save_exec<[](u64 s, u64 e) { return ~(s & e); }>},
    {"s_nor_saveexec_b64", save_exec<[](u64 s, u64 e) { return ~(s | e); }>},
    {"s_xnor_saveexec_b64", save_exec<[](u64 s, u64 e) { return ~(s ^ e); }>},
    {"s_andn1_wrexec_b64", write_exec<[](u64 s, u64 e) { return ~s & e; }>},
    {"s_andn2_wrexec_b64", write_exec<[](u64 s, u64 e) { return s & ~e; }>},
    {"s_movrels_b32", relative_move<true, false>},
    {"s_movrels_b64", relative_move<true, true>},
    {"s_movreld_b32", relative_move<false, false>},
    {"s_movreld_b64", relative_move<false, true>},

    {"s_add_u32", binary32_carry<[](u32 a, u32 b, bool) { return u64{a} + b; }>},
    {"s_sub_u32", binary32_carry<[](u32 a, u32 b, bool) { return with_scc(a - b, b > a); }>},
    {"s_addc_u32", binary32_carry<[](u32 a, u32 b, bool c) { return u64{a} + b + c; }>},
    {"s_subb_u32", binary32_carry<[](u32 a, u32 b, bool c) {
       return with_scc(a - b - c, u64{b} + c > a);
     }>},
    {"s_add_i32", binary32_carry<[](u32 a, u32 b, bool) {
       return with_scc(a + b, add_overflows(a, b, a + b));
     }>},
    {"s_sub_i32", binary32_carry<[](u32 a, u32 b, bool) {
       return with_scc(a - b, sub_overflows(a, b, a - b));
     }>},
    {"s_min_i32", binary32_carry<[](u32 a, u32 b, bool) {
       return i32(a) < i32(b) ? with_scc(a, true) : with_scc(b, false);
     }>},
    {"s_min_u32", binary32_carry<[](u32 a, u32 b, bool) {
       return a < b ? with_scc(a, true) : with_scc(b, false);
     }>},
    {"s_max_i32", binary32_carry<[](u32 a, u32 b, bool) {
       return i32(a) >= i32(b) ? with_scc(a, true) : with_scc(b, false);
     }>},
    {"s_max_u32", binary32_carry<[](u32 a, u32 b, bool) {
       return a >= b ? with_scc(a, true) : with_scc(b, false);
     }>},
    {"s_absdiff_i32", binary32_scc<[](u32 a, u32 b) { return u32(absolute_difference(a, b)); }>},
    {"s_and_b32", binary32_scc<[](u32 a, u32 b) { return a & b; }>},
    {"s_or_b32", binary32_scc<[](u32 a, u32 b) { return a | b; }>},
    {"s_xor_b32", binary32_scc<[](u32 a, u32 b) { return a ^ b; }>},
    {"s_andn2_b32", binary32_scc<[](u32 a, u32 b) { return a & ~b; }>},
    {"s_orn2_b32", binary32_scc<[](u32 a, u32 b) { return a | ~b; }>},
    {"s_nand_b32", binary32_scc<[](u32 a, u32 b) { return ~(a & b); }>},
    {"s_nor_b32", binary32_scc<[](u32 a, u32 b) { return ~(a | b); }>},
    {"s_xnor_b32", binary32_scc<[](u32 a, u32 b) { return ~(a ^ b); }>},
    {"s_and_b64", binary64_scc<[](u64 a, u64 b) { return a & b; }>},
    {"s_or_b64", binary64_scc<[](u64 a, u64 b) { return a | b; }>},
    {"s_xor_b64", binary64_scc<[](u64 a, u64 b) { return a ^ b; }>},
    {"s_andn2_b64", binary64_scc<[](u64 a, u64 b) { return a & ~b; }>},
    {"s_orn2_b64", binary64_scc<[](u64 a, u64 b) { return a | ~b; }>},
    {"s_nand_b64", binary64_scc<[](u64 a, u64 b) { return ~(a & b); }>},
    {"s_nor_b64", binary64_scc<[](u64 a, u64 b) { return ~(a | b); }>},
    {"s_xnor_b64", binary64_scc<[](u64 a, u64 b) { return ~(a ^ b); }>},
    {"s_lshl_b32", binary32_scc<[](u32 a, u32 b) { return a << (b & 31); }>},
    {"s_lshr_b32", binary32_scc<[](u32 a, u32 b) { return a >> (b & 31); }>},
    {"s_ashr_i32", binary32_scc<[](u32 a, u32 b) { return u32(i32(a) >> (b & 31)); }>},
    {"s_lshl_b64", shift64_scc<[](u64 a, u32 b) { return a << (b & 63); }>},
    {"s_lshr_b64", shift64_scc<[](u64 a, u32 b) { return a >> (b & 63); }>},
    {"s_ashr_i64", shift64_scc<[](u64 a, u32 b) { return u64(i64(a) >> (b & 63)); }>},
    {"s_bfe_u32", binary32_scc<extract_unsigned<u32>>},
    {"s_bfe_i32", binary32_scc<extract_signed<u32, i32>>},
    {"s_bfe_u64", shift64_scc<extract_unsigned<u64>>},
    {"s_bfe_i64", shift64_scc<extract_signed<u64, i64>>},
    {"s_lshl1_add_u32", binary32_carry<[](u32 a, u32 b, bool) {
       u64 sum = (u64{a} << 1) + b;
       return with_scc(u32(sum), sum >> 32 != 0);
     }>},
    {"s_lshl2_add_u32", binary32_carry<[](u32 a, u32 b, bool) {
       u64 sum = (u64{a} << 2) + b;
       return with_scc(u32(sum), sum >> 32 != 0);
     }>},
    {"s_lshl3_add_u32", binary32_carry<[](u32 a, u32 b, bool) {
       u64 sum = (u64{a} << 3) + b;
       return with_scc(u32(sum), sum >> 32 != 0);
     }>},
    {"s_lshl4_add_u32", binary32_carry<[](u32 a, u32 b, bool) {
       u64 sum = (u64{a} << 4) + b;
       return with_scc(u32(sum), sum >> 32 != 0);
     }>},
    {"s_cselect_b32", conditional_select<false>},
    {"s_cselect_b64", conditional_select<true>},
    {"s_mul_i32", binary32<[](u32 a, u32 b) { return a * b; }>},
    {"s_mul_hi_u32", binary32<[](u32 a, u32 b) { return u32(u64{a} * b >> 32); }>},
    {"s_mul_hi_i32", binary32<[](u32 a, u32 b) { return u32(i64{i32(a)} * i32(b) >> 32); }>},
    {"s_bfm_b32",
     binary32<[](u32 a, u32 b) { return field_mask<u32>(a & 31) << (b & 31); }>},
    {"s_bfm_b64", field_mask64},
    {"s_pack_ll_b32_b16", binary32<[](u32 a, u32 b) { return (a & 0xffff) | b << 16; }>},
    {"s_pack_lh_b32_b16", binary32<[](u32 a, u32 b) { return (a & 0xffff) | (b & 0xffff0000); }>},
    {"s_pack_hh_b32_b16", binary32<[](u32 a, u32 b) { return a >> 16 | (b & 0xffff0000); }>},

    {"s_movk_i32", move_immediate},
    {"s_cmovk_i32", conditional_move_immediate},
    {"s_addk_i32", add_immediate},
    {"s_mulk_i32", multiply_immediate},
    {"s_cmpk_eq_i32", compare_signed_immediate<[](i32 a, i32 b) { return a == b; }>},
    {"s_cmpk_lg_i32", compare_signed_immediate<[](i32 a, i32 b) { return a != b; }>},
    {"s_cmpk_gt_i32", compare_signed_immediate<[](i32 a, i32 b) { return a > b; }>},
    {"s_cmpk_ge_i32", compare_signed_immediate<[](i32 a, i32 b) { return a >= b; }>},
    {"s_cmpk_lt_i32", compare_signed_immediate<[](i32 a, i32 b) { return a < b; }>},
    {"s_cmpk_le_i32", compare_signed_immediate<[](i32 a, i32 b) { return a <= b; }>},
    {"s_cmpk_eq_u32", compare_unsigned_immediate<[](u32 a, u32 b) { return a == b; }>},
    {"s_cmpk_lg_u32", compare_unsigned_immediate<[](u32 a, u32 b) { return a != b; }>},
    {"s_cmpk_gt_u32", compare_unsigned_immediate<[](u32 a, u32 b) { return a > b; }>},
    {"s_cmpk_ge_u32", compare_unsigned_immediate<[](u32 a, u32 b) { return a >= b; }>},
    {"s_cmpk_lt_u32", compare_unsigned_immediate<[](u32 a, u32 b) { return a < b; }>},
    {"s_cmpk_le_u32", compare_unsigned_immediate<[](u32 a, u32 b) { return a <= b; }>},

    {"s_cmp_eq_i32", compare32<[](u32 a, u32 b) { return a == b; }>},
    {"s_cmp_lg_i32", compare32<[](u32 a, u32 b) { return a != b; }>},
    {"s_cmp_gt_i32", compare32<[](u32 a, u32 b) { return i32(a) > i32(b); }>},
    {"s_cmp_ge_i32", compare32<[](u32 a, u32 b) { return i32(a) >= i32(b); }>},
    {"s_cmp_lt_i32", compare32<[](u32 a, u32 b) { return i32(a) < i32(b); }>},
    {"s_cmp_le_i32", compare32<[](u32 a, u32 b) { return i32(a) <= i32(b); }>},
    {"s_cmp_eq_u32", compare32<[](u32 a, u32 b) { return a == b; }>},
    {"s_cmp_lg_u32", compare32<[](u32 a, u32 b) { return a != b; }>},
    {"s_cmp_gt_u32", compare32<[](u32 a, u32 b) { return a > b; }>},
    {"s_cmp_ge_u32", compare32<[](u32 a, u32 b) { return a >= b; }>},
    {"s_cmp_lt_u32", compare32<[](u32 a, u32 b) { return a < b; }>},
    {"s_cmp_le_u32", compare32<[](u32 a, u32 b) { return a <= b; }>},
    {"s_bitcmp0_b32", compare32<[](u32 a, u32 b) { return !(a >> (b & 31) & 1); }>},
    {"s_bitcmp1_b32", compare32<[](u32 a, u32 b) { return bool(a >> (b & 31) & 1); }>},
    {"s_bitcmp0_b64", compare64<[](u64 a, u64 b) { return !(a >> (b & 63) & 1); }>},
    {"s_bitcmp1_b64", compare64<[](u64 a, u64 b) { return bool(a >> (b & 63) & 1); }>},
    {"s_cmp_eq_u64", compare64<[](u64 a, u64 b) { return a == b; }>},
    {"s_cmp_lg_u64", compare64<[](u64 a, u64 b) { return a != b; }>},

    {"s_getreg_b32", get_register},
    {"s_setreg_b32", set_register},
    {"s_setreg_imm32_b32", set_register_immediate},
    {"s_set_gpr_idx_on", gpr_index_on},
    {"s_set_gpr_idx_idx", gpr_index_index},
    {"s_set_gpr_idx_mode", gpr_index_mode},
    {"s_set_gpr_idx_off", gpr_index_off},
    {"s_getpc_b64", get_pc},
};

}  // namespace

HandlerTable salu_handlers() { return {kRows, sizeof kRows / sizeof kRows[0]}; }

}  // namespace cdna
