// Runs workgroups: sets waves up, schedules them, releases barriers, records findings. The C ABI.
#include <algorithm>
#include <new>

#include "machine_state.h"

namespace cdna {

namespace {

constexpr uint32_t kMaxWaves = 16;  // 1024 work-items
// What registers and LDS hold before they are written: a NaN in every float format.
constexpr int kPoison = 0xff;

const std::vector<NamedHandler>& all_handlers() {
  static const std::vector<NamedHandler> handlers = [] {
    std::vector<NamedHandler> rows;
    for (HandlerTable table :
         {salu_handlers(), control_handlers(), valu_integer_handlers(), valu_float_handlers(),
          valu_division_handlers(), valu_compare_handlers(), valu_lane_handlers(), convert_handlers(),
          convert_scaled_handlers(), transcendental_handlers(), packed_handlers(), mfma_handlers(),
          scalar_memory_handlers(), global_handlers(), buffer_handlers(), lds_handlers()}) {
      rows.insert(rows.end(), table.rows, table.rows + table.count);
    }
    return rows;
  }();
  return handlers;
}

bool is_name(const char* name, const char* other) { return std::strcmp(name, other) == 0; }

bool prepare(Machine& m, const RunConfig& config, RunOutput& output) {
  if (config.instruction_count == 0 || config.entry >= config.instruction_count ||
      config.lds_bytes > 160 * 1024) {
    return false;
  }
  m.config = &config;
  m.output = &output;
  output = RunOutput{};
  m.checks = config.checks;
  m.late_dma = config.late_dma != 0;
  m.is_tracked = m.checks != 0 || m.late_dma;
  uint32_t first = config.instructions[0].address, last = first;
  for (uint32_t i = 0; i < config.instruction_count; ++i) {
    uint32_t handler = config.instructions[i].handler;
    if (handler >= all_handlers().size()) return false;
    m.handlers.push_back(all_handlers()[handler].handler);
    m.steps.push_back(is_name(all_handlers()[handler].name, "s_waitcnt") ? Step::kWait
                                                                         : Step::kPlain);
    last = std::max(last, config.instructions[i].address);
  }
  m.at_address.assign((last - first) / 4 + 1, -1);
  for (uint32_t i = 0; i < config.instruction_count; ++i) {
    m.at_address[(config.instructions[i].address - first) / 4] = static_cast<int32_t>(i);
  }
  m.finding_of.assign(size_t{kFindingKinds} * config.instruction_count, -1);
  m.group.lds_bytes = config.lds_bytes;
  return true;
}

// Registers of one wave at the start of its workgroup.
void start_wave(Machine& m, Wave& w, uint32_t id) {
  const RunConfig& c = *m.config;
  std::memset(w.v, kPoison, sizeof(w.v));
  std::memset(w.s, kPoison, sizeof(w.s));
  if (w.scratch_bytes) std::memset(w.scratch, kPoison, size_t{kLanes} * w.scratch_bytes);
  w.scc = false;
  set_mode_bits(w.mode, c.mode);
  w.state = WaveState::kRunning;
  w.pc = c.entry;
  w.id = id;
  w.arch = c.arch;
  w.group = &m.group;
  w.machine = &m;
  for (int i = kFlatScratch; i < kVcc; ++i) w.s[i] = 0;
  for (uint32_t i = 0; i < c.initial_sgpr_count; ++i) w.s[i] = c.initial_sgprs[i];
  uint32_t next = c.system_first;
  uint32_t items = c.block[0] * c.block[1] * c.block[2];
  for (int axis = 0; axis < 3; ++axis) {
    if (c.system_sgprs & (kSystemWorkgroupX << axis)) w.s[next++] = m.group.id[axis];
  }
  if (c.system_sgprs & kSystemWorkgroupInfo) {
    w.s[next++] = uint32_t{id == 0} << 31 | static_cast<uint32_t>(m.waves.size());
  }
  // Private memory is addressed from each wave's own base here.
  if (c.system_sgprs & kSystemScratchOffset) w.s[next++] = 0;
  uint64_t exec = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    uint32_t item = id * kLanes + lane;
    if (item >= items) break;
    exec |= 1ull << lane;
    uint32_t x = item % c.block[0], y = item / c.block[0] % c.block[1];
    uint32_t z = item / c.block[0] / c.block[1];
    uint32_t packed = x;
    if (c.workitem_id_mode >= 1) packed |= y << 10;
    if (c.workitem_id_mode >= 2) packed |= z << 20;
    w.v[0].lane[lane] = packed;
  }
  w.set_pair(kExec, exec);
}

// Executes up to `slice` instructions of a wave, until it waits or ends.
template <bool kTracked>
void run_wave(Machine& m, Wave& w, uint64_t slice) {
  const Instruction* code = m.config->instructions;
  const Handler* handlers = m.handlers.data();
  uint64_t* executed = m.config->executed;
  uint32_t count = m.config->instruction_count;
  uint64_t left = std::min(slice, m.budget), limit = left;
  while (left > 0 && w.state == WaveState::kRunning && !m.is_stopped) {
    uint32_t pc = w.pc;
    if (pc >= count) {
      // Execution ran past the last instruction.
      w.pc = count - 1;
      report(w, FindingKind::kUnsupported, -1, pc);
      break;
    }
    const Instruction& in = code[pc];
    w.next = pc + 1;
    --left;
    ++m.output->instructions;
    ++executed[pc];
    if constexpr (kTracked) {
      before_instruction(m, w, in);
      handlers[pc](w, in);
      after_instruction(m, w, in);
    } else {
      handlers[pc](w, in);
    }
    if (w.state != WaveState::kRunning) {
      if constexpr (kTracked) {
        if (w.state == WaveState::kAtBarrier) check_barrier_arrival(m, w);
        if (w.state == WaveState::kEnded) finish_wave(m, w);
      }
      m.barrier_of[w.id] = pc;
    }
    w.pc = w.next;
  }
  m.budget -= limit - left;
  if (m.budget == 0 && w.state == WaveState::kRunning && !m.is_stopped) {
    w.pc = std::min(w.pc, count - 1);
    report(w, FindingKind::kInstructionLimit, -1, m.config->max_instructions);
  }
}

// A small generator of its own, so that runs repeat on every platform.
uint64_t next_random(uint64_t& state) {
  state += 0x9e3779b97f4a7c15ull;
  uint64_t z = state;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

// Lets waves continue once all that have not ended wait; false when all have ended.
bool release_barrier(Machine& m) {
  bool is_waiting = false;
  for (Wave* w : m.waves) {
    if (w->state == WaveState::kRunning) return true;
    is_waiting |= w->state == WaveState::kAtBarrier;
  }
  if (!is_waiting) return false;
  if (m.is_tracked) check_barrier_release(m);
  ++m.group.epoch;
  for (Wave* w : m.waves) {
    if (w->state == WaveState::kAtBarrier) w->state = WaveState::kRunning;
  }
  return true;
}

template <bool kTracked>
void run_workgroup(Machine& m, uint64_t number) {
  constexpr uint64_t kNoSlice = ~0ull;
  const RunConfig& c = *m.config;
  size_t count = m.waves.size();
  uint64_t random = c.seed ^ number * 0xd1342543de82ef95ull;
  do {
    if (c.schedule == kRandom) {
      size_t first = next_random(random) % count;
      for (size_t i = 0; i < count; ++i) {
        Wave& w = *m.waves[(first + i) % count];
        if (w.state != WaveState::kRunning) continue;
        run_wave<kTracked>(m, w, next_random(random) % 64 + 1);
        break;
      }
    } else {
      uint64_t slice = c.schedule == kRoundRobin ? std::max(c.slice, 1u) : kNoSlice;
      for (size_t i = 0; i < count && !m.is_stopped; ++i) {
        Wave& w = *m.waves[c.schedule == kReversed ? count - 1 - i : i];
        if (w.state == WaveState::kRunning) run_wave<kTracked>(m, w, slice);
      }
    }
  } while (!m.is_stopped && release_barrier(m));
}

void start_workgroup(Machine& m, uint64_t number) {
  const RunConfig& c = *m.config;
  m.group.id[0] = static_cast<uint32_t>(number % c.grid[0]);
  m.group.id[1] = static_cast<uint32_t>(number / c.grid[0] % c.grid[1]);
  m.group.id[2] = static_cast<uint32_t>(number / c.grid[0] / c.grid[1]);
  m.group.epoch = 1;
  m.is_stopped = false;
  m.budget = c.max_instructions;
  std::memset(m.group.lds, kPoison, m.group.lds_bytes);
  for (uint32_t id = 0; id < m.waves.size(); ++id) start_wave(m, *m.waves[id], id);
  if (m.is_tracked) reset_checks(m, false);
}

struct Storage {
  std::vector<std::unique_ptr<Wave>> waves;
  std::vector<uint8_t> scratch;

  Storage(Machine& m, uint32_t count) {
    uint32_t bytes = m.config->scratch_bytes;
    scratch.assign(size_t{count} * kLanes * bytes, kPoison);
    for (uint32_t i = 0; i < count; ++i) {
      waves.push_back(std::make_unique<Wave>());
      waves[i]->scratch = scratch.data() + size_t{i} * kLanes * bytes;
      waves[i]->scratch_bytes = bytes;
      m.waves.push_back(waves[i].get());
    }
    m.barrier_of.assign(count, 0);
    if (m.is_tracked) prepare_checks(m);
  }
};

}  // namespace

const char* handler_name(uint32_t handler) { return all_handlers()[handler].name; }

void report(Wave& w, FindingKind kind, int lane, uint64_t detail0, uint64_t detail1) {
  Machine& m = *w.machine;
  const RunConfig& c = *m.config;
  if (kind == FindingKind::kUnsupported || kind == FindingKind::kInstructionLimit) {
    m.is_stopped = true;
  }
  int32_t& slot = m.finding_of[static_cast<size_t>(kind) * c.instruction_count + w.pc];
  if (slot >= 0) {
    ++c.findings[slot].count;
    return;
  }
  if (m.output->finding_count == c.finding_capacity) {
    ++m.output->findings_lost;
    return;
  }
  slot = static_cast<int32_t>(m.output->finding_count++);
  FindingRecord& record = c.findings[slot];
  record.kind = static_cast<uint32_t>(kind);
  record.instruction = w.pc;
  record.address = c.instructions[w.pc].address;
  record.wave = w.id;
  std::copy(m.group.id, m.group.id + 3, record.workgroup);
  record.lane = lane;
  record.detail0 = detail0;
  record.detail1 = detail1;
  record.count = 1;
}

uint64_t code_address(const Wave& w) {
  const RunConfig& c = *w.machine->config;
  return c.image_base + c.instructions[w.pc].address;
}

bool jump(Wave& w, uint64_t address) {
  const Machine& m = *w.machine;
  uint64_t offset = address - m.config->image_base - m.config->instructions[0].address;
  int32_t index = -1;
  if (offset % 4 == 0 && offset / 4 < m.at_address.size()) index = m.at_address[offset / 4];
  if (index < 0) {
    report(w, FindingKind::kUnsupported, -1, address);
    return false;
  }
  w.next = static_cast<uint32_t>(index);
  return true;
}

uint64_t clock_ticks(const Wave& w) { return w.machine->output->instructions; }

void count_bytes(Wave& w, uint64_t bytes) { w.machine->config->bytes[w.pc] += bytes; }

void count_bank_cycles(Wave& w, uint64_t cycles) {
  w.machine->config->bank_cycles[w.pc] += cycles;
}

}  // namespace cdna

