// Branches, calls, waits and the end of a wave.
//
// A handler here only sets the wave's state: the machine acts on the counters of s_waitcnt and on
// waves that wait at a barrier. Instructions about priority, caches and sleeping change nothing
// that a program can see.
#include "operands.h"

namespace cdna {
namespace {

// Code addresses are absolute in the loaded image, where the machine has placed it.
uint64_t address_after(const Wave& w) { return code_address(w) + 4; }

void take(Wave& w, const Instruction& in) { w.next = static_cast<uint32_t>(in.target); }

template <auto Condition>
void branch_if(Wave& w, const Instruction& in) {
  if (Condition(w)) take(w, in);
}

void set_pc(Wave& w, const Instruction& in) { jump(w, scalar64(w, in.op[0])); }

void swap_pc(Wave& w, const Instruction& in) {
  uint64_t target = scalar64(w, in.op[1]);
  w.set_pair(in.op[0].index, address_after(w));
  jump(w, target);
}

void call(Wave& w, const Instruction& in) {
  w.set_pair(in.op[0].index, address_after(w));
  take(w, in);
}

void end_program(Wave& w, const Instruction&) { w.state = WaveState::kEnded; }

void barrier(Wave& w, const Instruction&) { w.state = WaveState::kAtBarrier; }

void nothing(Wave&, const Instruction&) {}

// No trap handler is installed, and nobody could resume a halted wave.
void unsupported(Wave& w, const Instruction& in) {
  report(w, FindingKind::kUnsupported, -1, in.immediate);
  w.state = WaveState::kEnded;
}

void halt(Wave& w, const Instruction& in) {
  if (in.immediate & 1) unsupported(w, in);
}

constexpr NamedHandler kRows[] = {
    {"s_setpc_b64", set_pc},
    {"s_swappc_b64", swap_pc},
    {"s_call_b64", call},
    {"s_branch", take},
    {"s_cbranch_scc0", branch_if<[](const Wave& w) { return !w.scc; }>},
    {"s_cbranch_scc1", branch_if<[](const Wave& w) { return w.scc; }>},
    {"s_cbranch_vccz", branch_if<[](const Wave& w) { return w.vcc() == 0; }>},
    {"s_cbranch_vccnz", branch_if<[](const Wave& w) { return w.vcc() != 0; }>},
    {"s_cbranch_execz", branch_if<[](const Wave& w) { return w.exec() == 0; }>},
    {"s_cbranch_execnz", branch_if<[](const Wave& w) { return w.exec() != 0; }>},
    {"s_endpgm", end_program},
    {"s_barrier", barrier},
    {"s_waitcnt", nothing},
    {"s_nop", nothing},
    {"s_sleep", nothing},
    {"s_wakeup", nothing},
    {"s_setprio", nothing},
    {"s_icache_inv", nothing},
    {"s_sendmsg", nothing},
    {"s_sethalt", halt},
    {"s_trap", unsupported},
};

}  // namespace

HandlerTable control_handlers() { return {kRows, sizeof kRows / sizeof kRows[0]}; }

}  // namespace cdna
