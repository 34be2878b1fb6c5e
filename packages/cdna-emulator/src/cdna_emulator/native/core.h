// Machine state and decoded instructions: what every file of the native core shares.
//
// A program is an array of `Instruction`, lowered by native_core.py from the parsed text. Each has
// a handler, found by name once at load time. A handler changes the state of one wave and nothing
// else: `Machine` (machine.cpp) advances program counters, schedules waves, and keeps the shadow
// state of the checkers around every handler call.
//
// The layout of `Operand` and `Instruction` is mirrored by ctypes structures in native_core.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cdna {

constexpr int kLanes = 64;
constexpr int kAgprBase = 256;
constexpr int kVgprs = 512;

// Scalar registers by their number in machine code.
constexpr int kFlatScratch = 102, kVcc = 106, kM0 = 124, kExec = 126, kSgprs = 128;

// Flat addresses of LDS and of private memory: 32-bit offsets from these bases. SRC_SHARED_BASE and
// the like read them; limits are base + 0xffffffff.
constexpr uint64_t kSharedAperture = 1ull << 48, kPrivateAperture = 2ull << 48;

enum OperandKind : uint8_t { kAbsent = 0, kVgpr = 1, kSgpr = 2, kConstant = 3, kSpecial = 4 };
enum OperandFlags : uint8_t { kNeg = 1, kAbs = 2, kSext = 4, kRead = 8, kWrite = 16 };
enum Special : uint16_t {
  kScc, kVccz, kExecz, kSharedBase, kSharedLimit, kPrivateBase, kPrivateLimit, kLdsDirect
};

struct Operand {
  uint8_t kind;    // OperandKind
  uint8_t width;   // registers of 32 bits
  uint8_t flags;   // OperandFlags
  uint8_t select;  // SDWA: 0..3 a byte, 4..5 a word, 6 the dword
  uint16_t index;  // register number (VGPR 0..511 with AGPRs from 256, SGPR 0..127) or Special
  uint16_t reserved;
  uint64_t bits;   // constants, already in the operand's own format (see instruction.py)
};
static_assert(sizeof(Operand) == 16);

enum InstructionFlags : uint32_t {
  kOffen = 1u << 0,        // buffer: per-lane byte offset
  kIdxen = 1u << 1,        // buffer: per-lane index
  kLds = 1u << 2,          // memory to LDS, or global_load_lds_*
  kSc0 = 1u << 3,          // atomics: return the old value
  kSc1 = 1u << 4,
  kNt = 1u << 5,
  kClamp = 1u << 6,
  kSdwa = 1u << 7,
  kDpp = 1u << 8,
  kBoundCtrl = 1u << 9,    // DPP: lanes without a source read 0 instead of being disabled
  kIgnoresExec = 1u << 10,
  kBranch = 1u << 11,
  kLoad = 1u << 12,
  kStore = 1u << 13,
  kAtomic = 1u << 14,
  kWritesExec = 1u << 15,
  kReadsVcc = 1u << 16,
  kVector = 1u << 17,      // VALU, transcendental or matrix instruction
  kMatrix = 1u << 18,
  kReadsM0 = 1u << 19,
};

// Which counter of s_waitcnt an instruction holds up until it is done.
enum Counter : uint8_t { kNoCounter, kVmCounter, kLdsCounter, kSmemCounter, kFlatCounter };

// dpp_control: quad_perm patterns are 0..255 as in machine code, the rest one value per row of
// this list plus the amount.
enum DppControl : uint16_t {
  kRowShl = 0x100, kRowShr = 0x110, kRowRor = 0x120, kWaveShl = 0x130, kWaveRol = 0x134,
  kWaveShr = 0x138, kWaveRor = 0x13c, kRowMirror = 0x140, kRowHalfMirror = 0x141,
  kRowBcast15 = 0x142, kRowBcast31 = 0x143, kRowNewbcast = 0x150,
};

