"""Arithmetic, functions and conversions against torch."""

from __future__ import annotations

import math

import torch

from kernel_cases.case import Launch, case, integers, normal, uniform, unset

F8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def wrap(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Reduce Python integers to a dtype's range as machine arithmetic does."""
    bits = 8 * dtype.itemsize
    signed = [((value + (1 << (bits - 1))) % (1 << bits)) - (1 << (bits - 1)) for value in values]
    if dtype.is_signed:
        return torch.tensor(signed, dtype=dtype)
    same_width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return torch.tensor(signed, dtype=same_width).view(dtype)


@case(
    "elementwise.py:integers",
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint32, torch.uint64),
)
def integer_arithmetic(rng, arch, dtype):
    n, bits = 128, 8 * dtype.itemsize
    limit = 1 << min(bits - 1, 62)
    low = -limit if dtype.is_signed else 0
    a = [int(v) for v in torch.randint(low, limit, (n,), generator=rng)]
    b = [int(v) or 3 for v in torch.randint(low, limit, (n,), generator=rng)]
    b[::2] = [(abs(v) % 11 + 1) * (1 if v >= 0 else -1) for v in b[::2]]
    o = unset(8 * n, dtype=torch.int64).to(dtype)
    shift = [i % 7 for i in range(n)]
    results = [
        [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)],
        [int(math.copysign(abs(x) % abs(y), x)) if bits < 64 else (abs(x) % abs(y)) * (
            -1 if x < 0 else 1) for x, y in zip(a, b, strict=True)],
        [x * y + x for x, y in zip(a, b, strict=True)],
        [x >> s for x, s in zip(a, shift, strict=True)],
        [x << s for x, s in zip(a, shift, strict=True)],
        [(x & y) ^ (x | ~y) for x, y in zip(a, b, strict=True)],
        [min(x, y) - max(x, y) for x, y in zip(a, b, strict=True)],
        [x if x < y else -y for x, y in zip(a, b, strict=True)],
    ]  # fmt: skip
    want = torch.cat([wrap(values, dtype) for values in results])
    return Launch((1,), (wrap(a, dtype), wrap(b, dtype), o, n), expect=((o, want, 0),))


