// Matrix instructions.
//
// A wave multiplies `blocks` pairs of matrices A [size x depth] and B [depth x size] and adds C.
// Lane l holds row (of A) or column (of B) l % size. The lanes above that choose the block and then
// the group g of `depth / groups` consecutive values of k; the values of one lane are packed into
// its registers in order of k. Results: lane l holds column l % size, register r the rows
//
//     size 32   8 * (r / 4) + 4 * (l / 32) + r % 4, sixteen registers for each block
//     size 16   4 * (l / 16) + r, four registers for each block; for f64 4 * r + l / 16
//     size 4    r, and l / 4 is the block; for f64 row l / 16 and block l / 4 % 4
//
// Sources: AMD "CDNA3 ISA" and "CDNA4 ISA", chapter "Matrix Arithmetic Instructions", and AMD's
// matrix instruction calculator.
//
// Arithmetic: products are exact and are added to C in double precision in order of k; the sum is
// rounded to f32 once, to nearest even, and denormals are kept. Hardware adds in groups that the
// documents do not specify, so its last bits can differ. NaN results are the quiet NaN 0x7fc00000.
// f64 rounds after each fused multiplication and addition, in order of k; integers wrap.

#include <bit>
#include <type_traits>

#include "core.h"
#include "formats.h"

namespace cdna {
namespace {

// --- matrices in memory ---

// [block][k][row or column], so that lanes with the same k are neighbours.
template <typename T, int kSize, int kDepth, int kBlocks>
struct Factor {
  alignas(64) T at[kBlocks][kDepth][kSize];
};

template <typename T, int kSize, int kBlocks>
struct Product {
  alignas(64) T at[kBlocks][kSize][kSize];
};

// product += a^T b, with k outermost in each sum.
template <typename T, int kSize, int kDepth, int kBlocks>
void multiply(const Factor<T, kSize, kDepth, kBlocks>& a,
              const Factor<T, kSize, kDepth, kBlocks>& b, Product<T, kSize, kBlocks>& product) {
  constexpr int kWidth = kSize < 32 / static_cast<int>(sizeof(T)) ? kSize : 32 / sizeof(T);
  constexpr int kColumns = kSize >= 2 * kWidth ? 2 : 1;  // vectors of one tile
  constexpr int kRows = 4;
  using Vector = T __attribute__((vector_size(kWidth * sizeof(T)), aligned(sizeof(T))));
  for (int block = 0; block < kBlocks; ++block) {
    for (int row = 0; row < kSize; row += kRows) {
      for (int column = 0; column < kSize; column += kColumns * kWidth) {
        Vector sum[kRows][kColumns];
        for (int r = 0; r < kRows; ++r) {
          for (int c = 0; c < kColumns; ++c) {
            std::memcpy(&sum[r][c], &product.at[block][row + r][column + c * kWidth],
                        sizeof(Vector));
          }
        }
        for (int k = 0; k < kDepth; ++k) {
          Vector right[kColumns];
          for (int c = 0; c < kColumns; ++c) {
            std::memcpy(&right[c], &b.at[block][k][column + c * kWidth], sizeof(Vector));
          }
          for (int r = 0; r < kRows; ++r) {
            Vector left = Vector{} + a.at[block][k][row + r];
            for (int c = 0; c < kColumns; ++c) {
              if constexpr (std::is_floating_point_v<T>) {
                sum[r][c] = __builtin_elementwise_fma(left, right[c], sum[r][c]);
              } else {
                sum[r][c] += left * right[c];
              }
            }
          }
        }
        for (int r = 0; r < kRows; ++r) {
          for (int c = 0; c < kColumns; ++c) {
            std::memcpy(&product.at[block][row + r][column + c * kWidth], &sum[r][c],
                        sizeof(Vector));
          }
        }
      }
    }
  }
}

// --- element types of A and B ---
//
// `get` returns value `element` of a lane, whose registers are `v`; `kPerRegister` values share a
// register. `table` is what `get` looks codes up in, by architecture.

struct ElementF32 {
  static constexpr int kBits = 32;
  static const float* table(uint32_t) { return nullptr; }
  static double get(uint32_t word, int, const float*) { return std::bit_cast<float>(word); }
};

struct ElementXf32 {
  static constexpr int kBits = 32;
  static const float* table(uint32_t) { return nullptr; }
  // Ten bits of mantissa, rounded to nearest even.
  static double get(uint32_t word, int, const float*) {
    bool is_special = (word & 0x7f800000) == 0x7f800000;
    uint32_t rounded = (word + 0xfff + (word >> 13 & 1)) & 0xffffe000;
    return std::bit_cast<float>(is_special ? word : rounded);
  }
};

struct ElementF16 {
  static constexpr int kBits = 16;
  static const float* table(uint32_t) { return nullptr; }
  static double get(uint32_t word, int position, const float*) {
    auto bits = static_cast<uint16_t>(word >> (16 * position));
    return static_cast<float>(std::bit_cast<_Float16>(bits));
  }
};

struct ElementBf16 {
  static constexpr int kBits = 16;
  static const float* table(uint32_t) { return nullptr; }
  static double get(uint32_t word, int position, const float*) {
    return std::bit_cast<float>(position ? word & 0xffff0000 : word << 16);
  }
};

struct ElementFp8 {
  static constexpr int kBits = 8;
  static const float* table(uint32_t arch) { return fp8_values(arch); }
  static double get(uint32_t word, int position, const float* table) {
    return table[word >> (8 * position) & 255];
  }
};

struct ElementBf8 : ElementFp8 {
  static const float* table(uint32_t arch) { return bf8_values(arch); }
};

struct ElementI8 {
  static constexpr int kBits = 8;
  static const float* table(uint32_t) { return nullptr; }
  static int32_t get(uint32_t word, int position, const float*) {
    return static_cast<int8_t>(word >> (8 * position));
  }
};

// --- operands ---

// Lane that B's lane `lane` is taken from.
inline int broadcast_lane(int blgp, int lane) {
  switch (blgp) {
    case 1: return lane & 31;
    case 2: return lane | 32;
    case 3: return (lane + 16) & 63;
    case 4: case 5: case 6: case 7: return (blgp - 4) * 16 + (lane & 15);
    default: return lane;
  }
}

template <typename Element, typename T, int kSize, int kDepth, int kBlocks>
void load_factor(const Wave& w, const Operand& o, Factor<T, kSize, kDepth, kBlocks>& factor) {
  constexpr int kGroups = kLanes / (kSize * kBlocks);
  constexpr int kPerLane = kDepth / kGroups;
  constexpr int kPerRegister = 32 / Element::kBits;
  static_assert(kGroups * kPerLane == kDepth && kPerLane % kPerRegister == 0);
  const float* table = Element::table(w.arch);
  for (int element = 0; element < kPerLane; ++element) {
    const uint32_t* lanes = w.v[o.index + element / kPerRegister].lane;
    for (int part = 0; part < kGroups * kBlocks; ++part) {
      T* to = factor.at[part % kBlocks][part / kBlocks * kPerLane + element];
      for (int i = 0; i < kSize; ++i) {
        to[i] = Element::get(lanes[part * kSize + i], element % kPerRegister, table);
      }
    }
  }
}

// Copies of B's registers after a lane broadcast, for the rare instructions that have one.
struct BroadcastRegisters {
  Wave* wave;
  int index, count;
  Vgpr saved[2];

