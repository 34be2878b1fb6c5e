// global_*, flat_* and scratch_*: loads, stores, atomics, and copies from memory to LDS.
//
// Addresses: global takes a 64-bit vector pair, or a scalar pair plus a 32-bit vector offset; flat a
// vector pair, whose aperture says LDS, private or device memory; scratch a 32-bit offset into the
// lane's private memory from a vector register, a scalar register, both or neither.
#include "memory.h"

namespace cdna {

namespace {

// M0 holds a byte offset whose two low bits are dropped here; LDS has 64 KiB on gfx942.
uint32_t m0_mask(const Wave& w) { return w.arch == 942 ? 0xfffcu : 0x3fffcu; }

struct GlobalSpace {
  static constexpr bool kHasScalarBase = true;

  static uint64_t address(const Wave& w, const Instruction& in, const Operand& v,
                          const Operand& s, int lane) {
    uint64_t offset = static_cast<uint64_t>(static_cast<int64_t>(in.offset));
    if (s.kind == kAbsent) return vector_pair(w, v, lane) + offset;
    uint64_t index = v.kind == kVgpr ? w.v[v.index].lane[lane] : 0;
    return w.pair(s.index) + index + offset;
  }

  template <class Body>
  static void with_bytes(Wave& w, int lane, uint64_t address, uint32_t bytes, bool is_write,
                         Body body) {
    body(reach(w, lane, address, bytes, is_write));
  }
};

struct ScratchSpace {
  static uint64_t address(const Wave& w, const Instruction& in, const Operand& v,
                          const Operand& s, int lane) {
    uint32_t offset = v.kind == kVgpr ? w.v[v.index].lane[lane] : 0;
    return static_cast<uint32_t>(offset + scalar_value(w, s) + static_cast<uint32_t>(in.offset));
  }

  template <class Body>
  static void with_bytes(Wave& w, int lane, uint64_t address, uint32_t bytes, bool, Body body) {
    body(scratch_memory(w, lane, address, bytes));
  }
};

struct FlatSpace {
  static constexpr bool kHasScalarBase = false;

  static uint64_t address(const Wave& w, const Instruction& in, const Operand& v, const Operand&,
                          int lane) {
    return vector_pair(w, v, lane) + static_cast<uint64_t>(static_cast<int64_t>(in.offset));
  }

