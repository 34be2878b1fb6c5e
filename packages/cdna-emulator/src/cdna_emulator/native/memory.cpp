// Device memory, LDS and private memory as the handlers see them; arithmetic of float atomics.
#include "memory.h"

#include <cmath>

namespace cdna {

namespace {

// In detail1 of an out-of-bounds finding, above the number of bytes.
constexpr uint64_t kWriteDetail = 1ull << 32;

bool in_lds(Wave& w, int lane, uint32_t address, uint32_t bytes) {
  uint32_t size = w.group->lds_bytes;
  if (address <= size && size - address >= bytes) return true;
  report(w, FindingKind::kLdsOutOfBounds, lane, address, bytes);
  return false;
}

}  // namespace

uint8_t* translate(Wave& w, int lane, uint64_t address, uint32_t bytes, bool is_write) {
  uint8_t* host = find_host(*w.machine->config, address, bytes, is_write);
  if (host == nullptr) {
    report(w, FindingKind::kOutOfBounds, lane, address, bytes | (is_write ? kWriteDetail : 0));
  }
  return host;
}

uint8_t* scratch_memory(Wave& w, int lane, uint64_t offset, uint32_t bytes) {
  if (offset <= w.scratch_bytes && w.scratch_bytes - offset >= bytes) {
    return w.scratch + static_cast<size_t>(lane) * w.scratch_bytes + offset;
  }
  report(w, FindingKind::kScratchOutOfBounds, lane, offset, bytes);
  return nullptr;
}

bool lds_load(Wave& w, int lane, uint32_t address, uint32_t bytes, void* value) {
  if (!in_lds(w, lane, address, bytes)) return false;
  if (w.machine->is_tracked) track_lds(*w.machine, w, lane, address, bytes, Access::kLoad);
  std::memcpy(value, w.group->lds + address, bytes);
  return true;
}

bool lds_store(Wave& w, int lane, uint32_t address, uint32_t bytes, const void* value) {
  if (!in_lds(w, lane, address, bytes)) return false;
  if (w.machine->is_tracked) {
    track_lds(*w.machine, w, lane, address, bytes, Access::kStore, value);
  }
  std::memcpy(w.group->lds + address, value, bytes);
  return true;
}

uint8_t* lds_atomic(Wave& w, int lane, uint32_t address, uint32_t bytes) {
  if (!in_lds(w, lane, address, bytes) || !is_aligned(w, lane, address, bytes)) return nullptr;
  if (w.machine->is_tracked) track_lds(*w.machine, w, lane, address, bytes, Access::kAtomic);
  return w.group->lds + address;
}

void lds_dma(Wave& w, int lane, uint32_t address, uint32_t bytes, const void* value) {
  if (!in_lds(w, lane, address, bytes)) return;
  Machine& m = *w.machine;
  if (m.is_tracked) track_copy(m, w, lane, address, bytes, value);
  if (!m.late_dma) std::memcpy(w.group->lds + address, value, bytes);
}

namespace atomic {

namespace {

// Bits of a float format: the sign, the exponent and the quiet bit.
template <class T, T kSign, T kInfinity, T kQuiet>
struct Bits {
  static bool is_nan(T a) { return (a & ~kSign) > kInfinity; }
  static bool is_signaling(T a) { return is_nan(a) && !(a & kQuiet); }
  static bool is_denormal(T a) { return (a & ~kSign) != 0 && (a & kInfinity) == 0; }
  static T flush(T a) { return is_denormal(a) ? a & kSign : a; }
  // Order of numbers as an order of unsigned integers; -0 comes before +0.
  static T order(T a) { return a & kSign ? ~a : a | kSign; }

  // A quiet NaN loses against every number; a signaling one is returned as quiet.
  static T select(T a, T b, bool flush_inputs, bool is_max) {
    if (is_signaling(a)) return a | kQuiet;
    if (is_signaling(b)) return b | kQuiet;
    if (is_nan(a)) return b;
    if (is_nan(b)) return a;
    T x = order(flush_inputs ? flush(a) : a), y = order(flush_inputs ? flush(b) : b);
    return (is_max ? x >= y : x <= y) ? a : b;
  }