  // The registers are changed in place and put back: the loaders stay free of this case.
  BroadcastRegisters(Wave& w, const Operand& o, int blgp, int registers)
      : wave(&w), index(o.index), count(blgp ? registers : 0) {
    for (int r = 0; r < count; ++r) {
      saved[r] = w.v[index + r];
      for (int lane = 0; lane < kLanes; ++lane) {
        w.v[index + r].lane[lane] = saved[r].lane[broadcast_lane(blgp, lane)];
      }
    }
  }
  ~BroadcastRegisters() {
    for (int r = 0; r < count; ++r) wave->v[index + r] = saved[r];
  }
  BroadcastRegisters(const BroadcastRegisters&) = delete;
  BroadcastRegisters& operator=(const BroadcastRegisters&) = delete;
};

// cbsz and abid: groups of 2^cbsz blocks share the A of their member abid.
template <typename T, int kSize, int kDepth, int kBlocks>
void share_blocks(const Instruction& in, Factor<T, kSize, kDepth, kBlocks>& a) {
  if (kBlocks == 1 || in.cbsz == 0) return;
  int group = 1 << in.cbsz;
  for (int block = 0; block < kBlocks; ++block) {
    int from = (block & ~(group - 1)) + (in.abid & (group - 1));
    if (from != block && from < kBlocks) {
      std::memcpy(a.at[block], a.at[from], sizeof(a.at[block]));
    }
  }
}

// Position of 32-bit result register `r` of the lanes from `part * kSize` on.
template <int kSize, int kBlocks>
struct Position {
  static constexpr int kParts = kLanes / kSize;
  static constexpr int kRegisters = kSize * kSize * kBlocks / kLanes;
  static constexpr int kPerBlock = kSize == 4 ? kRegisters : kRegisters / kBlocks;
  static constexpr int block(int r, int part) { return kSize == 4 ? part : r / kPerBlock; }
  static constexpr int row(int r, int part) {
    int within = r % kPerBlock;
    if (kSize == 4) return within;
    return kParts * 4 * (within / 4) + 4 * part + within % 4;
  }
};

// Value of C that every lane shares, as bits.
inline uint32_t shared_bits(const Wave& w, const Operand& o) {
  return o.kind == kSgpr ? w.s[o.index] : static_cast<uint32_t>(o.bits);
}

template <typename T>
T from_bits(uint32_t bits) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::bit_cast<float>(bits);
  } else {
    return static_cast<T>(bits);
  }
}

