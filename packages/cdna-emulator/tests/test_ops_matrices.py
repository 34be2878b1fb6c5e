"""Matrix instructions against plain products, on both cores."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
directed = importlib.import_module("operation_cases.machine")
sys.path.remove(str(HERE))
machine = directed.machine
F32, F64, LANE, U32, U64, EIGHT = (
    directed.F32,
    directed.F64,
    directed.LANE,
    directed.U32,
    directed.U64,
    directed.EIGHT,
)


def _pack(codes, bits):
    """Put ``[element, lane]`` codes into registers from the lowest bit up."""
    per_word = 32 // bits
    words = np.zeros((max(1, len(codes) * bits // 32), 64), U32)
    for k, row in enumerate(codes):
        if bits == 64:
            words[2 * k] = row.astype(U32)
            words[2 * k + 1] = (row >> U64(32)).astype(U32)
        else:
            words[k // per_word] |= row.astype(U32) << U32(bits * (k % per_word))
    return words


def _codes(values, kind, arch):
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if kind in ("fp8", "bf8"):
        return tensor.float().to(EIGHT[arch, kind]).view(torch.uint8).numpy(), 8
    if kind == "i8":
        return values.astype(np.int8).view(np.uint8), 8
    if kind == "bf16":
        return tensor.float().to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16), 16
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16), 16
    if kind == "f64":
        return values.astype(F64).view(U64), 64
    return values.astype(F32).view(U32), 32


def _span(first, count):
    return f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"


# Rows, columns, depth, blocks, type.
SHAPES = [
    *((16, 16, 4, 1, "f32"), (32, 32, 2, 1, "f32"), (32, 32, 1, 2, "f32"), (4, 4, 1, 16, "f32")),
    *((16, 16, 1, 4, "f32"), (16, 16, 16, 1, "f16"), (32, 32, 8, 1, "f16"), (4, 4, 4, 16, "f16")),
    *((16, 16, 16, 1, "bf16"), (32, 32, 8, 1, "bf16"), (32, 32, 4, 2, "bf16")),
    *((16, 16, 4, 4, "bf16"), (16, 16, 32, 1, "i8"), (32, 32, 16, 1, "i8"), (4, 4, 4, 16, "i8")),
    *((16, 16, 32, 1, "fp8"), (32, 32, 16, 1, "fp8"), (16, 16, 32, 1, "bf8")),
    *((16, 16, 8, 1, "xf32"), (32, 32, 4, 1, "xf32"), (16, 16, 4, 1, "f64"), (4, 4, 4, 4, "f64")),
    *((16, 16, 32, 1, "f16"), (32, 32, 16, 1, "f16"), (16, 16, 32, 1, "bf16")),
    *((32, 32, 16, 1, "bf16"), (16, 16, 64, 1, "i8"), (32, 32, 32, 1, "i8")),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}x{s[2]}-{s[3]}-{s[4]}")
def test_matrix_products_are_plain_products(machine, seed, shape):
    """Lay whole numbers out as AMD's tables of matrix layouts say and read the product back."""
    rows, columns, depth, blocks, kind = shape
    wide = {"f16": 256, "bf16": 256, "i8": 512}.get(kind, 10**9)
    is_new = rows * depth > wide and blocks == 1
    arch = "gfx950" if is_new else "gfx942"
    rng = np.random.default_rng(seed)
    a = rng.integers(-4, 5, (blocks, rows, depth))
    b = rng.integers(-4, 5, (blocks, depth, columns))
    c = rng.integers(-4, 5, (blocks, rows, columns))
    held = rows * depth * blocks // 64
    m = machine(arch)
    # Lane: row fastest, then block, then group of consecutive k.
    index, block, group = LANE % rows, LANE // rows % blocks, LANE // (rows * blocks)
    for register, gathered in (
        (10, np.stack([a[block, index, group * held + k] for k in range(held)])),
        (20, np.stack([b[block, group * held + k, index] for k in range(held)])),
    ):
        codes, bits = _codes(gathered, kind, arch)
        for k, words in enumerate(_pack(codes, bits)):
            m.v(register + k, words)
    result = {"f64": "f64", "i8": "i32"}.get(kind, "f32")
    lanes = {}
    for k, i, j in np.ndindex(blocks, rows, columns):
        if rows == 4 and kind == "f64":
            place = 0, j + 4 * k + 16 * i
        elif rows == 4:
            place = i, j + 4 * k
        elif kind == "f64":
            place = i // 4, j + 16 * (i % 4)
        else:
            groups = 64 // columns
            per_block = rows * columns // 64
            place = k * per_block + i // (4 * groups) * 4 + i % 4, j + columns * (i // 4 % groups)
        lanes[k, i, j] = place
    width = 2 if kind == "f64" else 1
    count = rows * columns * blocks // 64
    dtype = {"f32": F32, "i32": np.int32, "f64": F64}[result]
    start = np.zeros((count, 64), dtype)
    for where, (register, lane) in lanes.items():
        start[register, lane] = c[where]
    for register in range(count):
        m.v(100 + width * register, start[register])
    pair = f"_{kind}_{kind}" if kind in ("fp8", "bf8") else f"_{kind}"
    size = f"{rows}x{columns}x{depth}" + (f"_{blocks}b" if blocks > 1 else "")
    bits = {"f64": 64, "i8": 8, "fp8": 8, "bf8": 8, "f16": 16, "bf16": 16}.get(kind, 32)
    regs = max(1, held * bits // 32)
    target = _span(100, count * width)
    # Lanes that are off take part all the same.
    m.exec(0x5555)
    m.run(f"v_mfma_{result}_{size}{pair} {target}, {_span(10, regs)}, {_span(20, regs)}, {target}")
    want = a @ b + c
    for where, (register, lane) in lanes.items():
        if kind == "f64":
            got = m.f64(100 + 2 * register)[lane]
        else:
            got = m.bits(100 + register).view(dtype)[lane]
        assert got == want[where], (where, register, lane)


def test_broadcast_of_blocks_and_lane_groups(machine, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-4, 5, (2, 64)).astype(F32)
    base = machine().v(10, a).v(11, b)
    base.run("v_mfma_f32_4x4x1_16b_f32 v[20:23], v10, v11, 0")
    # Block 2 of each four serves all four; the last quarter of B serves all.
    m = machine().v(10, a).v(11, b)
    m.run("v_mfma_f32_4x4x1_16b_f32 v[20:23], v10, v11, 0 cbsz:2 abid:2 blgp:7")
    a_lanes = LANE // 16 * 16 + 8 + LANE % 4
    expected = machine().v(10, a[a_lanes]).v(11, b[48 + LANE % 16])
    expected.run("v_mfma_f32_4x4x1_16b_f32 v[20:23], v10, v11, 0")
    for register in range(20, 24):
        np.testing.assert_array_equal(m.bits(register), expected.bits(register))
        assert np.any(m.bits(register) != base.bits(register))
