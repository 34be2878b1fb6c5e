// What machine.cpp, checks.cpp and memory.cpp share: one run of a thread, and the shadow state that
// the checkers keep beside registers and LDS.
#pragma once

#include <memory>
#include <vector>

#include "core.h"
#include "machine.h"

namespace cdna {

// A finding is recorded once per kind and instruction.
constexpr uint32_t kFindingKinds = 16;

// Wave-instructions of a wave are numbered per queue in the order they are issued; a queue that
// returns in order is described by how many were issued and how many are known to be done.
struct Queue {
  uint32_t issued = 0, retired = 0;
};

// One copy from memory to LDS that no wait has retired yet.
struct DmaCopy {
  uint32_t issue;  // number in the vector memory queue
  uint32_t instruction;
  uint32_t bytes;    // per lane
  uint64_t lanes;    // bit per lane that copies
  uint32_t address[kLanes];
  uint8_t data[kLanes][16];  // used only when copies land late
};

enum Pending : uint8_t { kNothing = 0, kPendingVm, kPendingLds, kPendingSmem, kPendingFlat };

struct Outstanding {
  uint32_t issue = 0;
  uint32_t instruction = 0;
  Pending kind = kNothing;
};

// Checkers' state of one wave.
struct Shadow {
  uint64_t written[kVgprs];       // per register: lanes that were ever written
  uint32_t lds_source[kVgprs];    // 1 + LDS address of bytes never written that were loaded, or 0
  int load_register = -1;         // where the LDS load being executed puts its first dword
  Outstanding vgpr[kVgprs];       // loads that may still be on their way
  Outstanding sgpr[kSgprs];
  bool sgpr_written[kSgprs];
  uint32_t vgprs_pending = 0;     // registers whose load was not seen to be done
  uint32_t sgprs_pending = 0;
  Queue vm;                       // loads, stores and atomics of vector memory: in order
  Queue lds;                      // LDS: in order
  Queue smem;                     // scalar loads return in any order
  // FLAT counts in both counters and returns in any order: each has to reach zero.
  uint32_t flat_issued = 0, flat_vm_retired = 0, flat_lds_retired = 0;
  uint32_t last_lds_write = 0;    // number in the LDS queue
  uint32_t last_lds_write_instruction = 0;
  uint64_t exec = 0;              // before the instruction
  std::vector<DmaCopy> copies;    // in order of issue

  bool is_done(const Outstanding& o) const {
    switch (o.kind) {
      case kPendingVm: return o.issue <= vm.retired;
      case kPendingLds: return o.issue <= lds.retired;
      case kPendingSmem: return o.issue <= smem.retired;
      case kPendingFlat: return o.issue <= flat_vm_retired && o.issue <= flat_lds_retired;
      default: return true;
    }
  }
};

// Shadow of one dword of LDS. Byte masks are four bits; epochs are counted from 1, so 0 is never.
struct LdsCell {
  uint32_t write_epoch, write_instruction;
  uint32_t read_epoch, read_instruction;
  uint32_t copy;      // number in the writer's vector memory queue while a copy is on its way, or 0
  uint16_t readers;   // waves that read in read_epoch
  uint16_t writers;   // waves that wrote these values in write_epoch
  uint8_t writer;     // the last of them
  uint8_t write_bytes, read_bytes;
  uint8_t initialised;
  bool is_atomic;     // of the last write
};

enum class Access { kLoad, kStore, kAtomic };

// What the machine does beside calling the handler.
enum class Step : uint8_t { kPlain, kWait };

// How the uninitialised-register check treats an instruction's operands.
enum class Reads : uint8_t {
  kAll,             // every active lane of every source
  kCopy,            // passes on whether its source was written
  kFirstLane,       // one lane, the first active one
  kFromLane,        // a scalar kept in a lane comes back
  kToLane,          // a scalar is kept in a lane
  kKeepsOld,        // the destination is read only to keep a part of it
  kPair,            // of a pair of registers those that op_sel and op_sel_hi select
  kWideAddend,      // the high half of the addend counts for the high half of the sum
};

struct Machine {
  const RunConfig* config = nullptr;
  RunOutput* output = nullptr;
  std::vector<Handler> handlers;      // per instruction
  std::vector<Step> steps;            // per instruction
  std::vector<Reads> reads;           // per instruction
  std::vector<int32_t> finding_of;    // [kind][instruction] -> record or -1
  std::vector<int32_t> at_address;    // dword of the image after the first one -> instruction or -1
  std::vector<uint32_t> barrier_of;   // per wave: the barrier it waits at
  std::vector<LdsCell> lds_cells;     // empty: LDS is not checked
  std::vector<std::unique_ptr<Shadow>> shadows;
  std::vector<Wave*> waves;
  Workgroup group;
  uint32_t checks = 0;
  bool late_dma = false;
  bool is_tracked = false;            // any check, or late copies
  bool is_stopped = false;            // a finding ended the workgroup
  uint64_t budget = 0;                // instructions the workgroup may still execute

  bool checks_for(uint32_t check) const { return checks & check; }
};

// Mnemonic of a handler.
const char* handler_name(uint32_t handler);

// --- checks.cpp ---

void prepare_checks(Machine& m);
// At the start of a workgroup.
void reset_checks(Machine& m, bool all_initialised);
// Around every instruction of a tracked run.
void before_instruction(Machine& m, Wave& w, const Instruction& in);
void after_instruction(Machine& m, Wave& w, const Instruction& in);
void check_barrier_arrival(Machine& m, Wave& w);
void check_barrier_release(Machine& m);
// The wave ended: what it left on its way lands.
void finish_wave(Machine& m, Wave& w);
// Shadow of an LDS access that is in bounds, before it happens; `value` is what a store writes.
void track_lds(Machine& m, Wave& w, int lane, uint32_t address, uint32_t bytes, Access access,
               const void* value = nullptr);
// Records a copy to LDS that is in bounds; the bytes are kept when copies land late.
void track_copy(Machine& m, Wave& w, int lane, uint32_t address, uint32_t bytes, const void* value);

}  // namespace cdna
