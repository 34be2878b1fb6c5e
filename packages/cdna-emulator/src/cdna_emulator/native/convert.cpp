// Conversions between number formats (v_cvt_*), and v_prng_b32.
//
// Rounding: results of f32 follow MODE's field for f32, results of f16 and f64 the other one;
// conversions to integers truncate; bf16, fp8 and bf8 round to nearest even. fp8 and bf8 are the
// FNUZ forms on gfx942 and the OCP forms on gfx950. With FP16_OVFL set, finite values that overflow
// f16, fp8 or bf8 become the largest number. Infinities are kept where the format has them and
// become NaN where not; the documents promise this for f16 and we read it into fp8.
//
// Stochastic rounding (v_cvt_sr_*) adds the highest bits of the random operand below the last place
// and truncates.
//
// Sources: AMD "CDNA3 ISA" and "CDNA4 ISA", vector instructions.

#include <limits>

#include "formats.h"
#include "lanewise.h"
#include "operands.h"

namespace cdna {
namespace {

// --- integers to floats ---

template <auto F>
void to_f32(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch32(w, in, in.op[1], 0, buffer);
  {
    RoundingScope rounding(w.mode.round32);
    for (int lane = 0; lane < kLanes; ++lane) result.lane[lane] = as_bits(F(x[lane]));
  }
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}

inline float f32_of_i32(uint32_t x) { return static_cast<float>(static_cast<int32_t>(x)); }
void f32_of_u32(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch32(w, in, in.op[1], 0, buffer);
  {
    RoundingScope rounding(w.mode.round32);
    for (int lane = 0; lane < kLanes; ++lane) {
      result.lane[lane] = as_bits(static_cast<float>(x[lane]));
    }
  }
  // The compiler's vector code subtracts equal numbers for 0, which rounding down makes -0.
  for (int lane = 0; lane < kLanes; ++lane) result.lane[lane] &= 0x7fffffff;
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}
template <int kByte>
float f32_of_byte(uint32_t x) {
  return static_cast<float>(static_cast<int32_t>(x >> (8 * kByte) & 255));
}
// A signed 4-bit number of sixteenths.
inline float f32_of_offset(uint32_t x) {
  return static_cast<float>(static_cast<int32_t>(x << 28) >> 28) * 0.0625f;
}

template <auto F>
void to_f64(Wave& w, const Instruction& in) {
  Lanes buffer;
  WideLanes result;
  const uint32_t* x = fetch32(w, in, in.op[1], 0, buffer);
  for (int lane = 0; lane < kLanes; ++lane) result.lane[lane] = as_bits(F(x[lane]));
  finish_f64(w, in, result.lane);
  write64(w, in, in.op[0], result.lane);
}

inline double f64_of_i32(uint32_t x) { return static_cast<int32_t>(x); }
inline double f64_of_u32(uint32_t x) { return x == 0 ? 0.0 : static_cast<double>(x); }

template <bool kSigned>
void f16_of_16(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch16(w, in, in.op[1], 0, buffer);
  {
    RoundingScope rounding(w.mode.round64);
    for (int lane = 0; lane < kLanes; ++lane) {
      // Up to 65535 round to infinity as f16 does.
      float value = static_cast<float>(kSigned ? signed16(x[lane]) : static_cast<int>(x[lane]));
      result.lane[lane] = float_to_half(value);
    }
  }
  finish_f16(w, in, result.lane);
  write16(w, in, in.op[0], result.lane);
}

// --- floats to integers: NaN is 0, the rest saturates ---

template <class Integer>
uint32_t truncated(double x) {
  constexpr double kLow = static_cast<double>(std::numeric_limits<Integer>::min());
  constexpr double kHigh = static_cast<double>(std::numeric_limits<Integer>::max());
  double bounded = x > kLow ? (x < kHigh ? x : kHigh) : kLow;
  auto integer = static_cast<Integer>(bounded);
  return x == x ? static_cast<uint32_t>(integer) : 0;
}

inline double as_is(float x) { return x; }
inline double floor_plus_half(float x) { return __builtin_floorf(x + 0.5f); }
inline double floor_of(float x) { return __builtin_floorf(x); }

template <class Integer, auto F>
void integer_of_f32(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch_f32(w, in, in.op[1], 0, buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = truncated<Integer>(F(as_float(x[lane])));
  }
  write32(w, in, in.op[0], result.lane);
}

template <class Integer>
void integer_of_f64(Wave& w, const Instruction& in) {
  WideLanes buffer;
  Lanes result;
  const uint64_t* x = fetch_f64(w, in, in.op[1], 0, buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = truncated<Integer>(as_double(x[lane]));
  }
  write32(w, in, in.op[0], result.lane);
}

template <class Integer>
void integer_of_f16(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch_f16(w, in, in.op[1], 0, buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = truncated<Integer>(half_to_float(x[lane])) & 0xffff;
  }
  write16(w, in, in.op[0], result.lane);
}

// Fractions of the largest integer, to nearest even.
template <bool kSigned>
uint32_t normalised(float x) {
  float low = kSigned ? -1.0f : 0.0f, scale = kSigned ? 32767.0f : 65535.0f;
  float bounded = x > low ? (x < 1.0f ? x : 1.0f) : low;
  bounded = x == x ? bounded : 0.0f;
  return static_cast<uint32_t>(static_cast<int32_t>(__builtin_rintf(bounded * scale))) & 0xffff;
}

template <bool kSigned>
void norm_of_f16(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch_f16(w, in, in.op[1], 0, buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = normalised<kSigned>(half_to_float(x[lane]));
  }
  write16(w, in, in.op[0], result.lane);
}

// --- floats to wider or narrower floats ---

void f32_of_f16(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch_f16(w, in, in.op[1], 0, buffer);
  for (int lane = 0; lane < kLanes; ++lane) result.lane[lane] = as_bits(half_to_float(x[lane]));
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}

void f32_of_bf16(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch16(w, in, in.op[1], 0, buffer);
  uint32_t keep = in.op[1].flags & kAbs ? 0x7fffffff : ~0u;
  uint32_t flip = in.op[1].flags & kNeg ? 0x80000000 : 0;
  for (int lane = 0; lane < kLanes; ++lane) result.lane[lane] = (x[lane] << 16 & keep) ^ flip;
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}

void f32_of_f64(Wave& w, const Instruction& in) {
  WideLanes buffer;
  Lanes result;
  const uint64_t* x = fetch_f64(w, in, in.op[1], 0, buffer);
  {
    RoundingScope rounding(w.mode.round32);
    for (int lane = 0; lane < kLanes; ++lane) {
      result.lane[lane] = as_bits(static_cast<float>(as_double(x[lane])));
    }
  }
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}

void f64_of_f32(Wave& w, const Instruction& in) {
  Lanes buffer;
  WideLanes result;
  const uint32_t* x = fetch_f32(w, in, in.op[1], 0, buffer);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = as_bits(static_cast<double>(as_float(x[lane])));
  }
  finish_f64(w, in, result.lane);
  write64(w, in, in.op[0], result.lane);
}

// f16 of each lane, with FP16_OVFL.
inline void halves_of(const Wave& w, uint8_t mode, const uint32_t* x, uint32_t* r) {
  {
    RoundingScope rounding(mode);
    for (int lane = 0; lane < kLanes; ++lane) r[lane] = float_to_half(as_float(x[lane]));
  }
  if (!w.mode.saturate16) return;
  for (int lane = 0; lane < kLanes; ++lane) {
    bool overflows = (r[lane] & 0x7fff) == 0x7c00 && (x[lane] & 0x7fffffff) != 0x7f800000;
    r[lane] -= overflows;
  }
}

void f16_of_f32(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  halves_of(w, w.mode.round64, fetch_f32(w, in, in.op[1], 0, buffer), result.lane);
  finish_f16(w, in, result.lane);
  write16(w, in, in.op[0], result.lane);
}

// --- two results in one register ---

template <auto F>
void pack_f32(Wave& w, const Instruction& in) {
  Lanes buffer[2], result;
  const uint32_t* x = fetch_f32(w, in, in.op[1], 0, buffer[0]);
  const uint32_t* y = fetch_f32(w, in, in.op[2], 1, buffer[1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = F(x[lane]) | F(y[lane]) << 16;
  }
  write32(w, in, in.op[0], result.lane);
}

inline uint32_t bf16_of(uint32_t bits) { return encode_nearest<kFormatBf16>(bits, false); }
template <bool kSigned>
uint32_t normalised_f32(uint32_t bits) {
  return normalised<kSigned>(as_float(bits));
}

// f16 in one rounding whatever MODE says.
template <uint8_t kMode>
void pack_halves(Wave& w, const Instruction& in) {
  Lanes buffer, low, high;
  halves_of(w, kMode, fetch_f32(w, in, in.op[1], 0, buffer), low.lane);
  halves_of(w, kMode, fetch_f32(w, in, in.op[2], 1, buffer), high.lane);
  if (w.mode.flush_outputs64) {
    for (int lane = 0; lane < kLanes; ++lane) {
      low.lane[lane] = flush16(low.lane[lane]);
      high.lane[lane] = flush16(high.lane[lane]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) low.lane[lane] |= high.lane[lane] << 16;
  write32(w, in, in.op[0], low.lane);
}

template <bool kSigned>
void pack_norm_f16(Wave& w, const Instruction& in) {
  Lanes buffer[2], result;
  const uint32_t* x = fetch_f16(w, in, in.op[1], 0, buffer[0]);
  const uint32_t* y = fetch_f16(w, in, in.op[2], 1, buffer[1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = normalised<kSigned>(half_to_float(x[lane])) |
                        normalised<kSigned>(half_to_float(y[lane])) << 16;
  }
  write32(w, in, in.op[0], result.lane);
}

inline uint32_t pack_signed(uint32_t x, uint32_t y) {
  return (clamp_signed16(static_cast<int32_t>(x)) & 0xffff) |
         clamp_signed16(static_cast<int32_t>(y)) << 16;
}
inline uint32_t pack_unsigned(uint32_t x, uint32_t y) {
  return (x < 0xffff ? x : 0xffff) | (y < 0xffff ? y : 0xffff) << 16;
}

inline uint32_t clamp_byte(int32_t x) {
  return static_cast<uint32_t>(x < 0 ? 0 : x > 255 ? 255 : x);
}
inline uint32_t saturated_bytes(uint32_t x) {
  return clamp_byte(signed16(x)) | clamp_byte(static_cast<int32_t>(x) >> 16) << 8;
}

// Rounds as MODE says, saturates, and puts the byte where source 1 says into source 2.
void pack_byte(Wave& w, const Instruction& in) {
  Lanes buffer[3], rounded;
  const uint32_t* x = fetch_f32(w, in, in.op[1], 0, buffer[0]);
  const uint32_t* position = fetch32(w, in, in.op[2], 1, buffer[1]);
  const uint32_t* old = fetch32(w, in, in.op[3], 2, buffer[2]);
  {
    RoundingScope rounding(w.mode.round32);
    for (int lane = 0; lane < kLanes; ++lane) {
      float value = as_float(x[lane]);
      float bounded = value > 0.0f ? (value < 255.0f ? value : 255.0f) : 0.0f;
      rounded.lane[lane] = static_cast<uint32_t>(static_cast<int32_t>(__builtin_rintf(bounded)));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t shift = 8 * (position[lane] & 3);
    rounded.lane[lane] = (old[lane] & ~(255u << shift)) | rounded.lane[lane] << shift;
  }
  write32(w, in, in.op[0], rounded.lane);
}

// --- fp8 and bf8 ---

inline const float* values_of(const Wave& w, bool is_bf8) {
  return is_bf8 ? bf8_values(w.arch) : fp8_values(w.arch);
}

template <bool kBf8>
void f32_of_fp8(Wave& w, const Instruction& in) {
  Lanes buffer, result;
  const uint32_t* x = fetch32(w, in, in.op[1], 0, buffer);  // SDWA selects the byte
  const float* values = values_of(w, kBf8);
  for (int lane = 0; lane < kLanes; ++lane) result.lane[lane] = as_bits(values[x[lane] & 255]);
  finish_f32(w, in, result.lane);
  write32(w, in, in.op[0], result.lane);
}

template <bool kBf8>
void pair_of_fp8(Wave& w, const Instruction& in) {
  Lanes buffer, low, high;
  const uint32_t* x = fetch32(w, in, in.op[1], 0, buffer);
  const float* values = values_of(w, kBf8);
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t codes = x[lane];
    low.lane[lane] = as_bits(values[codes & 255]);
    high.lane[lane] = as_bits(values[codes >> 8 & 255]);
  }
  int number = vgpr_number(w, in.op[0], kDestination);
  uint64_t mask = write_mask(w, in);
  finish_f32(w, in, low.lane);
  finish_f32(w, in, high.lane);
  store_lanes(w.v[number].lane, low.lane, mask);
  store_lanes(w.v[number + 1].lane, high.lane, mask);
}

// Replaces `width` bits from `shift` on of the destination.
inline void write_field(Wave& w, const Instruction& in, uint32_t* r, int width, int shift) {
  uint32_t* to = w.v[vgpr_number(w, in.op[0], kDestination)].lane;
  uint32_t field = ((1u << width) - 1) << shift;
  for (int lane = 0; lane < kLanes; ++lane) {
    r[lane] = (to[lane] & ~field) | (r[lane] << shift & field);
  }
  store_lanes(to, r, write_mask(w, in));
}

template <Format F>
void encode_pairs(const uint32_t* x, const uint32_t* y, bool saturate, uint32_t* r) {
  for (int lane = 0; lane < kLanes; ++lane) {
    r[lane] = encode_nearest<F>(x[lane], saturate) | encode_nearest<F>(y[lane], saturate) << 8;
  }
}

template <Format Ocp, Format Fnuz>
void fp8_pair_of_f32(Wave& w, const Instruction& in) {
  Lanes buffer[2], result;
  const uint32_t* x = fetch_f32(w, in, in.op[1], 0, buffer[0]);
  const uint32_t* y = fetch_f32(w, in, in.op[2], 1, buffer[1]);
  if (w.arch == 950) {
    encode_pairs<Ocp>(x, y, w.mode.saturate16, result.lane);
  } else {
    encode_pairs<Fnuz>(x, y, w.mode.saturate16, result.lane);
  }
  write_field(w, in, result.lane, 16, in.op_sel & 8 ? 16 : 0);
}

inline void round_stochastically(Wave& w, const Instruction& in, const Format& format,
                                 uint32_t* r) {
  Lanes buffer[2];
  const uint32_t* x = fetch_f32(w, in, in.op[1], 0, buffer[0]);
  const uint32_t* random = fetch32(w, in, in.op[2], 1, buffer[1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    r[lane] = encode(format, as_float(x[lane]), Rounding::kStochastic, w.mode.saturate16,
                     random[lane]);
  }
}

template <bool kBf8>
void fp8_stochastic(Wave& w, const Instruction& in) {
  Lanes result;
  const Format& format = kBf8 ? bf8_format(w.arch) : fp8_format(w.arch);
  round_stochastically(w, in, format, result.lane);
  write_field(w, in, result.lane, 8, 8 * (in.op_sel >> 2 & 3));
}

template <Format F>
void half_stochastic(Wave& w, const Instruction& in) {
  Lanes result;
  round_stochastically(w, in, F, result.lane);
  write_field(w, in, result.lane, 16, in.op_sel & 8 ? 16 : 0);
}

const NamedHandler kHandlers[] = {
    {"v_cvt_f32_i32", to_f32<f32_of_i32>},
    {"v_cvt_f32_u32", f32_of_u32},
    {"v_cvt_f32_ubyte0", to_f32<f32_of_byte<0>>},
    {"v_cvt_f32_ubyte1", to_f32<f32_of_byte<1>>},
    {"v_cvt_f32_ubyte2", to_f32<f32_of_byte<2>>},
    {"v_cvt_f32_ubyte3", to_f32<f32_of_byte<3>>},
    {"v_cvt_off_f32_i4", to_f32<f32_of_offset>},
    {"v_cvt_f64_i32", to_f64<f64_of_i32>},
    {"v_cvt_f64_u32", to_f64<f64_of_u32>},
    {"v_cvt_f16_i16", f16_of_16<true>},
    {"v_cvt_f16_u16", f16_of_16<false>},
    {"v_cvt_i32_f32", integer_of_f32<int32_t, as_is>},
    {"v_cvt_u32_f32", integer_of_f32<uint32_t, as_is>},
    {"v_cvt_rpi_i32_f32", integer_of_f32<int32_t, floor_plus_half>},
    {"v_cvt_flr_i32_f32", integer_of_f32<int32_t, floor_of>},
    {"v_cvt_i32_f64", integer_of_f64<int32_t>},
    {"v_cvt_u32_f64", integer_of_f64<uint32_t>},
    {"v_cvt_i16_f16", integer_of_f16<int16_t>},
    {"v_cvt_u16_f16", integer_of_f16<uint16_t>},
    {"v_cvt_norm_i16_f16", norm_of_f16<true>},
    {"v_cvt_norm_u16_f16", norm_of_f16<false>},
    {"v_cvt_f32_f16", f32_of_f16},
    {"v_cvt_f32_bf16", f32_of_bf16},
    {"v_cvt_f32_f64", f32_of_f64},
    {"v_cvt_f64_f32", f64_of_f32},
    {"v_cvt_f16_f32", f16_of_f32},
    {"v_cvt_pk_bf16_f32", pack_f32<bf16_of>},
    {"v_cvt_pk_f16_f32", pack_halves<0>},
    {"v_cvt_pkrtz_f16_f32", pack_halves<3>},
    {"v_cvt_pknorm_i16_f32", pack_f32<normalised_f32<true>>},
    {"v_cvt_pknorm_u16_f32", pack_f32<normalised_f32<false>>},
    {"v_cvt_pknorm_i16_f16", pack_norm_f16<true>},
    {"v_cvt_pknorm_u16_f16", pack_norm_f16<false>},
    {"v_cvt_pk_i16_i32", lanewise32<2, pack_signed>},
    {"v_cvt_pk_u16_u32", lanewise32<2, pack_unsigned>},
    {"v_cvt_pk_u8_f32", pack_byte},
    {"v_sat_pk_u8_i16", lanewise32<1, saturated_bytes>},
    {"v_cvt_f32_fp8", f32_of_fp8<false>},
    {"v_cvt_f32_bf8", f32_of_fp8<true>},
    {"v_cvt_pk_f32_fp8", pair_of_fp8<false>},
    {"v_cvt_pk_f32_bf8", pair_of_fp8<true>},
    {"v_cvt_pk_fp8_f32", fp8_pair_of_f32<kFormatE4M3, kFormatE4M3Fnuz>},
    {"v_cvt_pk_bf8_f32", fp8_pair_of_f32<kFormatE5M2, kFormatE5M2Fnuz>},
    {"v_cvt_sr_fp8_f32", fp8_stochastic<false>},
    {"v_cvt_sr_bf8_f32", fp8_stochastic<true>},
    {"v_cvt_sr_bf16_f32", half_stochastic<kFormatBf16>},
    {"v_cvt_sr_f16_f32", half_stochastic<kFormatF16>},
    {"v_prng_b32", lanewise32<1, next_random>},
};

}  // namespace

HandlerTable convert_handlers() { return {kHandlers, sizeof(kHandlers) / sizeof(kHandlers[0])}; }

}  // namespace cdna