  // NaN operands come back quiet, the first before the second.
  static T nan_of(T a, T b) { return (is_nan(a) ? a : b) | kQuiet; }
};

using Single = Bits<uint32_t, 0x80000000u, 0x7f800000u, 0x00400000u>;
using Double = Bits<uint64_t, 1ull << 63, 0x7ffull << 52, 1ull << 51>;
using HalfFloat = Bits<uint16_t, 0x8000, 0x7c00, 0x0200>;
using Brain = Bits<uint16_t, 0x8000, 0x7f80, 0x0040>;

constexpr uint32_t kSingleNan = 0x7fc00000u;
constexpr uint64_t kDoubleNan = 0x7ff8ull << 48;

float half_to_float(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }

// The sum of two halves is exact enough in a float for one rounding to be right.
uint16_t add_f16(uint16_t a, uint16_t b, bool flush_inputs, bool flush_outputs) {
  if (HalfFloat::is_nan(a) || HalfFloat::is_nan(b)) return HalfFloat::nan_of(a, b);
  if (flush_inputs) a = HalfFloat::flush(a), b = HalfFloat::flush(b);
  float sum = half_to_float(a) + half_to_float(b);
  if (std::isnan(sum)) return 0x7e00;
  uint16_t bits = std::bit_cast<uint16_t>(static_cast<_Float16>(sum));
  return flush_outputs ? HalfFloat::flush(bits) : bits;
}

uint16_t add_bf16(uint16_t a, uint16_t b, bool flush_inputs, bool flush_outputs) {
  if (Brain::is_nan(a) || Brain::is_nan(b)) return Brain::nan_of(a, b);
  if (flush_inputs) a = Brain::flush(a), b = Brain::flush(b);
  float sum = std::bit_cast<float>(uint32_t{a} << 16) + std::bit_cast<float>(uint32_t{b} << 16);
  if (std::isnan(sum)) return 0x7fc0;
  uint32_t bits = std::bit_cast<uint32_t>(sum);
  uint16_t rounded = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return flush_outputs ? Brain::flush(rounded) : rounded;
}

template <class Add>
uint32_t each_half(uint32_t a, uint32_t b, bool flush_inputs, bool flush_outputs, Add add) {
  uint32_t low = add(static_cast<uint16_t>(a), static_cast<uint16_t>(b), flush_inputs,
                     flush_outputs);
  uint32_t high = add(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16),
                      flush_inputs, flush_outputs);
  return low | high << 16;
}

}  // namespace

uint32_t add_f32(uint32_t a, uint32_t b, bool flush_inputs, bool flush_outputs) {
  if (Single::is_nan(a) || Single::is_nan(b)) return Single::nan_of(a, b);
  if (flush_inputs) a = Single::flush(a), b = Single::flush(b);
  float sum = std::bit_cast<float>(a) + std::bit_cast<float>(b);
  if (std::isnan(sum)) return kSingleNan;
  uint32_t bits = std::bit_cast<uint32_t>(sum);
  return flush_outputs ? Single::flush(bits) : bits;
}

uint64_t add_f64(uint64_t a, uint64_t b) {
  if (Double::is_nan(a) || Double::is_nan(b)) return Double::nan_of(a, b);
  double sum = std::bit_cast<double>(a) + std::bit_cast<double>(b);
  return std::isnan(sum) ? kDoubleNan : std::bit_cast<uint64_t>(sum);
}

uint32_t pk_add_f16(uint32_t a, uint32_t b, bool flush_inputs, bool flush_outputs) {
  return each_half(a, b, flush_inputs, flush_outputs, add_f16);
}

uint32_t pk_add_bf16(uint32_t a, uint32_t b, bool flush_inputs, bool flush_outputs) {
  return each_half(a, b, flush_inputs, flush_outputs, add_bf16);
}

uint32_t min_f32(uint32_t a, uint32_t b, bool flush) { return Single::select(a, b, flush, false); }
uint32_t max_f32(uint32_t a, uint32_t b, bool flush) { return Single::select(a, b, flush, true); }
uint64_t min_f64(uint64_t a, uint64_t b, bool flush) { return Double::select(a, b, flush, false); }
uint64_t max_f64(uint64_t a, uint64_t b, bool flush) { return Double::select(a, b, flush, true); }

}  // namespace atomic

}  // namespace cdna
