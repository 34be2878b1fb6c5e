// Vector moves, selection by mask, and instructions that reach into other lanes.
//
// Source: AMD CDNA3 and CDNA4 ISA documents, VOP1, VOP2 and VOP3 instructions.
#include <bit>
#include <utility>

#include "operands.h"

namespace cdna {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

// Sign modifiers are allowed and act as on f32.
void move32(Wave& w, const Instruction& in) {
  Lanes buffer;
  write32(w, in, in.op[0], fetch_f32_bits(w, in, in.op[1], 0, buffer));
}

void move64(Wave& w, const Instruction& in) {
  WideLanes buffer;
  write64(w, in, in.op[0], fetch_f64_bits(w, in, in.op[1], 0, buffer));
}

// Source 1 where the mask has a lane's bit, source 0 elsewhere.
void conditional_mask(Wave& w, const Instruction& in) {
  Lanes a_buffer, b_buffer, result;
  const u32* a = fetch_f32_bits(w, in, in.op[1], 0, a_buffer);
  const u32* b = fetch_f32_bits(w, in, in.op[2], 1, b_buffer);
  u64 mask = scalar64(w, in.op[3]);
  std::memcpy(result.lane, a, sizeof result.lane);
  store_lanes(result.lane, b, mask);
  write32(w, in, in.op[0], result.lane);
}

// The f16 halves of two sources side by side. Denormals are flushed where MODE says so, like those
// of arithmetic; LLVM uses the instruction on values only that went through arithmetic.
void pack_halves(Wave& w, const Instruction& in) {
  Lanes a_buffer, b_buffer, result;
  const u32* a = fetch_f16(w, in, in.op[1], 0, a_buffer);
  const u32* b = fetch_f16(w, in, in.op[2], 1, b_buffer);
  for (int lane = 0; lane < kLanes; ++lane) result.lane[lane] = a[lane] | b[lane] << 16;
  write32(w, in, in.op[0], result.lane);
}

void swap(Wave& w, const Instruction& in) {
  u32* a = w.v[vgpr_number(w, in.op[0], kDestination)].lane;
  u32* b = w.v[vgpr_number(w, in.op[1], 0)].lane;
  Lanes old;
  std::memcpy(old.lane, a, sizeof old.lane);
  store_lanes(a, b, w.exec());
  store_lanes(b, old.lane, w.exec());
}

// Rows (of 16 lanes, or pairs of them) with an odd number of operand 0 change places with the even
// rows before them of operand 1, whatever EXEC is.
template <int Row>
void swap_rows(Wave& w, const Instruction& in) {
  u32* a = w.v[in.op[0].index].lane;
  u32* b = w.v[in.op[1].index].lane;
  for (int base = 0; base < kLanes; base += 2 * Row) {
    for (int lane = base; lane < base + Row; ++lane) std::swap(b[lane], a[lane + Row]);
  }
}

void read_lane(Wave& w, const Instruction& in, int lane) {
  const Operand& from = in.op[1];
  w.s[in.op[0].index] =
      from.kind == kVgpr ? w.v[vgpr_number(w, from, 0)].lane[lane] : scalar32(w, from);
}

void read_selected_lane(Wave& w, const Instruction& in) {
  read_lane(w, in, static_cast<int>(scalar32(w, in.op[2]) & 63));
}

// The lowest lane that EXEC enables, lane 0 when there is none.
void read_first_lane(Wave& w, const Instruction& in) {
  read_lane(w, in, w.exec() ? std::countr_zero(w.exec()) : 0);
}

void write_lane(Wave& w, const Instruction& in) {
  u32 lane = scalar32(w, in.op[2]) & 63;
  w.v[vgpr_number(w, in.op[0], kDestination)].lane[lane] = scalar32(w, in.op[1]);
}

void nothing(Wave&, const Instruction&) {}

constexpr NamedHandler kRows[] = {
    {"v_nop", nothing},
    {"v_mov_b32", move32},
    {"v_mov_b64", move64},
    {"v_accvgpr_read_b32", move32},
    {"v_accvgpr_write_b32", move32},
    {"v_accvgpr_mov_b32", move32},
    {"v_cndmask_b32", conditional_mask},
    {"v_pack_b32_f16", pack_halves},
    {"v_swap_b32", swap},
    {"v_permlane16_swap_b32", swap_rows<16>},
    {"v_permlane32_swap_b32", swap_rows<32>},
    {"v_readlane_b32", read_selected_lane},
    {"v_readfirstlane_b32", read_first_lane},
    {"v_writelane_b32", write_lane},
};

}  // namespace

HandlerTable valu_lane_handlers() { return {kRows, sizeof kRows / sizeof kRows[0]}; }

}  // namespace cdna
