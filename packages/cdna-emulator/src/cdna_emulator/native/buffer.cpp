// buffer_*: accesses through a 128-bit descriptor in scalar registers, with range checks.
//
// Address arithmetic is that of "Buffer Addressing" in the CDNA3 and CDNA4 documents. Elements of
// swizzled buffers are 4 bytes, as on every GFX9 architecture. Accesses the descriptor declares out
// of range load zero and drop stores, which is defined behaviour and no finding; each dword of a
// wide access is judged for itself, atomics as a whole. An address that is in range by the
// descriptor and yet outside every mapped buffer is out of bounds.
#include "memory.h"

namespace cdna {

namespace {

constexpr uint32_t kElementBytes = 4;  // of swizzled buffers

struct Descriptor {
  uint64_t base;
  uint32_t stride;
  uint32_t num_records;
  uint32_t index_stride;
  bool is_swizzled;
  bool adds_lane;

  explicit Descriptor(const uint32_t* words) {
    base = words[0] | static_cast<uint64_t>(words[1] & 0xffff) << 32;
    stride = words[1] >> 16 & 0x3fff;
    is_swizzled = words[1] >> 31;
    num_records = words[2];
    index_stride = 8u << (words[3] >> 21 & 3);
    adds_lane = words[3] >> 23 & 1;
    // Private buffers have strides of 18 bits; the upper ones lie in the data format.
    if (adds_lane) stride |= (words[3] >> 15 & 15) << 14;
  }
};

// One instruction's access: everything that is the same for all lanes.
struct BufferAccess {
  Descriptor descriptor;
  const uint32_t* index = nullptr;   // per lane, idxen
  const uint32_t* offset = nullptr;  // per lane, offen
  uint32_t scalar_offset;
  uint32_t instruction_offset;

  BufferAccess(const Wave& w, const Instruction& in, const Operand& address,
               const Operand& descriptor_in, const Operand& soffset)
      : descriptor(&w.s[descriptor_in.index]),
        scalar_offset(scalar_value(w, soffset)),
        instruction_offset(static_cast<uint32_t>(in.offset)) {
    int reg = address.index;
    if (in.flags & kIdxen) index = w.v[reg++].lane;
    if (in.flags & kOffen) offset = w.v[reg].lane;
  }

  // Address of the byte `byte` of a lane's value; false when it is out of range. The scalar offset
  // is part of neither the range check nor the swizzle.
  bool locate(int lane, uint32_t byte, uint64_t& address) const {
    const Descriptor& d = descriptor;
    uint64_t within = uint64_t{instruction_offset} + (offset ? offset[lane] : 0) + byte;
    uint32_t record = index ? index[lane] : 0;
    if (index && d.stride != 0) {
      if (record >= d.num_records) return false;
    } else if (!(d.adds_lane && !index)) {
      if (within >= d.num_records) return false;
    }
    uint64_t element = record + (d.adds_lane ? static_cast<uint32_t>(lane) : 0);
    uint64_t from_base;
    if (d.is_swizzled) {
      uint64_t block = element / d.index_stride * d.stride + within / kElementBytes * kElementBytes;
      from_base = block * d.index_stride + element % d.index_stride * kElementBytes +
                  within % kElementBytes;
    } else {
      from_base = element * d.stride + within;
    }
    address = d.base + scalar_offset + from_base;
    return true;
  }

