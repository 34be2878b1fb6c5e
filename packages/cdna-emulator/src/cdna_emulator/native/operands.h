// Reading and writing of vector operands, with every modifier an encoding can attach to them.
//
// A handler asks for each source as an array over the 64 lanes (`fetch32`, `fetch_f32`, ...),
// computes all lanes into an array of its own, and hands that to `write32` and its relatives,
// which apply EXEC and the destination's modifiers. Lanes that EXEC disables are computed too and
// dropped at the write: arithmetic has no side effects. A source that is a plain vector register
// is returned in place, so the usual instruction copies nothing.
//
// `source` numbers the sources of an instruction from 0; DPP acts on source 0, op_sel and the
// gpr-index mode have one bit for each.
#pragma once

#include <bit>
#include <cfenv>
#include <cmath>

#include "core.h"

namespace cdna {

struct alignas(64) Lanes {
  uint32_t lane[kLanes];
};

struct alignas(64) WideLanes {
  uint64_t lane[kLanes];
};

// Number of the destination in the bits of the gpr-index mode.
constexpr int kDestination = 3;

// --- scalars ---

inline uint64_t special_value(Wave& w, uint16_t which) {
  switch (which) {
    case kScc: return w.scc;
    case kVccz: return w.vcc() == 0;
    case kExecz: return w.exec() == 0;
    case kSharedBase: return kSharedAperture;
    case kSharedLimit: return kSharedAperture | 0xffffffffu;
    case kPrivateBase: return kPrivateAperture;
    case kPrivateLimit: return kPrivateAperture | 0xffffffffu;
  }
  report(w, FindingKind::kUnsupported, -1, which);  // src_lds_direct does not exist on CDNA3
  return 0;
}

inline uint32_t scalar32(Wave& w, const Operand& o) {
  if (o.kind == kSgpr) return w.s[o.index];
  if (o.kind == kConstant) return static_cast<uint32_t>(o.bits);
  return static_cast<uint32_t>(special_value(w, o.index));
}

inline uint64_t scalar64(Wave& w, const Operand& o) {
  if (o.kind == kSgpr) return w.pair(o.index);
  if (o.kind == kConstant) return o.bits;
  return special_value(w, o.index);
}

// --- which vector register ---

// Register number after the gpr-index mode of s_set_gpr_idx_on.
inline int vgpr_number(Wave& w, const Operand& o, int source) {
  if (!w.mode.gpr_idx || !(w.s[kM0] >> (12 + source) & 1)) return o.index;
  int number = o.index + static_cast<int>(w.s[kM0] & 0xff);
  if (number + o.width > (o.index < kAgprBase ? kAgprBase : kVgprs)) {
    report(w, FindingKind::kUnsupported, -1, static_cast<uint64_t>(number));
    return o.index;
  }
  return number;
}

// --- lanes ---

// Lane that `lane` reads under a DPP control; -1 when there is none.
constexpr int dpp_source(uint32_t control, int lane) {
  int row = lane & ~15, in_row = lane & 15, amount = static_cast<int>(control & 15);
  if (control < 0x100) return (lane & ~3) | static_cast<int>(control >> (2 * (lane & 3)) & 3);
  if (control < kRowShr) return in_row + amount < 16 ? lane + amount : -1;
  if (control < kRowRor) return in_row >= amount ? lane - amount : -1;
  if (control < kWaveShl) return row | ((in_row - amount) & 15);
  if (control < kWaveRol) return lane < 63 ? lane + 1 : -1;
  if (control < kWaveShr) return (lane + 1) & 63;
  if (control < kWaveRor) return lane - 1;
  if (control < kRowMirror) return (lane - 1) & 63;
  if (control == kRowMirror) return row | (15 - in_row);
  if (control == kRowHalfMirror) return lane ^ 7;
  if (control == kRowBcast15) return row - 1;
  if (control == kRowBcast31) return lane < 32 ? -1 : 31;
  return row | amount;  // kRowNewbcast
}

constexpr int kDppControls = kRowNewbcast + 16;

struct DppTable {
  uint64_t valid[kDppControls] = {};        // lanes that have a source
  uint8_t from[kDppControls][kLanes] = {};  // 0 where there is none
  constexpr DppTable() {
    for (int control = 0; control < kDppControls; ++control) {
      for (int lane = 0; lane < kLanes; ++lane) {
        int source = dpp_source(static_cast<uint32_t>(control), lane);
        if (source < 0) continue;
        valid[control] |= 1ull << lane;
        from[control][lane] = static_cast<uint8_t>(source);
      }
    }
  }
};

inline const DppTable kDppTable;

// Lanes that find a source. One that EXEC disables is none: it counts as lying outside.
inline uint64_t dpp_valid(const Wave& w, const Instruction& in) {
  uint64_t valid = kDppTable.valid[in.dpp_control], exec = w.exec();
  if (exec == ~0ull) return valid;
  const uint8_t* from = kDppTable.from[in.dpp_control];
  for (int lane = 0; lane < kLanes; ++lane) {
    valid &= ~(static_cast<uint64_t>(!(exec >> from[lane] & 1)) << lane);
  }
  return valid;
}

// Lanes a vector instruction writes: EXEC, less those that DPP disables.
inline uint64_t write_mask(const Wave& w, const Instruction& in) {
  uint64_t mask = w.exec();
  if (!(in.flags & kDpp)) return mask;
  uint64_t rows = 0, banks = 0;
  for (int k = 0; k < 4; ++k) {
    rows |= in.row_mask >> k & 1 ? 0xffffull << (16 * k) : 0;
    banks |= in.bank_mask >> k & 1 ? 0x000f000f000f000full << (4 * k) : 0;
  }
  return mask & rows & banks & (in.flags & kBoundCtrl ? ~0ull : dpp_valid(w, in));
}

// What each lane reads under DPP: zero where there is no source.
inline void dpp_lanes(const Wave& w, const Instruction& in, const uint32_t* lanes, uint32_t* to) {
  const uint8_t* from = kDppTable.from[in.dpp_control];
  uint64_t valid = dpp_valid(w, in);
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = lanes[from[lane]];
  if (valid == ~0ull) return;
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = valid >> lane & 1 ? to[lane] : 0;
}

inline uint32_t sdwa_select(uint32_t value, uint8_t select, bool sext) {
  if (select < 4) {
    value >>= 8 * select;
    return sext ? static_cast<uint32_t>(static_cast<int8_t>(value)) : value & 0xff;
  }
  if (select < 6) {
    value >>= 16 * (select - 4);
    return sext ? static_cast<uint32_t>(static_cast<int16_t>(value)) : value & 0xffff;
  }
  return value;
}

// --- sources: bits ---

// 32 bits of each lane, after DPP and SDWA selection.
inline const uint32_t* fetch32(Wave& w, const Instruction& in, const Operand& o, int source,
                               Lanes& buffer) {
  const uint32_t* lanes = buffer.lane;
  if (o.kind == kVgpr) {
    lanes = w.v[vgpr_number(w, o, source)].lane;
    if ((in.flags & kDpp) && source == 0) {
      dpp_lanes(w, in, lanes, buffer.lane);
      lanes = buffer.lane;
    }
  } else {
    uint32_t value = scalar32(w, o);
    for (int lane = 0; lane < kLanes; ++lane) buffer.lane[lane] = value;
  }
  if ((in.flags & kSdwa) && (o.select < 6 || (o.flags & kSext))) {
    bool sext = o.flags & kSext;
    for (int lane = 0; lane < kLanes; ++lane) {
      buffer.lane[lane] = sdwa_select(lanes[lane], o.select, sext);
    }
    lanes = buffer.lane;
  }
  return lanes;
}

// 64 bits of each lane.
inline const uint64_t* fetch64(Wave& w, const Instruction& in, const Operand& o, int source,
                               WideLanes& buffer) {
  if (o.kind != kVgpr) {
    uint64_t value = scalar64(w, o);
    for (int lane = 0; lane < kLanes; ++lane) buffer.lane[lane] = value;
    return buffer.lane;
  }
  int number = vgpr_number(w, o, source);
  const uint32_t *low = w.v[number].lane, *high = w.v[number + 1].lane;
  Lanes moved_low, moved_high;
  if ((in.flags & kDpp) && source == 0) {
    dpp_lanes(w, in, low, moved_low.lane);
    dpp_lanes(w, in, high, moved_high.lane);
    low = moved_low.lane;
    high = moved_high.lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    buffer.lane[lane] = low[lane] | static_cast<uint64_t>(high[lane]) << 32;
  }
  return buffer.lane;
}

// 16 bits of each lane in the low half, zeros above: the half that op_sel or SDWA names.
inline const uint32_t* fetch16(Wave& w, const Instruction& in, const Operand& o, int source,
                               Lanes& buffer) {
  const uint32_t* lanes = fetch32(w, in, o, source, buffer);
  int shift = !(in.flags & kSdwa) && (in.op_sel >> source & 1) ? 16 : 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    buffer.lane[lane] = lanes[lane] >> shift & 0xffff;
  }
  return buffer.lane;
}

