// The C ABI of the native core: what native_core.py fills in and reads back through ctypes.
//
// A run executes a range of workgroups of one launch on the calling thread. Several threads may run
// different ranges of the same launch at once: they share instructions and device memory, and each
// has its own counters and findings.
#pragma once

#include <cstdint>

#include "core.h"

namespace cdna {

// One mapped buffer. Device addresses carry the index of their slot in bits 40 and up; a slot of
// size 0 is not mapped, so slot 0 keeps null pointers out.
struct MemorySlot {
  uint64_t base;      // first device address
  uint64_t size;      // bytes; device addresses base .. base + size - 1 are valid
  uint8_t* host;      // host address of `base`
  uint32_t writable;  // 0: stores and atomics are out of bounds
  uint32_t reserved;
};
static_assert(sizeof(MemorySlot) == 32);

enum Schedule : uint32_t {
  kRunToBarrier = 0,  // waves 0, 1, 2... each until it waits or ends
  kReversed = 1,      // the same from the last wave down
  kRoundRobin = 2,    // `slice` instructions each in turn
  kRandom = 3,        // a random wave for 1..64 instructions, from `seed` and the workgroup
};

enum Checks : uint32_t {
  kCheckWaits = 1,
  kCheckBarrierWrites = 2,
  kCheckRaces = 4,
  kCheckUninitialised = 8,
  kCheckBarriers = 16,  // divergent barriers
};

// Which registers follow the user registers at a wave's start, in this order.
enum SystemSgprs : uint32_t {
  kSystemWorkgroupX = 1,
  kSystemWorkgroupY = 2,
  kSystemWorkgroupZ = 4,
  kSystemWorkgroupInfo = 8,
  kSystemScratchOffset = 16,
};

// One finding per (kind, instruction); `count` says how often it was met.
struct FindingRecord {
  uint32_t kind;         // FindingKind
  uint32_t instruction;  // index
  uint32_t address;      // of the instruction, as in Instruction
  uint32_t wave;
  uint32_t workgroup[3];
  int32_t lane;  // -1: not of one lane
  uint64_t detail0;
  uint64_t detail1;
  uint64_t count;
};
static_assert(sizeof(FindingRecord) == 56);

// The MODE register's bits, as in hardware: 1:0 round f32, 3:2 round f16 and f64, 5:4 denormals
// of f32, 7:6 denormals of f16 and f64 (each: bit 0 keeps inputs, bit 1 keeps results),
// 8 DX10_CLAMP, 9 IEEE.
struct RunConfig {
  const Instruction* instructions;
  const MemorySlot* slots;
  const uint32_t* initial_sgprs;  // s0 and up: user registers with preloaded arguments
  uint64_t* executed;             // per instruction: times a wave executed it; required
  uint64_t* bytes;                // per instruction: bytes moved by active lanes; required
  uint64_t* bank_cycles;          // per instruction: LDS cycles; required
  FindingRecord* findings;
  uint64_t image_base;  // device address of Instruction::address 0
  uint64_t seed;
  uint64_t max_instructions;  // of one workgroup, all waves together
  uint64_t first_workgroup, end_workgroup;  // x fastest
  uint32_t instruction_count;
  uint32_t entry;  // index of the first instruction
  uint32_t slot_count;
  uint32_t finding_capacity;
  uint32_t initial_sgpr_count;
  uint32_t system_first;  // number of the first system register
  uint32_t system_sgprs;  // SystemSgprs
  uint32_t workitem_id_mode;  // 0 x, 1 x and y, 2 all; packed into v0 ten bits each
  uint32_t arch;              // 942 or 950
  uint32_t lds_bytes;         // of a workgroup
  uint32_t scratch_bytes;     // of a lane
  uint32_t grid[3];           // workgroups
  uint32_t block[3];          // work-items of a workgroup
  uint32_t mode;
  uint32_t schedule;  // Schedule
  uint32_t slice;
  uint32_t late_dma;  // copies from memory to LDS land when a wait retires them, not at issue
  uint32_t checks;    // Checks
};
static_assert(sizeof(RunConfig) == 184);

struct RunOutput {
  uint64_t instructions;   // executed by all waves
  uint32_t finding_count;  // records written to RunConfig::findings
  uint32_t findings_lost;  // different findings that found no room
};
static_assert(sizeof(RunOutput) == 16);

// Registers and LDS of one wave, before and after; for tests of single instructions.
struct WaveImage {
  uint32_t vgpr[kVgprs][kLanes];
  uint32_t sgpr[kSgprs];
  uint32_t scc;
  uint32_t mode;
  uint8_t* lds;  // RunConfig::lds_bytes bytes
};
static_assert(sizeof(WaveImage) == kVgprs * kLanes * 4 + kSgprs * 4 + 16);

}  // namespace cdna

extern "C" {

// The handler of a mnemonic without its encoding suffix, or -1.
int32_t cdna_handler_index(const char* name);

// Sizes of Instruction, RunConfig and FindingRecord, for the binding to compare with its own.
void cdna_layout(uint32_t sizes[3]);

// Runs workgroups [first_workgroup, end_workgroup). 0, or -1 when the configuration is unusable.
int32_t cdna_run(const cdna::RunConfig* config, cdna::RunOutput* output);

// Runs the program on one wave whose registers come from `image` and return there. Registers and
// LDS count as initialised; user and system registers of the configuration are ignored.
int32_t cdna_run_wave(const cdna::RunConfig* config, cdna::WaveImage* image,
                      cdna::RunOutput* output);

}  // extern "C"