template <typename T>
uint32_t to_bits(T value) {
  if constexpr (std::is_floating_point_v<T>) {
    uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
    return value == value ? bits : 0x7fc00000;
  } else {
    return static_cast<uint32_t>(value);
  }
}

template <typename T, int kSize, int kBlocks>
void load_product(const Wave& w, const Operand& o, Product<T, kSize, kBlocks>& product) {
  using At = Position<kSize, kBlocks>;
  for (int r = 0; r < At::kRegisters; ++r) {
    for (int part = 0; part < At::kParts; ++part) {
      T* to = product.at[At::block(r, part)][At::row(r, part)];
      if (o.kind == kVgpr) {
        const uint32_t* lanes = w.v[o.index + r].lane + part * kSize;
        for (int i = 0; i < kSize; ++i) to[i] = from_bits<T>(lanes[i]);
      } else {
        T value = from_bits<T>(shared_bits(w, o));
        for (int i = 0; i < kSize; ++i) to[i] = value;
      }
    }
  }
}

template <typename T, int kSize, int kBlocks>
void store_product(Wave& w, const Operand& o, const Product<T, kSize, kBlocks>& product) {
  using At = Position<kSize, kBlocks>;
  for (int r = 0; r < At::kRegisters; ++r) {
    for (int part = 0; part < At::kParts; ++part) {
      const T* from = product.at[At::block(r, part)][At::row(r, part)];
      uint32_t* lanes = w.v[o.index + r].lane + part * kSize;
      for (int i = 0; i < kSize; ++i) lanes[i] = to_bits(from[i]);
    }
  }
}

// --- 32-bit results ---

