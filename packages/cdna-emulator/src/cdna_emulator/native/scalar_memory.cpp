// s_load_*, s_buffer_load_*, the clock, and the scalar cache's instructions.
//
// The two low bits of a scalar address do not count in hardware; an address that has them set is
// reported, and read as hardware would.
#include "memory.h"

namespace cdna {

namespace {

// Register, constant or both: `s[0:1], s2 offset:16`. A constant has a sign, a register has none.
uint64_t offset_of(const Wave& w, const Instruction& in, const Operand& o) {
  int64_t offset = in.offset;
  if (o.kind == kSgpr) {
    offset += w.s[o.index];
  } else {
    offset += static_cast<int32_t>(scalar_value(w, o));
  }
  return static_cast<uint64_t>(offset);
}

uint64_t aligned(Wave& w, uint64_t address) {
  is_aligned(w, -1, address, 4);
  return address & ~3ull;
}

template <int kDwords>
void load(Wave& w, const Instruction& in) {
  uint64_t address = aligned(w, w.pair(in.op[1].index) + offset_of(w, in, in.op[2]));
  const uint8_t* bytes = reach(w, -1, address, 4 * kDwords, false);
  uint32_t* to = &w.s[in.op[0].index];
  if (bytes) {
    std::memcpy(to, bytes, 4 * kDwords);
  } else {
    std::memset(to, 0, 4 * kDwords);
  }
  count_bytes(w, 4 * kDwords);
}

// Dwords past the descriptor's records read zero.
template <int kDwords>
void buffer_load(Wave& w, const Instruction& in) {
  const uint32_t* words = &w.s[in.op[1].index];
  uint64_t base = words[0] | static_cast<uint64_t>(words[1] & 0xffff) << 32;
  uint64_t stride = words[1] >> 16 & 0x3fff;
  uint64_t size = words[2] * (stride ? stride : 1);
  uint64_t offset = aligned(w, offset_of(w, in, in.op[2]));
  uint32_t values[kDwords] = {};
  for (uint32_t i = 0; i < kDwords; ++i) {
    if (offset + 4 * i >= size) continue;
    const uint8_t* bytes = reach(w, -1, (base & ~3ull) + offset + 4 * i, 4, false);
    if (bytes) std::memcpy(&values[i], bytes, 4);
  }
  std::memcpy(&w.s[in.op[0].index], values, sizeof(values));
  count_bytes(w, 4 * kDwords);
}

void memory_time(Wave& w, const Instruction& in) { w.set_pair(in.op[0].index, clock_ticks(w)); }

// Caches are not modelled.
void cache_control(Wave&, const Instruction&) {}

const NamedHandler kHandlers[] = {
    {"s_load_dword", load<1>},
    {"s_load_dwordx2", load<2>},
    {"s_load_dwordx4", load<4>},
    {"s_load_dwordx8", load<8>},
    {"s_load_dwordx16", load<16>},
    {"s_buffer_load_dword", buffer_load<1>},
    {"s_buffer_load_dwordx2", buffer_load<2>},
    {"s_buffer_load_dwordx4", buffer_load<4>},
    {"s_buffer_load_dwordx8", buffer_load<8>},
    {"s_buffer_load_dwordx16", buffer_load<16>},
    {"s_memtime", memory_time},
    {"s_memrealtime", memory_time},
    {"s_dcache_inv", cache_control},
    {"s_dcache_wb", cache_control},
};

}  // namespace

HandlerTable scalar_memory_handlers() {
  return {kHandlers, sizeof(kHandlers) / sizeof(*kHandlers)};
}

}  // namespace cdna
