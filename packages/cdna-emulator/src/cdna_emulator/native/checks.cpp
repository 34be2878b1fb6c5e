// The checkers' shadow state: outstanding loads, registers and LDS bytes never written, LDS races.
//
// Waits. Vector memory (loads, stores, atomics) returns in order, LDS returns in order, scalar loads
// and FLAT in any order. `s_waitcnt vmcnt(n)` therefore retires all but the newest n of the vector
// memory queue, lgkmcnt(n) all but the newest n of LDS, and what returns in any order is done only
// after a wait for zero. A register is outstanding until then; using it, or overwriting it from
// another queue, is a missing wait. Registers that a store still has to read are no hazard: the
// data leaves them at issue.
//
// LDS. Each dword remembers the last write and the readers since the last barrier, its epoch. Two
// waves that touch the same bytes in one epoch race when one of them writes, unless both are
// atomic or both write the same values, which compilers do with data that waves hold in common. A
// copy from memory to LDS writes from its issue until the wait of its own wave that retires it:
// touching its bytes before then is a missing wait, and another wave needs a barrier after that
// wait. A dword keeps one writer, so of several waves that write different bytes of it in
// one epoch only the last is compared.
//
// Uninitialised values. Reading a lane that was never written is reported where the value is used;
// moves between registers pass the state on instead, and so do the ways of keeping scalars in lanes
// of a vector register, and loads from LDS: the masked tail of a tile may be loaded as long as
// nothing is done with it. A packed instruction reads of a pair what its halves select, and a
// wide addend's high half reaches only the high half of the sum.
#include <algorithm>

#include "machine_state.h"