template <int kSize, int kDepth, int kBlocks, typename ElementA, typename ElementB = ElementA>
void matrix(Wave& w, const Instruction& in) {
  using T = std::conditional_t<std::is_same_v<ElementA, ElementI8>, int32_t, double>;
  constexpr int kGroups = kLanes / (kSize * kBlocks);
  constexpr int kRegisters = kDepth / kGroups * ElementB::kBits / 32;
  Factor<T, kSize, kDepth, kBlocks> a, b;
  Product<T, kSize, kBlocks> product;
  load_factor<ElementA>(w, in.op[1], a);
  share_blocks(in, a);
  if constexpr (kRegisters <= 2) {
    BroadcastRegisters broadcast(w, in.op[2], in.blgp, kRegisters);
    load_factor<ElementB>(w, in.op[2], b);
  } else {
    load_factor<ElementB>(w, in.op[2], b);
  }
  load_product(w, in.op[3], product);
  multiply(a, b, product);
  store_product(w, in.op[0], product);
}

// --- f64 ---

inline double load_double(const Wave& w, const Operand& o, int which, int lane) {
  if (o.kind == kSgpr) return std::bit_cast<double>(w.pair(o.index));
  if (o.kind != kVgpr) return std::bit_cast<double>(o.bits);
  int number = o.index + 2 * which;
  uint64_t low = w.v[number].lane[lane], high = w.v[number + 1].lane[lane];
  return std::bit_cast<double>(low | high << 32);
}

template <int kSize, int kBlocks>
void matrix_f64(Wave& w, const Instruction& in) {
  constexpr int kDepth = 4;
  constexpr int kResults = kSize * kSize * kBlocks / kLanes;
  // The field of blgp negates A, B and C here; LLVM prints it as neg:[a,b,c].
  int negate = in.blgp | in.neg_lo;
  Factor<double, kSize, kDepth, kBlocks> a, b;
  Product<double, kSize, kBlocks> product;
  for (int lane = 0; lane < kLanes; ++lane) {
    int i = lane % kSize, block = lane / kSize % kBlocks, k = lane / (kSize * kBlocks);
    double left = load_double(w, in.op[1], 0, lane), right = load_double(w, in.op[2], 0, lane);
    a.at[block][k][i] = negate & 1 ? -left : left;
    b.at[block][k][i] = negate & 2 ? -right : right;
    for (int r = 0; r < kResults; ++r) {
      double value = load_double(w, in.op[3], r, lane);
      product.at[block][4 * r + k][i] = negate & 4 ? -value : value;
    }
  }
  multiply(a, b, product);
  for (int lane = 0; lane < kLanes; ++lane) {
    int i = lane % kSize, block = lane / kSize % kBlocks, k = lane / (kSize * kBlocks);
    for (int r = 0; r < kResults; ++r) {
      double value = product.at[block][4 * r + k][i];
      uint64_t bits = value == value ? std::bit_cast<uint64_t>(value) : 0x7ff8000000000000ull;
      w.v[in.op[0].index + 2 * r].lane[lane] = static_cast<uint32_t>(bits);
      w.v[in.op[0].index + 2 * r + 1].lane[lane] = static_cast<uint32_t>(bits >> 32);
    }
  }
}

// --- f8f6f4 ---

struct PackedFormat {
  const float* values;
  int bits;
};

// The formats that cbsz (for A) and blgp (for B) number; always the OCP forms.
const PackedFormat kPackedFormats[5] = {
    {kDecodeTable<kFormatE4M3>.value, 8}, {kDecodeTable<kFormatE5M2>.value, 8},
    {kDecodeTable<kFormatE2M3>.value, 6}, {kDecodeTable<kFormatE3M2>.value, 6},
    {kDecodeTable<kFormatE2M1>.value, 4},
};