@case("elementwise.py:wide_products")
def wide_products(rng, arch):
    a, b = (integers(rng, 0, 2**32, 128, dtype=torch.int64) for _ in range(2))
    o = unset(128, dtype=torch.int64).to(torch.uint32)
    want = torch.tensor([x * y >> 32 for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    args = (a.to(torch.uint32), b.to(torch.uint32), o, 128)
    return Launch((1,), args, expect=((o, want.to(torch.uint32), 0),))


@case("elementwise.py:bit_tricks")
def bit_tricks(rng, arch):
    a, o = integers(rng, 0, 2**31, 128) >> integers(rng, 0, 31, 128), unset(512, dtype=torch.int32)
    a[5] = 0
    values = a.tolist()
    want = [32 - v.bit_length() if v else -1 for v in values]
    want += [(v & -v).bit_length() - 1 for v in values]
    want += [v.bit_count() + 7 for v in values]
    turned = wrap([int(f"{v:032b}"[::-1], 2) for v in values], torch.int32)
    want = torch.cat([torch.tensor(want).int(), turned])
    return Launch((1,), (a, o, 128), expect=((o, want, 0),))


@case("elementwise.py:maths", F32, F64)
def maths(rng, arch, dtype):
    x = uniform(rng, 0.01, 8, 200, dtype=dtype)
    o, d = unset(12, 200, dtype=dtype), x.double()
    want = torch.stack(
        [d.exp(), d.exp2(), d.log(), d.log2(), d.sin(), d.cos(), d.sqrt(), d.rsqrt(), d.erf(),
         d.floor() + d.ceil() * d, 1 / d, d * d - d]
    )  # fmt: skip
    return Launch((1,), (x, o, 200, 256), expect=((o, want, 4e-6 if dtype == F32 else 1e-14),))


@case("elementwise.py:library", F32, F64)
def library(rng, arch, dtype):
    x, y = uniform(rng, 0.01, 7, 200, dtype=dtype), uniform(rng, 0.5, 3, 200, dtype=dtype)
    o, d, e = unset(12, 200, dtype=dtype), x.double(), y.double()
    want = torch.stack(
        [d.tanh(), d**e, torch.atan2(d, e), d.expm1(), d.log1p(), torch.fmod(d, e), d.round(),
         (x / 8).double().acos(), d.cosh(), torch.hypot(d, e), d.trunc() * e.round(),
         (x / 8).double().tan()]
    )  # fmt: skip
    return Launch((1,), (x, y, o, 200, 256), expect=((o, want, 4e-6 if dtype == F32 else 1e-13),))


@case("elementwise.py:accurate")
def accurate(rng, arch):
    x, y = uniform(rng, 1e-30, 1e30, 200), uniform(rng, 1e-6, 1e6, 200)
    o = unset(400)
    want = torch.cat([x.double().sqrt().float(), (x.double() / y.double()).float()])
    return Launch((1,), (x, y, o, 200, 256), expect=((o, want, 0),))


@case("elementwise.py:doubles")
def doubles(rng, arch):
    x, y, o = (normal(rng, 128).double() * 100 for _ in range(3))
    o = unset(6, 128, dtype=F64)
    want = torch.stack(
        [x / y, x.abs().sqrt(), x * y + x, torch.where(x < y, x.floor(), y.ceil()),
         torch.maximum(x, y) - torch.minimum(x, y), x.trunc() + y.float().double()]
    )  # fmt: skip
    return Launch((1,), (x, y, o, 128), expect=((o, want, 3e-11),))


@case("elementwise.py:halves", F16, BF16)
def halves(rng, arch, dtype):
    x, y = normal(rng, 256, dtype=dtype), normal(rng, 256, dtype=dtype)
    o, d, e = unset(6, 256, dtype=dtype), x.double(), y.double()
    want = torch.stack(
        [d + e, d * e - d, torch.maximum(d, e), torch.where(d > e, d, -e), d * e + d,
         d.clamp(-1, 1)]
    ).to(dtype)  # fmt: skip
    return Launch((1,), (x, y, o, 256), expect=((o, want, 3e-2 if dtype == BF16 else 4e-3),))


#: Values whose conversion is special: zeros, ties, denormals, overflow, infinities.
SPECIAL = [0.0, -0.0, 1.0, -1.5, 2**-14, 2**-16, 2**-24, 6e-8, 65504.0, 65519.0, 448.0, 240.0,
           57344.0, 1.0625, 1.1875, 3.0 + 2**-9, 0.001, -0.002]  # fmt: skip


@case(
    "elementwise.py:convert",
    *((F32, dtype) for dtype in (F16, BF16, *F8)),
    *((dtype, F32) for dtype in (F16, BF16, *F8)),
    *((F16, dtype) for dtype in F8),
    *((dtype, BF16) for dtype in F8[:3]),
    (F64, F32),
    (F32, F64),
)
def convert(rng, arch, source, target):
    x = torch.cat([torch.tensor(SPECIAL), normal(rng, 300), normal(rng, 300) * 1e-3]).double()
    # Beyond the largest value compilers differ: saturated, infinite or not a number.
    limit = min(torch.finfo(source).max, torch.finfo(target).max)
    x = x.clamp(-limit, limit).to(source)
    n = x.numel()
    o = unset(n, dtype=target)
    want = x.float().to(target) if F64 not in (source, target) else x.to(target)
    return Launch((1,), (x, o, n, 1024), expect=((o.view(n), want, 0),))


# Triton 3.7 takes this format for its OCP namesake on gfx950.
@case("elementwise.py:convert", since=(3, 9))
def convert_e5m2fnuz_to_bf16(rng, arch):
    return convert(rng, arch, F8[3], BF16)


@case(
    "elementwise.py:convert",
    *((F32, dtype) for dtype in (torch.int32, torch.int8, torch.int64, torch.uint8)),
    *((dtype, F32) for dtype in (torch.int32, torch.int8, torch.int64, torch.uint32)),
    (torch.int32, F16),
    (torch.int16, torch.int64),
    (torch.int64, torch.int8),
    (torch.int64, F64),
    (F64, torch.int64),
)
def convert_integers(rng, arch, source, target):
    x = integers(rng, 0, 120, 300, dtype=torch.int64) * (1 if source.itemsize == 1 else 17) % 127
    x = (x if target == torch.uint8 or not source.is_signed else x - 60).to(source)
    o = unset(300, dtype=torch.float32 if target.is_floating_point else torch.int32).to(target)
    return Launch((1,), (x, o, 300, 512), expect=((o, x.to(target), 0),))


def philox(seed: int, counter: int) -> tuple[int, int, int, int]:
    """Philox 4x32-10, written from Salmon et al., Parallel Random Numbers (SC 2011)."""
    c0, c1, c2, c3 = counter & 0xFFFFFFFF, 0, 0, 0
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@case("elementwise.py:random_numbers")
def random_numbers(rng, arch):
    seed, n = int(integers(rng, 0, 2**31, 1)), 300
    o, u, g = unset(n, dtype=torch.int32), unset(n), unset(n)
    words = torch.tensor([philox(seed, i)[:2] for i in range(n)])
    signed = torch.where(words >= 2**31, words - 2**32, words)
    # Bits of a signed integer fold to a positive one, which is scaled to [0, 1).
    folded = torch.where(signed < 0, -signed - 1, signed).double() * 4.6566127342e-10
    r = (-2 * folded[:, 0].clamp(min=1e-7).log()).sqrt()
    gauss = r * (folded[:, 1] * 2 * math.pi).cos()
    return Launch(
        (2,),
        (o, u, g, seed, n, 256),
        expect=((o, signed[:, 0].int(), 0), (u, folded[:, 0], 1e-6), (g, gauss, 1e-4)),
    )


@case("elementwise.py:collatz")
def collatz(rng, arch):
    x = integers(rng, 1, 1000, 8)
    o, want = unset(8, 64, dtype=torch.int32), []
    for value in x.tolist():
        steps = 0
        while value != 1:
            value, steps = (value // 2 if value % 2 == 0 else 3 * value + 1), steps + 1
        want.append(steps)
    want = torch.tensor(want, dtype=torch.int32)[:, None].expand(8, 64)
    return Launch((8,), (x, o, 64), expect=((o, want, 0),))


@case("elementwise.py:activations", F16, BF16)
def activations(rng, arch, dtype):
    x, o = normal(rng, 200, dtype=dtype) * 3, unset(3, 200)
    d = x.double()
    functional = torch.nn.functional
    want = torch.stack([functional.silu(d), functional.gelu(d), d.clamp(-1, 1)])
    return Launch((1,), (x, o, 200, 256), expect=((o, want, 3e-6),))


@case("elementwise.py:bits")
def bits(rng, arch):
    x, o = normal(rng, 128) * 50, unset(256, dtype=torch.int32)
    want = torch.cat([x.view(torch.int32) >> 23 & 255, (-x).int()])
    return Launch((1,), (x, o, 128), expect=((o, want, 0),))


@case("elementwise.py:inline_assembly")
def inline_assembly(rng, arch):
    a, b = integers(rng, 0, 2**31, 64), integers(rng, 0, 2**31, 64)
    a_bytes = [value.to_bytes(4, "little") for value in a.tolist()]
    b_bytes = [value.to_bytes(4, "little") for value in b.tolist()]
    # Selectors 0..3 name bytes of the second source, 4..7 of the first.
    mixed = [
        bytes([(y + x)[s] for s in (0, 5, 2, 7)]) for x, y in zip(a_bytes, b_bytes, strict=True)
    ]
    sums = [
        5 + sum(abs(p - q) for p, q in zip(x, y, strict=True))
        for x, y in zip(a_bytes, b_bytes, strict=True)
    ]
    want = [int.from_bytes(value, "little", signed=True) for value in mixed] + sums
    o = unset(128, dtype=torch.int32)
    return Launch((1,), (a, b, o, 64), expect=((o, torch.tensor(want).int(), 0),))
