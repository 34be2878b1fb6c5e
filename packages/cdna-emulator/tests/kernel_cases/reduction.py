"""Norms, reductions, scans, sorts, histograms."""

from __future__ import annotations

import torch

from kernel_cases.case import Launch, case, integers, normal, uniform, unset


@case("reduction.py:softmax", torch.float32, torch.float16, torch.bfloat16)
def softmax(rng, arch, dtype):
    x, o = normal(rng, 3, 300, dtype=dtype), unset(3, 300, dtype=dtype)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    want = x.double().softmax(1).to(dtype)
    return Launch((3,), (x, o, 300, 512), expect=((o, want, tolerance),))


@case("reduction.py:layer_norm")
def layer_norm(rng, arch):
    x, w, b = normal(rng, 4, 700), normal(rng, 700), normal(rng, 700)
    o, mean = unset(4, 700), unset(4)
    want = torch.nn.functional.layer_norm(
        x.double(), (700,), w.double(), b.double(), eps=1e-5
    ).float()
    return Launch(
        (4,), (x, w, b, o, mean, 700, 1e-5, 256), expect=((o, want, 2e-5), (mean, x.mean(1), 1e-5))
    )


@case("reduction.py:rms_norm", torch.bfloat16, torch.float16)
def rms_norm(rng, arch, dtype):
    x, w, o = normal(rng, 4, 500, dtype=dtype), normal(rng, 500), unset(4, 500, dtype=dtype)
    want = torch.nn.functional.rms_norm(x.double(), (500,), w.double(), eps=1e-6).to(dtype)
    return Launch((4,), (x, w, o, 500, 1e-6, 512), expect=((o, want, 1e-2),))


@case("reduction.py:reduce_all", torch.float32, torch.int32, torch.int64, torch.float64)
def reduce_all(rng, arch, dtype):
    x = integers(rng, -1000, 1000, 16, 64).to(dtype)
    o = unset(3 * 16 + 3 * 64, dtype=dtype)
    parts = [f(axis) for axis in (1, 0) for f in (x.sum, x.amax, x.amin)]
    want = torch.cat([part.to(dtype) for part in parts])
    return Launch((1,), (x, o, 16, 64), expect=((o, want, 0),))


@case("reduction.py:arg_extrema", torch.float32, torch.int32)
def arg_extrema(rng, arch, dtype):
    # Few values: ties go to the first.
    x = integers(rng, -20, 20, 8, 256).to(dtype)
    o = unset(16, dtype=torch.int32)
    best = (x == x.amax(1, keepdim=True)).int(), (x == x.amin(1, keepdim=True)).int()
    want = torch.cat([found.argmax(1) for found in best]).int()
    return Launch((1,), (x, o, 8, 256), expect=((o, want, 0),))


@case("reduction.py:scan", torch.float32, torch.int32)
def scan(rng, arch, dtype):
    x = integers(rng, 1, 3, 4, 128).to(dtype) if dtype == torch.int32 else uniform(
        rng, 0.9, 1.1, 4, 128
    )  # fmt: skip
    total, product = unset(4, 128, dtype=dtype), unset(4, 128, dtype=dtype)
    wide = x.to(torch.float64 if dtype == torch.float32 else torch.int32)
    products = wide.flip(1).cumprod(1, dtype=wide.dtype).flip(1)
    sums = wide.cumsum(1, dtype=wide.dtype)
    return Launch(
        (1,),
        (x, total, product, 4, 128),
        expect=((total, sums, 1e-5), (product, products, 1e-4)),
    )


@case("reduction.py:linear_recurrence")
def linear_recurrence(rng, arch):
    a, b, o = uniform(rng, 0.5, 1, 256), normal(rng, 256), unset(256)
    want, y = [], 0.0
    for decay, value in zip(a.tolist(), b.tolist(), strict=True):
        y = decay * y + value
        want.append(y)
    return Launch((1,), (a, b, o, 256), expect=((o, torch.tensor(want), 1e-5),))


@case("reduction.py:sort_rows", (torch.float32, False), (torch.int32, True), (torch.float16, True))
def sort_rows(rng, arch, dtype, descending):
    x = integers(rng, -1000, 1000, 4, 128).to(dtype)
    o = unset(4, 128, dtype=dtype)
    want = x.sort(1, descending=descending).values
    return Launch((1,), (x, o, 4, 128, descending), expect=((o, want, 0),))


@case("reduction.py:top_k")
def top_k(rng, arch):
    x, o = normal(rng, 4, 128), unset(4, 8)
    return Launch((1,), (x, o, 4, 128, 8), expect=((o, x.topk(8, 1).values, 0),))


@case("reduction.py:histogram")
def histogram(rng, arch):
    x, o = integers(rng, 0, 32, 512), unset(32, dtype=torch.int32)
    return Launch((1,), (x, o, 512, 32), expect=((o, x.bincount(minlength=32).int(), 0),))


@case("reduction.py:reduce_bits")
def reduce_bits(rng, arch):
    x, o = integers(rng, 0, 2**31, 512), unset(3, dtype=torch.int32)
    ored = xored = 0
    for value in x.tolist():
        ored, xored = ored | value, xored ^ value
    want = torch.tensor([xored, ored, int(x.max())], dtype=torch.int32)
    return Launch((1,), (x, o, 512), expect=((o, want, 0),))
