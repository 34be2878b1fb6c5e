// ds_*: reads, writes, atomics, transposing reads and lane permutations.
//
// Unaligned access is on, as amdhsa sets it up: accesses of 8 bytes and more need dword alignment
// here, narrower ones their own; anything else is reported as misaligned.
//
// Bank conflicts are an estimate. LDS has 32 banks of 4 bytes on gfx942 and 64 on gfx950. A wave
// is served in phases of consecutive lanes, as many as fill all banks once and at most 32; a phase
// takes as many cycles as the busiest bank has different dwords. Hardware picks the lanes of a phase
// in other orders for some widths.
#include <algorithm>

#include "memory.h"

namespace cdna {

namespace {

constexpr uint32_t kPhaseLanes = 32;

struct Addresses {
  uint32_t lane[kLanes];
};

Addresses addresses(const Wave& w, const Operand& o, uint32_t offset) {
  Addresses a;
  for (int lane = 0; lane < kLanes; ++lane) a.lane[lane] = w.v[o.index].lane[lane] + offset;
  return a;
}

// ds_read_addtid and ds_write_addtid: no address register.
Addresses lane_addresses(const Wave& w, const Instruction& in) {
  Addresses a;
  uint32_t base = (w.s[kM0] & 0xffff) + static_cast<uint32_t>(in.offset);
  for (uint32_t lane = 0; lane < kLanes; ++lane) a.lane[lane] = base + 4 * lane;
  return a;
}

// Cycles of the lanes first..last-1 of one phase.
uint64_t phase_cycles(const Addresses& a, uint64_t exec, uint32_t first, uint32_t last,
                      uint32_t dwords, uint32_t banks) {
  uint32_t seen[64][kPhaseLanes];
  uint8_t counts[64] = {};
  uint8_t most = 0;
  for (uint32_t lane = first; lane < last; ++lane) {
    if (!(exec >> lane & 1)) continue;
    for (uint32_t i = 0; i < dwords; ++i) {
      uint32_t dword = a.lane[lane] / 4 + i, bank = dword % banks;
      uint32_t* found = std::find(seen[bank], seen[bank] + counts[bank], dword);
      if (found == seen[bank] + counts[bank]) {
        *found = dword;
        most = std::max(most, ++counts[bank]);
      }
    }
  }
  return most;
}

void count_cycles(Wave& w, const Addresses& a, uint32_t bytes) {
  uint64_t exec = w.exec();
  uint32_t banks = w.arch == 942 ? 32 : 64, dwords = (bytes + 3) / 4;
  uint32_t lanes = std::min(kPhaseLanes, banks / std::bit_ceil(dwords));
  // Lanes side by side fill every bank once.
  uint32_t different = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    different |= a.lane[lane] ^ (a.lane[0] + lane * bytes);
  }
  if (different == 0 && exec == ~0ull && a.lane[0] % 4 == 0) {
    count_bank_cycles(w, kLanes / lanes);
    return;
  }
  uint64_t cycles = 0;
  for (uint32_t first = 0; first < kLanes; first += lanes) {
    uint32_t last = std::min<uint32_t>(first + lanes, kLanes);
    cycles += phase_cycles(a, exec, first, last, dwords, banks);
  }
  count_bank_cycles(w, cycles);
}

// Reports misaligned addresses; true when all active lanes are also in bounds.
bool check(Wave& w, const Addresses& a, uint32_t bytes, uint32_t alignment) {
  uint64_t exec = w.exec();
  uint32_t low_bits = 0, highest = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t address = exec >> lane & 1 ? a.lane[lane] : 0;
    low_bits |= address;
    highest = std::max(highest, address);
  }
  if (low_bits % alignment) {
    for_each_lane(exec, [&](int lane) { is_aligned(w, lane, a.lane[lane], alignment); });
  }
  return w.group->lds_bytes >= bytes && highest <= w.group->lds_bytes - bytes;
}

template <int kBytes, bool kSigned, Half kHalf>
void read_at(Wave& w, int reg, const Addresses& a) {
  constexpr uint32_t kAlignment = kBytes < 4 ? kBytes : 4;
  bool is_plain = check(w, a, kBytes, kAlignment) && !w.machine->is_tracked;
  if (w.machine->is_tracked) w.shadow->load_register = reg;
  const uint8_t* lds = w.group->lds;
  for_each_lane(w.exec(), [&](int lane) {
    uint8_t value[kBytes] = {};
    if (is_plain) {
      put<kBytes, kSigned, kHalf>(w, reg, lane, lds + a.lane[lane]);
      return;
    }
    bool is_loaded = lds_load(w, lane, a.lane[lane], kBytes, value);
    put<kBytes, kSigned, kHalf>(w, reg, lane, is_loaded ? value : nullptr);
  });
  count_bytes(w, active_bytes(w, kBytes));
  count_cycles(w, a, kBytes);
}