// --- sources: floats ---

inline uint32_t flush32(uint32_t x) { return x & 0x7f800000 ? x : x & 0x80000000; }
inline uint32_t flush16(uint32_t x) { return x & 0x7c00 ? x : x & 0x8000; }
inline uint64_t flush64(uint64_t x) {
  return x & 0x7ff0000000000000 ? x : x & 0x8000000000000000;
}

// Bits of f32 after abs and neg, without flushing: for instructions that move bits.
inline const uint32_t* fetch_f32_bits(Wave& w, const Instruction& in, const Operand& o, int source,
                                      Lanes& buffer) {
  const uint32_t* lanes = fetch32(w, in, o, source, buffer);
  if (!(o.flags & (kNeg | kAbs))) return lanes;
  uint32_t keep = o.flags & kAbs ? 0x7fffffff : 0xffffffff;
  uint32_t flip = o.flags & kNeg ? 0x80000000 : 0;
  for (int lane = 0; lane < kLanes; ++lane) buffer.lane[lane] = (lanes[lane] & keep) ^ flip;
  return buffer.lane;
}

// Bits of f32 as arithmetic sees them: denormals are zeros where MODE flushes inputs.
inline const uint32_t* fetch_f32(Wave& w, const Instruction& in, const Operand& o, int source,
                                 Lanes& buffer) {
  const uint32_t* lanes = fetch_f32_bits(w, in, o, source, buffer);
  if (!w.mode.flush_inputs32) return lanes;
  for (int lane = 0; lane < kLanes; ++lane) buffer.lane[lane] = flush32(lanes[lane]);
  return buffer.lane;
}

