"""Gluon kernels: matrix instructions one by one, copies to LDS, layouts, buffer atomics."""

from __future__ import annotations

import torch

from kernel_cases.case import Launch, case, integers, normal, unset

F16, BF16, F32, I8 = torch.float16, torch.bfloat16, torch.float32, torch.int8
E4, E5 = torch.float8_e4m3fnuz, torch.float8_e5m2fnuz
O4, O5 = torch.float8_e4m3fn, torch.float8_e5m2


def one_product(rng, arch, dtype, instruction, k_width, transposed):
    m = n = 32
    k = 2 * max(instruction[2], 16)
    if dtype == I8:
        a, b = integers(rng, -99, 99, m, k, dtype=I8), integers(rng, -99, 99, k, n, dtype=I8)
        c, acc, want = unset(m, n, dtype=torch.int32), "int32", a.int() @ b.int()
    else:
        a, b = normal(rng, m, k).to(dtype), normal(rng, k, n).to(dtype)
        c, acc, want = unset(m, n), "fp32", a.double() @ b.double()
    return Launch(
        (1,),
        (a, b, c, m, n, k),
        {
            "VERSION": 3 if arch == "gfx942" else 4,
            "INSTRUCTION": list(instruction),
            "TRANSPOSED": transposed,
            "K_WIDTH": k_width,
            "ACC": ("triton dtype", acc),
            "WARPS": [1, 1],
        },
        ((c, want, 2e-5),),
    )


@case(
    "gluon_amd.py:mfma",
    (F32, (16, 16, 4), 1, False),
    (F32, (32, 32, 2), 1, True),
    (F16, (16, 16, 16), 4, False),
    (F16, (32, 32, 8), 4, True),
    (BF16, (16, 16, 16), 4, True),
    (BF16, (32, 32, 8), 4, False),
    num_warps=1,
)
def gluon_mfma(rng, arch, dtype, instruction, k_width, transposed):
    return one_product(rng, arch, dtype, instruction, k_width, transposed)


@case(
    "gluon_amd.py:mfma",
    (I8, (16, 16, 32), 8, False),
    (I8, (32, 32, 16), 8, True),
    (E4, (16, 16, 32), 8, True),
    (E5, (32, 32, 16), 8, False),
    (E4, (32, 32, 16), 8, True),
    (E5, (16, 16, 32), 8, True),
    num_warps=1,
    archs=("gfx942",),
)
def gluon_mfma_narrow_942(rng, arch, dtype, instruction, k_width, transposed):
    return one_product(rng, arch, dtype, instruction, k_width, transposed)


@case(
    "gluon_amd.py:mfma",
    (F16, (16, 16, 32), 8, True),
    (BF16, (32, 32, 16), 8, False),
    (I8, (16, 16, 64), 16, False),
    (I8, (32, 32, 32), 16, True),
    (O4, (16, 16, 32), 8, False),
    (O5, (32, 32, 16), 8, True),
    (O4, (32, 32, 16), 8, False),
    (O5, (16, 16, 32), 8, True),
    num_warps=1,
    archs=("gfx950",),
)
def gluon_mfma_wide_950(rng, arch, dtype, instruction, k_width, transposed):
    return one_product(rng, arch, dtype, instruction, k_width, transposed)


@case("gluon_amd.py:mfma_through_lds", (F16, 1, 1), (BF16, 8, 8), (BF16, 4, 16))
def gluon_lds(rng, arch, dtype, vector, phases):
    a, b, c = normal(rng, 64, 64, dtype=dtype), normal(rng, 64, 64, dtype=dtype), unset(64, 64)
    version, instruction, k_width = (
        (3, [16, 16, 16], 4) if arch == "gfx942" else (4, [16, 16, 32], 8)
    )
    return Launch(
        (1,),
        (a, b, c, 64, 64, 64, version, instruction, k_width, vector, phases),
        expect=((c, a.double() @ b.double(), 2e-5),),
    )


@case("gluon_amd.py:mfma_through_lds", archs=("gfx950",))
def gluon_lds_fp8(rng, arch):
    a, b, c = normal(rng, 64, 128).to(O4), normal(rng, 128, 64).to(O4), unset(64, 64)
    return Launch(
        (1,),
        (a, b, c, 64, 64, 128, 4, [16, 16, 32], 8, 1, 1),
        expect=((c, a.double() @ b.double(), 2e-5),),
    )


@case("gluon_amd.py:async_matmul", True, False, archs=("gfx950",))
def gluon_async(rng, arch, from_global):
    a, b, c = normal(rng, 32, 256, dtype=BF16), normal(rng, 256, 64, dtype=BF16), unset(32, 64)
    return Launch(
        (1,),
        (a, b, c, 256, 32, 64, 64, from_global),
        expect=((c, a.double() @ b.double(), 5e-5),),
    )


@case("gluon_amd.py:async_copy_words")
def gluon_async_words(rng, arch):
    x, o = normal(rng, 500), unset(500)
    return Launch((2,), (x, o, 500, 256), expect=((o, x, 0),))


@case("gluon_amd.py:buffer_atomics", "add", "or", "xor")
@case("gluon_amd.py:buffer_atomics", "max", since=(3, 9))
def gluon_buffer_atomics(rng, arch, op):
    x = integers(rng, 0, 1000, 500)
    o = torch.zeros(64, dtype=torch.int32)
    rows = torch.nn.functional.pad(x, (0, 12)).view(8, 64)
    want = torch.zeros_like(o)
    combine = {"add": torch.add, "max": torch.maximum}
    combine |= {"or": torch.bitwise_or, "xor": torch.bitwise_xor}
    for row in rows:
        want = combine[op](want, row)
    # Additions want an unsigned type, the others a signed one.
    dtype = torch.uint32 if op == "add" else torch.int32
    x, o, want = x.view(dtype), o.view(dtype), want.view(dtype)
    return Launch((2,), (x, o, 500, op, 64, 256), expect=((o, want, 0),))


@case("gluon_amd.py:buffer_atomic_floats", F32, F16)
def gluon_buffer_floats(rng, arch, dtype):
    return _buffer_floats(rng, dtype)


@case("gluon_amd.py:buffer_atomic_floats", archs=("gfx950",))
def gluon_buffer_bf16(rng, arch):
    return _buffer_floats(rng, BF16)


def _buffer_floats(rng, dtype):
    # Small integers: sums are exact in any order.
    x = integers(rng, -4, 5, 3, 512).to(dtype)
    o = torch.zeros(512, dtype=dtype)
    return Launch((3,), (x, o, 512), expect=((o, x.sum(0), 0),))


@case("gluon_amd.py:convert_layouts", F32, F16)
def gluon_layouts(rng, arch, dtype):
    x, o = integers(rng, -99, 99, 64, 64).to(dtype), unset(64, 64, dtype=dtype)
    return Launch((1,), (x, o, 64, 64), expect=((o, x * 3, 0),))
