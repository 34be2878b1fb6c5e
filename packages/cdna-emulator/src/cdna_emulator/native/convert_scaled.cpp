// Conversions with a scale (v_cvt_scalef32_*), gfx950 only.
//
// The last source is the scale: the power of two that its f32 exponent field names, NaN for the
// field 255. Narrowing divides by it, widening multiplies. fp8 and bf8 are the OCP forms here. fp8
// and bf8 saturate with FP16_OVFL alone, fp6, bf6 and fp4 always. Results are rounded once, to
// nearest even or stochastically; of several values in one instruction each next one takes the next
// number of the generator behind v_prng_b32.
//
// Source: AMD "CDNA4 ISA", vector instructions; LLVM for the meaning of op_sel, whose bits 0 and 1
// select the part of a packed source, bits 2 and 3 the part of a packed destination.

#include "formats.h"
#include "operands.h"

namespace cdna {
namespace {

inline double scale_of(uint32_t bits) { return decode_e8m0(bits >> 23); }

// --- the wide side: f32, f16 or bf16 ---

enum class Wide { kF32, kF16, kBf16 };

constexpr int wide_bits(Wide kind) { return kind == Wide::kF32 ? 32 : 16; }

template <Wide kKind>
double wide_value(uint32_t bits) {
  if constexpr (kKind == Wide::kF32) return as_float(bits);
  if constexpr (kKind == Wide::kF16) return half_to_float(bits & 0xffff);
  if constexpr (kKind == Wide::kBf16) return as_float(bits << 16);
}

template <Wide kKind>
uint32_t wide_code(double value, bool saturate) {
  if constexpr (kKind == Wide::kF32) return as_bits(static_cast<float>(value));
  if constexpr (kKind == Wide::kF16) {
    return encode(kFormatF16, value, Rounding::kNearestEven, saturate);
  }
  if constexpr (kKind == Wide::kBf16) {
    // Narrow values times a power of two have so few digits that f32 holds them exactly.
    return encode_nearest<kFormatBf16>(as_bits(static_cast<float>(value)), false);
  }
}

inline void write_part(Wave& w, const Instruction& in, uint32_t* r, int width, int shift) {
  uint32_t* to = w.v[vgpr_number(w, in.op[0], kDestination)].lane;
  uint32_t field = ((1u << width) - 1) << shift;
  for (int lane = 0; lane < kLanes; ++lane) {
    r[lane] = (to[lane] & ~field) | (r[lane] << shift & field);
  }
  store_lanes(to, r, write_mask(w, in));
}

// Bit where a packed part of `width` bits begins.
inline int destination_shift(const Instruction& in, int width) {
  return width == 16 ? in.op_sel >> 3 << 4 : (in.op_sel >> 2 & 3) * 8;
}
inline int source_shift(const Instruction& in, int width) {
  return width == 16 ? (in.op_sel & 1) * 16 : (in.op_sel & 3) * 8;
}

// --- narrowing one or two values ---

template <Format F>
uint32_t narrow(const Wave& w, double value, double scale) {
  return encode(F, value / scale, Rounding::kNearestEven, w.mode.saturate16);
}

// v_cvt_scalef32_pk_*_f32: two sources.
template <Format F>
void narrow_two(Wave& w, const Instruction& in) {
  constexpr int kWidth = 2 * F.bits();
  Lanes buffer[3], result;
  const uint32_t* x = fetch_f32(w, in, in.op[1], 0, buffer[0]);
  const uint32_t* y = fetch_f32(w, in, in.op[2], 1, buffer[1]);
  const uint32_t* scales = fetch_f32_bits(w, in, in.op[3], 2, buffer[2]);
  for (int lane = 0; lane < kLanes; ++lane) {
    double scale = scale_of(scales[lane]);
    result.lane[lane] = narrow<F>(w, as_float(x[lane]), scale) |
                        narrow<F>(w, as_float(y[lane]), scale) << F.bits();
  }
  write_part(w, in, result.lane, kWidth, destination_shift(in, kWidth));
}

// v_cvt_scalef32_pk_*_{f16,bf16}: both halves of one source.
template <Format F, Wide kKind>
void narrow_halves(Wave& w, const Instruction& in) {
  constexpr int kWidth = 2 * F.bits();
  Lanes buffer[2], result;
  const uint32_t* x = fetch32(w, in, in.op[1], 0, buffer[0]);
  const uint32_t* scales = fetch_f32_bits(w, in, in.op[2], 1, buffer[1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    double scale = scale_of(scales[lane]);
    result.lane[lane] = narrow<F>(w, wide_value<kKind>(x[lane]), scale) |
                        narrow<F>(w, wide_value<kKind>(x[lane] >> 16), scale) << F.bits();
  }
  write_part(w, in, result.lane, kWidth, destination_shift(in, kWidth));
}

template <Format F>
uint32_t narrow_randomly(const Wave& w, double value, double scale, uint32_t random) {
  return encode(F, value / scale, Rounding::kStochastic, w.mode.saturate16, random);
}

// v_cvt_scalef32_sr_{fp8,bf8}_*: one value into one byte.
template <Format F, Wide kKind>
void narrow_one_randomly(Wave& w, const Instruction& in) {
  Lanes buffer[3], result;
  const uint32_t* x = kKind == Wide::kF32 ? fetch_f32(w, in, in.op[1], 0, buffer[0])
                                          : fetch32(w, in, in.op[1], 0, buffer[0]);
  const uint32_t* random = fetch32(w, in, in.op[2], 1, buffer[1]);
  const uint32_t* scales = fetch_f32_bits(w, in, in.op[3], 2, buffer[2]);
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lane[lane] = narrow_randomly<F>(w, wide_value<kKind>(x[lane]), scale_of(scales[lane]),
                                           random[lane]);
  }
  write_part(w, in, result.lane, 8, destination_shift(in, 8));
}

// v_cvt_scalef32_sr_pk_fp4_*: a pair of registers, or the halves of one, into one byte.
template <Format F, Wide kKind>
void narrow_pair_randomly(Wave& w, const Instruction& in) {
  Lanes buffer[3], result;
  WideLanes wide;
  const uint32_t* random = fetch32(w, in, in.op[2], 1, buffer[1]);
  const uint32_t* scales = fetch_f32_bits(w, in, in.op[3], 2, buffer[2]);
  if constexpr (kKind == Wide::kF32) {
    fetch64(w, in, in.op[1], 0, wide);
  } else {
    const uint32_t* x = fetch32(w, in, in.op[1], 0, buffer[0]);
    for (int lane = 0; lane < kLanes; ++lane) {
      wide.lane[lane] = (x[lane] & 0xffff) | static_cast<uint64_t>(x[lane] >> 16) << 32;
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    double scale = scale_of(scales[lane]);
    double low = wide_value<kKind>(static_cast<uint32_t>(wide.lane[lane]));
    double high = wide_value<kKind>(static_cast<uint32_t>(wide.lane[lane] >> 32));
    result.lane[lane] =
        narrow_randomly<F>(w, low, scale, random[lane]) |
        narrow_randomly<F>(w, high, scale, next_random(random[lane])) << F.bits();
  }
  write_part(w, in, result.lane, 2 * F.bits(), destination_shift(in, 2 * F.bits()));
}

// --- widening one or two values ---

template <Format F>
double widened(uint32_t code, double scale) {
  return kDecodeTable<F>.value[code & ((1u << F.bits()) - 1)] * scale;
}

// v_cvt_scalef32_{f32,f16}_{fp8,bf8}
template <Format F, Wide kKind>
void widen_one(Wave& w, const Instruction& in) {
  Lanes buffer[2], result;
  const uint32_t* x = fetch32(w, in, in.op[1], 0, buffer[0]);
  const uint32_t* scales = fetch_f32_bits(w, in, in.op[2], 1, buffer[1]);
  int shift = source_shift(in, 8);
  for (int lane = 0; lane < kLanes; ++lane) {
    double value = widened<F>(x[lane] >> shift, scale_of(scales[lane]));
    result.lane[lane] = wide_code<kKind>(value, w.mode.saturate16);
  }
  if constexpr (kKind == Wide::kF32) {
    store_lanes(w.v[vgpr_number(w, in.op[0], kDestination)].lane, result.lane, write_mask(w, in));
  } else {
    write_part(w, in, result.lane, 16, destination_shift(in, 16));
  }
}

// v_cvt_scalef32_pk_{f32,f16,bf16}_{fp8,bf8,fp4}
template <Format F, Wide kKind>
void widen_two(Wave& w, const Instruction& in) {
  Lanes buffer[2], low, high;
  const uint32_t* x = fetch32(w, in, in.op[1], 0, buffer[0]);
  const uint32_t* scales = fetch_f32_bits(w, in, in.op[2], 1, buffer[1]);
  int shift = source_shift(in, 2 * F.bits());
  for (int lane = 0; lane < kLanes; ++lane) {
    double scale = scale_of(scales[lane]);
    uint32_t codes = x[lane] >> shift;
    low.lane[lane] = wide_code<kKind>(widened<F>(codes, scale), w.mode.saturate16);
    high.lane[lane] = wide_code<kKind>(widened<F>(codes >> F.bits(), scale), w.mode.saturate16);
  }
  int number = vgpr_number(w, in.op[0], kDestination);
  uint64_t mask = write_mask(w, in);
  if constexpr (kKind == Wide::kF32) {
    store_lanes(w.v[number].lane, low.lane, mask);
    store_lanes(w.v[number + 1].lane, high.lane, mask);
  } else {
    for (int lane = 0; lane < kLanes; ++lane) low.lane[lane] |= high.lane[lane] << 16;
    store_lanes(w.v[number].lane, low.lane, mask);
  }
}

// --- 32 values of 6 bits ---

constexpr int kMany = 32;

// One lane's registers as a string of bits.
class BitString {
 public:
  BitString() : words_{} {}

  void append(uint32_t code, int width) {
    int word = position_ >> 5, shift = position_ & 31;
    words_[word] |= code << shift;
    if (shift + width > 32) words_[word + 1] |= code >> (32 - shift);
    position_ += width;
  }
  uint32_t take(int width) {
    int word = position_ >> 5, shift = position_ & 31;
    uint64_t both = words_[word] | static_cast<uint64_t>(words_[word + 1]) << 32;
    position_ += width;
    return static_cast<uint32_t>(both >> shift) & static_cast<uint32_t>((1ull << width) - 1);
  }
  void load(const Wave& w, int number, int count, int lane) {
    for (int r = 0; r < count; ++r) words_[r] = w.v[number + r].lane[lane];
  }
  void store(Wave& w, int number, int count, int lane) const {
    for (int r = 0; r < count; ++r) w.v[number + r].lane[lane] = words_[r];
  }

 private:
  uint32_t words_[kMany + 1];
  int position_ = 0;
};

// v_cvt_scalef32_[sr_]pk32_{fp6,bf6}_{f32,f16,bf16}
template <Format F, Wide kKind, bool kRandom>
void narrow_many(Wave& w, const Instruction& in) {
  Lanes buffer[2];
  const uint32_t* random = kRandom ? fetch32(w, in, in.op[2], 1, buffer[0]) : nullptr;
  const uint32_t* scales = fetch_f32_bits(w, in, in.op[kRandom ? 3 : 2], 1 + kRandom, buffer[1]);
  uint64_t mask = w.exec();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    double scale = scale_of(scales[lane]);
    uint32_t state = kRandom ? random[lane] : 0;
    BitString wide, packed;
    wide.load(w, in.op[1].index, kMany * wide_bits(kKind) / 32, lane);
    for (int k = 0; k < kMany; ++k) {
      double value = wide_value<kKind>(wide.take(wide_bits(kKind)));
      if constexpr (kRandom) {
        packed.append(narrow_randomly<F>(w, value, scale, state), F.bits());
        state = next_random(state);
      } else {
        packed.append(narrow<F>(w, value, scale), F.bits());
      }
    }
    packed.store(w, in.op[0].index, kMany * F.bits() / 32, lane);
  }
}

// v_cvt_scalef32_2xpk16_{fp6,bf6}_f32: the values of both sources alternate.
template <Format F>
void narrow_interleaved(Wave& w, const Instruction& in) {
  Lanes buffer;
  const uint32_t* scales = fetch_f32_bits(w, in, in.op[3], 2, buffer);
  uint64_t mask = w.exec();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    double scale = scale_of(scales[lane]);
    BitString packed;
    for (int k = 0; k < kMany / 2; ++k) {
      for (int source = 1; source <= 2; ++source) {
        double value = as_float(w.v[in.op[source].index + k].lane[lane]);
        packed.append(narrow<F>(w, value, scale), F.bits());
      }
    }
    packed.store(w, in.op[0].index, kMany * F.bits() / 32, lane);
  }
}

// v_cvt_scalef32_pk32_{f32,f16,bf16}_{fp6,bf6}
template <Format F, Wide kKind>
void widen_many(Wave& w, const Instruction& in) {
  Lanes buffer;
  const uint32_t* scales = fetch_f32_bits(w, in, in.op[2], 1, buffer);
  uint64_t mask = w.exec();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    double scale = scale_of(scales[lane]);
    BitString packed, wide;
    packed.load(w, in.op[1].index, kMany * F.bits() / 32, lane);
    for (int k = 0; k < kMany; ++k) {
      double value = widened<F>(packed.take(F.bits()), scale);
      wide.append(wide_code<kKind>(value, w.mode.saturate16), wide_bits(kKind));
    }
    wide.store(w, in.op[0].index, kMany * wide_bits(kKind) / 32, lane);
  }
}