// A lane holds 32 values. Those of 6 and 4 bits are 32 consecutive k; those of 8 bits are two runs
// of 16, half of the depth apart. Scale byte of lane group g: for the g-th 32 values of k.
template <int kSize, int kDepth, int kBits, bool kScaled>
void load_values(const Wave& w, const Operand& o, const float* values, const double* scales,
                 Factor<double, kSize, kDepth, 1>& factor) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  for (int element = 0; element < 32; ++element) {
    int bit = element * kBits, shift = bit & 31;
    const uint32_t* low = w.v[o.index + bit / 32].lane;
    // A value of 6 bits may lie across two registers.
    bool split = shift + kBits > 32;
    const uint32_t* high = split ? w.v[o.index + bit / 32 + 1].lane : low;
    int up = split ? 32 - shift : 31;
    for (int group = 0; group < kLanes / kSize; ++group) {
      int k = kBits == 8 ? element / 16 * (kDepth / 2) + 16 * group + element % 16
                         : 32 * group + element;
      const double* scale = scales + kSize * (k / 32);
      double* to = factor.at[0][k];
      for (int i = 0; i < kSize; ++i) {
        uint32_t word = low[group * kSize + i] >> shift;
        if constexpr (kBits == 6) word |= split ? high[group * kSize + i] << up : 0;
        double value = values[word & kMask];
        to[i] = kScaled ? value * scale[i] : value;
      }
    }
  }
}

template <int kSize, int kDepth, bool kScaled>
bool load_packed(Wave& w, const Operand& o, int which, const double* scales,
                 Factor<double, kSize, kDepth, 1>& factor) {
  if (which >= 5) {
    report(w, FindingKind::kUnsupported, -1, static_cast<uint64_t>(which));
    return false;
  }
  const PackedFormat& format = kPackedFormats[which];
  if (format.bits == 8) {
    load_values<kSize, kDepth, 8, kScaled>(w, o, format.values, scales, factor);
  } else if (format.bits == 6) {
    load_values<kSize, kDepth, 6, kScaled>(w, o, format.values, scales, factor);
  } else {
    load_values<kSize, kDepth, 4, kScaled>(w, o, format.values, scales, factor);
  }
  return true;
}

void load_scales(const Wave& w, const Operand& o, int byte, double* scales) {
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t word = o.kind == kVgpr ? w.v[o.index].lane[lane] : shared_bits(w, o);
    scales[lane] = decode_e8m0(word >> (8 * byte));
  }
}

template <int kSize, int kDepth, bool kScaled>
void matrix_packed(Wave& w, const Instruction& in) {
  double scales_a[kLanes] = {}, scales_b[kLanes] = {};
  if constexpr (kScaled) {
    load_scales(w, in.op[4], (in.op_sel & 1) | (in.op_sel_hi & 1) << 1, scales_a);
    load_scales(w, in.op[5], (in.op_sel >> 1 & 1) | (in.op_sel_hi >> 1 & 1) << 1, scales_b);
  }
  Factor<double, kSize, kDepth, 1> a, b;
  Product<double, kSize, 1> product;
  if (!load_packed<kSize, kDepth, kScaled>(w, in.op[1], in.cbsz, scales_a, a)) return;
  if (!load_packed<kSize, kDepth, kScaled>(w, in.op[2], in.blgp, scales_b, b)) return;
  load_product(w, in.op[3], product);
  multiply(a, b, product);
  store_product(w, in.op[0], product);
}

using F32 = ElementF32;
using F16 = ElementF16;
using Bf16 = ElementBf16;
using Xf32 = ElementXf32;
using Fp8 = ElementFp8;
using Bf8 = ElementBf8;
using I8 = ElementI8;