template <int kBytes, Half kHalf>
void write_at(Wave& w, int reg, const Addresses& a) {
  constexpr uint32_t kAlignment = kBytes < 4 ? kBytes : 4;
  bool is_plain = check(w, a, kBytes, kAlignment) && !w.machine->is_tracked;
  uint8_t* lds = w.group->lds;
  for_each_lane(w.exec(), [&](int lane) {
    uint8_t value[kBytes];
    take<kBytes, kHalf>(w, reg, lane, value);
    if (is_plain) {
      std::memcpy(lds + a.lane[lane], value, kBytes);
    } else {
      lds_store(w, lane, a.lane[lane], kBytes, value);
    }
  });
  count_bytes(w, active_bytes(w, kBytes));
  count_cycles(w, a, kBytes);
}

template <int kBytes, bool kSigned = false, Half kHalf = Half::kWhole>
void read(Wave& w, const Instruction& in) {
  read_at<kBytes, kSigned, kHalf>(w, in.op[0].index,
                                  addresses(w, in.op[1], static_cast<uint32_t>(in.offset)));
}

template <int kBytes, Half kHalf = Half::kWhole>
void write(Wave& w, const Instruction& in) {
  write_at<kBytes, kHalf>(w, in.op[1].index,
                          addresses(w, in.op[0], static_cast<uint32_t>(in.offset)));
}

// Two offsets, in units of the value, or of 64 values.
template <int kBytes, int kUnits>
void read2(Wave& w, const Instruction& in) {
  constexpr int kScale = kBytes * kUnits;
  Addresses first = addresses(w, in.op[1], static_cast<uint32_t>(in.offset * kScale));
  Addresses second = addresses(w, in.op[1], static_cast<uint32_t>(in.offset1 * kScale));
  read_at<kBytes, false, Half::kWhole>(w, in.op[0].index, first);
  read_at<kBytes, false, Half::kWhole>(w, in.op[0].index + kBytes / 4, second);
}

template <int kBytes, int kUnits>
void write2(Wave& w, const Instruction& in) {
  constexpr int kScale = kBytes * kUnits;
  Addresses first = addresses(w, in.op[0], static_cast<uint32_t>(in.offset * kScale));
  Addresses second = addresses(w, in.op[0], static_cast<uint32_t>(in.offset1 * kScale));
  write_at<kBytes, Half::kWhole>(w, in.op[1].index, first);
  write_at<kBytes, Half::kWhole>(w, in.op[2].index, second);
}

void read_addtid(Wave& w, const Instruction& in) {
  read_at<4, false, Half::kWhole>(w, in.op[0].index, lane_addresses(w, in));
}

void write_addtid(Wave& w, const Instruction& in) {
  write_at<4, Half::kWhole>(w, in.op[0].index, lane_addresses(w, in));
}

// --- transposing reads ---

uint32_t element(const uint8_t* bytes, int bits, int index) {
  int at = bits * index;
  uint32_t word = bytes[at / 8];
  if (at % 8 + bits > 8) word |= static_cast<uint32_t>(bytes[at / 8 + 1]) << 8;
  return word >> (at % 8) & ((1u << bits) - 1);
}

// Sixteen lanes read a matrix whose rows are 16 elements long: with n elements to a lane, the row
// r lies in lanes r * 16 / n and up. Lane c receives column c, its rows in order: "MFMA Transpose
// Load from LDS" in the CDNA4 document, and what Triton's layouts for gfx950 rely on.
template <int kBits, int kBytes>
void read_transposed(Wave& w, const Instruction& in) {
  constexpr int kElements = kBytes * 8 / kBits, kLanesOfRow = 16 / kElements;
  // The hardware demands it; what it does otherwise is not known.
  if (w.exec() != ~0ull) {
    report(w, FindingKind::kUnsupported, -1, w.exec());
    return;
  }
  Addresses a = addresses(w, in.op[1], static_cast<uint32_t>(in.offset));
  check(w, a, kBytes, kBytes == 12 ? 16 : kBytes);
  uint8_t rows[kLanes][kBytes + 1] = {};
  for (int lane = 0; lane < kLanes; ++lane) lds_load(w, lane, a.lane[lane], kBytes, rows[lane]);
  for (int lane = 0; lane < kLanes; ++lane) {
    int group = lane & ~15, column = lane & 15;
    uint8_t value[kBytes + 4] = {};
    for (int row = 0; row < kElements; ++row) {
      const uint8_t* from = rows[group + row * kLanesOfRow + column / kElements];
      uint32_t bits = element(from, kBits, column % kElements);
      int at = kBits * row;
      uint32_t word;
      std::memcpy(&word, value + at / 8, 4);
      word |= bits << (at % 8);
      std::memcpy(value + at / 8, &word, 4);
    }
    put<kBytes, false, Half::kWhole>(w, in.op[0].index, lane, value);
  }
  count_bytes(w, active_bytes(w, kBytes));
  count_cycles(w, a, kBytes);
}