using namespace cdna;

int32_t cdna_handler_index(const char* name) {
  const std::vector<NamedHandler>& handlers = all_handlers();
  for (size_t i = 0; i < handlers.size(); ++i) {
    if (is_name(handlers[i].name, name)) return static_cast<int32_t>(i);
  }
  return -1;
}

void cdna_layout(uint32_t sizes[3]) {
  sizes[0] = sizeof(Instruction);
  sizes[1] = sizeof(RunConfig);
  sizes[2] = sizeof(FindingRecord);
}

int32_t cdna_run(const RunConfig* config, RunOutput* output) {
  Machine m;
  uint64_t items = uint64_t{config->block[0]} * config->block[1] * config->block[2];
  uint64_t groups = uint64_t{config->grid[0]} * config->grid[1] * config->grid[2];
  if (items == 0 || items > kMaxWaves * kLanes || config->end_workgroup > groups ||
      config->initial_sgpr_count > kFlatScratch || config->system_first + 5 > kFlatScratch ||
      !prepare(m, *config, *output)) {
    return -1;
  }
  std::vector<uint8_t> lds(config->lds_bytes + 64);
  m.group.lds = lds.data();
  Storage storage(m, static_cast<uint32_t>((items + kLanes - 1) / kLanes));
  for (uint64_t number = config->first_workgroup;
       number < config->end_workgroup && !m.is_stopped; ++number) {
    start_workgroup(m, number);
    m.is_tracked ? run_workgroup<true>(m, number) : run_workgroup<false>(m, number);
  }
  return 0;
}

int32_t cdna_run_wave(const RunConfig* config, WaveImage* image, RunOutput* output) {
  Machine m;
  if (!prepare(m, *config, *output)) return -1;
  Storage storage(m, 1);
  Wave& w = *m.waves[0];
  m.group.lds = image->lds;
  m.group.epoch = 1;
  m.budget = config->max_instructions;
  w.machine = &m;
  w.group = &m.group;
  w.arch = config->arch;
  w.pc = config->entry;
  std::memcpy(w.v, image->vgpr, sizeof(w.v));
  std::memcpy(w.s, image->sgpr, sizeof(w.s));
  w.scc = image->scc != 0;
  set_mode_bits(w.mode, image->mode);
  if (m.is_tracked) reset_checks(m, true);
  m.is_tracked ? run_workgroup<true>(m, 0) : run_workgroup<false>(m, 0);
  std::memcpy(image->vgpr, w.v, sizeof(w.v));
  std::memcpy(image->sgpr, w.s, sizeof(w.s));
  image->scc = w.scc;
  image->mode = mode_bits(w.mode);
  return 0;
}