inline const uint32_t* fetch_f16_bits(Wave& w, const Instruction& in, const Operand& o, int source,
                                      Lanes& buffer) {
  fetch16(w, in, o, source, buffer);
  if (!(o.flags & (kNeg | kAbs))) return buffer.lane;
  uint32_t keep = o.flags & kAbs ? 0x7fff : 0xffff, flip = o.flags & kNeg ? 0x8000 : 0;
  for (int lane = 0; lane < kLanes; ++lane) buffer.lane[lane] = (buffer.lane[lane] & keep) ^ flip;
  return buffer.lane;
}

inline const uint32_t* fetch_f16(Wave& w, const Instruction& in, const Operand& o, int source,
                                 Lanes& buffer) {
  fetch_f16_bits(w, in, o, source, buffer);
  if (!w.mode.flush_inputs64) return buffer.lane;
  for (int lane = 0; lane < kLanes; ++lane) buffer.lane[lane] = flush16(buffer.lane[lane]);
  return buffer.lane;
}

inline const uint64_t* fetch_f64_bits(Wave& w, const Instruction& in, const Operand& o, int source,
                                      WideLanes& buffer) {
  fetch64(w, in, o, source, buffer);
  if (!(o.flags & (kNeg | kAbs))) return buffer.lane;
  uint64_t keep = o.flags & kAbs ? ~0ull >> 1 : ~0ull, flip = o.flags & kNeg ? 1ull << 63 : 0;
  for (int lane = 0; lane < kLanes; ++lane) buffer.lane[lane] = (buffer.lane[lane] & keep) ^ flip;
  return buffer.lane;
}

inline const uint64_t* fetch_f64(Wave& w, const Instruction& in, const Operand& o, int source,
                                 WideLanes& buffer) {
  fetch_f64_bits(w, in, o, source, buffer);
  if (!w.mode.flush_inputs64) return buffer.lane;
  for (int lane = 0; lane < kLanes; ++lane) buffer.lane[lane] = flush64(buffer.lane[lane]);
  return buffer.lane;
}

// --- rounding ---