namespace cdna {

namespace {

// Numbers of scalar registers in findings begin here.
constexpr uint64_t kSgprDetail = 1024;
// Marks an LDS address where findings have a register number.
constexpr uint64_t kLdsDetail = 1ull << 32;
// Operand of v_mad_u64_u32 and v_mad_i64_i32 that is as wide as the sum.
constexpr int kAddend = 4;

bool starts_with(const char* name, const char* prefix) {
  return std::strncmp(name, prefix, std::strlen(prefix)) == 0;
}

Reads reads_of(const char* name) {
  for (const char* copy : {"v_mov_b", "v_accvgpr_", "s_mov_b"}) {
    if (starts_with(name, copy)) return Reads::kCopy;
  }
  if (starts_with(name, "v_readfirstlane")) return Reads::kFirstLane;
  if (starts_with(name, "v_readlane")) return Reads::kFromLane;
  if (starts_with(name, "v_writelane")) return Reads::kToLane;
  if (starts_with(name, "v_mad_u64") || starts_with(name, "v_mad_i64")) return Reads::kWideAddend;
  if (starts_with(name, "v_pk_") && std::strstr(name, "32")) return Reads::kPair;
  for (const char* part : {"v_cvt_", "v_fma_mix"}) {
    if (starts_with(name, part)) return Reads::kKeepsOld;
  }
  return Reads::kAll;
}

// First register of an operand, after the gpr-index mode of vector instructions.
uint32_t first_register(const Wave& w, const Instruction& in, const Operand& o, int source) {
  if (o.kind != kVgpr || !w.mode.gpr_idx || !(in.flags & kVector)) return o.index;
  if (!(w.s[kM0] >> (12 + source) & 1)) return o.index;
  uint32_t number = o.index + (w.s[kM0] & 0xff);
  return number + o.width <= kVgprs ? number : o.index;
}

// Calls visit(operand, first register, is_read, is_written) for each register operand.
template <class Visit>
void for_each_register(const Wave& w, const Instruction& in, Visit visit) {
  int source = 0;
  for (int i = 0; i < in.op_count; ++i) {
    const Operand& o = in.op[i];
    bool is_read = o.flags & kRead, is_written = o.flags & kWrite;
    if (o.kind == kVgpr || o.kind == kSgpr) {
      visit(o, first_register(w, in, o, is_written ? 3 : source), is_read, is_written);
    }
    source += !is_written;
  }
}

void check_outstanding(Machine& m, Wave& w, const Instruction& in) {
  Shadow& s = *w.shadow;
  if (s.vgprs_pending == 0 && s.sgprs_pending == 0) return;
  auto check = [&](Outstanding& o, uint64_t detail, bool is_read, bool is_written) {
    if (o.kind == kNothing || s.is_done(o)) return;
    // Loads of one in-order queue may overwrite each other.
    bool is_ordered = (o.kind == kPendingVm && in.counter == kVmCounter) ||
                      (o.kind == kPendingLds && in.counter == kLdsCounter);
    if (!is_read && is_written && is_ordered) return;
    report(w, FindingKind::kMissingWait, -1, detail, o.instruction);
  };
  for_each_register(w, in, [&](const Operand& o, uint32_t first, bool is_read, bool is_written) {
    bool is_vector = o.kind == kVgpr;
    uint32_t end = std::min<uint32_t>(first + o.width, is_vector ? kVgprs : kSgprs);
    for (uint32_t r = first; r < end; ++r) {
      check(is_vector ? s.vgpr[r] : s.sgpr[r], is_vector ? r : kSgprDetail + r, is_read,
            is_written);
    }
  });
  if (in.flags & kReadsVcc) {
    check(s.sgpr[kVcc], kSgprDetail + kVcc, true, false);
    check(s.sgpr[kVcc + 1], kSgprDetail + kVcc + 1, true, false);
  }
  if (in.flags & (kReadsM0 | kLds)) check(s.sgpr[kM0], kSgprDetail + kM0, true, false);
}

// Lanes of a source that the instruction looks at.
uint64_t lanes_read(const Wave& w, const Instruction& in, Reads reads) {
  if (reads == Reads::kFirstLane) {
    uint64_t exec = w.exec();
    return exec ? exec & -exec : 1;
  }
  return in.flags & kIgnoresExec ? ~0ull : w.exec();
}

// The lane that v_readlane or v_writelane names.
uint64_t selected_lane(const Wave& w, const Instruction& in) {
  const Operand& lane = in.op[2];
  uint64_t value = lane.kind == kSgpr ? w.s[lane.index] : lane.bits;
  return 1ull << (value & 63);
}

// Whether the instruction looks at register number `part` of its operand number `position`.
bool reads_part(const Instruction& in, Reads reads, int position, uint32_t part) {
  if (reads == Reads::kWideAddend) return position != kAddend || part == 0;
  if (reads != Reads::kPair) return true;
  int source = position - 1;
  return (in.op_sel >> source & 1) == part || (in.op_sel_hi >> source & 1) == part;
}

void check_initialised(Machine& m, Wave& w, const Instruction& in) {
  Shadow& s = *w.shadow;
  Reads reads = m.reads[w.pc];
  if (reads == Reads::kCopy && !(in.flags & (kDpp | kSdwa))) return;
  if (reads == Reads::kFromLane || reads == Reads::kToLane) return;
  bool keeps_old = reads == Reads::kKeepsOld || (in.flags & kDpp) || in.dst_unused == 2;
  uint64_t lanes = lanes_read(w, in, reads);
  bool is_first = true;
  for_each_register(w, in, [&](const Operand& o, uint32_t first, bool is_read, bool is_written) {
    bool is_dpp_source = (in.flags & kDpp) && !is_written && is_first;
    is_first &= is_written;
    if (!is_read || (is_written && keeps_old)) return;
    for (uint32_t r = first; r < first + o.width; ++r) {
      if (!reads_part(in, reads, int(&o - in.op), r - first)) continue;
      if (o.kind == kSgpr) {
        if (r < kSgprs && !s.sgpr_written[r]) {
          report(w, FindingKind::kUninitialisedSgpr, -1, r);
        }
        continue;
      }
      // DPP reads other lanes than it writes: only a register that no lane has is certain.
      uint64_t missing = is_dpp_source ? (s.written[r] ? 0 : lanes) : lanes & ~s.written[r];
      if (r >= kVgprs || !missing) continue;
      int lane = __builtin_ctzll(missing);
      if (s.lds_source[r]) {
        report(w, FindingKind::kUninitialisedLds, lane, s.lds_source[r] - 1);
      } else {
        report(w, FindingKind::kUninitialisedVgpr, lane, r);
      }
    }
  });
  if ((in.flags & kReadsVcc) && !(s.sgpr_written[kVcc] && s.sgpr_written[kVcc + 1])) {
    report(w, FindingKind::kUninitialisedSgpr, -1, kVcc);
  }
}

// Whether a copying instruction's source is written, lane by lane and register by register.
void mark_copy(Shadow& s, const Instruction& in, const Operand& to, uint32_t first,
               uint32_t from_first) {
  const Operand& from = in.op[1];
  for (uint32_t i = 0; i < to.width; ++i) {
    uint64_t written = ~0ull;
    if (from.kind == kVgpr && from_first + i < kVgprs) written = s.written[from_first + i];
    if (from.kind == kSgpr && from_first + i < kSgprs) {
      written = s.sgpr_written[from_first + i] ? ~0ull : 0;
    }
    if (to.kind == kSgpr) {
      s.sgpr_written[first + i] = written != 0;
    } else {
      s.written[first + i] = (s.written[first + i] & ~s.exec) | (written & s.exec);
    }
  }
}

// Scalars pass through lanes of a vector register with their state.
void mark_lane(const Wave& w, Shadow& s, const Instruction& in, Reads reads) {
  const Operand &to = in.op[0], &from = in.op[1];
  uint64_t lane = selected_lane(w, in);
  if (reads == Reads::kFromLane) {
    if (to.index < kSgprs) s.sgpr_written[to.index] = s.written[from.index] & lane;
    return;
  }
  bool is_written = from.kind != kSgpr || from.index >= kSgprs || s.sgpr_written[from.index];
  s.written[to.index] = is_written ? s.written[to.index] | lane : s.written[to.index] & ~lane;
}

void mark_written(Machine& m, Wave& w, const Instruction& in) {
  Shadow& s = *w.shadow;
  Reads reads = m.reads[w.pc];
  if (reads == Reads::kFromLane || reads == Reads::kToLane) {
    mark_lane(w, s, in, reads);
    return;
  }
  bool is_copy = reads == Reads::kCopy && !(in.flags & (kDpp | kSdwa)) && in.op_count == 2;
  uint64_t lanes = in.flags & kIgnoresExec ? ~0ull : s.exec;
  uint64_t high = lanes;  // lanes whose sum has a high half
  if (reads == Reads::kWideAddend) {
    const Operand& addend = in.op[kAddend];
    if (addend.kind == kVgpr && addend.index + 1u < kVgprs) high &= s.written[addend.index + 1];
    if (addend.kind == kSgpr && addend.index + 1u < kSgprs && !s.sgpr_written[addend.index + 1]) {
      high = 0;
    }
  }
  for_each_register(w, in, [&](const Operand& o, uint32_t first, bool, bool is_written) {
    if (!is_written) return;
    if (is_copy) {
      mark_copy(s, in, o, first, first_register(w, in, in.op[1], 0));
      return;
    }
    uint32_t end = std::min<uint32_t>(first + o.width, o.kind == kVgpr ? kVgprs : kSgprs);
    for (uint32_t r = first; r < end; ++r) {
      if (o.kind == kVgpr && &o == &in.op[0] && r == first + 1) {
        s.written[r] = (s.written[r] & ~lanes) | high;
      } else if (o.kind == kVgpr) {
        s.written[r] |= lanes;
      } else {
        s.sgpr_written[r] = true;
      }
      if (o.kind == kVgpr && s.written[r] == ~0ull) s.lds_source[r] = 0;
    }
  });
}

// Registers a load will fill are outstanding; any other write settles its registers.
void mark_outstanding(Wave& w, const Instruction& in) {
  Shadow& s = *w.shadow;
  Outstanding next;
  next.instruction = w.pc;
  switch (in.counter) {
    case kVmCounter: next.kind = kPendingVm, next.issue = s.vm.issued; break;
    case kLdsCounter: next.kind = kPendingLds, next.issue = s.lds.issued; break;
    case kSmemCounter: next.kind = kPendingSmem, next.issue = s.smem.issued; break;
    case kFlatCounter: next.kind = kPendingFlat, next.issue = s.flat_issued; break;
    default: break;
  }
  if (next.kind == kNothing && s.vgprs_pending == 0 && s.sgprs_pending == 0) return;
  // A buffer atomic's data register is written only when the old value is returned.
  if ((in.flags & kAtomic) && !(in.flags & kSc0)) return;
  for_each_register(w, in, [&](const Operand& o, uint32_t first, bool, bool is_written) {
    if (!is_written) return;
    bool is_vector = o.kind == kVgpr;
    uint32_t end = std::min<uint32_t>(first + o.width, is_vector ? kVgprs : kSgprs);
    for (uint32_t r = first; r < end; ++r) {
      Outstanding& old = is_vector ? s.vgpr[r] : s.sgpr[r];
      uint32_t& pending = is_vector ? s.vgprs_pending : s.sgprs_pending;
      pending += (next.kind != kNothing) - (old.kind != kNothing);
      old = next;
    }
  });
}

// Forgets what a wait has settled, so that the next instructions find nothing to look up.
void settle(Outstanding* registers, size_t count, uint32_t& pending, const Shadow& s) {
  if (pending == 0) return;
  for (size_t r = 0; r < count; ++r) {
    if (registers[r].kind != kNothing && s.is_done(registers[r])) {
      registers[r].kind = kNothing;
      --pending;
    }
  }
}

void land(Machine& m, Wave& w, const DmaCopy& copy) {
  for (uint64_t lanes = copy.lanes; lanes; lanes &= lanes - 1) {
    int lane = __builtin_ctzll(lanes);
    if (m.late_dma) {
      std::memcpy(w.group->lds + copy.address[lane], copy.data[lane], copy.bytes);
    }
    if (m.lds_cells.empty()) continue;
    for (uint32_t byte = 0; byte < copy.bytes; byte += 4) {
      LdsCell& cell = m.lds_cells[(copy.address[lane] + byte) / 4];
      if (cell.writer == w.id && cell.copy == copy.issue) {
        cell.copy = 0;
        cell.write_epoch = w.group->epoch;
      }
    }
  }
}

void land_copies(Machine& m, Wave& w) {
  Shadow& s = *w.shadow;
  size_t landed = 0;
  while (landed < s.copies.size() && s.copies[landed].issue <= s.vm.retired) {
    land(m, w, s.copies[landed++]);
  }
  s.copies.erase(s.copies.begin(), s.copies.begin() + static_cast<ptrdiff_t>(landed));
}

void retire(Queue& queue, int still_out) {
  uint32_t allowed = static_cast<uint32_t>(still_out);
  if (queue.issued > allowed) queue.retired = std::max(queue.retired, queue.issued - allowed);
}

void wait(Machine& m, Wave& w, const Instruction& in) {
  Shadow& s = *w.shadow;
  if (in.vmcnt >= 0) {
    retire(s.vm, in.vmcnt);
    if (in.vmcnt == 0) s.flat_vm_retired = s.flat_issued;
    land_copies(m, w);
  }
  if (in.lgkmcnt >= 0) {
    retire(s.lds, in.lgkmcnt);
    if (in.lgkmcnt == 0) {
      s.smem.retired = s.smem.issued;
      s.flat_lds_retired = s.flat_issued;
    }
  }
  settle(s.vgpr, kVgprs, s.vgprs_pending, s);
  settle(s.sgpr, kSgprs, s.sgprs_pending, s);
}

void issue(Wave& w, const Instruction& in) {
  Shadow& s = *w.shadow;
  switch (in.counter) {
    case kVmCounter: ++s.vm.issued; break;
    case kSmemCounter: ++s.smem.issued; break;
    case kFlatCounter: ++s.flat_issued; break;
    case kLdsCounter:
      ++s.lds.issued;
      if (in.flags & kStore) {
        s.last_lds_write = s.lds.issued;
        s.last_lds_write_instruction = w.pc;
      }
      break;
    default: break;
  }
}

bool is_lds_load(const Instruction& in) {
  return (in.counter == kLdsCounter || in.counter == kFlatCounter) && (in.flags & kLoad);
}

void report_race(Wave& w, int lane, uint32_t other, uint32_t address) {
  report(w, FindingKind::kLdsRace, lane, other, address);
}

// Bytes never written: of an atomic reported at once, of a load where its register is used.
void load_unwritten(Wave& w, int lane, uint32_t address, int reg) {
  Shadow& s = *w.shadow;
  if (reg < 0) {
    report(w, FindingKind::kUninitialisedLds, lane, address);
    return;
  }
  s.written[reg] &= ~(1ull << lane);
  // Of the first lane, which is the one that a use reports.
  if (s.lds_source[reg] == 0) s.lds_source[reg] = address + 1;
}

struct CellAccess {
  int lane;
  uint32_t dword;     // of LDS
  uint8_t mask;       // its bytes
  Access access;
  bool changes;       // a store of other values than LDS holds
  int load_register;  // -1: none
};

void track_cell(Machine& m, Wave& w, const CellAccess& a) {
  LdsCell& cell = m.lds_cells[a.dword];
  uint32_t epoch = w.group->epoch, address = a.dword * 4, self = 1u << w.id;
  bool is_same_bytes = cell.write_bytes & a.mask, is_same_epoch = cell.write_epoch == epoch;
  bool is_load = a.access == Access::kLoad;
  // A wave that wrote the same values itself reads its own.
  bool is_foreign = is_load ? !(cell.writers & self) : (cell.writers & ~self) && a.changes;
  if (is_same_bytes && cell.copy != 0 && m.checks_for(kCheckWaits)) {
    report(w, FindingKind::kMissingWait, a.lane, kLdsDetail | address, cell.write_instruction);
  } else if (is_same_bytes && is_same_epoch && is_foreign &&
             !(cell.is_atomic && a.access == Access::kAtomic) && m.checks_for(kCheckRaces)) {
    report_race(w, a.lane, cell.write_instruction, address);
  }
  bool is_foreign_read = cell.readers & ~self;
  if (!is_load && a.changes && cell.read_epoch == epoch && is_foreign_read &&
      (cell.read_bytes & a.mask) && m.checks_for(kCheckRaces)) {
    report_race(w, a.lane, cell.read_instruction, address);
  }
  if (a.access != Access::kStore && (a.mask & ~cell.initialised) &&
      m.checks_for(kCheckUninitialised)) {
    load_unwritten(w, a.lane, address, a.load_register);
  }
  if (is_load) {
    if (cell.read_epoch != epoch) cell.readers = 0, cell.read_bytes = 0;
    cell.read_epoch = epoch;
    cell.readers |= static_cast<uint16_t>(self);
    cell.read_bytes |= a.mask;
    cell.read_instruction = w.pc;
    return;
  }
  bool adds_writer = is_same_epoch && !a.changes && cell.copy == 0;
  if (!adds_writer) {
    if (!is_same_epoch || cell.writer != w.id) cell.write_bytes = 0;
    cell.writers = 0;
  }
  cell.writers |= static_cast<uint16_t>(self);
  cell.write_epoch = epoch;
  cell.writer = static_cast<uint8_t>(w.id);
  cell.write_bytes |= a.mask;
  cell.write_instruction = w.pc;
  cell.initialised |= a.mask;
  cell.is_atomic = a.access == Access::kAtomic;
  cell.copy = 0;
}

}  // namespace

void prepare_checks(Machine& m) {
  for (size_t i = 0; i < m.waves.size(); ++i) {
    m.shadows.push_back(std::make_unique<Shadow>());
    m.waves[i]->shadow = m.shadows[i].get();
  }
  m.reads.clear();
  for (uint32_t i = 0; i < m.config->instruction_count; ++i) {
    m.reads.push_back(reads_of(handler_name(m.config->instructions[i].handler)));
  }
  if (m.checks & (kCheckWaits | kCheckRaces | kCheckUninitialised)) {
    m.lds_cells.resize((m.group.lds_bytes + 3) / 4);
  }
}

void reset_checks(Machine& m, bool all_initialised) {
  LdsCell fresh{};
  fresh.initialised = all_initialised ? 15 : 0;
  std::fill(m.lds_cells.begin(), m.lds_cells.end(), fresh);
  const RunConfig& c = *m.config;
  for (Wave* w : m.waves) {
    Shadow& s = *w->shadow;
    s = Shadow{};
    std::fill(s.written, s.written + kVgprs, all_initialised ? ~0ull : 0);
    s.written[0] = ~0ull;
    // What hardware sets up: user and system registers, and everything above VCC.
    std::fill(s.sgpr_written, s.sgpr_written + kSgprs, all_initialised);
    std::fill(s.sgpr_written, s.sgpr_written + c.initial_sgpr_count, true);
    uint32_t system = static_cast<uint32_t>(__builtin_popcount(c.system_sgprs));
    std::fill_n(s.sgpr_written + c.system_first, system, true);
    std::fill(s.sgpr_written + kFlatScratch, s.sgpr_written + kVcc, true);
    std::fill(s.sgpr_written + kVcc + 2, s.sgpr_written + kSgprs, true);
  }
}

void before_instruction(Machine& m, Wave& w, const Instruction& in) {
  w.shadow->exec = w.exec();
  if (m.checks_for(kCheckWaits)) check_outstanding(m, w, in);
  if (m.checks_for(kCheckUninitialised)) check_initialised(m, w, in);
  if (in.counter != kNoCounter) issue(w, in);
  // Loads from LDS take back what they find unwritten.
  if (m.checks_for(kCheckUninitialised) && is_lds_load(in)) mark_written(m, w, in);
  w.shadow->load_register = -1;
}

void after_instruction(Machine& m, Wave& w, const Instruction& in) {
  if (m.steps[w.pc] == Step::kWait) {
    wait(m, w, in);
    return;
  }
  if (m.checks_for(kCheckUninitialised) && !is_lds_load(in)) mark_written(m, w, in);
  if (m.checks_for(kCheckWaits)) mark_outstanding(w, in);
}

void check_barrier_arrival(Machine& m, Wave& w) {
  const Shadow& s = *w.shadow;
  if (!m.checks_for(kCheckBarrierWrites) || m.waves.size() == 1) return;
  if (s.last_lds_write > s.lds.retired) {
    report(w, FindingKind::kBarrierWrites, -1, s.last_lds_write_instruction);
  }
}

void check_barrier_release(Machine& m) {
  if (!m.checks_for(kCheckBarriers)) return;
  const Wave* first = nullptr;
  for (Wave* w : m.waves) {
    if (w->state != WaveState::kAtBarrier) continue;
    if (first == nullptr) first = w;
    if (m.barrier_of[w->id] == m.barrier_of[first->id]) continue;
    uint32_t next = w->pc;
    w->pc = m.barrier_of[w->id];  // report names the barrier
    report(*w, FindingKind::kDivergentBarrier, -1, m.barrier_of[first->id]);
    w->pc = next;
  }
}

void finish_wave(Machine& m, Wave& w) {
  w.shadow->vm.retired = w.shadow->vm.issued;
  land_copies(m, w);
}

void track_lds(Machine& m, Wave& w, int lane, uint32_t address, uint32_t bytes, Access access,
               const void* value) {
  if (m.lds_cells.empty()) return;
  CellAccess a{lane, 0, 0, access, true, -1};
  if (access == Access::kStore) a.changes = std::memcmp(w.group->lds + address, value, bytes) != 0;
  int reg = access == Access::kLoad ? w.shadow->load_register : -1;
  uint32_t end = address + bytes;
  for (uint32_t at = address; at < end; at = (at | 3) + 1) {
    uint32_t first = at & 3, last = std::min(4u, end - (at & ~3u));
    a.dword = at / 4;
    a.mask = static_cast<uint8_t>((1u << last) - (1u << first));
    a.load_register = reg < 0 ? -1 : reg + static_cast<int>((at - address) / 4);
    track_cell(m, w, a);
  }
}

void track_copy(Machine& m, Wave& w, int lane, uint32_t address, uint32_t bytes,
                const void* value) {
  Shadow& s = *w.shadow;
  if (s.copies.empty() || s.copies.back().issue != s.vm.issued) {
    s.copies.emplace_back();
    s.copies.back().issue = s.vm.issued;
    s.copies.back().instruction = w.pc;
    s.copies.back().bytes = bytes;
    s.copies.back().lanes = 0;
  }
  DmaCopy& copy = s.copies.back();
  copy.lanes |= 1ull << lane;
  copy.address[lane] = address;
  if (m.late_dma) std::memcpy(copy.data[lane], value, bytes);
  if (m.lds_cells.empty()) return;
  track_lds(m, w, lane, address, bytes, Access::kStore, value);
  for (uint32_t byte = 0; byte < bytes; byte += 4) {
    m.lds_cells[(address + byte) / 4].copy = copy.issue;
  }
}

}  // namespace cdna