// --- permutations: LDS hardware, no LDS memory ---

// Cycles of a permutation, which moves a dword for each lane through the banks.
void count_permutation(Wave& w) { count_bank_cycles(w, kLanes / kPhaseLanes); }

// Active lanes send; where several send to one lane, the last wins.
void permute(Wave& w, const Instruction& in) {
  uint64_t exec = w.exec();
  uint32_t received[kLanes] = {};
  const uint32_t* address = w.v[in.op[1].index].lane;
  const uint32_t* data = w.v[in.op[2].index].lane;
  for_each_lane(exec, [&](int lane) {
    received[(address[lane] + static_cast<uint32_t>(in.offset)) / 4 % kLanes] = data[lane];
  });
  uint32_t* to = w.v[in.op[0].index].lane;
  for_each_lane(exec, [&](int lane) { to[lane] = received[lane]; });
  count_permutation(w);
}

// Lanes fetch; an inactive source gives 0.
template <class Source>
void fetch_from(Wave& w, int to_reg, int data_reg, Source source) {
  uint64_t exec = w.exec();
  uint32_t data[kLanes], sources[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    data[lane] = exec >> lane & 1 ? w.v[data_reg].lane[lane] : 0;
    sources[lane] = source(lane);
  }
  uint32_t* to = w.v[to_reg].lane;
  for_each_lane(exec, [&](int lane) { to[lane] = data[sources[lane]]; });
  count_permutation(w);
}

void bpermute(Wave& w, const Instruction& in) {
  const uint32_t* address = w.v[in.op[1].index].lane;
  fetch_from(w, in.op[0].index, in.op[2].index, [&](int lane) {
    return (address[lane] + static_cast<uint32_t>(in.offset)) / 4 % kLanes;
  });
}

// Pattern in the offset: bit 15 selects a permutation within quads, else lanes of each half wave
// are computed with and, or and xor masks. Rotations and FFT orders (0xc000 and up) are not modelled.
void swizzle(Wave& w, const Instruction& in) {
  uint32_t pattern = static_cast<uint32_t>(in.offset);
  if (pattern >= 0xc000) {
    report(w, FindingKind::kUnsupported, -1, pattern);
    return;
  }
  fetch_from(w, in.op[0].index, in.op[1].index, [&](int lane) -> uint32_t {
    uint32_t number = static_cast<uint32_t>(lane);
    if (pattern & 0x8000) return (number & ~3u) | (pattern >> (2 * (number & 3)) & 3);
    uint32_t and_mask = pattern & 31, or_mask = pattern >> 5 & 31, xor_mask = pattern >> 10 & 31;
    return (number & 32) | (((number & and_mask) | or_mask) ^ xor_mask);
  });
}

// --- atomics ---

// operation(wave, old value, first data operand, second one) -> new value. Text order: [vdst,] addr,
// data0[, data1]. Waves of a workgroup run on one thread, so plain reads and writes will do.
template <class T, auto kOperation, bool kReturns>
void atomic_op(Wave& w, const Instruction& in) {
  const Operand* op = in.op + kReturns;
  bool has_second = in.op_count == 3 + kReturns;
  Addresses a = addresses(w, op[0], static_cast<uint32_t>(in.offset));
  for_each_lane(w.exec(), [&](int lane) {
    T first = register_value<T>(w, op[1].index, lane);
    T second = has_second ? register_value<T>(w, op[2].index, lane) : 0;
    T old = 0;
    if (uint8_t* bytes = lds_atomic(w, lane, a.lane[lane], sizeof(T))) {
      std::memcpy(&old, bytes, sizeof(T));
      T value = kOperation(w, old, first, second);
      std::memcpy(bytes, &value, sizeof(T));
    }
    if constexpr (kReturns) set_register_value<T>(w, in.op[0].index, lane, old);
  });
  count_bytes(w, active_bytes(w, sizeof(T)));
  count_cycles(w, a, sizeof(T));
}