constexpr Format kFp8 = kFormatE4M3, kBf8 = kFormatE5M2, kFp6 = kFormatE2M3, kBf6 = kFormatE3M2,
                 kFp4 = kFormatE2M1;
using enum Wide;

const NamedHandler kHandlers[] = {
    {"v_cvt_scalef32_pk_fp8_f32", narrow_two<kFp8>},
    {"v_cvt_scalef32_pk_bf8_f32", narrow_two<kBf8>},
    {"v_cvt_scalef32_pk_fp4_f32", narrow_two<kFp4>},
    {"v_cvt_scalef32_pk_fp8_f16", narrow_halves<kFp8, kF16>},
    {"v_cvt_scalef32_pk_bf8_f16", narrow_halves<kBf8, kF16>},
    {"v_cvt_scalef32_pk_fp4_f16", narrow_halves<kFp4, kF16>},
    {"v_cvt_scalef32_pk_fp8_bf16", narrow_halves<kFp8, kBf16>},
    {"v_cvt_scalef32_pk_bf8_bf16", narrow_halves<kBf8, kBf16>},
    {"v_cvt_scalef32_pk_fp4_bf16", narrow_halves<kFp4, kBf16>},
    {"v_cvt_scalef32_sr_fp8_f32", narrow_one_randomly<kFp8, kF32>},
    {"v_cvt_scalef32_sr_bf8_f32", narrow_one_randomly<kBf8, kF32>},
    {"v_cvt_scalef32_sr_fp8_f16", narrow_one_randomly<kFp8, kF16>},
    {"v_cvt_scalef32_sr_bf8_f16", narrow_one_randomly<kBf8, kF16>},
    {"v_cvt_scalef32_sr_fp8_bf16", narrow_one_randomly<kFp8, kBf16>},
    {"v_cvt_scalef32_sr_bf8_bf16", narrow_one_randomly<kBf8, kBf16>},
    {"v_cvt_scalef32_sr_pk_fp4_f32", narrow_pair_randomly<kFp4, kF32>},
    {"v_cvt_scalef32_sr_pk_fp4_f16", narrow_pair_randomly<kFp4, kF16>},
    {"v_cvt_scalef32_sr_pk_fp4_bf16", narrow_pair_randomly<kFp4, kBf16>},
    {"v_cvt_scalef32_f32_fp8", widen_one<kFp8, kF32>},
    {"v_cvt_scalef32_f32_bf8", widen_one<kBf8, kF32>},
    {"v_cvt_scalef32_f16_fp8", widen_one<kFp8, kF16>},
    {"v_cvt_scalef32_f16_bf8", widen_one<kBf8, kF16>},
    {"v_cvt_scalef32_pk_f32_fp8", widen_two<kFp8, kF32>},
    {"v_cvt_scalef32_pk_f32_bf8", widen_two<kBf8, kF32>},
    {"v_cvt_scalef32_pk_f32_fp4", widen_two<kFp4, kF32>},
    {"v_cvt_scalef32_pk_f16_fp8", widen_two<kFp8, kF16>},
    {"v_cvt_scalef32_pk_f16_bf8", widen_two<kBf8, kF16>},
    {"v_cvt_scalef32_pk_f16_fp4", widen_two<kFp4, kF16>},
    {"v_cvt_scalef32_pk_bf16_fp8", widen_two<kFp8, kBf16>},
    {"v_cvt_scalef32_pk_bf16_bf8", widen_two<kBf8, kBf16>},
    {"v_cvt_scalef32_pk_bf16_fp4", widen_two<kFp4, kBf16>},
    {"v_cvt_scalef32_2xpk16_fp6_f32", narrow_interleaved<kFp6>},
    {"v_cvt_scalef32_2xpk16_bf6_f32", narrow_interleaved<kBf6>},
    {"v_cvt_scalef32_pk32_fp6_f16", narrow_many<kFp6, kF16, false>},
    {"v_cvt_scalef32_pk32_bf6_f16", narrow_many<kBf6, kF16, false>},
    {"v_cvt_scalef32_pk32_fp6_bf16", narrow_many<kFp6, kBf16, false>},
    {"v_cvt_scalef32_pk32_bf6_bf16", narrow_many<kBf6, kBf16, false>},
    {"v_cvt_scalef32_sr_pk32_fp6_f32", narrow_many<kFp6, kF32, true>},
    {"v_cvt_scalef32_sr_pk32_bf6_f32", narrow_many<kBf6, kF32, true>},
    {"v_cvt_scalef32_sr_pk32_fp6_f16", narrow_many<kFp6, kF16, true>},
    {"v_cvt_scalef32_sr_pk32_bf6_f16", narrow_many<kBf6, kF16, true>},
    {"v_cvt_scalef32_sr_pk32_fp6_bf16", narrow_many<kFp6, kBf16, true>},
    {"v_cvt_scalef32_sr_pk32_bf6_bf16", narrow_many<kBf6, kBf16, true>},
    {"v_cvt_scalef32_pk32_f32_fp6", widen_many<kFp6, kF32>},
    {"v_cvt_scalef32_pk32_f32_bf6", widen_many<kBf6, kF32>},
    {"v_cvt_scalef32_pk32_f16_fp6", widen_many<kFp6, kF16>},
    {"v_cvt_scalef32_pk32_f16_bf6", widen_many<kBf6, kF16>},
    {"v_cvt_scalef32_pk32_bf16_fp6", widen_many<kFp6, kBf16>},
    {"v_cvt_scalef32_pk32_bf16_bf6", widen_many<kBf6, kBf16>},
};

}  // namespace

HandlerTable convert_scaled_handlers() {
  return {kHandlers, sizeof(kHandlers) / sizeof(kHandlers[0])};
}

}  // namespace cdna
