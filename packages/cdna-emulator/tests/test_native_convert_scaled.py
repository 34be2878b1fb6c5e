"""Conversions with a scale against tables of the narrow formats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

X, Y, Z, D = 64, 96, 128, 0
RANDOM, SCALE = 200, 201


def _small(exponent: int, mantissa: int, bias: int) -> np.ndarray:
    values = []
    for code in range(1 << (1 + exponent + mantissa)):
        field, fraction = divmod(code % (1 << (exponent + mantissa)), 1 << mantissa)
        unit = 2.0 ** (max(field, 1) - bias - mantissa)
        value = (fraction + ((1 << mantissa) if field else 0)) * unit
        values.append(-value if code >> (exponent + mantissa) else value)
    return np.array(values)


def _torch(dtype: torch.dtype) -> np.ndarray:
    return torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()


VALUES = {
    "fp8": _torch(torch.float8_e4m3fn),
    "bf8": _torch(torch.float8_e5m2),
    "fp6": _small(2, 3, 1),
    "bf6": _small(3, 2, 3),
    "fp4": _small(2, 1, 1),
}
BITS = {"fp8": 8, "bf8": 8, "fp6": 6, "bf6": 6, "fp4": 4, "f32": 32, "f16": 16, "bf16": 16}


@dataclass(frozen=True)
class Case:
    """One instruction, how many values it converts, and where they lie."""

    name: str
    count: int
    source: str
    result: str
    select: str = ""
    byte: int = 0

    @property
    def random(self) -> bool:
        return "_sr_" in self.name

    @property
    def narrows(self) -> bool:
        return self.result in VALUES

    def text(self) -> str:
        sources = [_range(X, _registers(self.count, self.source))]
        if self.name.endswith("f32") and self.narrows and self.count in (2, 32) and not self.random:
            sources = [_range(X, self.count // 2), _range(Y, self.count // 2)]
        sources += [f"v{RANDOM}"] * self.random + [f"v{SCALE}"]
        width = _registers(self.count, self.result)
        return f"{self.name} {_range(D, width)}, {', '.join(sources)} {self.select}".strip()


def _registers(count: int, kind: str) -> int:
    return -(-count * BITS[kind] // 32)


def _range(first: int, width: int) -> str:
    return f"v{first}" if width == 1 else f"v[{first}:{first + width - 1}]"


def _cases() -> list[Case]:
    cases = []
    for wide in ("f32", "f16", "bf16"):
        for narrow in ("fp8", "bf8", "fp4"):
            parts = 2 if BITS[narrow] == 8 else 4
            for part in range(parts):
                bits = (part & 1, part >> 1)
                source = f"op_sel:[{bits[0]},{bits[1]},0]" if part else ""
                byte = part * 2 if parts == 2 else part
                cases.append(
                    Case(f"v_cvt_scalef32_pk_{wide}_{narrow}", 2, narrow, wide, source, byte)
                )
                last = "0,1" if parts == 2 else f"{bits[0]},{bits[1]}"
                # The bits of the destination follow those of the sources.
                if parts == 2 and wide != "f32":
                    last = "1"
                select = f"op_sel:[0,0,{last}]" if part else ""
                cases.append(
                    Case(f"v_cvt_scalef32_pk_{narrow}_{wide}", 2, wide, narrow, select, byte)
                )
        for narrow in ("fp8", "bf8"):
            for byte in range(4):
                select = f"op_sel:[0,0,{byte & 1},{byte >> 1}]" if byte else ""
                name = f"v_cvt_scalef32_sr_{narrow}_{wide}"
                cases.append(Case(name, 1, wide, narrow, select, byte))
                if wide != "bf16":
                    select = f"op_sel:[{byte & 1},{byte >> 1},0]" if byte else ""
                    name = f"v_cvt_scalef32_{wide}_{narrow}"
                    cases.append(Case(name, 1, narrow, wide, select, byte))
        cases.append(
            Case(f"v_cvt_scalef32_sr_pk_fp4_{wide}", 2, wide, "fp4", "op_sel:[0,0,0,1]", 2)
        )
        for narrow in ("fp6", "bf6"):
            cases.append(Case(f"v_cvt_scalef32_pk32_{wide}_{narrow}", 32, narrow, wide))
            cases.append(Case(f"v_cvt_scalef32_sr_pk32_{narrow}_{wide}", 32, wide, narrow))
            name = "2xpk16" if wide == "f32" else "pk32"
            cases.append(Case(f"v_cvt_scalef32_{name}_{narrow}_{wide}", 32, wide, narrow))
    return cases


CASES = _cases()
HIGH_HALF = "v_cvt_scalef32_f16_fp8 v0, v64, v201 op_sel:[0,0,1]"


@pytest.fixture(autouse=True)
def _quiet_numpy():
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="module")
def compiled(instructions):
    return instructions([case.text() for case in CASES] + [HIGH_HALF], "gfx950")


def _to_codes(values: np.ndarray, kind: str) -> np.ndarray:
    """Bits of exact wide values."""
    if kind == "f32":
        return values.astype(np.float32).view(np.uint32)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return values.astype(np.float32).view(np.uint32) >> 16


def _from_codes(codes: np.ndarray, kind: str) -> np.ndarray:
    if kind in VALUES:
        return VALUES[kind][codes]
    if kind == "f32":
        return codes.astype(np.uint32).view(np.float32).astype(np.float64)
    if kind == "f16":
        return codes.astype(np.uint16).view(np.float16).astype(np.float64)
    return (codes << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def _pack(codes: np.ndarray, kind: str, first_bit: int = 0) -> np.ndarray:
    """[count, 64] codes to [registers, 64] words."""
    count, bits = len(codes), BITS[kind]
    words = np.zeros((-(-(count * bits + first_bit) // 32), 64), np.uint64)
    for place, row in enumerate(codes):
        word, shift = divmod(place * bits + first_bit, 32)
        words[word] |= row.astype(np.uint64) << np.uint64(shift) & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            words[word + 1] |= row.astype(np.uint64) >> np.uint64(32 - shift)
    return words.astype(np.uint32)


def _unpack(words: np.ndarray, kind: str, count: int, first_bit: int = 0) -> np.ndarray:
    bits, out = BITS[kind], np.zeros((count, 64), np.int64)
    for place in range(count):
        word, shift = divmod(place * bits + first_bit, 32)
        both = words[word].astype(np.uint64)
        if shift + bits > 32:
            both |= words[word + 1].astype(np.uint64) << np.uint64(32)
        out[place] = (both >> np.uint64(shift) & np.uint64((1 << bits) - 1)).astype(np.int64)
    return out


def _neighbours(values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of a format on both sides of some values within its range."""
    numbers = np.unique(VALUES[kind][np.isfinite(VALUES[kind])])
    place = np.clip(np.searchsorted(numbers, values), 0, len(numbers) - 1)
    above = numbers[place]
    below = np.where(above == values, above, numbers[np.maximum(place - 1, 0)])
    return below, above