// Host rounding mode of AMD's numbering; computation between construction and destruction must
// read from and write to memory, which the compiler does not move across the calls.
class RoundingScope {
 public:
  explicit RoundingScope(uint8_t mode) : changed_(mode != 0) {
    static constexpr int kHost[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    if (changed_) std::fesetround(kHost[mode & 3]);
  }
  ~RoundingScope() {
    if (changed_) std::fesetround(FE_TONEAREST);
  }
  RoundingScope(const RoundingScope&) = delete;
  RoundingScope& operator=(const RoundingScope&) = delete;

 private:
  bool changed_;
};

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline double as_double(uint64_t bits) { return std::bit_cast<double>(bits); }
inline uint64_t as_bits(double value) { return std::bit_cast<uint64_t>(value); }

inline float half_to_float(uint32_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(bits)));
}

// Rounds in the host's present mode.
inline uint32_t float_to_half(float value) {
  return std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}

// Single precision rounded to odd: an inexact result has its last bit set, so that rounding once
// more to f16 gives what rounding the double directly would.
inline float double_to_odd_float(double value) {
  float single = static_cast<float>(value);
  uint32_t bits = as_bits(single);
  double back = single;
  bool fix = back != value && value == value && !(bits & 1);
  uint32_t step = std::fabs(back) > std::fabs(value) ? ~0u : 1u;
  return as_float(fix ? bits + step : bits);
}

// --- results ---

// Output modifiers act only where IEEE mode is off and denormal results are flushed.
inline float output_factor(const Instruction& in) {
  static constexpr float kFactor[] = {1.0f, 2.0f, 4.0f, 0.5f};
  return kFactor[in.output_modifier & 3];
}

// Flush, omod and clamp of f32 results, in place.
inline void finish_f32(const Wave& w, const Instruction& in, uint32_t* r) {
  if (w.mode.flush_outputs32) {
    for (int lane = 0; lane < kLanes; ++lane) r[lane] = flush32(r[lane]);
  }
  if (in.output_modifier && !w.mode.ieee && w.mode.flush_outputs32) {
    float factor = output_factor(in);
    for (int lane = 0; lane < kLanes; ++lane) {
      r[lane] = flush32(as_bits(as_float(r[lane]) * factor + 0.0f));
    }
  }
  if (in.flags & kClamp) {
    for (int lane = 0; lane < kLanes; ++lane) {
      float x = as_float(r[lane]);
      float clamped = x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
      r[lane] = x == x || w.mode.dx10_clamp ? as_bits(clamped) : r[lane];
    }
  }
}

inline void finish_f64(const Wave& w, const Instruction& in, uint64_t* r) {
  if (w.mode.flush_outputs64) {
    for (int lane = 0; lane < kLanes; ++lane) r[lane] = flush64(r[lane]);
  }
  if (in.output_modifier && !w.mode.ieee && w.mode.flush_outputs64) {
    double factor = output_factor(in);
    for (int lane = 0; lane < kLanes; ++lane) {
      r[lane] = flush64(as_bits(as_double(r[lane]) * factor + 0.0));
    }
  }
  if (in.flags & kClamp) {
    for (int lane = 0; lane < kLanes; ++lane) {
      double x = as_double(r[lane]);
      double clamped = x > 0.0 ? (x < 1.0 ? x : 1.0) : 0.0;
      r[lane] = x == x || w.mode.dx10_clamp ? as_bits(clamped) : r[lane];
    }
  }
}

// Clamp of one f16 to [0, 1].
inline uint32_t clamp_f16(const Mode& mode, uint32_t x) {
  if ((x & 0x7fff) > 0x7c00) return mode.dx10_clamp ? 0 : x;
  if (x & 0x8000) return 0;
  return x > 0x3c00 ? 0x3c00 : x;
}

inline void finish_f16(const Wave& w, const Instruction& in, uint32_t* r) {
  if (w.mode.flush_outputs64) {
    for (int lane = 0; lane < kLanes; ++lane) r[lane] = flush16(r[lane]);
  }
  if (in.output_modifier && !w.mode.ieee && w.mode.flush_outputs64) {
    float factor = output_factor(in);
    for (int lane = 0; lane < kLanes; ++lane) {
      r[lane] = flush16(float_to_half(half_to_float(r[lane]) * factor + 0.0f));
    }
  }
  if (in.flags & kClamp) {
    for (int lane = 0; lane < kLanes; ++lane) r[lane] = clamp_f16(w.mode, r[lane]);
  }
}