  // Whether all of a lane's value is in range and contiguous in memory.
  bool is_simple(int lane, uint32_t bytes, uint64_t& address) const {
    const Descriptor& d = descriptor;
    if (d.is_swizzled || d.adds_lane) return false;
    if (index && d.stride != 0) return locate(lane, 0, address);
    uint64_t last;
    return locate(lane, 0, address) && locate(lane, (bytes - 1) & ~3u, last);
  }
};

// Calls body(bytes) with the value a lane loads, zero where it is out of range.
template <int kBytes, class Body>
void with_loaded(Wave& w, const BufferAccess& access, int lane, Body body) {
  uint64_t address;
  if (access.is_simple(lane, kBytes, address)) {
    if (kBytes >= 4) is_aligned(w, lane, address, 4);
    uint8_t* bytes = find_host(*w.machine->config, address, kBytes, false);
    if (bytes) return body(bytes);
  }
  uint8_t value[kBytes] = {};
  constexpr int kPart = kBytes < 4 ? kBytes : 4;
  for (int i = 0; i < kBytes; i += kPart) {
    if (!access.locate(lane, static_cast<uint32_t>(i), address)) continue;
    const uint8_t* bytes = reach(w, lane, address, kPart, false);
    if (bytes) std::memcpy(value + i, bytes, kPart);
  }
  body(value);
}

template <int kBytes, bool kSigned>
void load_to_lds(Wave& w, const Instruction& in) {
  BufferAccess access(w, in, in.op[0], in.op[1], in.op[2]);
  uint32_t base = copy_base(w, in, w.arch == 942 ? 0xffffu : 0x3ffffu);
  for_each_lane(w.exec(), [&](int lane) {
    with_loaded<kBytes>(w, access, lane, [&](const uint8_t* bytes) {
      copy_to_lds<kBytes, kSigned>(w, lane, base, bytes);
    });
  });
}

// Text order: vdata, vaddr, rsrc, soffset; without vdata when the value goes to LDS.
template <int kBytes, bool kSigned = false, Half kHalf = Half::kWhole>
void load(Wave& w, const Instruction& in) {
  count_bytes(w, active_bytes(w, kBytes));
  if (in.flags & kLds) {
    load_to_lds<kBytes, kSigned>(w, in);
    return;
  }
  BufferAccess access(w, in, in.op[1], in.op[2], in.op[3]);
  // A lane's address is read before its value is written, which may take the same register.
  for_each_lane(w.exec(), [&](int lane) {
    with_loaded<kBytes>(w, access, lane, [&](const uint8_t* bytes) {
      put<kBytes, kSigned, kHalf>(w, in.op[0].index, lane, bytes);
    });
  });
}

template <int kBytes, Half kHalf = Half::kWhole>
void store(Wave& w, const Instruction& in) {
  count_bytes(w, active_bytes(w, kBytes));
  BufferAccess access(w, in, in.op[1], in.op[2], in.op[3]);
  constexpr int kPart = kBytes < 4 ? kBytes : 4;
  for_each_lane(w.exec(), [&](int lane) {
    uint8_t value[kBytes < 4 ? 4 : kBytes];
    take<kBytes, kHalf>(w, in.op[0].index, lane, value);
    uint64_t address;
    if (access.is_simple(lane, kBytes, address)) {
      if (kBytes >= 4) is_aligned(w, lane, address, 4);
      uint8_t* bytes = find_host(*w.machine->config, address, kBytes, true);
      if (bytes) {
        std::memcpy(bytes, value, kBytes);
        return;
      }
    }
    for (int i = 0; i < kBytes; i += kPart) {
      if (!access.locate(lane, static_cast<uint32_t>(i), address)) continue;
      if (uint8_t* bytes = reach(w, lane, address, kPart, true)) {
        std::memcpy(bytes, value + i, kPart);
      }
    }
  });
}

template <class T, class Operation, bool kCompares = false>
void atomic_op(Wave& w, const Instruction& in) {
  count_bytes(w, active_bytes(w, sizeof(T)));
  BufferAccess access(w, in, in.op[1], in.op[2], in.op[3]);
  for_each_lane(w.exec(), [&](int lane) {
    uint64_t address, last;
    T old = 0;
    AtomicData<T> data = atomic_data<T, kCompares>(w, in.op[0].index, lane);
    if (access.locate(lane, 0, address) && access.locate(lane, sizeof(T) - 1, last) &&
        is_aligned(w, lane, address, sizeof(T))) {
      uint8_t* bytes = reach(w, lane, address, sizeof(T), true);
      if (bytes) old = exchange<T>(bytes, data, Operation{});
    }
    if (in.flags & kSc0) set_register_value<T>(w, in.op[0].index, lane, old);
  });
}

// Caches are not modelled: writing back and invalidating them changes nothing.
void cache_control(Wave&, const Instruction&) {}

#define CDNA_INTEGER_ATOMICS(suffix, T)                                       \
  {"buffer_atomic_swap" suffix, atomic_op<T, atomic::Swap>},                  \
      {"buffer_atomic_cmpswap" suffix, atomic_op<T, atomic::CompareSwap, true>}, \
      {"buffer_atomic_add" suffix, atomic_op<T, atomic::Add>},                \
      {"buffer_atomic_sub" suffix, atomic_op<T, atomic::Sub>},                \
      {"buffer_atomic_smin" suffix, atomic_op<T, atomic::MinSigned>},         \
      {"buffer_atomic_umin" suffix, atomic_op<T, atomic::MinUnsigned>},       \
      {"buffer_atomic_smax" suffix, atomic_op<T, atomic::MaxSigned>},         \
      {"buffer_atomic_umax" suffix, atomic_op<T, atomic::MaxUnsigned>},       \
      {"buffer_atomic_and" suffix, atomic_op<T, atomic::And>},                \
      {"buffer_atomic_or" suffix, atomic_op<T, atomic::Or>},                  \
      {"buffer_atomic_xor" suffix, atomic_op<T, atomic::Xor>},                \
      {"buffer_atomic_inc" suffix, atomic_op<T, atomic::Increment>},          \
      {"buffer_atomic_dec" suffix, atomic_op<T, atomic::Decrement>}

const NamedHandler kHandlers[] = {
    {"buffer_load_dword", load<4>},
    {"buffer_load_dwordx2", load<8>},
    {"buffer_load_dwordx3", load<12>},
    {"buffer_load_dwordx4", load<16>},
    {"buffer_load_ubyte", load<1>},
    {"buffer_load_sbyte", load<1, true>},
    {"buffer_load_ushort", load<2>},
    {"buffer_load_sshort", load<2, true>},
    {"buffer_load_ubyte_d16", load<1, false, Half::kLow>},
    {"buffer_load_ubyte_d16_hi", load<1, false, Half::kHigh>},
    {"buffer_load_sbyte_d16", load<1, true, Half::kLow>},
    {"buffer_load_sbyte_d16_hi", load<1, true, Half::kHigh>},
    {"buffer_load_short_d16", load<2, false, Half::kLow>},
    {"buffer_load_short_d16_hi", load<2, false, Half::kHigh>},
    {"buffer_store_dword", store<4>},
    {"buffer_store_dwordx2", store<8>},
    {"buffer_store_dwordx3", store<12>},
    {"buffer_store_dwordx4", store<16>},
    {"buffer_store_byte", store<1>},
    {"buffer_store_short", store<2>},
    {"buffer_store_byte_d16_hi", store<1, Half::kHigh>},
    {"buffer_store_short_d16_hi", store<2, Half::kHigh>},
    CDNA_INTEGER_ATOMICS("", uint32_t),
    CDNA_INTEGER_ATOMICS("_x2", uint64_t),
    {"buffer_atomic_add_f32", atomic_op<uint32_t, atomic::AddF32>},
    {"buffer_atomic_pk_add_f16", atomic_op<uint32_t, atomic::PkAddF16>},
    {"buffer_atomic_pk_add_bf16", atomic_op<uint32_t, atomic::PkAddBf16>},
    {"buffer_atomic_add_f64", atomic_op<uint64_t, atomic::AddF64>},
    {"buffer_atomic_min_f64", atomic_op<uint64_t, atomic::MinF64>},
    {"buffer_atomic_max_f64", atomic_op<uint64_t, atomic::MaxF64>},
    {"buffer_wbl2", cache_control},
    {"buffer_inv", cache_control},
};

}  // namespace

HandlerTable buffer_handlers() { return {kHandlers, sizeof(kHandlers) / sizeof(*kHandlers)}; }

}  // namespace cdna