def _source_codes(rng: np.random.Generator, case: Case) -> np.ndarray:
    shape = (case.count, 64)
    if not case.narrows:
        return rng.integers(0, 1 << BITS[case.source], shape).astype(np.uint32)
    # Within the range of the format, times a scale that the case then divides by.
    top = VALUES[case.result][np.isfinite(VALUES[case.result])].max()
    values = rng.uniform(-1, 1, shape) * top * 2.0 ** -rng.integers(0, 6, shape)
    return _to_codes(values, case.source).astype(np.uint32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.byte}")
def test_conversion(compiled, case, seed):
    rng = np.random.default_rng(seed)
    codes = _source_codes(rng, case)
    exponents = rng.integers(-3, 4, 64)
    scale = (2.0**exponents * rng.uniform(1, 2, 64)).astype(np.float32)  # the mantissa is ignored
    random = rng.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    registers = {SCALE: scale.view(np.uint32), RANDOM: random}
    if case.text().count("v[96") or f"v{Y}" in case.text():  # two sources: values alternate
        registers |= {X + k: row for k, row in enumerate(codes[0::2])}
        registers |= {Y + k: row for k, row in enumerate(codes[1::2])}
    else:
        first_bit = 0 if case.narrows else 8 * case.byte
        packed = _pack(codes, case.source, first_bit)
        registers |= {X + k: row for k, row in enumerate(packed)}
    after = compiled.run(case.text(), registers)
    values = _from_codes(codes, case.source)
    if not case.narrows:
        got = _from_codes(_unpack(after[D:], case.result, case.count), case.result)
        want = values * 2.0**exponents
        want = want.astype(np.float16).astype(np.float64) if case.result == "f16" else want
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_array_equal(got[~np.isnan(want)], want[~np.isnan(want)])
        return
    first_bit = 8 * case.byte
    got = VALUES[case.result][_unpack(after[D:], case.result, case.count, first_bit)]
    exact = values / 2.0**exponents
    top = VALUES[case.result][np.isfinite(VALUES[case.result])].max()
    inside = np.abs(exact) <= top
    below, above = _neighbours(exact, case.result)
    assert ((got == below) | (got == above))[inside].all()
    if not case.random:
        assert (np.abs(got - exact) <= (above - below) / 2)[inside].all()
    if BITS[case.result] < 8:
        np.testing.assert_array_equal(got[~inside], np.copysign(top, exact[~inside]))
    if case.count < 32:
        width = case.count * BITS[case.result]
        kept = 0xFFFFFFFF & ~(((1 << width) - 1) << first_bit)
        assert (after[D] & kept == 0xDEADBEEF & kept).all()