template <class T, class Operation>
T integer(const Wave&, T old, T value, T) {
  return Operation{}(old, AtomicData<T>{value, 0});
}

// The first data operand is compared, the second one stored.
template <class T>
T compare_store(const Wave&, T old, T compare, T value) {
  return old == compare ? value : old;
}

// NaN equals nothing, and zeros equal each other.
uint32_t compare_store_f32(const Wave& w, uint32_t old, uint32_t compare, uint32_t value) {
  auto flush = [&](uint32_t a) {
    return w.mode.flush_inputs32 && (a & 0x7f800000u) == 0 ? a & 0x80000000u : a;
  };
  float x = std::bit_cast<float>(flush(old)), y = std::bit_cast<float>(flush(compare));
  return x == y ? flush(value) : old;
}

uint64_t compare_store_f64(const Wave& w, uint64_t old, uint64_t compare, uint64_t value) {
  auto flush = [&](uint64_t a) {
    bool is_small = (a & 0x7ffull << 52) == 0;
    return w.mode.flush_inputs64 && is_small ? a & 1ull << 63 : a;
  };
  double x = std::bit_cast<double>(flush(old)), y = std::bit_cast<double>(flush(compare));
  return x == y ? flush(value) : old;
}

// Bits of the first operand are cleared, then those of the second set.
template <class T>
T mask_or(const Wave&, T old, T mask, T value) {
  return (old & ~mask) | value;
}

uint32_t add_f32(const Wave& w, uint32_t old, uint32_t value, uint32_t) {
  return atomic::add_f32(old, value, w.mode.flush_inputs32, w.mode.flush_outputs32);
}
uint64_t add_f64(const Wave&, uint64_t old, uint64_t value, uint64_t) {
  return atomic::add_f64(old, value);
}
uint32_t min_f32(const Wave& w, uint32_t old, uint32_t value, uint32_t) {
  return atomic::min_f32(old, value, w.mode.flush_inputs32);
}
uint32_t max_f32(const Wave& w, uint32_t old, uint32_t value, uint32_t) {
  return atomic::max_f32(old, value, w.mode.flush_inputs32);
}
uint64_t min_f64(const Wave& w, uint64_t old, uint64_t value, uint64_t) {
  return atomic::min_f64(old, value, w.mode.flush_inputs64);
}
uint64_t max_f64(const Wave& w, uint64_t old, uint64_t value, uint64_t) {
  return atomic::max_f64(old, value, w.mode.flush_inputs64);
}
uint32_t pk_add_f16(const Wave& w, uint32_t old, uint32_t value, uint32_t) {
  return atomic::pk_add_f16(old, value, w.mode.flush_inputs64, w.mode.flush_outputs64);
}
uint32_t pk_add_bf16(const Wave& w, uint32_t old, uint32_t value, uint32_t) {
  return atomic::pk_add_bf16(old, value, w.mode.flush_inputs64, w.mode.flush_outputs64);
}

void nop(Wave&, const Instruction&) {}

// With and without return of the old value.
#define CDNA_ATOMIC(name, suffix, T, operation)                \
  {"ds_" name "_" suffix, atomic_op<T, operation, false>},     \
      {"ds_" name "_rtn_" suffix, atomic_op<T, operation, true>}
#define CDNA_INTEGER(name, suffix, T, operation) \
  CDNA_ATOMIC(name, suffix, T, (integer<T, atomic::operation>))