struct Instruction {
  Operand op[6];         // in the order of LLVM's text
  uint32_t handler;      // index from cdna_handler_index
  uint32_t address;      // byte offset of the instruction in the loaded image, for findings
  int32_t target;        // index of the branch target, -1: none
  int32_t offset;        // offset: or offset0:
  int32_t offset1;       // offset1:
  uint32_t flags;        // InstructionFlags
  uint32_t immediate;    // s_nop, s_setreg, s_set_gpr_idx_*: the number
  uint16_t dpp_control;  // DppControl
  uint8_t row_mask, bank_mask;
  uint8_t op_count;
  uint8_t op_sel, op_sel_hi, neg_lo, neg_hi;  // bit k: source k; op_sel bit 3: destination (VOP3)
  uint8_t output_modifier;                    // 0 none, 1 times 2, 2 times 4, 3 divided by 2
  uint8_t cbsz, abid, blgp;
  uint8_t dst_select, dst_unused;             // SDWA; dst_unused: 0 pad, 1 sign, 2 preserve
  uint8_t counter;                            // Counter
  int8_t vmcnt, lgkmcnt, expcnt;              // s_waitcnt: wait until at most this many, -1: no wait
  uint8_t bitop3;
  uint8_t encoding;                           // 0 none, 1 e32, 2 e64, 3 dpp, 4 sdwa, 5 e64_dpp
  uint8_t reserved[7];
};
static_assert(sizeof(Instruction) == 152);

struct alignas(64) Vgpr {
  uint32_t lane[kLanes];
};

// The MODE register's fields that change results.
struct Mode {
  uint8_t round32 = 0;            // 0 nearest even, 1 up, 2 down, 3 toward zero
  uint8_t round64 = 0;            // of f16 and f64
  bool flush_inputs32 = false, flush_outputs32 = false;  // denormals of f32
  bool flush_inputs64 = false, flush_outputs64 = false;  // of f16 and f64
  bool dx10_clamp = true, ieee = true;
  bool gpr_idx = false;           // s_set_gpr_idx_on: vector register numbers add M0[7:0]
  bool saturate16 = false;        // FP16_OVFL: overflowing f16, fp8 and bf8 results are the largest
};

// Between Mode and the bits of the hardware register: 1:0 round f32, 3:2 round f16 and f64, 5:4 and
// 7:6 denormals of the same (bit 0 keeps inputs, bit 1 keeps results), 8 DX10_CLAMP, 9 IEEE,
// 23 FP16_OVFL, 27 GPR_IDX_EN.
inline void set_mode_bits(Mode& mode, uint32_t bits) {
  mode.round32 = bits & 3;
  mode.round64 = bits >> 2 & 3;
  mode.flush_inputs32 = !(bits >> 4 & 1);
  mode.flush_outputs32 = !(bits >> 5 & 1);
  mode.flush_inputs64 = !(bits >> 6 & 1);
  mode.flush_outputs64 = !(bits >> 7 & 1);
  mode.dx10_clamp = bits >> 8 & 1;
  mode.ieee = bits >> 9 & 1;
  mode.saturate16 = bits >> 23 & 1;
  mode.gpr_idx = bits >> 27 & 1;
}

inline uint32_t mode_bits(const Mode& mode) {
  return mode.round32 | mode.round64 << 2 | uint32_t(!mode.flush_inputs32) << 4 |
         uint32_t(!mode.flush_outputs32) << 5 | uint32_t(!mode.flush_inputs64) << 6 |
         uint32_t(!mode.flush_outputs64) << 7 | uint32_t(mode.dx10_clamp) << 8 |
         uint32_t(mode.ieee) << 9 | uint32_t(mode.saturate16) << 23 | uint32_t(mode.gpr_idx) << 27;
}

struct Machine;
struct Workgroup;

enum class WaveState : uint8_t { kRunning, kAtBarrier, kEnded };

struct Shadow;  // checkers' state of one wave, machine.cpp

struct Wave {
  Vgpr v[kVgprs];
  uint32_t s[kSgprs];
  bool scc = false;
  Mode mode;
  WaveState state = WaveState::kRunning;
  uint32_t pc = 0;    // index of the instruction being executed
  uint32_t next = 0;  // index of the one after it; branches set it
  uint32_t id = 0;    // in its workgroup
  Workgroup* group = nullptr;
  Machine* machine = nullptr;
  Shadow* shadow = nullptr;
  uint8_t* scratch = nullptr;  // private memory: lane-major, scratch_bytes per lane
  uint32_t scratch_bytes = 0;
  uint32_t arch = 942;  // 942 or 950: formats of fp8 and bf8 differ; set by the machine