@pytest.mark.parametrize("kind", VALUES)
def test_stochastic_rounding_follows_the_random_number(compiled, kind, seed):
    """With the largest random number everything inexact rounds away from zero, with 0 toward it."""
    rng = np.random.default_rng(seed)
    case = next(case for case in CASES if case.random and case.result == kind)
    values = rng.uniform(0.3, 1.9, 64).astype(np.float32)
    codes = np.resize(values.view(np.uint32), (case.count, 64))
    for random, side in ((0, 0), (0xFFFFFFFF, 1)):
        registers = {X + k: row for k, row in enumerate(codes)}
        registers |= {SCALE: np.full(64, 0x3F800000), RANDOM: np.full(64, random)}
        after = compiled.run(case.text(), registers)
        got = VALUES[kind][_unpack(after[D:], kind, 1, 8 * case.byte)[0]]
        np.testing.assert_array_equal(got, _neighbours(values.astype(np.float64), kind)[side])


def test_nan_scale_and_high_half(compiled):
    wide = next(case for case in CASES if case.name == "v_cvt_scalef32_pk_f32_fp4")
    scale = np.full(64, 0x7F800000, np.uint32)
    after = compiled.run(wide.text(), {X: np.full(64, 0x22), SCALE: scale})
    assert np.isnan(after[D : D + 2].view(np.float32)).all()
    after = compiled.run(HIGH_HALF, {X: np.full(64, 0x38), SCALE: np.full(64, 0x40000000)})
    assert (after[D] == 0x4000BEEF).all()


def test_saturation_of_fp8_follows_the_mode(compiled):
    case = next(case for case in CASES if case.name == "v_cvt_scalef32_pk_fp8_f32")
    big = np.full(64, 1e6, np.float32).view(np.uint32)
    registers = {X: big, Y: big | 0x80000000, SCALE: np.full(64, 0x3F800000)}
    after = compiled.run(case.text(), registers)
    assert np.isnan(VALUES["fp8"][_unpack(after[D:], "fp8", 2)]).all()
    after = compiled.run(case.text(), registers, mode=0x3F0 | 1 << 23)
    np.testing.assert_array_equal(VALUES["fp8"][_unpack(after[D:], "fp8", 2)][:, 0], [448, -448])
