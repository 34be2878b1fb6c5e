// What the memory instructions share: how values lie in memory and registers, and atomic operations.
//
// Register halves that a d16 load does not fill become zero: so the CDNA3 and CDNA4 documents say
// for memory with ECC, which these accelerators always have ("16-bit Memory Operations").
#pragma once

#include <bit>
#include <type_traits>

#include "core.h"
#include "machine_state.h"

namespace cdna {

enum class Half { kWhole, kLow, kHigh };

// --- lanes ---

template <class Body>
inline void for_each_lane(uint64_t lanes, Body body) {
  for (; lanes; lanes &= lanes - 1) body(std::countr_zero(lanes));
}

inline uint64_t active_bytes(const Wave& w, uint64_t bytes) {
  return static_cast<uint64_t>(std::popcount(w.exec())) * bytes;
}

// --- registers ---

inline uint32_t scalar_value(const Wave& w, const Operand& o) {
  if (o.kind == kSgpr) return w.s[o.index];
  return o.kind == kConstant ? static_cast<uint32_t>(o.bits) : 0;
}

inline uint64_t vector_pair(const Wave& w, const Operand& o, int lane) {
  return w.v[o.index].lane[lane] | static_cast<uint64_t>(w.v[o.index + 1].lane[lane]) << 32;
}

// Bytes in memory to the 32-bit value of a register.
template <int kBytes, bool kSigned, Half kHalf>
inline uint32_t extend(const void* bytes) {
  static_assert(kBytes <= 4);
  uint32_t value = 0;
  std::memcpy(&value, bytes, kBytes);
  if constexpr (kSigned) {
    constexpr int shift = 32 - 8 * kBytes;
    value = static_cast<uint32_t>(static_cast<int32_t>(value << shift) >> shift);
  }
  if constexpr (kHalf == Half::kLow) value &= 0xffff;
  if constexpr (kHalf == Half::kHigh) value <<= 16;
  return value;
}

// Writes the registers that a load of one lane fills; `bytes` nullptr loads zero.
template <int kBytes, bool kSigned, Half kHalf>
inline void put(Wave& w, int reg, int lane, const uint8_t* bytes) {
  if constexpr (kBytes <= 4) {
    w.v[reg].lane[lane] = bytes ? extend<kBytes, kSigned, kHalf>(bytes) : 0;
  } else {
    for (int i = 0; i < kBytes / 4; ++i) {
      uint32_t value = 0;
      if (bytes) std::memcpy(&value, bytes + 4 * i, 4);
      w.v[reg + i].lane[lane] = value;
    }
  }
}

// Bytes that a store of one lane writes.
template <int kBytes, Half kHalf>
inline void take(const Wave& w, int reg, int lane, uint8_t* bytes) {
  if constexpr (kBytes <= 4) {
    uint32_t value = w.v[reg].lane[lane];
    if constexpr (kHalf == Half::kHigh) value >>= 16;
    std::memcpy(bytes, &value, kBytes);
  } else {
    for (int i = 0; i < kBytes / 4; ++i) std::memcpy(bytes + 4 * i, &w.v[reg + i].lane[lane], 4);
  }
}

// --- device memory ---

inline uint8_t* find_host(const RunConfig& c, uint64_t address, uint32_t bytes, bool is_write) {
  uint64_t index = address >> 40;
  if (index >= c.slot_count) return nullptr;
  const MemorySlot& slot = c.slots[index];
  uint64_t offset = address - slot.base;
  if (offset >= slot.size || slot.size - offset < bytes || (is_write && !slot.writable)) {
    return nullptr;
  }
  return slot.host + offset;
}

// As `translate`, with the usual case in line.
inline uint8_t* reach(Wave& w, int lane, uint64_t address, uint32_t bytes, bool is_write) {
  uint8_t* host = find_host(*w.machine->config, address, bytes, is_write);
  return host ? host : translate(w, lane, address, bytes, is_write);
}

// Private memory of one lane, or nullptr after a report.
uint8_t* scratch_memory(Wave& w, int lane, uint64_t offset, uint32_t bytes);

// Whether an address is aligned, reporting it when not.
inline bool is_aligned(Wave& w, int lane, uint64_t address, uint32_t alignment) {
  if (address % alignment == 0) return true;
  report(w, FindingKind::kMisaligned, lane, address, alignment);
  return false;
}

// --- copies to LDS ---

// Where lane 0 of a copy lands: M0 plus the instruction's offset, which also counts in memory.
inline uint32_t copy_base(const Wave& w, const Instruction& in, uint32_t m0_mask) {
  return (w.s[kM0] & m0_mask) + static_cast<uint32_t>(in.offset);
}

// Lanes lie 4 bytes apart, those of 96 and 128 bits 16. What is narrower than a dword is extended.
template <int kBytes, bool kSigned>
inline void copy_to_lds(Wave& w, int lane, uint32_t base, const uint8_t* bytes) {
  uint32_t address = base + static_cast<uint32_t>(lane) * (kBytes <= 4 ? 4 : 16);
  if constexpr (kBytes <= 4) {
    uint32_t value = bytes ? extend<kBytes, kSigned, Half::kWhole>(bytes) : 0;
    lds_dma(w, lane, address, 4, &value);
  } else {
    static constexpr uint8_t kZero[16] = {};
    lds_dma(w, lane, address, kBytes, bytes ? bytes : kZero);
  }
}

// --- atomic operations: operation(old value, data of the instruction) -> new value ---

// data[0] is the operand, data[1] what `cmpswap` compares with.
template <class T>
struct AtomicData {
  T value;
  T compare;
};

namespace atomic {

template <class T>
using Signed = std::make_signed_t<T>;

struct Swap {
  template <class T> T operator()(T, AtomicData<T> d) const { return d.value; }
};
struct CompareSwap {
  template <class T> T operator()(T old, AtomicData<T> d) const {
    return old == d.compare ? d.value : old;
  }
};
struct Add {
  template <class T> T operator()(T old, AtomicData<T> d) const { return old + d.value; }
};
struct Sub {
  template <class T> T operator()(T old, AtomicData<T> d) const { return old - d.value; }
};
struct ReverseSub {
  template <class T> T operator()(T old, AtomicData<T> d) const { return d.value - old; }
};
struct MinUnsigned {
  template <class T> T operator()(T old, AtomicData<T> d) const {
    return old < d.value ? old : d.value;
  }
};
struct MaxUnsigned {
  template <class T> T operator()(T old, AtomicData<T> d) const {
    return old > d.value ? old : d.value;
  }
};
struct MinSigned {
  template <class T> T operator()(T old, AtomicData<T> d) const {
    return static_cast<Signed<T>>(old) < static_cast<Signed<T>>(d.value) ? old : d.value;
  }
};
struct MaxSigned {
  template <class T> T operator()(T old, AtomicData<T> d) const {
    return static_cast<Signed<T>>(old) > static_cast<Signed<T>>(d.value) ? old : d.value;
  }
};
struct And {
  template <class T> T operator()(T old, AtomicData<T> d) const { return old & d.value; }
};
struct Or {
  template <class T> T operator()(T old, AtomicData<T> d) const { return old | d.value; }
};
struct Xor {
  template <class T> T operator()(T old, AtomicData<T> d) const { return old ^ d.value; }
};
struct Increment {  // wraps to 0 past the operand
  template <class T> T operator()(T old, AtomicData<T> d) const {
    return old >= d.value ? 0 : old + 1;
  }
};
struct Decrement {  // wraps to the operand
  template <class T> T operator()(T old, AtomicData<T> d) const {
    return old == 0 || old > d.value ? d.value : old - 1;
  }
};

// Floats. What differs between LDS and memory is which denormals are flushed: "Float Memory
// Atomics" of the CDNA3 and CDNA4 documents.
uint32_t add_f32(uint32_t a, uint32_t b, bool flush_inputs, bool flush_outputs);
uint64_t add_f64(uint64_t a, uint64_t b);
uint32_t pk_add_f16(uint32_t a, uint32_t b, bool flush_inputs, bool flush_outputs);
uint32_t pk_add_bf16(uint32_t a, uint32_t b, bool flush_inputs, bool flush_outputs);
uint32_t min_f32(uint32_t a, uint32_t b, bool flush);
uint32_t max_f32(uint32_t a, uint32_t b, bool flush);
uint64_t min_f64(uint64_t a, uint64_t b, bool flush);
uint64_t max_f64(uint64_t a, uint64_t b, bool flush);

// In memory additions of f32 flush denormals, the others keep them.
struct AddF32 {
  uint32_t operator()(uint32_t old, AtomicData<uint32_t> d) const {
    return add_f32(old, d.value, true, true);
  }
};
struct PkAddF16 {
  uint32_t operator()(uint32_t old, AtomicData<uint32_t> d) const {
    return pk_add_f16(old, d.value, false, false);
  }
};
struct PkAddBf16 {
  uint32_t operator()(uint32_t old, AtomicData<uint32_t> d) const {
    return pk_add_bf16(old, d.value, false, false);
  }
};
struct AddF64 {
  uint64_t operator()(uint64_t old, AtomicData<uint64_t> d) const {
    return add_f64(old, d.value);
  }
};
struct MinF64 {
  uint64_t operator()(uint64_t old, AtomicData<uint64_t> d) const {
    return min_f64(old, d.value, false);
  }
};
struct MaxF64 {
  uint64_t operator()(uint64_t old, AtomicData<uint64_t> d) const {
    return max_f64(old, d.value, false);
  }
};

}  // namespace atomic

// Replaces a value in memory that other threads may change too; returns the old one.
template <class T, class Operation>
inline T exchange(uint8_t* host, AtomicData<T> data, Operation operation) {
  T* memory = reinterpret_cast<T*>(host);
  T old = __atomic_load_n(memory, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(memory, &old, operation(old, data), true, __ATOMIC_SEQ_CST,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
inline T register_value(const Wave& w, int reg, int lane) {
  T value = w.v[reg].lane[lane];
  if constexpr (sizeof(T) == 8) value |= static_cast<T>(w.v[reg + 1].lane[lane]) << 32;
  return value;
}

template <class T>
inline void set_register_value(Wave& w, int reg, int lane, T value) {
  w.v[reg].lane[lane] = static_cast<uint32_t>(value);
  if constexpr (sizeof(T) == 8) w.v[reg + 1].lane[lane] = static_cast<uint32_t>(value >> 32);
}

// Operand of a memory atomic: the value, followed by what a compare-and-swap compares with.
template <class T, bool kCompares>
inline AtomicData<T> atomic_data(const Wave& w, int reg, int lane) {
  AtomicData<T> data{register_value<T>(w, reg, lane), 0};
  if constexpr (kCompares) data.compare = register_value<T>(w, reg + sizeof(T) / 4, lane);
  return data;
}

}  // namespace cdna
