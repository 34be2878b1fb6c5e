"""Conversions of the native core against NumPy, torch and formats written out as values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

X, Y, Z, D = 16, 17, 18, 0
FP16_OVFL = 1 << 23
ROUND_NEAREST, ROUND_UP, ROUND_DOWN, ROUND_TO_ZERO = range(4)
DENORMALS = 0x3F0

SPECIAL = np.concatenate(
    (
        [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 0.49999997, 255.5, np.inf, -np.inf, np.nan],
        [65504.0, 65519.9, 65520.0, 1e5, 6e-8, 2.98e-8, 2.99e-8, 1e-40, -1e-45, 3.4e38, 1e30],
        [448.0, 464.0, 465.0, 240.0, 248.0, 57344.0, 61439.0, 61440.0],
        [2147483648.0, -2147483904.0, 4294967296.0],
    )
).astype(np.float32)

OCP = {"fp8": torch.float8_e4m3fn, "bf8": torch.float8_e5m2}
FNUZ = {"fp8": torch.float8_e4m3fnuz, "bf8": torch.float8_e5m2fnuz}
TYPES = {"gfx942": FNUZ, "gfx950": OCP}

COMMON = [
    "v_cvt_f16_f32 v0, v16",
    "v_cvt_f16_f32 v0, -|v16|",
    "v_cvt_f32_f16 v0, v16",
    "v_cvt_f32_f16_sdwa v0, v16 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1",
    "v_cvt_f16_f32_sdwa v0, v16 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD",
    "v_cvt_f32_f64 v0, v[16:17]",
    "v_cvt_f64_f32 v[0:1], v16",
    "v_cvt_f64_i32 v[0:1], v16",
    "v_cvt_f64_u32 v[0:1], v16",
    "v_cvt_i32_f32 v0, v16",
    "v_cvt_u32_f32 v0, v16",
    "v_cvt_flr_i32_f32 v0, v16",
    "v_cvt_rpi_i32_f32 v0, v16",
    "v_cvt_i32_f64 v0, v[16:17]",
    "v_cvt_u32_f64 v0, v[16:17]",
    "v_cvt_f32_i32 v0, v16",
    "v_cvt_f32_u32 v0, v16",
    *(f"v_cvt_f32_ubyte{byte} v0, v16" for byte in range(4)),
    "v_cvt_off_f32_i4 v0, v16",
    "v_cvt_f16_i16 v0, v16",
    "v_cvt_f16_u16 v0, v16",
    "v_cvt_i16_f16 v0, v16",
    "v_cvt_u16_f16 v0, v16",
    "v_cvt_norm_i16_f16 v0, v16",
    "v_cvt_norm_u16_f16 v0, v16",
    "v_cvt_pkrtz_f16_f32 v0, v16, v17",
    "v_cvt_pknorm_i16_f32 v0, v16, v17",
    "v_cvt_pknorm_u16_f32 v0, v16, v17",
    "v_cvt_pknorm_i16_f16 v0, v16, v17",
    "v_cvt_pk_i16_i32 v0, v16, v17",
    "v_cvt_pk_u16_u32 v0, v16, v17",
    "v_cvt_pk_u8_f32 v0, v16, v17, v18",
    "v_sat_pk_u8_i16 v0, v16",
    *(f"v_cvt_pk_{kind}_f32 v0, v16, v17" for kind in OCP),
    *(f"v_cvt_pk_{kind}_f32 v0, v16, v17 op_sel:[0,0,1]" for kind in OCP),
    *(f"v_cvt_sr_{kind}_f32 v0, v16, v17" for kind in OCP),
    "v_cvt_sr_fp8_f32 v0, v16, v17 op_sel:[0,0,1,1]",
    "v_cvt_sr_fp8_f32 v0, v16, v17 op_sel:[0,0,1,0]",
    *(f"v_cvt_f32_{kind} v0, v16" for kind in OCP),
    *(f"v_cvt_f32_{kind}_sdwa v0, v16 src0_sel:BYTE_2" for kind in OCP),
    *(f"v_cvt_pk_f32_{kind} v[0:1], v16" for kind in OCP),
    *(f"v_cvt_pk_f32_{kind}_sdwa v[0:1], v16 src0_sel:WORD_1" for kind in OCP),
]
GFX950 = [
    "v_cvt_f32_bf16 v0, v16",
    "v_cvt_pk_bf16_f32 v0, v16, v17",
    "v_cvt_pk_f16_f32 v0, v16, v17",
    "v_cvt_sr_bf16_f32 v0, v16, v17",
    "v_cvt_sr_bf16_f32 v0, v16, v17 op_sel:[0,0,1]",
    "v_cvt_sr_f16_f32 v0, v16, v17",
    "v_prng_b32 v0, v16",
]


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """Overflow, NaN and infinity are what these tests are about."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="module")
def compiled(instructions):
    return {
        "gfx942": instructions(COMMON, "gfx942"),
        "gfx950": instructions(COMMON + GFX950, "gfx950"),
    }


