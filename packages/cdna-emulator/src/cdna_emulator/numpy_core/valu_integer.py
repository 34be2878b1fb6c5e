"""Vector integer arithmetic, shifts, bit fields and byte operations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cdna_emulator.numpy_core.operands import number
from cdna_emulator.numpy_core.registry import Step, add_lanewise, lanewise
from cdna_emulator.numpy_core.state import LANE, Array

_U32, _U64 = np.uint32, np.uint64


def signed(values: Array) -> Array:
    """See the same bits as signed numbers."""
    return np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}")


def fit(step: Step, exact: Array, dtype: type) -> Array:
    """Bring int64 results into a narrower type: saturated with clamp, wrapped without."""
    if step.clamp:
        limits = np.iinfo(dtype)
        exact = np.clip(exact, limits.min, limits.max)
    return exact.astype(dtype)


def wide(values: Array) -> Array:
    """Widen to int64, where sums and products of 32-bit halves are exact."""
    return values.astype(np.int64)


def _exact(dtype: type, formula: Callable[..., Array]) -> Callable[..., Array]:
    """Make an operation over int64 of sources seen as ``dtype``."""

    def compute(step: Step, *sources: Array) -> Array:
        seen = [wide(np.ascontiguousarray(x).view(dtype)) for x in sources]
        return fit(step, formula(*seen), dtype)

    return compute


for _names, _dtype, _formula in (
    ("v_add_u32", np.uint32, lambda a, b: a + b),
    ("v_sub_u32", np.uint32, lambda a, b: a - b),
    ("v_subrev_u32", np.uint32, lambda a, b: b - a),
    ("v_add_i32", np.int32, lambda a, b: a + b),
    ("v_sub_i32", np.int32, lambda a, b: a - b),
    ("v_add_u16", np.uint16, lambda a, b: a + b),
    ("v_sub_u16", np.uint16, lambda a, b: a - b),
    ("v_subrev_u16", np.uint16, lambda a, b: b - a),
    ("v_add_i16", np.int16, lambda a, b: a + b),
    ("v_sub_i16", np.int16, lambda a, b: a - b),
    ("v_mul_lo_u16", np.uint16, lambda a, b: a * b),
    ("v_mad_u16", np.uint16, lambda a, b, c: a * b + c),
    ("v_mad_legacy_u16", np.uint16, lambda a, b, c: a * b + c),
    ("v_mad_i16", np.int16, lambda a, b, c: a * b + c),
    ("v_min_i32", np.int32, np.minimum),
    ("v_max_i32", np.int32, np.maximum),
    ("v_min_u32", np.uint32, np.minimum),
    ("v_max_u32", np.uint32, np.maximum),
    ("v_min_i16", np.int16, np.minimum),
    ("v_max_i16", np.int16, np.maximum),
    ("v_min_u16", np.uint16, np.minimum),
    ("v_max_u16", np.uint16, np.maximum),
    ("v_add3_u32", np.uint32, lambda a, b, c: a + b + c),
    ("v_min3_i32", np.int32, lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    ("v_max3_i32", np.int32, lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    ("v_med3_i32", np.int32, lambda a, b, c: np.sort(np.stack([a, b, c]), axis=0)[1]),
    ("v_min3_u32", np.uint32, lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    ("v_max3_u32", np.uint32, lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    ("v_med3_u32", np.uint32, lambda a, b, c: np.sort(np.stack([a, b, c]), axis=0)[1]),
    ("v_min3_i16", np.int16, lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    ("v_max3_i16", np.int16, lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    ("v_med3_i16", np.int16, lambda a, b, c: np.sort(np.stack([a, b, c]), axis=0)[1]),
    ("v_min3_u16", np.uint16, lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    ("v_max3_u16", np.uint16, lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    ("v_med3_u16", np.uint16, lambda a, b, c: np.sort(np.stack([a, b, c]), axis=0)[1]),
):
    add_lanewise(_names, _exact(_dtype, _formula))


def _low24(values: Array) -> Array:
    return wide(values & _U32(0xFFFFFF))


def _low24_signed(values: Array) -> Array:
    return wide(signed(values << _U32(8)) >> np.int32(8))


for _name, _function in (
    ("v_not_b32", lambda s, a: ~a),
    ("v_and_b32", lambda s, a, b: a & b),
    ("v_or_b32", lambda s, a, b: a | b),
    ("v_xor_b32", lambda s, a, b: a ^ b),
    ("v_xnor_b32", lambda s, a, b: ~(a ^ b)),
    ("v_lshlrev_b32", lambda s, a, b: b << (a & _U32(31))),
    ("v_lshrrev_b32", lambda s, a, b: b >> (a & _U32(31))),
    ("v_ashrrev_i32", lambda s, a, b: signed(b) >> signed(a & _U32(31))),
    ("v_lshlrev_b16", lambda s, a, b: b << (a & np.uint16(15))),
    ("v_lshrrev_b16", lambda s, a, b: b >> (a & np.uint16(15))),
    ("v_ashrrev_i16", lambda s, a, b: signed(b) >> signed(a & np.uint16(15))),
    ("v_lshlrev_b64", lambda s, a, b: b << (a & _U32(63)).astype(_U64)),
    ("v_lshrrev_b64", lambda s, a, b: b >> (a & _U32(63)).astype(_U64)),
    ("v_ashrrev_i64", lambda s, a, b: signed(b) >> (a & _U32(63)).astype(np.int64)),
    ("v_bfm_b32", lambda s, a, b: ((_U32(1) << (a & _U32(31))) - _U32(1)) << (b & _U32(31))),
    ("v_mul_lo_u32", lambda s, a, b: a * b),
    ("v_mul_hi_u32", lambda s, a, b: (a.astype(_U64) * b.astype(_U64) >> _U64(32)).astype(_U32)),
    ("v_mul_hi_i32", lambda s, a, b: (wide(signed(a)) * wide(signed(b)) >> 32).astype(np.int32)),
    ("v_mul_u32_u24", lambda s, a, b: fit(s, _low24(a) * _low24(b), np.uint32)),
    ("v_mul_hi_u32_u24", lambda s, a, b: (_low24(a) * _low24(b) >> 32).astype(_U32)),
    ("v_mul_i32_i24", lambda s, a, b: fit(s, _low24_signed(a) * _low24_signed(b), np.int32)),
    (
        "v_mul_hi_i32_i24",
        lambda s, a, b: (_low24_signed(a) * _low24_signed(b) >> 32).astype(np.int32),
    ),
    (
        "v_mad_u32_u24",
        lambda s, a, b, c: fit(s, _low24(a) * _low24(b) + wide(c), np.uint32),
    ),
    (
        "v_mad_i32_i24",
        lambda s, a, b, c: fit(s, _low24_signed(a) * _low24_signed(b) + wide(signed(c)), np.int32),
    ),
    ("v_mad_u32_u16", lambda s, a, b, c: fit(s, wide(a) * wide(b) + wide(c), np.uint32)),
    (
        "v_mad_i32_i16",
        lambda s, a, b, c: fit(s, wide(signed(a)) * wide(signed(b)) + wide(signed(c)), np.int32),
    ),
    ("v_bfi_b32", lambda s, a, b, c: a & b | ~a & c),
    ("v_add_lshl_u32", lambda s, a, b, c: (a + b) << (c & _U32(31))),
    ("v_lshl_add_u32", lambda s, a, b, c: (a << (b & _U32(31))) + c),
    ("v_lshl_or_b32", lambda s, a, b, c: a << (b & _U32(31)) | c),
    ("v_and_or_b32", lambda s, a, b, c: a & b | c),
    ("v_or3_b32", lambda s, a, b, c: a | b | c),
    ("v_xad_u32", lambda s, a, b, c: (a ^ b) + c),
    ("v_alignbit_b32", lambda s, a, b, c: _align(a, b, c & _U32(31))),
    ("v_alignbyte_b32", lambda s, a, b, c: _align(a, b, (c & _U32(3)) * _U32(8))),
    ("v_prng_b32", lambda s, a: (a << _U32(1)) ^ (a >> _U32(31)) * _U32(197)),
):
    add_lanewise(_name, _function)


@lanewise("v_lshl_add_u64")
def _lshl_add_wide(step: Step, a: Array, b: Array, c: Array) -> Array:
    # The count has three bits; above four it shifts by nothing.
    count = b & _U32(7)
    return (a << np.where(count > 4, 0, count).astype(_U64)) + c


def _align(high: Array, low: Array, shift: Array) -> Array:
    both = high.astype(_U64) << _U64(32) | low.astype(_U64)
    return (both >> shift.astype(_U64)).astype(_U32)


# --- bits


@lanewise("v_bfrev_b32")
def _bfrev(step: Step, a: Array) -> Array:
    result = np.zeros_like(a)
    for bit in range(32):
        result |= (a >> _U32(bit) & _U32(1)) << _U32(31 - bit)
    return result


def count_bits(values: Array) -> Array:
    """Count the ones of each value."""
    return np.array([int(value).bit_count() for value in values], values.dtype)


def _leading(values: Array) -> Array:
    """Position of the highest one counted from the top, -1 if there is none."""
    return np.array([32 - int(v).bit_length() if v else -1 for v in values], np.int32)


@lanewise("v_ffbh_u32")
def _ffbh_unsigned(step: Step, a: Array) -> Array:
    return _leading(a)


@lanewise("v_ffbh_i32")
def _ffbh_signed(step: Step, a: Array) -> Array:
    # The first bit from the top that differs from the sign.
    return _leading(a ^ (signed(a) >> np.int32(31)).view(_U32))


@lanewise("v_ffbl_b32")
def _ffbl(step: Step, a: Array) -> Array:
    return np.array([(int(v) & -int(v)).bit_length() - 1 for v in a], np.int32)


@lanewise("v_bcnt_u32_b32")
def _bcnt(step: Step, a: Array, b: Array) -> Array:
    return count_bits(a) + b


@lanewise("v_mbcnt_lo_u32_b32")
def _mbcnt_lo(step: Step, a: Array, b: Array) -> Array:
    below = np.array([(1 << int(lane)) - 1 & 0xFFFFFFFF for lane in LANE], _U32)
    return count_bits(a & below) + b


@lanewise("v_mbcnt_hi_u32_b32")
def _mbcnt_hi(step: Step, a: Array, b: Array) -> Array:
    below = np.array([((1 << int(lane)) - 1) >> 32 for lane in LANE], _U32)
    return count_bits(a & below) + b


@lanewise("v_bfe_u32")
def _bfe_unsigned(step: Step, a: Array, b: Array, c: Array) -> Array:
    width = c & _U32(31)
    result: Array = a >> (b & _U32(31)) & ((_U32(1) << width) - _U32(1))
    return result


@lanewise("v_bfe_i32")
def _bfe_signed(step: Step, a: Array, b: Array, c: Array) -> Array:
    width = c & _U32(31)
    shifted = (signed(a) >> signed(b & _U32(31))).view(_U32)
    field = shifted & ((_U32(1) << width) - _U32(1))
    top = np.where(width > 0, field >> np.maximum(width, 1) - _U32(1), 0) & _U32(1)
    return np.where(top == 1, field | ~((_U32(1) << width) - _U32(1)), field).astype(_U32)


@lanewise("v_bitop3_b32 v_bitop3_b16")
def _bitop3(step: Step, a: Array, b: Array, c: Array) -> Array:
    truth = number(step.inst, "bitop3")
    result = np.zeros_like(a)
    for row in range(8):
        if truth >> row & 1:
            x, y, z = (v if row >> k & 1 else ~v for v, k in ((a, 2), (b, 1), (c, 0)))
            result |= x & y & z
    return result


# --- carries


def _carry(step: Step, exact: Array) -> tuple[Array, Array]:
    """Return the sum and whether it left the range of 32 bits."""
    out = (exact < 0) | (exact > 0xFFFFFFFF)
    return fit(step, exact, np.uint32), out


for _name, _sum in (
    ("v_add_co_u32", lambda a, b: a + b),
    ("v_sub_co_u32", lambda a, b: a - b),
    ("v_subrev_co_u32", lambda a, b: b - a),
    ("v_addc_co_u32", lambda a, b, c: a + b + c),
    ("v_subb_co_u32", lambda a, b, c: a - b - c),
    ("v_subbrev_co_u32", lambda a, b, c: b - a - c),
):
    add_lanewise(_name, lambda step, *x, _sum=_sum: _carry(step, _sum(*map(wide, x))))


@lanewise("v_mad_u64_u32")
def _mad_wide_unsigned(step: Step, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    exact = [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    over = np.array([value >> 64 != 0 for value in exact])
    top = (1 << 64) - 1
    kept = [min(value, top) if step.clamp else value & top for value in exact]
    return np.array(kept, _U64), over


@lanewise("v_mad_i64_i32")
def _mad_wide_signed(step: Step, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    terms = zip(signed(a), signed(b), signed(c), strict=True)
    exact = [int(x) * int(y) + int(z) for x, y, z in terms]
    # The carry out is bit 64 of the 65-bit sum.
    sign = np.array([bool(value >> 64 & 1) for value in exact])
    low, high = -(1 << 63), (1 << 63) - 1
    kept = [min(max(value, low), high) if step.clamp else value for value in exact]
    return np.array([value & ((1 << 64) - 1) for value in kept], _U64), sign


# --- bytes


def _byte(values: Array, k: int) -> Array:
    return wide(values >> _U32(8 * k) & _U32(255))


@lanewise("v_perm_b32")
def _perm(step: Step, a: Array, b: Array, c: Array) -> Array:
    both = [_byte(b, k) for k in range(4)] + [_byte(a, k) for k in range(4)]
    # Selectors 8 to 11 repeat a sign bit, 12 is zero, the rest ones.
    signs = [(both[k] >> 7) * 255 for k in (1, 3, 5, 7)]
    menu = np.stack([*both, *signs, np.zeros_like(both[0]), *[np.full_like(both[0], 255)] * 3])
    result = np.zeros(len(a), np.int64)
    for k in range(4):
        selector = np.minimum(_byte(c, k), 15)
        result |= menu[selector, LANE] << 8 * k
    return result.astype(_U32)


def _sad_bytes(a: Array, b: Array) -> Array:
    return sum((np.abs(_byte(a, k) - _byte(b, k)) for k in range(4)), np.zeros(len(a), np.int64))


def _halves(values: Array) -> tuple[Array, Array]:
    return wide(values & _U32(0xFFFF)), wide(values >> _U32(16))


for _name, _difference in (
    ("v_sad_u8", _sad_bytes),
    ("v_sad_hi_u8", lambda a, b: _sad_bytes(a, b) << 16),
    (
        "v_sad_u16",
        lambda a, b: sum(np.abs(x - y) for x, y in zip(_halves(a), _halves(b), strict=True)),
    ),
    ("v_sad_u32", lambda a, b: np.abs(wide(a) - wide(b))),
    (
        "v_msad_u8",
        lambda a, b: sum(
            np.where(_byte(b, k) == 0, 0, np.abs(_byte(a, k) - _byte(b, k))) for k in range(4)
        ),
    ),
):
    add_lanewise(_name, lambda s, a, b, c, _d=_difference: fit(s, _d(a, b) + wide(c), np.uint32))


@lanewise("v_lerp_u8")
def _lerp(step: Step, a: Array, b: Array, c: Array) -> Array:
    parts = [(_byte(a, k) + _byte(b, k) + (_byte(c, k) & 1)) >> 1 << 8 * k for k in range(4)]
    return sum(parts, np.zeros(len(a), np.int64)).astype(_U32)


@lanewise("v_sat_pk_u8_i16")
def _saturate_bytes(step: Step, a: Array) -> Array:
    low, high = (np.clip(signed(h.astype(np.uint16)), 0, 255) for h in _halves(a))
    result: Array = (wide(low) | wide(high) << 8).astype(_U32)
    return result


@lanewise("v_ashr_pk_i8_i32 v_ashr_pk_u8_i32")
def _shift_saturate(step: Step, a: Array, b: Array, c: Array) -> Array:
    least, most = (-128, 127) if "_i8_" in step.inst.mnemonic else (0, 255)
    shift = signed(c & _U32(31))
    low, high = (np.clip(signed(x) >> shift, least, most) & 255 for x in (a, b))
    return (low | high << 8).astype(np.uint16)
