"""Matrix products of every shape and dtype, attention on top of them."""

from __future__ import annotations

import torch

from kernel_cases.case import Launch, case, integers, normal, unset

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
OCP = (torch.float8_e4m3fn, torch.float8_e5m2)
_NAMES = {torch.float32: "fp32", torch.int32: "int32", torch.float64: "fp64"}


def product(a, b, out_dtype=F32, precision=None, tolerance=1e-5, shape=(64, 64, 32)):
    """A masked product whose edges lie inside tiles."""
    m, k = a.shape
    n = b.shape[1]
    c = unset(m, n, dtype=out_dtype)
    block_m, block_n, _ = shape
    grid = (-(-m // block_m), -(-n // block_n))
    wide = torch.float64 if a.is_floating_point() else torch.int64
    want = (a.to(wide) @ b.to(wide)).to(out_dtype)
    acc = torch.int32 if not a.is_floating_point() else F64 if a.dtype == F64 else F32
    return Launch(
        grid,
        (a, b, c, m, n, k, a.stride(0), b.stride(0), n, *shape),
        {"ACC": ("triton dtype", _NAMES[acc]), "PRECISION": precision},
        ((c, want, tolerance),),
    )


@case("matmul.py:matmul", F16, BF16, F32, matrix_instr_nonkdim=16)
def matmul_16(rng, arch, dtype):
    a, b = normal(rng, 70, 96, dtype=dtype), normal(rng, 96, 80, dtype=dtype)
    return product(a, b, tolerance=3e-5)


@case("matmul.py:matmul", F16, BF16, F32, matrix_instr_nonkdim=32)
def matmul_32(rng, arch, dtype):
    a, b = normal(rng, 70, 96, dtype=dtype), normal(rng, 96, 80, dtype=dtype)
    return product(a, b, tolerance=3e-5)


@case("matmul.py:matmul", 16, 32, num_stages=3)
def matmul_pipelined(rng, arch, width):
    a, b = normal(rng, 64, 160, dtype=BF16), normal(rng, 160, 128, dtype=BF16)
    return product(a, b, out_dtype=BF16, tolerance=1e-2, shape=(64, 128, width))


@case("matmul.py:matmul", num_warps=8, kpack=2, archs=("gfx942",), matrix_instr_nonkdim=16)
def matmul_kpack(rng, arch):
    a, b = normal(rng, 128, 128, dtype=F16), normal(rng, 128, 128, dtype=F16)
    return product(a, b, out_dtype=F16, tolerance=2e-3, shape=(128, 128, 64))


@case("matmul.py:matmul", archs=("gfx942",), matrix_instr_nonkdim=16)
def matmul_xf32_16(rng, arch):
    return product(normal(rng, 64, 64), normal(rng, 64, 64), precision="tf32", tolerance=5e-2)


@case("matmul.py:matmul", archs=("gfx942",), matrix_instr_nonkdim=32)
def matmul_xf32_32(rng, arch):
    return product(normal(rng, 64, 64), normal(rng, 64, 64), precision="tf32", tolerance=5e-2)


@case("matmul.py:matmul", "bf16x3", "bf16x6")
def matmul_f32_in_pieces(rng, arch, precision):
    a, b = normal(rng, 64, 64), normal(rng, 64, 64)
    return product(a, b, precision=precision, tolerance=1e-3)


@case("matmul.py:matmul", matrix_instr_nonkdim=16)
def matmul_f64(rng, arch):
    a, b = normal(rng, 32, 32, dtype=F64), normal(rng, 32, 32, dtype=F64)
    return product(a, b, out_dtype=F64, tolerance=1e-13, shape=(32, 32, 16))


def pairs(*dtypes):
    return [(a, b) for a in dtypes for b in dtypes]


@case("matmul.py:matmul", *pairs(*FNUZ), archs=("gfx942",), matrix_instr_nonkdim=16)
def matmul_fp8_fnuz_16(rng, arch, a_dtype, b_dtype):
    a, b = normal(rng, 64, 128).to(a_dtype), normal(rng, 128, 64).to(b_dtype)
    return product(a, b, tolerance=3e-5, shape=(64, 64, 64))


@case("matmul.py:matmul", *pairs(*FNUZ), archs=("gfx942",), matrix_instr_nonkdim=32)
def matmul_fp8_fnuz_32(rng, arch, a_dtype, b_dtype):
    a, b = normal(rng, 64, 128).to(a_dtype), normal(rng, 128, 64).to(b_dtype)
    return product(a, b, tolerance=3e-5, shape=(64, 64, 64))


@case("matmul.py:matmul", *OCP, matrix_instr_nonkdim=16)
def matmul_fp8_ocp_16(rng, arch, dtype):
    a, b = normal(rng, 64, 256).to(dtype), normal(rng, 256, 64).to(dtype)
    return product(a, b, tolerance=3e-5, shape=(64, 64, 128))


@case("matmul.py:matmul", *pairs(*OCP), archs=("gfx950",), matrix_instr_nonkdim=32)
def matmul_fp8_ocp_32(rng, arch, a_dtype, b_dtype):
    a, b = normal(rng, 64, 128).to(a_dtype), normal(rng, 128, 64).to(b_dtype)
    return product(a, b, tolerance=3e-5, shape=(64, 64, 64))


@case("matmul.py:matmul", 16, 32)
def matmul_int8(rng, arch, width):
    a = integers(rng, -128, 128, 64, 96, dtype=torch.int8)
    b = integers(rng, -128, 128, 96, 64, dtype=torch.int8)
    return product(a, b, out_dtype=torch.int32, shape=(64, 64, width))


FLOAT_ACC = {"ACC": ("triton dtype", "fp32")}


@case(
    "matmul.py:matmul_bt",
    *((dtype, 64, 4) for dtype in (F16, BF16, F32)),
    *((dtype, 4, 64) for dtype in (F16, BF16, F32)),
    num_warps=1,
)
def matmul_4(rng, arch, dtype, m, n):
    a, b, c = normal(rng, m, 64, dtype=dtype), normal(rng, n, 64, dtype=dtype), unset(m, n)
    want = a.double() @ b.double().T
    return Launch((1,), (a, b, c, m, n, 64), FLOAT_ACC, ((c, want, 1e-5),))


@case("matmul.py:matmul_bt", (64, 4), (4, 64), num_warps=1)
def matmul_4_int8(rng, arch, m, n):
    a, b = (integers(rng, -128, 128, rows, 64, dtype=torch.int8) for rows in (m, n))
    c = unset(m, n, dtype=torch.int32)
    constants = {"ACC": ("triton dtype", "int32")}
    return Launch((1,), (a, b, c, m, n, 64), constants, ((c, a.int() @ b.int().T, 0),))


@case("matmul.py:matmul_bt", F16, BF16, F32)
def matmul_transposed(rng, arch, dtype):
    a, b = normal(rng, 32, 64, dtype=dtype), normal(rng, 128, 64, dtype=dtype)
    c, want = unset(32, 128), a.double() @ b.double().T
    return Launch((1,), (a, b, c, 32, 128, 64), FLOAT_ACC, ((c, want, 2e-5),))


@case("matmul.py:matmul_batched")
def matmul_batched(rng, arch):
    a, b = normal(rng, 4, 16, 32, dtype=BF16), normal(rng, 4, 32, 16, dtype=BF16)
    c = unset(4, 16, 16)
    return Launch((1,), (a, b, c, 4, 16, 32), expect=((c, a.double() @ b.double(), 1e-5),))


@case("matmul.py:matmul_split_k")
def matmul_split_k(rng, arch):
    a, b = normal(rng, 32, 160, dtype=F16), normal(rng, 160, 32, dtype=F16)
    c = torch.zeros(32, 32)
    return Launch((5,), (a, b, c, 160, 32, 32, 32), expect=((c, a.double() @ b.double(), 2e-5),))


@case("matmul.py:matmul_chain", F16, BF16)
def matmul_chain(rng, arch, dtype):
    # Whole numbers up to 256 in between: a tie that rounds the other way would show in the result.
    a, b = (integers(rng, -2, 3, 64, 64).to(dtype) for _ in range(2))
    c = normal(rng, 64, 64, dtype=dtype)
    o = unset(64, 64)
    want = (a.double() @ b.double()).to(dtype).double() @ c.double()
    return Launch((1,), (a, b, c, o, 64, 64), expect=((o, want, 1e-5),))


FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
#: The values of the 16 bit patterns of e2m1.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat([E2M1, -E2M1])


def scaled_operand(rng, kind, rows, depth):
    """Draw a matrix [rows, depth] and its scales: bytes for the kernel, values for torch."""
    scale = integers(rng, 120, 134, rows, depth // 32, dtype=torch.uint8)
    factor = torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
    if kind == "e2m1":
        code = integers(rng, 0, 16, rows, depth, dtype=torch.uint8)
        packed = code[:, ::2] | (code[:, 1::2] << 4)
        return packed, scale, E2M1[code.long()].double() * factor
    x = normal(rng, rows, depth).to(FORMATS[kind])
    return x.view(torch.uint8), scale, x.double() * factor


def scaled_launch(rng, a_format, b_format, m, n, k, rest):
    a, a_scale, a_value = scaled_operand(rng, a_format, m, k)
    b, b_scale, b_value = scaled_operand(rng, b_format, n, k)
    c = unset(m, n)
    return Launch(
        (1,),
        (a, a_scale, b.T.contiguous(), b_scale, c),
        {
            "A_FORMAT": a_format,
            "B_FORMAT": b_format,
            "A_PACK": 2 if a_format == "e2m1" else 1,
            "B_PACK": 2 if b_format == "e2m1" else 1,
            "M": m,
            "N": n,
            "K": k,
            **rest,
        },
        ((c, a_value @ b_value.T, 1e-4),),
    )


PAIRS = [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e2m1", "e2m1"), ("e4m3", "e2m1")]


@case("matmul.py:matmul_scaled", *PAIRS, archs=("gfx950",), matrix_instr_nonkdim=16)
def dot_scaled_16(rng, arch, a_format, b_format):
    return scaled_launch(rng, a_format, b_format, 32, 64, 128, {})


@case("matmul.py:matmul_scaled", *PAIRS[::2], archs=("gfx950",), matrix_instr_nonkdim=32)
def dot_scaled_32(rng, arch, a_format, b_format):
    return scaled_launch(rng, a_format, b_format, 64, 64, 128, {})


@case("gluon_amd.py:mfma_scaled", *PAIRS, archs=("gfx950",), num_warps=1)
def gluon_scaled(rng, arch, a_format, b_format):
    shape = [32, 32, 64] if a_format == "e5m2" else [16, 16, 128]
    rest = {"INSTRUCTION": shape}
    return scaled_launch(rng, a_format, b_format, 32, 32, 128, rest)


@case("attention.py:attention", (64, True, BF16), (64, False, F16), (128, True, BF16))
def attention(rng, arch, width, causal, dtype):
    heads, tokens = 2, 100
    q, k, v = (normal(rng, heads, tokens, width, dtype=dtype) for _ in range(3))
    o, lse = unset(heads, tokens, width, dtype=dtype), unset(heads, tokens)
    s = q.double() @ k.double().transpose(1, 2) * width**-0.5
    if causal:
        s = s.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
    want_lse = s.logsumexp(2) * 1.4426950408889634
    want = (s.softmax(2) @ v.double()).to(dtype)
    return Launch(
        (-(-tokens // 64), heads),
        (q, k, v, o, lse, tokens, width**-0.5 * 1.4426950408889634, width, 64, 32, causal),
        expect=((o, want, 2e-2), (lse, want_lse, 1e-4)),
    )


@case("attention.py:decode_gemv")
def attention_decode(rng, arch):
    heads, tokens, width = 3, 150, 64
    q = normal(rng, heads, width, dtype=F16)
    k, v = normal(rng, tokens, width, dtype=F16), normal(rng, tokens, width, dtype=F16)
    o = unset(heads, width)
    want = ((q.double() @ k.double().T) * 0.125).softmax(1) @ v.double()
    return Launch((heads,), (q, k, v, o, tokens, 0.125, width, 64), expect=((o, want, 1e-4),))