const NamedHandler kHandlers[] = {
    {"ds_read_b32", read<4>},
    {"ds_read_b64", read<8>},
    {"ds_read_b96", read<12>},
    {"ds_read_b128", read<16>},
    {"ds_read_u8", read<1>},
    {"ds_read_i8", read<1, true>},
    {"ds_read_u16", read<2>},
    {"ds_read_i16", read<2, true>},
    {"ds_read_u8_d16", read<1, false, Half::kLow>},
    {"ds_read_u8_d16_hi", read<1, false, Half::kHigh>},
    {"ds_read_i8_d16", read<1, true, Half::kLow>},
    {"ds_read_i8_d16_hi", read<1, true, Half::kHigh>},
    {"ds_read_u16_d16", read<2, false, Half::kLow>},
    {"ds_read_u16_d16_hi", read<2, false, Half::kHigh>},
    {"ds_read2_b32", read2<4, 1>},
    {"ds_read2_b64", read2<8, 1>},
    {"ds_read2st64_b32", read2<4, 64>},
    {"ds_read2st64_b64", read2<8, 64>},
    {"ds_read_addtid_b32", read_addtid},
    {"ds_read_b64_tr_b4", read_transposed<4, 8>},
    {"ds_read_b64_tr_b8", read_transposed<8, 8>},
    {"ds_read_b64_tr_b16", read_transposed<16, 8>},
    {"ds_read_b96_tr_b6", read_transposed<6, 12>},
    {"ds_write_b32", write<4>},
    {"ds_write_b64", write<8>},
    {"ds_write_b96", write<12>},
    {"ds_write_b128", write<16>},
    {"ds_write_b8", write<1>},
    {"ds_write_b16", write<2>},
    {"ds_write_b8_d16_hi", write<1, Half::kHigh>},
    {"ds_write_b16_d16_hi", write<2, Half::kHigh>},
    {"ds_write2_b32", write2<4, 1>},
    {"ds_write2_b64", write2<8, 1>},
    {"ds_write2st64_b32", write2<4, 64>},
    {"ds_write2st64_b64", write2<8, 64>},
    {"ds_write_addtid_b32", write_addtid},
    {"ds_permute_b32", permute},
    {"ds_bpermute_b32", bpermute},
    {"ds_swizzle_b32", swizzle},
    {"ds_nop", nop},
    CDNA_INTEGER("add", "u32", uint32_t, Add),
    CDNA_INTEGER("add", "u64", uint64_t, Add),
    CDNA_INTEGER("sub", "u32", uint32_t, Sub),
    CDNA_INTEGER("sub", "u64", uint64_t, Sub),
    CDNA_INTEGER("rsub", "u32", uint32_t, ReverseSub),
    CDNA_INTEGER("rsub", "u64", uint64_t, ReverseSub),
    CDNA_INTEGER("inc", "u32", uint32_t, Increment),
    CDNA_INTEGER("inc", "u64", uint64_t, Increment),
    CDNA_INTEGER("dec", "u32", uint32_t, Decrement),
    CDNA_INTEGER("dec", "u64", uint64_t, Decrement),
    CDNA_INTEGER("min", "i32", uint32_t, MinSigned),
    CDNA_INTEGER("min", "u32", uint32_t, MinUnsigned),
    CDNA_INTEGER("min", "i64", uint64_t, MinSigned),
    CDNA_INTEGER("min", "u64", uint64_t, MinUnsigned),
    CDNA_INTEGER("max", "i32", uint32_t, MaxSigned),
    CDNA_INTEGER("max", "u32", uint32_t, MaxUnsigned),
    CDNA_INTEGER("max", "i64", uint64_t, MaxSigned),
    CDNA_INTEGER("max", "u64", uint64_t, MaxUnsigned),
    CDNA_INTEGER("and", "b32", uint32_t, And),
    CDNA_INTEGER("and", "b64", uint64_t, And),
    CDNA_INTEGER("or", "b32", uint32_t, Or),
    CDNA_INTEGER("or", "b64", uint64_t, Or),
    CDNA_INTEGER("xor", "b32", uint32_t, Xor),
    CDNA_INTEGER("xor", "b64", uint64_t, Xor),
    {"ds_wrxchg_rtn_b32", atomic_op<uint32_t, integer<uint32_t, atomic::Swap>, true>},
    {"ds_wrxchg_rtn_b64", atomic_op<uint64_t, integer<uint64_t, atomic::Swap>, true>},
    CDNA_ATOMIC("cmpst", "b32", uint32_t, compare_store<uint32_t>),
    CDNA_ATOMIC("cmpst", "b64", uint64_t, compare_store<uint64_t>),
    CDNA_ATOMIC("cmpst", "f32", uint32_t, compare_store_f32),
    CDNA_ATOMIC("cmpst", "f64", uint64_t, compare_store_f64),
    CDNA_ATOMIC("mskor", "b32", uint32_t, mask_or<uint32_t>),
    CDNA_ATOMIC("mskor", "b64", uint64_t, mask_or<uint64_t>),
    CDNA_ATOMIC("add", "f32", uint32_t, add_f32),
    CDNA_ATOMIC("add", "f64", uint64_t, add_f64),
    CDNA_ATOMIC("min", "f32", uint32_t, min_f32),
    CDNA_ATOMIC("max", "f32", uint32_t, max_f32),
    CDNA_ATOMIC("min", "f64", uint64_t, min_f64),
    CDNA_ATOMIC("max", "f64", uint64_t, max_f64),
    CDNA_ATOMIC("pk_add", "f16", uint32_t, pk_add_f16),
    CDNA_ATOMIC("pk_add", "bf16", uint32_t, pk_add_bf16),
};

}  // namespace

HandlerTable lds_handlers() { return {kHandlers, sizeof(kHandlers) / sizeof(*kHandlers)}; }

}  // namespace cdna