  template <class Body>
  static void with_bytes(Wave& w, int lane, uint64_t address, uint32_t bytes, bool is_write,
                         Body body) {
    if (address >> 32 == kSharedAperture >> 32) {
      uint8_t value[16];
      uint32_t at = static_cast<uint32_t>(address);
      if (is_write) {
        body(value);
        lds_store(w, lane, at, bytes, value);
      } else {
        body(lds_load(w, lane, at, bytes, value) ? value : nullptr);
      }
    } else if (address >> 32 == kPrivateAperture >> 32) {
      body(scratch_memory(w, lane, static_cast<uint32_t>(address), bytes));
    } else {
      body(reach(w, lane, address, bytes, is_write));
    }
  }
};

// Text order: vdst, vaddr[, saddr].
template <class Space, int kBytes, bool kSigned = false, Half kHalf = Half::kWhole>
void load(Wave& w, const Instruction& in) {
  if (w.machine->is_tracked) w.shadow->load_register = in.op[0].index;  // should it lie in LDS
  for_each_lane(w.exec(), [&](int lane) {
    uint64_t address = Space::address(w, in, in.op[1], in.op[2], lane);
    Space::with_bytes(w, lane, address, kBytes, false, [&](const uint8_t* bytes) {
      put<kBytes, kSigned, kHalf>(w, in.op[0].index, lane, bytes);
    });
  });
  count_bytes(w, active_bytes(w, kBytes));
}

// Text order: vaddr, vdata[, saddr].
template <class Space, int kBytes, Half kHalf = Half::kWhole>
void store(Wave& w, const Instruction& in) {
  for_each_lane(w.exec(), [&](int lane) {
    uint64_t address = Space::address(w, in, in.op[0], in.op[2], lane);
    Space::with_bytes(w, lane, address, kBytes, true, [&](uint8_t* bytes) {
      if (bytes) take<kBytes, kHalf>(w, in.op[1].index, lane, bytes);
    });
  });
  count_bytes(w, active_bytes(w, kBytes));
}

// Text order: vaddr, saddr.
template <int kBytes, bool kSigned = false>
void load_lds(Wave& w, const Instruction& in) {
  uint32_t base = copy_base(w, in, m0_mask(w));
  for_each_lane(w.exec(), [&](int lane) {
    uint64_t address = GlobalSpace::address(w, in, in.op[0], in.op[1], lane);
    copy_to_lds<kBytes, kSigned>(w, lane, base, reach(w, lane, address, kBytes, false));
  });
  count_bytes(w, active_bytes(w, kBytes));
}

// Text order: [vdst,] vaddr, vdata[, saddr]; the first is there when the old value is returned.
template <class Space, class T, class Operation, bool kCompares = false>
void atomic_op(Wave& w, const Instruction& in) {
  bool returns = in.flags & kSc0;
  const Operand* op = in.op + returns;
  static constexpr Operand kNone{};
  const Operand& saddr = Space::kHasScalarBase ? op[2] : kNone;
  for_each_lane(w.exec(), [&](int lane) {
    uint64_t address = Space::address(w, in, op[0], saddr, lane);
    if (!is_aligned(w, lane, address, sizeof(T))) return;
    AtomicData<T> data = atomic_data<T, kCompares>(w, op[1].index, lane);
    T old = 0;
    if (!Space::kHasScalarBase && address >> 32 == kSharedAperture >> 32) {
      uint8_t* bytes = lds_atomic(w, lane, static_cast<uint32_t>(address), sizeof(T));
      if (bytes) old = exchange<T>(bytes, data, Operation{});
    } else {
      Space::with_bytes(w, lane, address, sizeof(T), true, [&](uint8_t* bytes) {
        if (bytes) old = exchange<T>(bytes, data, Operation{});
      });
    }
    if (returns) set_register_value<T>(w, in.op[0].index, lane, old);
  });
  count_bytes(w, active_bytes(w, sizeof(T)));
}

#define CDNA_LOADS_AND_STORES(prefix, Space)                                 \
  {prefix "_load_dword", load<Space, 4>},                                    \
      {prefix "_load_dwordx2", load<Space, 8>},                              \
      {prefix "_load_dwordx3", load<Space, 12>},                             \
      {prefix "_load_dwordx4", load<Space, 16>},                             \
      {prefix "_load_ubyte", load<Space, 1>},                                \
      {prefix "_load_sbyte", load<Space, 1, true>},                          \
      {prefix "_load_ushort", load<Space, 2>},                               \
      {prefix "_load_sshort", load<Space, 2, true>},                         \
      {prefix "_load_ubyte_d16", load<Space, 1, false, Half::kLow>},         \
      {prefix "_load_ubyte_d16_hi", load<Space, 1, false, Half::kHigh>},     \
      {prefix "_load_sbyte_d16", load<Space, 1, true, Half::kLow>},          \
      {prefix "_load_sbyte_d16_hi", load<Space, 1, true, Half::kHigh>},      \
      {prefix "_load_short_d16", load<Space, 2, false, Half::kLow>},         \
      {prefix "_load_short_d16_hi", load<Space, 2, false, Half::kHigh>},     \
      {prefix "_store_dword", store<Space, 4>},                              \
      {prefix "_store_dwordx2", store<Space, 8>},                            \
      {prefix "_store_dwordx3", store<Space, 12>},                           \
      {prefix "_store_dwordx4", store<Space, 16>},                           \
      {prefix "_store_byte", store<Space, 1>},                               \
      {prefix "_store_short", store<Space, 2>},                              \
      {prefix "_store_byte_d16_hi", store<Space, 1, Half::kHigh>},           \
      {prefix "_store_short_d16_hi", store<Space, 2, Half::kHigh>}

#define CDNA_INTEGER_ATOMICS(prefix, suffix, Space, T)                             \
  {prefix "_atomic_swap" suffix, atomic_op<Space, T, atomic::Swap>},               \
      {prefix "_atomic_cmpswap" suffix, atomic_op<Space, T, atomic::CompareSwap, true>}, \
      {prefix "_atomic_add" suffix, atomic_op<Space, T, atomic::Add>},             \
      {prefix "_atomic_sub" suffix, atomic_op<Space, T, atomic::Sub>},             \
      {prefix "_atomic_smin" suffix, atomic_op<Space, T, atomic::MinSigned>},      \
      {prefix "_atomic_umin" suffix, atomic_op<Space, T, atomic::MinUnsigned>},    \
      {prefix "_atomic_smax" suffix, atomic_op<Space, T, atomic::MaxSigned>},      \
      {prefix "_atomic_umax" suffix, atomic_op<Space, T, atomic::MaxUnsigned>},    \
      {prefix "_atomic_and" suffix, atomic_op<Space, T, atomic::And>},             \
      {prefix "_atomic_or" suffix, atomic_op<Space, T, atomic::Or>},               \
      {prefix "_atomic_xor" suffix, atomic_op<Space, T, atomic::Xor>},             \
      {prefix "_atomic_inc" suffix, atomic_op<Space, T, atomic::Increment>},       \
      {prefix "_atomic_dec" suffix, atomic_op<Space, T, atomic::Decrement>}

#define CDNA_ATOMICS(prefix, Space)                                            \
  CDNA_INTEGER_ATOMICS(prefix, "", Space, uint32_t),                           \
      CDNA_INTEGER_ATOMICS(prefix, "_x2", Space, uint64_t),                    \
      {prefix "_atomic_add_f32", atomic_op<Space, uint32_t, atomic::AddF32>},          \
      {prefix "_atomic_pk_add_f16", atomic_op<Space, uint32_t, atomic::PkAddF16>},     \
      {prefix "_atomic_pk_add_bf16", atomic_op<Space, uint32_t, atomic::PkAddBf16>},   \
      {prefix "_atomic_add_f64", atomic_op<Space, uint64_t, atomic::AddF64>},          \
      {prefix "_atomic_min_f64", atomic_op<Space, uint64_t, atomic::MinF64>},          \
      {prefix "_atomic_max_f64", atomic_op<Space, uint64_t, atomic::MaxF64>}

const NamedHandler kHandlers[] = {
    CDNA_LOADS_AND_STORES("global", GlobalSpace),
    CDNA_LOADS_AND_STORES("flat", FlatSpace),
    CDNA_LOADS_AND_STORES("scratch", ScratchSpace),
    CDNA_ATOMICS("global", GlobalSpace),
    CDNA_ATOMICS("flat", FlatSpace),
    {"global_load_lds_dword", load_lds<4>},
    {"global_load_lds_ubyte", load_lds<1>},
    {"global_load_lds_sbyte", load_lds<1, true>},
    {"global_load_lds_ushort", load_lds<2>},
    {"global_load_lds_sshort", load_lds<2, true>},
    {"global_load_lds_dwordx3", load_lds<12>},
    {"global_load_lds_dwordx4", load_lds<16>},
};

}  // namespace

HandlerTable global_handlers() { return {kHandlers, sizeof(kHandlers) / sizeof(*kHandlers)}; }

}  // namespace cdna
