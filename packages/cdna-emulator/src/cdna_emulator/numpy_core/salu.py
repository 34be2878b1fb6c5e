"""Scalar arithmetic, logic and comparisons on one wave's scalar registers."""

from __future__ import annotations

from collections.abc import Callable

from cdna_emulator.errors import UnknownInstructionError
from cdna_emulator.instruction import M0, Instruction
from cdna_emulator.numpy_core.operands import scalar
from cdna_emulator.numpy_core.registry import handler
from cdna_emulator.numpy_core.state import WaveState

_ONES = {32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}


def signed(value: int, bits: int = 32) -> int:
    """Read the low bits of a number as a signed one."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def put(state: WaveState, inst: Instruction, position: int, value: int, bits: int) -> None:
    """Write a scalar destination."""
    index = inst.operands[position].index
    if bits == 64:
        state.set_pair(index, value)
    else:
        state.sgpr[index] = value & 0xFFFFFFFF


def get(state: WaveState, inst: Instruction, position: int, bits: int) -> int:
    """Return a scalar source of 32 or 64 bits."""
    value = scalar(state, inst.operands[position], bits // 32)
    if inst.operands[position].kind == "special" and bits == 32:
        # A 32-bit read of an aperture gives its high half, which holds all of it.
        return value >> 32 if value >> 32 else value
    return value & _ONES[bits]


def _width(inst: Instruction, position: int) -> int:
    return 64 if inst.op.slots[position].type in ("b64", "mask") else 32


def _register(names: str, function: Callable[..., int], scc: Callable[[int], bool] | None) -> None:
    """Register ``function(*sources)``; ``scc`` makes the condition from the result."""

    @handler(names)
    def execute(state: WaveState, inst: Instruction) -> None:
        slots = inst.op.slots
        values = [get(state, inst, k, _width(inst, k)) for k, s in enumerate(slots) if s.is_read]
        bits = _width(inst, 0)
        result = function(*values) & _ONES[bits]
        put(state, inst, 0, result, bits)
        if scc is not None:
            state.scc = int(scc(result))


def _nonzero(value: int) -> bool:
    return value != 0


def _reverse(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2)


def _first(value: int) -> int:
    return (value & -value).bit_length() - 1


def _leading(value: int, bits: int) -> int:
    return bits - value.bit_length() if value else -1


def _leading_sign(value: int, bits: int) -> int:
    return _leading(value ^ (_ONES[bits] if value >> (bits - 1) else 0), bits)


def _groups(value: int, bits: int) -> list[bool]:
    return [bool(value >> 4 * k & 15) for k in range(bits // 4)]


def _field_unsigned(value: int, control: int, bits: int) -> int:
    return value >> (control & (bits - 1)) & ((1 << (control >> 16 & 127)) - 1)


def _field_signed(value: int, control: int, bits: int) -> int:
    width = min(control >> 16 & 127, bits)
    field = signed(value, bits) >> (control & (bits - 1)) & ((1 << width) - 1)
    return signed(field, width) if width else 0


for _bits in (32, 64):
    _b, _ones = f"b{_bits}", _ONES[_bits]
    _register(f"s_mov_{_b}", lambda a: a, None)
    _register(f"s_brev_{_b}", lambda a, n=_bits: _reverse(a, n), None)
    _register(f"s_not_{_b}", lambda a: ~a, _nonzero)
    _register(
        f"s_quadmask_{_b}",
        lambda a, n=_bits: sum(on << k for k, on in enumerate(_groups(a, n))),
        _nonzero,
    )
    _register(
        f"s_wqm_{_b}",
        lambda a, n=_bits: sum((15 if on else 0) << 4 * k for k, on in enumerate(_groups(a, n))),
        _nonzero,
    )
    _register(f"s_bcnt0_i32_{_b}", lambda a, n=_bits: n - a.bit_count(), _nonzero)
    _register(f"s_bcnt1_i32_{_b}", lambda a: a.bit_count(), _nonzero)
    _register(f"s_ff0_i32_{_b}", lambda a, ones=_ones: _first(a ^ ones), None)
    _register(f"s_ff1_i32_{_b}", _first, None)
    _register(f"s_flbit_i32_{_b}", lambda a, n=_bits: _leading(a, n), None)
    _register(f"s_bitset0_{_b}", lambda d, a, n=_bits: d & ~(1 << (a & (n - 1))), None)
    _register(f"s_bitset1_{_b}", lambda d, a, n=_bits: d | 1 << (a & (n - 1)), None)
    _register(f"s_and_{_b}", lambda a, b: a & b, _nonzero)
    _register(f"s_or_{_b}", lambda a, b: a | b, _nonzero)
    _register(f"s_xor_{_b}", lambda a, b: a ^ b, _nonzero)
    _register(f"s_andn2_{_b}", lambda a, b: a & ~b, _nonzero)
    _register(f"s_orn2_{_b}", lambda a, b, m=_ones: a | ~b & m, _nonzero)
    _register(f"s_nand_{_b}", lambda a, b: ~(a & b), _nonzero)
    _register(f"s_nor_{_b}", lambda a, b: ~(a | b), _nonzero)
    _register(f"s_xnor_{_b}", lambda a, b: ~(a ^ b), _nonzero)
    _register(f"s_lshl_{_b}", lambda a, b, n=_bits: a << (b & (n - 1)), _nonzero)
    _register(f"s_lshr_{_b}", lambda a, b, n=_bits: a >> (b & (n - 1)), _nonzero)
    _register(f"s_ashr_i{_bits}", lambda a, b, n=_bits: signed(a, n) >> (b & (n - 1)), _nonzero)
    _register(f"s_bfe_u{_bits}", lambda a, b, n=_bits: _field_unsigned(a, b, n), _nonzero)
    _register(f"s_bfe_i{_bits}", lambda a, b, n=_bits: _field_signed(a, b, n), _nonzero)
    _register(
        f"s_bfm_{_b}",
        lambda a, b, n=_bits: ((1 << (a & (n - 1))) - 1) << (b & (n - 1)),
        None,
    )

_register("s_flbit_i32", lambda a: _leading_sign(a, 32), None)
_register("s_flbit_i32_i64", lambda a: _leading_sign(a, 64), None)
_register("s_sext_i32_i8", lambda a: signed(a, 8), None)
_register("s_sext_i32_i16", lambda a: signed(a, 16), None)
_register("s_abs_i32", lambda a: abs(signed(a)), _nonzero)
_register("s_absdiff_i32", lambda a, b: abs(signed(signed(a) - signed(b))), _nonzero)
_register(
    "s_bitreplicate_b64_b32", lambda a: sum((a >> k & 1) * (3 << 2 * k) for k in range(32)), None
)
_register("s_mul_i32", lambda a, b: a * b, None)
_register("s_mul_hi_u32", lambda a, b: a * b >> 32, None)
_register("s_mul_hi_i32", lambda a, b: signed(a) * signed(b) >> 32, None)
_register("s_pack_ll_b32_b16", lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16, None)
_register("s_pack_lh_b32_b16", lambda a, b: a & 0xFFFF | b >> 16 << 16, None)
_register("s_pack_hh_b32_b16", lambda a, b: a >> 16 | b >> 16 << 16, None)
_register("s_movk_i32", lambda k: signed(k, 16), None)
_register("s_mulk_i32", lambda d, k: d * signed(k, 16), None)


# --- sums that carry


def _sum(names: str, function: Callable[[int, int, int], tuple[int, bool]]) -> None:
    """Register ``function(a, b, scc)`` that returns the result and the new condition."""

    @handler(names)
    def execute(state: WaveState, inst: Instruction) -> None:
        result, scc = function(
            get(state, inst, 1, 32), get(state, inst, 2, 32), int(bool(state.scc))
        )
        put(state, inst, 0, result, 32)
        state.scc = int(scc)


def _overflows(exact: int) -> bool:
    return not -(1 << 31) <= exact < 1 << 31


_sum("s_add_u32", lambda a, b, c: (a + b, a + b > 0xFFFFFFFF))
_sum("s_sub_u32", lambda a, b, c: (a - b, b > a))
_sum("s_addc_u32", lambda a, b, c: (a + b + c, a + b + c > 0xFFFFFFFF))
_sum("s_subb_u32", lambda a, b, c: (a - b - c, b + c > a))
_sum("s_add_i32", lambda a, b, c: (a + b, _overflows(signed(a) + signed(b))))
_sum("s_sub_i32", lambda a, b, c: (a - b, _overflows(signed(a) - signed(b))))
_sum("s_min_i32", lambda a, b, c: (min(signed(a), signed(b)), signed(a) < signed(b)))
_sum("s_max_i32", lambda a, b, c: (max(signed(a), signed(b)), signed(a) >= signed(b)))
_sum("s_min_u32", lambda a, b, c: (min(a, b), a < b))
_sum("s_max_u32", lambda a, b, c: (max(a, b), a >= b))
_sum("s_lshl1_add_u32", lambda a, b, c: (2 * a + b, 2 * a + b > 0xFFFFFFFF))
_sum("s_lshl2_add_u32", lambda a, b, c: (4 * a + b, 4 * a + b > 0xFFFFFFFF))
_sum("s_lshl3_add_u32", lambda a, b, c: (8 * a + b, 8 * a + b > 0xFFFFFFFF))
_sum("s_lshl4_add_u32", lambda a, b, c: (16 * a + b, 16 * a + b > 0xFFFFFFFF))


@handler("s_addk_i32")
def _addk(state: WaveState, inst: Instruction) -> None:
    exact = signed(get(state, inst, 0, 32)) + signed(get(state, inst, 1, 32), 16)
    put(state, inst, 0, exact, 32)
    state.scc = int(_overflows(exact))


# --- conditions


@handler("s_cmov_b32 s_cmov_b64 s_cmovk_i32")
def _conditional_move(state: WaveState, inst: Instruction) -> None:
    bits = 64 if inst.mnemonic.endswith("b64") else 32
    if state.scc:
        value = get(state, inst, 1, bits)
        put(state, inst, 0, signed(value, 16) if "cmovk" in inst.mnemonic else value, bits)


@handler("s_cselect_b32 s_cselect_b64")
def _conditional_select(state: WaveState, inst: Instruction) -> None:
    bits = 64 if inst.mnemonic.endswith("b64") else 32
    put(state, inst, 0, get(state, inst, 1 if state.scc else 2, bits), bits)


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}


def _compare(name: str, kind: str, *, short: bool) -> None:
    compare, bits = _COMPARE[name], int(kind[1:])

    @handler(f"s_cmp{'k' if short else ''}_{name}_{kind}")
    def execute(state: WaveState, inst: Instruction) -> None:
        a, b = get(state, inst, 0, bits), get(state, inst, 1, bits)
        if short:
            b = signed(b, 16) if kind[0] == "i" else b & 0xFFFF
        if kind[0] == "i":
            a, b = signed(a, bits), signed(b, bits)
        state.scc = int(compare(a, b))


for _name in _COMPARE:
    for _kind in ("i32", "u32"):
        _compare(_name, _kind, short=False)
        _compare(_name, _kind, short=True)
_compare("eq", "u64", short=False)
_compare("lg", "u64", short=False)


@handler("s_bitcmp0_b32 s_bitcmp1_b32 s_bitcmp0_b64 s_bitcmp1_b64")
def _bit_test(state: WaveState, inst: Instruction) -> None:
    bits = int(inst.mnemonic[-2:])
    bit = get(state, inst, 0, bits) >> (get(state, inst, 1, 32) & (bits - 1)) & 1
    state.scc = int(bit == int(inst.mnemonic[8]))


# --- EXEC


_EXEC: dict[str, Callable[[int, int], int]] = {
    "and": lambda s, e: s & e,
    "or": lambda s, e: s | e,
    "xor": lambda s, e: s ^ e,
    "andn1": lambda s, e: ~s & e,
    "andn2": lambda s, e: s & ~e,
    "orn1": lambda s, e: ~s | e,
    "orn2": lambda s, e: s | ~e,
    "nand": lambda s, e: ~(s & e),
    "nor": lambda s, e: ~(s | e),
    "xnor": lambda s, e: ~(s ^ e),
}


def _exec_op(name: str, combine: Callable[[int, int], int], *, saves: bool) -> None:
    @handler(name)
    def execute(state: WaveState, inst: Instruction) -> None:
        old = state.exec
        state.exec = combine(get(state, inst, 1, 64), old)
        new = state.exec
        put(state, inst, 0, old if saves else new, 64)
        state.scc = int(new != 0)


for _name, _function in _EXEC.items():
    _exec_op(f"s_{_name}_saveexec_b64", _function, saves=True)
for _name in ("andn1", "andn2"):
    _exec_op(f"s_{_name}_wrexec_b64", _EXEC[_name], saves=False)


# --- indexed registers and MODE


@handler("s_movrels_b32 s_movrels_b64")
def _indexed_read(state: WaveState, inst: Instruction) -> None:
    index = inst.operands[1].index + state.m0
    words = 2 if inst.mnemonic.endswith("64") else 1
    for k in range(words):
        state.sgpr[inst.operands[0].index + k] = state.sgpr[index + k]


@handler("s_movreld_b32 s_movreld_b64")
def _indexed_write(state: WaveState, inst: Instruction) -> None:
    bits = int(inst.mnemonic[-2:])
    index = inst.operands[0].index + state.m0
    value = get(state, inst, 1, bits)
    for k in range(bits // 32):
        state.sgpr[index + k] = value >> 32 * k & 0xFFFFFFFF


def _set_m0(state: WaveState, low: int, width: int, value: int) -> None:
    mask = ((1 << width) - 1) << low
    state.sgpr[M0] = state.m0 & ~mask | value << low & mask


@handler("s_set_gpr_idx_on")
def _gpr_idx_on(state: WaveState, inst: Instruction) -> None:
    state.mode.gpr_idx = True
    _set_m0(state, 0, 8, get(state, inst, 0, 32))
    _set_m0(state, 12, 4, inst.operands[1].bits)


@handler("s_set_gpr_idx_idx")
def _gpr_idx_index(state: WaveState, inst: Instruction) -> None:
    _set_m0(state, 0, 8, get(state, inst, 0, 32))


@handler("s_set_gpr_idx_mode")
def _gpr_idx_mode(state: WaveState, inst: Instruction) -> None:
    _set_m0(state, 12, 4, inst.operands[0].bits)


@handler("s_set_gpr_idx_off")
def _gpr_idx_off(state: WaveState, inst: Instruction) -> None:
    state.mode.gpr_idx = False


_MODE_REGISTER = 1


def _hardware_field(inst: Instruction, code: int) -> tuple[int, int]:
    """Return offset and mask of a field of MODE."""
    if code & 63 != _MODE_REGISTER:
        raise UnknownInstructionError(
            f"numpy core: `{inst.text}`: register must be HW_REG_MODE, got number {code & 63}"
        )
    return code >> 6 & 31, (1 << (code >> 11 & 31) + 1) - 1


@handler("s_getreg_b32")
def _getreg(state: WaveState, inst: Instruction) -> None:
    offset, mask = _hardware_field(inst, inst.operands[1].bits)
    put(state, inst, 0, state.mode.bits >> offset & mask, 32)


@handler("s_setreg_b32 s_setreg_imm32_b32")
def _setreg(state: WaveState, inst: Instruction) -> None:
    offset, mask = _hardware_field(inst, inst.operands[0].bits)
    value = get(state, inst, 1, 32) & mask
    state.mode.bits = (state.mode.bits & ~(mask << offset) | value << offset) & 0xFFFFFFFF