  uint64_t pair(int index) const {
    uint64_t value;
    std::memcpy(&value, &s[index], 8);
    return value;
  }
  void set_pair(int index, uint64_t value) { std::memcpy(&s[index], &value, 8); }
  uint64_t exec() const { return pair(kExec); }
  uint64_t vcc() const { return pair(kVcc); }
};

struct Workgroup {
  uint8_t* lds = nullptr;
  uint32_t lds_bytes = 0;
  uint32_t id[3] = {0, 0, 0};
  uint32_t epoch = 0;  // barriers passed
};

// --- services of the machine (machine.cpp) that handlers call ---

enum class FindingKind : uint32_t {
  kOutOfBounds = 1,     // memory outside every mapped buffer
  kLdsOutOfBounds = 2,
  kMissingWait = 3,     // a register with an outstanding load was used
  kBarrierWrites = 4,   // LDS writes outstanding at a barrier
  kLdsRace = 5,
  kUninitialisedVgpr = 6,
  kUninitialisedLds = 7,
  kDivergentBarrier = 8,
  kInstructionLimit = 9,
  kUnsupported = 10,    // a state or value this core does not model; detail says which
  kMisaligned = 11,
  kScratchOutOfBounds = 12,
  kUninitialisedSgpr = 13,
};

// Records a finding at the wave's present instruction; `lane` -1 when it is not of one lane.
void report(Wave& w, FindingKind kind, int lane, uint64_t detail0, uint64_t detail1 = 0);

// Returns the host address of `bytes` bytes of device memory, or nullptr after a report.
uint8_t* translate(Wave& w, int lane, uint64_t address, uint32_t bytes, bool is_write);

// LDS access with bounds, race and initialisation checks; false after a report.
bool lds_load(Wave& w, int lane, uint32_t address, uint32_t bytes, void* value);
bool lds_store(Wave& w, int lane, uint32_t address, uint32_t bytes, const void* value);
// Address for an atomic read-modify-write, or nullptr after a report.
uint8_t* lds_atomic(Wave& w, int lane, uint32_t address, uint32_t bytes);
// A direct copy from memory into LDS: lands now or when its wait retires it, as scheduled.
void lds_dma(Wave& w, int lane, uint32_t address, uint32_t bytes, const void* value);

// Device address of the present instruction; s_getpc_b64 and calls add the instruction's 4 bytes.
uint64_t code_address(const Wave& w);
// Continues at a device address; false after a report when no instruction starts there.
bool jump(Wave& w, uint64_t address);
// What s_memtime reads: instructions executed so far in the workgroup.
uint64_t clock_ticks(const Wave& w);

// Adds to the instruction's counters for the profile.
void count_bytes(Wave& w, uint64_t bytes);
void count_bank_cycles(Wave& w, uint64_t cycles);

// --- handlers ---

using Handler = void (*)(Wave&, const Instruction&);

struct NamedHandler {
  const char* name;  // mnemonic without encoding suffix
  Handler handler;
};

struct HandlerTable {
  const NamedHandler* rows;
  size_t count;
};

// One table per file of instructions; machine.cpp concatenates them.
HandlerTable salu_handlers();
HandlerTable control_handlers();  // branches, s_waitcnt (a no-op here: the machine acts on it)...
HandlerTable valu_integer_handlers();
HandlerTable valu_float_handlers();
HandlerTable valu_division_handlers();  // v_div_scale, v_div_fmas, v_div_fixup
HandlerTable valu_compare_handlers();
HandlerTable valu_lane_handlers();  // readlane, writelane, permlane swaps, mov, swap, cndmask
HandlerTable convert_handlers();    // v_cvt_*
HandlerTable convert_scaled_handlers();  // v_cvt_scalef32_*
HandlerTable transcendental_handlers();
HandlerTable packed_handlers();     // v_pk_*, v_dot*, v_fma_mix*
HandlerTable mfma_handlers();
HandlerTable scalar_memory_handlers();
HandlerTable global_handlers();     // global_*, flat_*, scratch_*
HandlerTable buffer_handlers();
HandlerTable lds_handlers();

}  // namespace cdna
