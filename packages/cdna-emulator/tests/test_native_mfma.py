"""Matrix instructions of the native core against matrices laid out one element at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

A, B, C, D = 64, 96, 128, 0
SCALE_A, SCALE_B = 200, 201
CANONICAL_NAN = 0x7FC00000


def _small(exponent: int, mantissa: int, bias: int) -> np.ndarray:
    """Values of a format without infinities and NaN, from its definition."""
    values = []
    for code in range(1 << (1 + exponent + mantissa)):
        field = code >> mantissa & ((1 << exponent) - 1)
        fraction = code % (1 << mantissa) / (1 << mantissa)
        value = (1 + fraction) * 2.0 ** (field - bias) if field else fraction * 2.0 ** (1 - bias)
        values.append(-value if code >> (exponent + mantissa) else value)
    return np.array(values)


def _torch_values(dtype: torch.dtype) -> np.ndarray:
    return torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()


TABLES = {
    ("fp8", "gfx942"): _torch_values(torch.float8_e4m3fnuz),
    ("bf8", "gfx942"): _torch_values(torch.float8_e5m2fnuz),
    ("fp8", "gfx950"): _torch_values(torch.float8_e4m3fn),
    ("bf8", "gfx950"): _torch_values(torch.float8_e5m2),
    ("fp6", "gfx950"): _small(2, 3, 1),
    ("bf6", "gfx950"): _small(3, 2, 3),
    ("fp4", "gfx950"): _small(2, 1, 1),
}
#: Codes that are numbers on both architectures: a NaN would hide most of a result.
FINITE = {
    kind: np.flatnonzero(np.isfinite(TABLES[kind, "gfx942"] + TABLES[kind, "gfx950"]))
    for kind in ("fp8", "bf8")
}
BITS = {"f64": 64, "f32": 32, "xf32": 32, "f16": 16, "bf16": 16, "i8": 8, "fp8": 8, "bf8": 8}
BITS |= {"fp6": 6, "bf6": 6, "fp4": 4}
PACKED = ("fp8", "bf8", "fp6", "bf6", "fp4")


@dataclass(frozen=True)
class Case:
    """One instruction: shape, blocks and types of its factors."""

    name: str
    size: int
    depth: int
    blocks: int
    a: str
    b: str
    modifiers: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.modifiers}".strip().replace(" ", "-")

    @property
    def groups(self) -> int:
        return 64 // (self.size * self.blocks)

    @property
    def per_lane(self) -> int:
        return self.depth // self.groups

    def width(self, kind: str) -> int:
        return self.per_lane * BITS[kind] // 32

    @property
    def result_width(self) -> int:
        return self.size**2 * self.blocks // 64 * (2 if self.a == "f64" else 1)

    def text(self, accumulator: str | None = None) -> str:
        d = f"v[{D}:{D + self.result_width - 1}]"
        c = accumulator or f"v[{C}:{C + self.result_width - 1}]"
        if self.a == "f64" and self.result_width == 2:
            c = accumulator or f"v[{C}:{C + 1}]"
        factors = [_range(A, self.width(self.a)), _range(B, self.width(self.b))]
        return f"{self.name} {d}, {factors[0]}, {factors[1]}, {c} {self.modifiers}".strip()

    def k(self, kind: str, lane: int, element: int) -> int:
        """Column of A, or row of B, of one element."""
        group = lane // (self.size * self.blocks)
        if self.name.endswith("f8f6f4") and BITS[kind] == 8:
            return element // 16 * (self.depth // 2) + 16 * group + element % 16
        return self.per_lane * group + element


def _range(first: int, width: int) -> str:
    return f"v{first}" if width == 1 else f"v[{first}:{first + width - 1}]"


def _plain(names: str) -> list[Case]:
    cases = []
    for word in names.split():
        shape, _, types = word.partition(":")
        dims, _, blocks = shape.partition("_")
        size, _, depth = dims.split("x")
        a, _, b = types.partition("/")
        out = "i32" if a == "i8" else "f64" if a == "f64" else "f32"
        suffix = f"{a}_{b}" if b else a
        name = f"v_mfma_{out}_{shape}_{suffix}"
        cases.append(Case(name, int(size), int(depth), int(blocks[:-1] or 1), a, b or a))
    return cases


COMMON = _plain(
    "32x32x1_2b:f32 16x16x1_4b:f32 4x4x1_16b:f32 32x32x2:f32 16x16x4:f32"
    " 32x32x4_2b:f16 16x16x4_4b:f16 4x4x4_16b:f16 32x32x8:f16 16x16x16:f16"
    " 32x32x4_2b:bf16 16x16x4_4b:bf16 4x4x4_16b:bf16 32x32x8:bf16 16x16x16:bf16"
    " 32x32x4_2b:i8 16x16x4_4b:i8 4x4x4_16b:i8 32x32x16:i8 16x16x32:i8"
    " 16x16x32:fp8/fp8 16x16x32:fp8/bf8 16x16x32:bf8/fp8 16x16x32:bf8/bf8"
    " 32x32x16:fp8/fp8 32x32x16:fp8/bf8 32x32x16:bf8/fp8 32x32x16:bf8/bf8"
    " 16x16x4:f64 4x4x4_4b:f64"
)
ONLY = {
    "gfx942": _plain("16x16x8:xf32 32x32x4:xf32"),
    "gfx950": _plain(
        "16x16x32:f16 32x32x16:f16 16x16x32:bf16 32x32x16:bf16 16x16x64:i8 32x32x32:i8"
    )
    + [
        Case(f"v_mfma_f32_{size}x{size}x{depth}_f8f6f4", size, depth, 1, a, b, f"cbsz:{x} blgp:{y}")
        for size, depth in ((16, 128), (32, 64))
        for x, a in enumerate(PACKED)
        for y, b in enumerate(PACKED)
    ],
}
CASES = [(arch, case) for arch, only in ONLY.items() for case in COMMON + only]
BROADCASTS = {
    "v_mfma_f32_4x4x1_16b_f32": ("cbsz:2 abid:1", "cbsz:4 abid:9", "cbsz:1 abid:1 blgp:5"),
    "v_mfma_f32_16x16x4_4b_f16": ("cbsz:1 abid:1", "cbsz:2 abid:3", "blgp:3"),
    "v_mfma_f32_32x32x1_2b_f32": ("cbsz:1 abid:1", "blgp:1", "blgp:2", "blgp:4", "blgp:7"),
}


def _factor_words(rng: np.random.Generator, kind: str, width: int) -> np.ndarray:
    """Random registers whose values have moderate size, so that sums lose bits but not range."""
    words = rng.integers(0, 2**32, (width, 64), dtype=np.uint64).astype(np.uint32)
    if kind in ("f32", "xf32"):
        return (rng.standard_normal((width, 64)) * 4).astype(np.float32).view(np.uint32)
    if kind == "f64":
        values = rng.standard_normal((width // 2, 64)).view(np.uint32).reshape(-1, 64, 2)
        return values.transpose(0, 2, 1).reshape(width, 64).copy()
    if kind == "f16":
        return rng.standard_normal((width, 64, 2)).astype(np.float16).view(np.uint32)[..., 0]
    if kind == "bf16":
        return words & 0xBFFFBFFF  # below 2: no infinity and no NaN
    if kind in FINITE:
        return rng.choice(FINITE[kind], (width, 64, 4)).astype(np.uint8).view(np.uint32)[..., 0]
    return words


def _elements(case: Case, kind: str, words: np.ndarray, arch: str) -> np.ndarray:
    """[64 lanes, per_lane] values, as float64 or int64."""
    if kind == "f64":
        pairs = words.reshape(-1, 2, 64).transpose(2, 0, 1).copy()
        return pairs.view(np.float64).reshape(64, -1)
    bits = BITS[kind]
    out = np.zeros((64, case.per_lane), np.int64 if kind == "i8" else np.float64)
    for lane in range(64):
        whole = sum(int(word) << 32 * place for place, word in enumerate(words[:, lane]))
        codes = [whole >> bits * e & (1 << bits) - 1 for e in range(case.per_lane)]
        out[lane] = [_value(kind, code, arch) for code in codes]
    return out


def _value(kind: str, code: int, arch: str) -> float:
    if kind == "i8":
        return code - (code >> 7 << 8)
    if (kind, arch) in TABLES:
        return float(TABLES[kind, arch][code])
    if kind == "f16":
        return float(np.uint16(code).view(np.float16))
    if kind == "bf16":
        return float(np.uint32(code << 16).view(np.float32))
    if kind == "xf32":
        code = (code + 0xFFF + (code >> 13 & 1)) & 0xFFFFE000
    return float(np.uint32(code).view(np.float32))


def _matrices(case: Case, kind: str, elements: np.ndarray) -> np.ndarray:
    """[blocks, size, depth], of A or of B transposed."""
    out = np.zeros((case.blocks, case.size, case.depth), elements.dtype)
    for lane in range(64):
        for element in range(case.per_lane):
            row, block = lane % case.size, lane // case.size % case.blocks
            out[block, row, case.k(kind, lane, element)] = elements[lane, element]
    return out


def _place(case: Case, register: int, lane: int) -> tuple[int, int, int]:
    """Block, row and column of one result."""
    if case.a == "f64":
        row = 4 * register + lane // (case.size * case.blocks)
        return lane // case.size % case.blocks, row, lane % case.size
    if case.size == 4:
        return lane // 4, register, lane % 4
    per_block = case.size**2 // 64
    block, r = divmod(register, per_block)
    row = 8 * (r // 4) + 4 * (lane // 32) + r % 4 if case.size == 32 else 4 * (lane // 16) + r
    return block, row, lane % case.size


def _expected(case: Case, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """C + A B in order of k, before the final rounding; all [blocks, ...]."""
    total = c.astype(np.int64 if case.a == "i8" else np.float64)
    for k in range(case.depth):
        total = total + a[:, :, None, k] * b[:, None, :, k]
    return total


def _accumulator(rng: np.random.Generator, case: Case) -> np.ndarray:
    if case.a == "i8":
        return rng.integers(0, 2**32, (case.result_width, 64), dtype=np.uint64).astype(np.uint32)
    return _factor_words(rng, "f64" if case.a == "f64" else "f32", case.result_width)


def _results(case: Case, words: np.ndarray) -> np.ndarray:
    """[blocks, size, size] of the registers of C or D."""
    if case.a == "f64":
        values = _elements(case, "f64", words, "")
    else:
        values = words.view(np.int32 if case.a == "i8" else np.float32).T
    out = np.zeros((case.blocks, case.size, case.size), values.dtype)
    for lane in range(64):
        for register in range(values.shape[1]):
            out[_place(case, register, lane)] = values[lane, register]
    return out


def _registers(first: int, words: np.ndarray) -> dict[int, np.ndarray]:
    return {first + number: row for number, row in enumerate(words)}


@pytest.fixture(scope="module")
def compiled(instructions):
    built = {}
    for arch, only in ONLY.items():
        texts = [case.text() for case in COMMON + only]
        texts += [case.text(_constant(case)) for case in COMMON if case.a != "f64"]
        texts += [f"{_named(name).text()} {m}" for name, all_ in BROADCASTS.items() for m in all_]
        texts += SPECIAL_TEXTS[arch]
        built[arch] = instructions(texts, arch)
    return built


def _named(name: str) -> Case:
    return next(case for case in COMMON if case.name == name)


def _constant(case: Case) -> str:
    return "-3" if case.a == "i8" else "0.5"


SCALED = "v_mfma_scale_f32_{n}x{n}x{k}_f8f6f4 v[0:{last}], v[64:71], v[96:{end}], v[128:{c}], v200,"
SCALED += " v201 op_sel:[{0},{1},0] op_sel_hi:[{2},{3},0] cbsz:{x} blgp:{y}"
SCALED_CASES = [
    Case("scale_f8f6f4", n, k, 1, "bf8", b, f"{bits:04b}")
    for n, k in ((16, 128), (32, 64))
    for b, bits in (("fp4", 0b0110), ("bf8", 0b1001), ("fp8", 0b0000), ("fp4", 0b1111))
]


def _scaled_text(case: Case) -> str:
    return SCALED.format(
        *case.modifiers,
        n=case.size,
        k=case.depth,
        last=case.result_width - 1,
        end=95 + case.width(case.b),
        c=127 + case.result_width,
        x=PACKED.index(case.a),
        y=PACKED.index(case.b),
    )


NEGATED = "v_mfma_f64_16x16x4_f64 v[0:7], v[64:65], v[96:97], v[128:135] neg:[1,0,1]"
AGPRS = "v_mfma_f32_16x16x16_f16 a[0:3], a[64:65], v[96:97], a[0:3]"
SPECIAL_TEXTS = {
    "gfx942": [NEGATED, AGPRS],
    "gfx950": [NEGATED, AGPRS, *map(_scaled_text, SCALED_CASES)],
}


def _check(case: Case, after: np.ndarray, expected: np.ndarray) -> None:
    got = _results(case, after[D : D + case.result_width])
    if case.a == "i8":
        np.testing.assert_array_equal(got, expected.astype(np.int32))
    elif case.a == "f64":
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-14)
    else:
        rounded = expected.astype(np.float32)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(rounded))
        np.testing.assert_array_equal(got[~np.isnan(got)], rounded[~np.isnan(rounded)])


@pytest.mark.parametrize(("arch", "case"), CASES, ids=lambda item: str(item))
def test_layout_and_sum(compiled, arch, case, seed):
    rng = np.random.default_rng(seed)
    words = {kind: _factor_words(rng, kind, case.width(kind)) for kind in {case.a, case.b}}
    a, b = words[case.a], _factor_words(rng, case.b, case.width(case.b))
    c = _accumulator(rng, case)
    after = compiled[arch].run(
        case.text(),
        _registers(A, a) | _registers(B, b) | _registers(C, c),
        exec_mask=int(rng.integers(0, 2**63)),  # matrix instructions do not look at it
    )
    left = _matrices(case, case.a, _elements(case, case.a, a, arch))
    right = _matrices(case, case.b, _elements(case, case.b, b, arch))
    _check(case, after, _expected(case, left, right, _results(case, c)))
    assert (after[D + case.result_width] == 0xDEADBEEF).all()


@pytest.mark.parametrize("case", [case for case in COMMON if case.a != "f64"], ids=str)
def test_constant_accumulator(compiled, case, seed):
    rng = np.random.default_rng(seed)
    a, b = (_factor_words(rng, kind, case.width(kind)) for kind in (case.a, case.b))
    text = case.text(_constant(case))
    after = compiled["gfx942"].run(text, _registers(A, a) | _registers(B, b))
    left = _matrices(case, case.a, _elements(case, case.a, a, "gfx942"))
    right = _matrices(case, case.b, _elements(case, case.b, b, "gfx942"))
    shape = (case.blocks, case.size, case.size)
    _check(case, after, _expected(case, left, right, np.full(shape, float(_constant(case)))))


def _broadcast_lane(blgp: int, lane: int) -> int:
    if blgp < 3:
        return (lane, lane % 32, lane % 32 + 32)[blgp]
    return (lane + 16) % 64 if blgp == 3 else 16 * (blgp - 4) + lane % 16


@pytest.mark.parametrize(
    ("name", "modifiers"), [(name, m) for name, all_ in BROADCASTS.items() for m in all_]
)
def test_broadcasts(compiled, name, modifiers, seed):
    rng = np.random.default_rng(seed)
    case = _named(name)
    fields = {k: int(v) for k, v in (word.split(":") for word in modifiers.split())}
    a, b = (_factor_words(rng, kind, case.width(kind)) for kind in (case.a, case.b))
    c = _accumulator(rng, case)
    registers = _registers(A, a) | _registers(B, b) | _registers(C, c)
    after = compiled["gfx942"].run(f"{case.text()} {modifiers}", registers)
    left = _matrices(case, case.a, _elements(case, case.a, a, "gfx942"))
    group = 1 << fields.get("cbsz", 0)
    left = left[[block // group * group + fields.get("abid", 0) for block in range(case.blocks)]]
    moved = b[:, [_broadcast_lane(fields.get("blgp", 0), lane) for lane in range(64)]]
    right = _matrices(case, case.b, _elements(case, case.b, moved, "gfx942"))
    _check(case, after, _expected(case, left, right, _results(case, c)))
    np.testing.assert_array_equal(after[B : B + len(b)], b)


@pytest.mark.parametrize("case", SCALED_CASES, ids=lambda c: f"{c.size}-{c.a}-{c.b}-{c.modifiers}")
def test_block_scales(compiled, case, seed):
    rng = np.random.default_rng(seed)
    a, b = (_factor_words(rng, kind, case.width(kind)) for kind in (case.a, case.b))
    c = _accumulator(rng, case)
    scales = rng.integers(120, 135, (2, 64, 4), dtype=np.uint8)
    scales[0, 5, :], scales[1, 9, :] = 255, 0
    registers = _registers(A, a) | _registers(B, b) | _registers(C, c)
    registers |= _registers(SCALE_A, scales.view(np.uint32)[..., 0])
    after = compiled["gfx950"].run(_scaled_text(case), registers)
    bits = [int(bit) for bit in case.modifiers]
    factors = []
    for side, (kind, words) in enumerate(((case.a, a), (case.b, b))):
        named = Case("_f8f6f4", case.size, case.depth, 1, case.a, case.b)
        matrix = _matrices(named, kind, _elements(named, kind, words, "gfx950"))
        codes = scales[side, :, bits[side] + 2 * bits[2 + side]].astype(np.float64)
        factor = np.where(codes == 255, np.nan, 2.0 ** (codes - 127))
        factors.append(matrix * np.repeat(factor.reshape(-1, case.size).T, 32, axis=1))
    _check(case, after, _expected(case, *factors, _results(case, c)))


def test_f64_negation(compiled, seed):
    rng = np.random.default_rng(seed)
    case = _named("v_mfma_f64_16x16x4_f64")
    a, b = (_factor_words(rng, "f64", 2) for _ in range(2))
    c = _accumulator(rng, case)
    registers = _registers(A, a) | _registers(B, b) | _registers(C, c)
    after = compiled["gfx942"].run(NEGATED, registers)
    left, right = (_matrices(case, "f64", _elements(case, "f64", words, "")) for words in (a, b))
    _check(case, after, _expected(case, -left, right, -_results(case, c)))


def test_accumulation_registers_in_place(compiled, seed):
    rng = np.random.default_rng(seed)
    case = _named("v_mfma_f32_16x16x16_f16")
    a, b, c = _factor_words(rng, "f16", 2), _factor_words(rng, "f16", 2), _accumulator(rng, case)
    registers = _registers(256 + A, a) | _registers(B, b) | _registers(256, c)
    after = compiled["gfx942"].run(AGPRS, registers)
    left, right = (_matrices(case, "f16", _elements(case, "f16", words, "")) for words in (a, b))
    _check(case, after[256:], _expected(case, left, right, _results(case, c)))


def test_special_values(compiled):
    case = _named("v_mfma_f32_16x16x16_f16")
    half = {"inf": 0x7C00, "-inf": 0xFC00, "tiny": 0x0001, "one": 0x3C00, "largest": 0x7BFF}
    a, b = np.zeros((2, 2, 64), np.uint32)
    c = np.zeros((4, 64), np.uint32)
    # Row i of A, column i of B, each only at k = 0: lanes 0..15, the low half.
    a[0, :5] = [half["inf"], half["inf"], half["tiny"], half["largest"], half["-inf"]]
    b[0, :5] = [half["one"], 0, half["tiny"], half["largest"], half["-inf"]]
    c[0, 0] = 0xFF800000  # -inf in row 0, column 0
    registers = _registers(A, a) | _registers(B, b) | _registers(C, c)
    got = _results(case, compiled["gfx942"].run(case.text(), registers)[:4])[0]
    assert got.view(np.uint32)[0, 0] == CANONICAL_NAN  # inf - inf
    assert got.view(np.uint32)[1, 1] == CANONICAL_NAN  # inf * 0
    assert got[2, 2] == np.float32(2.0**-48)  # products of denormals are kept
    assert got[3, 3] == np.float32(65504.0**2)
    assert got[4, 4] == np.inf
    c = np.full((4, 64), 1, np.uint32)  # the smallest denormal
    after = compiled["gfx942"].run(
        case.text(), _registers(A, a * 0) | _registers(B, b * 0) | _registers(C, c)
    )
    assert (after[:4] == 1).all()