const NamedHandler kHandlers[] = {
    {"v_mfma_f32_32x32x1_2b_f32", matrix<32, 1, 2, F32>},
    {"v_mfma_f32_16x16x1_4b_f32", matrix<16, 1, 4, F32>},
    {"v_mfma_f32_4x4x1_16b_f32", matrix<4, 1, 16, F32>},
    {"v_mfma_f32_32x32x2_f32", matrix<32, 2, 1, F32>},
    {"v_mfma_f32_16x16x4_f32", matrix<16, 4, 1, F32>},
    {"v_mfma_f32_32x32x4_2b_f16", matrix<32, 4, 2, F16>},
    {"v_mfma_f32_16x16x4_4b_f16", matrix<16, 4, 4, F16>},
    {"v_mfma_f32_4x4x4_16b_f16", matrix<4, 4, 16, F16>},
    {"v_mfma_f32_32x32x8_f16", matrix<32, 8, 1, F16>},
    {"v_mfma_f32_16x16x16_f16", matrix<16, 16, 1, F16>},
    {"v_mfma_f32_32x32x16_f16", matrix<32, 16, 1, F16>},
    {"v_mfma_f32_16x16x32_f16", matrix<16, 32, 1, F16>},
    {"v_mfma_f32_32x32x4_2b_bf16", matrix<32, 4, 2, Bf16>},
    {"v_mfma_f32_16x16x4_4b_bf16", matrix<16, 4, 4, Bf16>},
    {"v_mfma_f32_4x4x4_16b_bf16", matrix<4, 4, 16, Bf16>},
    {"v_mfma_f32_32x32x8_bf16", matrix<32, 8, 1, Bf16>},
    {"v_mfma_f32_16x16x16_bf16", matrix<16, 16, 1, Bf16>},
    {"v_mfma_f32_32x32x16_bf16", matrix<32, 16, 1, Bf16>},
    {"v_mfma_f32_16x16x32_bf16", matrix<16, 32, 1, Bf16>},
    {"v_mfma_f32_32x32x4_xf32", matrix<32, 4, 1, Xf32>},
    {"v_mfma_f32_16x16x8_xf32", matrix<16, 8, 1, Xf32>},
    {"v_mfma_i32_32x32x4_2b_i8", matrix<32, 4, 2, I8>},
    {"v_mfma_i32_16x16x4_4b_i8", matrix<16, 4, 4, I8>},
    {"v_mfma_i32_4x4x4_16b_i8", matrix<4, 4, 16, I8>},
    {"v_mfma_i32_32x32x16_i8", matrix<32, 16, 1, I8>},
    {"v_mfma_i32_16x16x32_i8", matrix<16, 32, 1, I8>},
    {"v_mfma_i32_32x32x32_i8", matrix<32, 32, 1, I8>},
    {"v_mfma_i32_16x16x64_i8", matrix<16, 64, 1, I8>},
    {"v_mfma_f32_16x16x32_fp8_fp8", matrix<16, 32, 1, Fp8>},
    {"v_mfma_f32_16x16x32_fp8_bf8", matrix<16, 32, 1, Fp8, Bf8>},
    {"v_mfma_f32_16x16x32_bf8_fp8", matrix<16, 32, 1, Bf8, Fp8>},
    {"v_mfma_f32_16x16x32_bf8_bf8", matrix<16, 32, 1, Bf8>},
    {"v_mfma_f32_32x32x16_fp8_fp8", matrix<32, 16, 1, Fp8>},
    {"v_mfma_f32_32x32x16_fp8_bf8", matrix<32, 16, 1, Fp8, Bf8>},
    {"v_mfma_f32_32x32x16_bf8_fp8", matrix<32, 16, 1, Bf8, Fp8>},
    {"v_mfma_f32_32x32x16_bf8_bf8", matrix<32, 16, 1, Bf8>},
    {"v_mfma_f64_16x16x4_f64", matrix_f64<16, 1>},
    {"v_mfma_f64_4x4x4_4b_f64", matrix_f64<4, 4>},
    {"v_mfma_f32_16x16x128_f8f6f4", matrix_packed<16, 128, false>},
    {"v_mfma_f32_32x32x64_f8f6f4", matrix_packed<32, 64, false>},
    {"v_mfma_scale_f32_16x16x128_f8f6f4", matrix_packed<16, 128, true>},
    {"v_mfma_scale_f32_32x32x64_f8f6f4", matrix_packed<32, 64, true>},
};

}  // namespace

HandlerTable mfma_handlers() { return {kHandlers, sizeof(kHandlers) / sizeof(kHandlers[0])}; }

}  // namespace cdna