// --- writing ---

// Copies the lanes of `mask`.
inline void store_lanes(uint32_t* to, const uint32_t* from, uint64_t mask) {
  if (mask == ~0ull) {
    std::memcpy(to, from, sizeof(Vgpr));
    return;
  }
  for (int group = 0; group < kLanes; group += 8) {
    uint32_t bits = static_cast<uint32_t>(mask >> group) & 0xff;
    for (int lane = 0; lane < 8; ++lane) {
      to[group + lane] = bits & (1u << lane) ? from[group + lane] : to[group + lane];
    }
  }
}

// A 32-bit result; SDWA places it in the selected part of the register.
inline void write32(Wave& w, const Instruction& in, const Operand& o, const uint32_t* r) {
  uint32_t* to = w.v[vgpr_number(w, o, kDestination)].lane;
  uint64_t mask = write_mask(w, in);
  if (!(in.flags & kSdwa) || in.dst_select >= 6) {
    store_lanes(to, r, mask);
    return;
  }
  int width = in.dst_select < 4 ? 8 : 16;
  int shift = in.dst_select < 4 ? 8 * in.dst_select : 16 * (in.dst_select - 4);
  uint32_t field = ((1u << width) - 1) << shift;
  Lanes placed;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t value = r[lane] << shift & field;
    uint32_t above = ~(field | (field - 1) | ((1u << shift) - 1));
    if (in.dst_unused == 1 && (value >> (shift + width - 1) & 1)) value |= above;
    if (in.dst_unused == 2) value |= to[lane] & ~field;
    placed.lane[lane] = value;
  }
  store_lanes(to, placed.lane, mask);
}

// What a 16-bit result does to the other half of its register. Nearly all instructions write zeros
// there, and LLVM relies on it; v_mad_{f16,u16,i16}, v_fma_f16, v_div_fixup_f16, v_fma_mix{lo,hi}_f16
// keep it (CDNA4 ISA, 12.11), as every instruction does whose op_sel names the high half.
enum class OtherHalf { kZero, kKeep };

inline void write16(Wave& w, const Instruction& in, const Operand& o, const uint32_t* r,
                    OtherHalf other = OtherHalf::kZero) {
  bool high = !(in.flags & kSdwa) && (in.op_sel & 8);
  if (!high && other == OtherHalf::kZero) {
    write32(w, in, o, r);
    return;
  }
  uint32_t* to = w.v[vgpr_number(w, o, kDestination)].lane;
  Lanes merged;
  for (int lane = 0; lane < kLanes; ++lane) {
    merged.lane[lane] = high ? (to[lane] & 0xffff) | r[lane] << 16
                             : (to[lane] & 0xffff0000) | (r[lane] & 0xffff);
  }
  store_lanes(to, merged.lane, write_mask(w, in));
}

inline void write64(Wave& w, const Instruction& in, const Operand& o, const uint64_t* r) {
  int number = vgpr_number(w, o, kDestination);
  uint64_t mask = write_mask(w, in);
  Lanes low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low.lane[lane] = static_cast<uint32_t>(r[lane]);
    high.lane[lane] = static_cast<uint32_t>(r[lane] >> 32);
  }
  store_lanes(w.v[number].lane, low.lane, mask);
  store_lanes(w.v[number + 1].lane, high.lane, mask);
}

// One bit for each lane into a pair of scalar registers; lanes that are not written become 0.
inline void write_lane_mask(Wave& w, const Instruction& in, const Operand& o, uint64_t bits) {
  w.set_pair(o.index, bits & write_mask(w, in));
}

// Bit `lane` of the result is whether flags[lane] is not 0.
inline uint64_t gather_bits(const uint32_t* flags) {
  typedef uint32_t Words __attribute__((ext_vector_type(8)));
  typedef bool Bits __attribute__((ext_vector_type(8)));
  uint64_t bits = 0;
  for (int group = 0; group < kLanes; group += 8) {
    Words words;
    std::memcpy(&words, flags + group, sizeof words);
    Bits set = __builtin_convertvector(words != 0, Bits);
    bits |= static_cast<uint64_t>(std::bit_cast<uint8_t>(set)) << group;
  }
  return bits;
}

}  // namespace cdna