def _floats(seed: int) -> np.ndarray:
    """64 values: the special ones, then random bits of all sizes."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    some = np.float32(2.0) ** rng.integers(-26, 18, 64).astype(np.float32)
    values = np.where(rng.random(64) < 0.7, (rng.standard_normal(64) * some), values)
    values = values.astype(np.float32)
    values[: len(SPECIAL)] = SPECIAL
    return rng.permutation(values)


def _words(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


def _run(compiled, text, *sources, arch="gfx942", mode=DENORMALS, **options):
    registers = {X + place: np.asarray(source) for place, source in enumerate(sources)}
    return compiled[arch].run(text, registers, mode=mode, **options)


def _same_floats(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits, and NaN where NaN is wanted."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    keep = ~np.isnan(want)
    kind = {2: np.uint16, 4: np.uint32, 8: np.uint64}[want.itemsize]
    np.testing.assert_array_equal(got.view(kind)[keep], want.view(kind)[keep])


def _half(values: np.ndarray, rounding: int) -> np.ndarray:
    """Round f32 to f16 by choosing among neighbours."""
    nearest = values.astype(np.float16)
    if rounding == ROUND_NEAREST:
        return nearest
    low, high = np.float16(-np.inf), np.float16(np.inf)
    wide = nearest.astype(np.float32)
    below = np.where(wide > values, np.nextafter(nearest, low), nearest)
    above = np.where(wide < values, np.nextafter(nearest, high), nearest)
    if rounding == ROUND_UP:
        return above
    if rounding == ROUND_DOWN:
        return below
    return np.where(np.signbit(values), above, below)


def _low(register: np.ndarray) -> np.ndarray:
    return (register & 0xFFFF).astype(np.uint16).view(np.float16)


@pytest.mark.parametrize("rounding", range(4))
def test_f32_to_f16(compiled, rounding, seed):
    values = _floats(seed)
    after = _run(compiled, "v_cvt_f16_f32 v0, v16", _words(values), mode=DENORMALS | rounding << 2)
    want = _half(values, rounding)
    zero = want == 0
    want[zero] = np.copysign(want[zero], values[zero])
    _same_floats(_low(after[D]), want)
    assert (after[D] >> 16 == 0).all()


def test_f32_to_f16_modifiers_and_modes(compiled, seed):
    values = _floats(seed)
    after = _run(compiled, "v_cvt_f16_f32 v0, -|v16|", _words(values))
    _same_floats(_low(after[D]), _half(-np.abs(values), ROUND_NEAREST))
    after = _run(compiled, COMMON[0], _words(values), mode=DENORMALS & ~0x80)
    want = _half(values, ROUND_NEAREST)
    tiny = np.abs(want) < np.float16(2.0**-14)
    _same_floats(_low(after[D]), np.where(tiny, np.copysign(np.float16(0), want), want))
    after = _run(compiled, COMMON[0], _words(values), mode=DENORMALS | FP16_OVFL)
    want = _half(values, ROUND_NEAREST)
    lost = np.isinf(want) & np.isfinite(values)
    want[lost] = np.copysign(np.float16(65504), values[lost])
    _same_floats(_low(after[D]), want)


def test_half_in_a_part_of_a_register(compiled, seed):
    values = _floats(seed)
    halves = _half(values, ROUND_NEAREST)
    packed = halves.view(np.uint16).astype(np.uint32)
    text = "v_cvt_f32_f16_sdwa v0, v16 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1"
    after = _run(compiled, text, packed << 16 | 0x1234)
    _same_floats(after[D].view(np.float32), halves.astype(np.float32))
    text = "v_cvt_f16_f32_sdwa v0, v16 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD"
    after = _run(compiled, text, _words(values), exec_mask=0xFFFF)
    _same_floats(_low(after[D] >> 16)[:16], halves[:16])
    assert (after[D, :16] & 0xFFFF == 0xBEEF).all()
    assert (after[D, 16:] == 0xDEADBEEF).all()


def test_all_f16_to_f32(compiled):
    for first in range(0, 65536, 64):
        codes = np.arange(first, first + 64, dtype=np.uint32)
        after = _run(compiled, "v_cvt_f32_f16 v0, v16", codes | 0xABCD0000)
        want = codes.astype(np.uint16).view(np.float16).astype(np.float32)
        _same_floats(after[D].view(np.float32), want)


@pytest.mark.parametrize("rounding", range(4))
def test_f64_to_f32_and_back(compiled, rounding, seed):
    rng = np.random.default_rng(seed)
    doubles = rng.standard_normal(64) * 2.0 ** rng.integers(-160, 160, 64)
    doubles[:6] = [0.0, -0.0, np.inf, np.nan, 1 + 2.0**-24, 1 + 3 * 2.0**-24]
    pair = doubles.view(np.uint32).reshape(64, 2)
    text = "v_cvt_f32_f64 v0, v[16:17]"
    after = _run(compiled, text, pair[:, 0], pair[:, 1], mode=DENORMALS | rounding)
    nearest = doubles.astype(np.float32)
    low, high = np.float32(-np.inf), np.float32(np.inf)
    below = np.where(nearest > doubles, np.nextafter(nearest, low), nearest)
    above = np.where(nearest < doubles, np.nextafter(nearest, high), nearest)
    inward = np.where(np.signbit(doubles), above, below)
    want = (nearest, above, below, inward)[rounding].astype(np.float32)
    zero = want == 0
    want[zero] = np.copysign(want[zero], doubles[zero])
    _same_floats(after[D].view(np.float32), want)

    singles = _floats(seed)
    after = _run(compiled, "v_cvt_f64_f32 v[0:1], v16", _words(singles))
    got = np.stack([after[D], after[D + 1]], axis=1).copy().view(np.float64)[:, 0]
    _same_floats(got, singles.astype(np.float64))
    after = _run(compiled, "v_cvt_f64_f32 v[0:1], v16", _words(singles), mode=0x3C0)
    got = np.stack([after[D], after[D + 1]], axis=1).copy().view(np.float64)[:, 0]
    tiny = np.abs(singles) < 2.0**-126
    _same_floats(got, np.where(tiny, np.copysign(0.0, singles), singles.astype(np.float64)))


def _integer(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """Truncate, saturate, and make NaN zero."""
    clipped = np.clip(np.trunc(values.astype(np.float64)), low, high)
    return np.where(np.isnan(values), 0, clipped).astype(np.int64)


INTEGERS = {
    "v_cvt_i32_f32 v0, v16": (lambda x: x, -(2**31), 2**31 - 1),
    "v_cvt_u32_f32 v0, v16": (lambda x: x, 0, 2**32 - 1),
    "v_cvt_flr_i32_f32 v0, v16": (np.floor, -(2**31), 2**31 - 1),
    "v_cvt_rpi_i32_f32 v0, v16": (
        lambda x: np.floor(x + np.float32(0.5)),
        -(2**31),
        2**31 - 1,
    ),
}


@pytest.mark.parametrize("text", INTEGERS)
def test_f32_to_integers(compiled, text, seed):
    values = _floats(seed)
    prepare, low, high = INTEGERS[text]
    after = _run(compiled, text, _words(values))
    want = _integer(prepare(values), low, high)
    np.testing.assert_array_equal(after[D], want.astype(np.uint32))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("i32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1)]
)
def test_f64_to_integers_and_back(compiled, name, low, high, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(64) * 2.0 ** rng.integers(-3, 36, 64)
    values[:5] = [np.nan, np.inf, -np.inf, 2147483647.5, -0.5]
    pair = values.view(np.uint32).reshape(64, 2)
    after = _run(compiled, f"v_cvt_{name}_f64 v0, v[16:17]", pair[:, 0], pair[:, 1])
    np.testing.assert_array_equal(after[D], _integer(values, low, high).astype(np.uint32))
    words = rng.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    numbers = words.view(np.int32) if name == "i32" else words
    after = _run(compiled, f"v_cvt_f64_{name} v[0:1], v16", words)
    got = np.stack([after[D], after[D + 1]], axis=1).copy().view(np.float64)[:, 0]
    np.testing.assert_array_equal(got, numbers.astype(np.float64))
    after = _run(compiled, f"v_cvt_f32_{name} v0, v16", words)
    np.testing.assert_array_equal(after[D].view(np.float32), numbers.astype(np.float32))


def test_bytes_and_offsets_to_f32(compiled, seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    for byte in range(4):
        after = _run(compiled, f"v_cvt_f32_ubyte{byte} v0, v16", words)
        np.testing.assert_array_equal(after[D].view(np.float32), words >> 8 * byte & 255)
    after = _run(compiled, "v_cvt_off_f32_i4 v0, v16", words)
    offsets = ((words & 15).astype(np.int64) ^ 8) - 8
    np.testing.assert_array_equal(after[D].view(np.float32), offsets / 16)


def test_16_bit_integers(compiled, seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    words[:4] = [0xFFFF, 0x8000, 0x7FFF, 65520]
    low = (words & 0xFFFF).astype(np.uint16)
    after = _run(compiled, "v_cvt_f16_u16 v0, v16", words)
    _same_floats(_low(after[D]), low.astype(np.float32).astype(np.float16))
    after = _run(compiled, "v_cvt_f16_i16 v0, v16", words)
    _same_floats(_low(after[D]), low.view(np.int16).astype(np.float32).astype(np.float16))
    halves = low.view(np.float16).copy()
    halves[4:8] = [np.nan, np.inf, -np.inf, 0.5]
    packed = halves.view(np.uint16).astype(np.uint32)
    for name, least, most in (("i16", -32768, 32767), ("u16", 0, 65535)):
        after = _run(compiled, f"v_cvt_{name}_f16 v0, v16", packed)
        np.testing.assert_array_equal(after[D], _integer(halves, least, most) & 0xFFFF)
    for name in ("i16", "u16"):
        after = _run(compiled, f"v_cvt_norm_{name}_f16 v0, v16", packed)
        np.testing.assert_array_equal(after[D], _normalised(halves, name))
    after = _run(compiled, "v_cvt_pknorm_i16_f16 v0, v16, v17", packed, packed[::-1].copy())
    want = _normalised(halves, "i16")
    np.testing.assert_array_equal(after[D], want | want[::-1] << 16)


def _normalised(values: np.ndarray, name: str) -> np.ndarray:
    least, scale = (-1.0, 32767) if name == "i16" else (0.0, 65535)
    clipped = np.where(np.isnan(values), 0, np.clip(values.astype(np.float32), least, 1))
    scaled = (clipped.astype(np.float32) * np.float32(scale)).astype(np.float32)
    return np.rint(scaled).astype(np.int64).astype(np.uint32) & 0xFFFF


def test_packed_16_bits(compiled, seed):
    x, y = _floats(seed), _floats(seed + 1)
    after = _run(compiled, "v_cvt_pkrtz_f16_f32 v0, v16, v17", _words(x), _words(y))
    for got, values in ((after[D], x), (after[D] >> 16, y)):
        want = _half(values, ROUND_TO_ZERO)
        want[want == 0] = np.copysign(np.float16(0), values[want == 0])
        _same_floats(_low(got), want)
    for name in ("i16", "u16"):
        after = _run(compiled, f"v_cvt_pknorm_{name}_f32 v0, v16, v17", _words(x), _words(y))
        np.testing.assert_array_equal(after[D], _normalised(x, name) | _normalised(y, name) << 16)
    rng = np.random.default_rng(seed)
    numbers = rng.integers(-70000, 70000, (2, 64)).astype(np.int32)
    after = _run(compiled, "v_cvt_pk_i16_i32 v0, v16, v17", *numbers.view(np.uint32))
    want = np.clip(numbers, -32768, 32767).astype(np.uint32) & 0xFFFF
    np.testing.assert_array_equal(after[D], want[0] | want[1] << 16)
    after = _run(compiled, "v_cvt_pk_u16_u32 v0, v16, v17", *numbers.view(np.uint32))
    want = np.minimum(numbers.view(np.uint32), 0xFFFF)
    np.testing.assert_array_equal(after[D], want[0] | want[1] << 16)
    after = _run(compiled, "v_sat_pk_u8_i16 v0, v16", numbers[0].view(np.uint32))
    low, high = numbers[0].astype(np.int16), (numbers[0] >> 16).astype(np.int16)
    want = np.clip(low, 0, 255).astype(np.uint32) | np.clip(high, 0, 255).astype(np.uint32) << 8
    np.testing.assert_array_equal(after[D], want)


def test_pack_byte(compiled, seed):
    rng = np.random.default_rng(seed)
    values, old = _floats(seed), rng.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    place = rng.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    after = _run(compiled, "v_cvt_pk_u8_f32 v0, v16, v17, v18", _words(values), place, old)
    byte = np.rint(np.clip(np.nan_to_num(values, nan=0.0), 0, 255)).astype(np.uint32)
    shift = 8 * (place & 3)
    np.testing.assert_array_equal(after[D], old & ~(np.uint32(255) << shift) | byte << shift)


# --- fp8 and bf8


def _values(dtype: torch.dtype) -> np.ndarray:
    return torch.arange(256, dtype=torch.uint8).view(dtype).double().float().numpy()


def _encoded(values: np.ndarray, dtype: torch.dtype, saturate: bool) -> np.ndarray:
    """Nearest code, ties to the even one, by looking at all of them; NaN is -1."""
    table = _values(dtype).astype(np.float64)
    finite = np.flatnonzero(np.isfinite(table))
    top = table[finite].max()
    limit = top + (top - np.sort(table[finite])[-2]) / 2
    # A tie with what would come next goes to the even code of both.
    limit = np.nextafter(limit, np.inf) if finite[table[finite].argmax()] % 2 == 0 else limit
    codes = np.zeros(len(values), np.int64)
    for place, value in enumerate(values.astype(np.float64)):
        if np.isnan(value) or (np.isinf(value) and not np.isinf(table).any()):
            codes[place] = -1
            continue
        if abs(value) >= limit and not (np.isfinite(value) and saturate):
            hit = np.flatnonzero(table == np.copysign(np.inf, value))
            codes[place] = hit[0] if len(hit) else -1
            continue
        distance = np.abs(table[finite] - np.clip(value, -top, top))
        near = finite[distance == distance.min()]
        near = [code for code in near if np.signbit(table[code]) == np.signbit(value)] or near
        codes[place] = min(near, key=lambda code: code & 1)
    return codes


@pytest.mark.parametrize("arch", TYPES)
@pytest.mark.parametrize("kind", OCP)
@pytest.mark.parametrize("saturate", [False, True])
def test_f32_to_fp8(compiled, arch, kind, saturate, seed):
    dtype = TYPES[arch][kind]
    x, y = _floats(seed), _floats(seed + 1)
    table = _values(dtype)
    y[:32] = np.random.default_rng(seed).choice(table[np.isfinite(table)], 32)
    y[32:48] = (y[:16] + y[16:32]) / 2  # ties among them
    mode = DENORMALS | FP16_OVFL * saturate | ROUND_UP << 2  # rounding is not MODE's
    text = f"v_cvt_pk_{kind}_f32 v0, v16, v17"
    for suffix, base in (("", 0), (" op_sel:[0,0,1]", 16)):
        after = _run(compiled, text + suffix, _words(x), _words(y), arch=arch, mode=mode)
        for values, at in ((x, base), (y, base + 8)):
            got = (after[D] >> at & 255).astype(np.int64)
            want = _encoded(values, dtype, saturate)
            is_nan = want < 0
            assert np.isnan(table[got[is_nan]]).all()
            np.testing.assert_array_equal(got[~is_nan], want[~is_nan])
        assert (after[D] >> (16 - base) & 0xFFFF == (0xBEEF if base else 0xDEAD)).all()


@pytest.mark.parametrize("arch", TYPES)
@pytest.mark.parametrize("kind", OCP)
def test_fp8_to_f32(compiled, arch, kind):
    want = _values(TYPES[arch][kind])
    for first in range(0, 256, 64):
        codes = np.arange(first, first + 64, dtype=np.uint32)
        words = codes | (codes ^ 255) << 8 | codes << 16 | (codes ^ 129) << 24
        table = {0: want[codes], 1: want[codes ^ 255], 2: want[codes], 3: want[codes ^ 129]}
        after = _run(compiled, f"v_cvt_f32_{kind} v0, v16", words, arch=arch)
        _same_floats(after[D].view(np.float32), table[0])
        after = _run(compiled, f"v_cvt_f32_{kind}_sdwa v0, v16 src0_sel:BYTE_2", words, arch=arch)
        _same_floats(after[D].view(np.float32), table[2])
        for suffix, byte in (("", 0), ("_sdwa", 2)):
            text = f"v_cvt_pk_f32_{kind}{suffix} v[0:1], v16"
            text += " src0_sel:WORD_1" if suffix else ""
            after = _run(compiled, text, words, arch=arch)
            _same_floats(after[D].view(np.float32), table[byte])
            _same_floats(after[D + 1].view(np.float32), table[byte + 1])


@pytest.mark.parametrize("kind", ["fp8", "bf8"])
def test_stochastic_rounding_is_fair(compiled, kind, seed):
    rng = np.random.default_rng(seed)
    table = np.sort(_values(OCP[kind])[np.isfinite(_values(OCP[kind]))])
    value = np.float32(rng.uniform(0.01, 100.0))
    above = table[np.searchsorted(table, value)]
    below = table[np.searchsorted(table, value) - 1]
    fraction = (value - below) / (above - below)
    ups = 0
    for step in range(64):
        random = ((np.arange(64, dtype=np.uint64) * 64 + step) << 20).astype(np.uint32)
        text = f"v_cvt_sr_{kind}_f32 v0, v16, v17"
        after = _run(compiled, text, _words(np.full(64, value)), random, arch="gfx950")
        got = _values(OCP[kind])[after[D] & 255]
        assert np.isin(got, [below, above]).all()
        assert (after[D] >> 8 == 0xDEADBE).all()
        ups += int((got == above).sum())
    assert abs(ups / 4096 - fraction) < 1 / 1024
    for bits, byte in (("1,1", 3), ("1,0", 1)):
        text = f"v_cvt_sr_fp8_f32 v0, v16, v17 op_sel:[0,0,{bits}]"
        after = _run(compiled, text, _words(np.full(64, np.float32(1))), random, arch="gfx950")
        one = 0x38 << 8 * byte
        assert (after[D] == (0xDEADBEEF & ~(255 << 8 * byte) | one)).all()


# --- gfx950


def test_bf16(compiled, seed):
    x, y = _floats(seed), _floats(seed + 1)
    x[0] = np.uint32(0x3F808000).view(np.float32)  # ties
    x[1] = np.uint32(0x3F818000).view(np.float32)
    text = "v_cvt_pk_bf16_f32 v0, v16, v17"
    after = _run(compiled, text, _words(x), _words(y), arch="gfx950")
    for got, values in ((after[D], x), (after[D] >> 16, y)):
        want = torch.from_numpy(values).bfloat16().float().numpy()
        _same_floats(((got & 0xFFFF) << 16).astype(np.uint32).view(np.float32), want)
    after = _run(compiled, "v_cvt_f32_bf16 v0, v16", _words(x) >> 16, arch="gfx950")
    np.testing.assert_array_equal(after[D], _words(x) & 0xFFFF0000)
    after = _run(compiled, "v_cvt_pk_f16_f32 v0, v16, v17", _words(x), _words(y), arch="gfx950")
    _same_floats(_low(after[D]), _half(x, ROUND_NEAREST))
    _same_floats(_low(after[D] >> 16), _half(y, ROUND_NEAREST))


def test_stochastic_16_bits(compiled, seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(0x30000000, 0x47000000, 64, dtype=np.uint64).astype(np.uint32)
    random = rng.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    text = "v_cvt_sr_bf16_f32 v0, v16, v17"
    want = (words.astype(np.uint64) + (random >> 16)).astype(np.uint32) >> 16
    after = _run(compiled, text, words, random, arch="gfx950")
    np.testing.assert_array_equal(after[D], want | 0xDEAD0000)
    after = _run(compiled, text + " op_sel:[0,0,1]", words, random, arch="gfx950")
    np.testing.assert_array_equal(after[D], want << 16 | 0xBEEF)
    normal = (words % (2**23)) | 0x3F800000
    after = _run(compiled, "v_cvt_sr_f16_f32 v0, v16, v17", normal, random, arch="gfx950")
    moved = ((normal.astype(np.uint64) + (random >> 19)) & 0xFFFFE000).astype(np.uint32)
    _same_floats(_low(after[D]), moved.view(np.float32).astype(np.float16))


def test_random_step(compiled, seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    after = _run(compiled, "v_prng_b32 v0, v16", words, arch="gfx950")
    want = (words << np.uint32(1)) ^ np.where(words >> 31, 197, 0).astype(np.uint32)
    np.testing.assert_array_equal(after[D], want)
