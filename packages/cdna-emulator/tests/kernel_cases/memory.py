"""Loads, stores, atomics and what moves data between lanes."""

from __future__ import annotations

import torch

from kernel_cases.case import Launch, case, integers, normal, unset

WIDTHS = (torch.int8, torch.float16, torch.float32, torch.int64)


@case("memory.py:copy", *WIDTHS)
def copy(rng, arch, dtype):
    x = integers(rng, -100, 100, 3000).to(dtype)
    o = unset(3000, dtype=dtype)
    return Launch((3,), (x, o, 3000, 1024), expect=((o, x, 0),))


@case("memory.py:copy")
def copy_unaligned(rng, arch):
    x, o = integers(rng, -100, 100, 1000).short(), unset(1000, dtype=torch.int16)
    return Launch((1,), (x[3:], o[5:], 995, 1024), expect=((o[5:], x[3:998], 0),))


@case("memory.py:transpose", torch.float32, torch.bfloat16, torch.int8)
def transpose(rng, arch, dtype):
    x = integers(rng, -100, 100, 70, 100).to(dtype)
    o = unset(100, 70, dtype=dtype)
    return Launch((2, 2), (x, o, 70, 100, 64), expect=((o, x.T, 0),))


@case("memory.py:gather_rows")
def gather_rows(rng, arch):
    table, o = normal(rng, 20, 100, dtype=torch.bfloat16), unset(6, 100, dtype=torch.bfloat16)
    index = integers(rng, -1, 20, 6, dtype=torch.int64)
    index[2] = -1
    want = table[index.clamp(min=0)] * (index >= 0)[:, None]
    return Launch((6,), (table, index, o, 100, 128), expect=((o, want, 0),))


@case("memory.py:scatter")
def scatter(rng, arch):
    x, o = normal(rng, 256), torch.zeros(400)
    index = torch.randperm(400, generator=rng)[:256]
    index[7] = -5
    want = torch.zeros(400)
    want[index[index >= 0]] = x[index >= 0]
    return Launch((1,), (x, index, o, 256), expect=((o, want, 0),))


@case("memory.py:gather_in_tile", 16, 64)
def gather_in_tile(rng, arch, rows):
    x, o = normal(rng, rows, 16), unset(rows, 16)
    index = integers(rng, 0, rows, rows, 16)
    want = x.gather(0, index.long())
    return Launch((1,), (x, index, o, rows, 16), expect=((o, want, 0),))


@case("memory.py:shuffle", torch.float32, torch.int16)
def shuffle(rng, arch, dtype):
    x, y = (integers(rng, -100, 100, 128).to(dtype) for _ in range(2))
    o = unset(6 * 128, dtype=dtype)
    both = torch.stack([x, y], 1).flatten()
    cube = y.reshape(4, 2, 16).permute(2, 0, 1).flatten()
    return Launch((1,), (x, y, o, 128), expect=((o, torch.cat([both, x.flip(0), cube, both]), 0),))


@case("memory.py:descriptor_copy")
def descriptor_copy(rng, arch):
    x, o = normal(rng, 50, 100), unset(50, 100)
    return Launch((2, 2), (x, o, 50, 100, 32, 64), expect=((o, x + 1, 0),))


@case("memory.py:cached_copy")
def cached_copy(rng, arch):
    x, o = normal(rng, 3 * 512), unset(3 * 512)
    return Launch((1,), (x, o, 512), expect=((o, x, 0),))


@case("memory.py:spilling", num_warps=1)
def spilling(rng, arch):
    x, o = normal(rng, 32768), unset(32768)
    total = x.double()
    for turn in range(2):
        total = total * 0.5 + (x.double() * (turn + 1)).sum()
    return Launch((1,), (x, o, 32768, 2), expect=((o, total + x, 2e-3),))


@case("memory.py:stencil")
def stencil(rng, arch):
    x, o = normal(rng, 600), unset(600)
    padded = torch.nn.functional.pad(x.double(), (1, 1))
    want = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    return Launch((3,), (x, o, 600, 256), expect=((o, want, 1e-6),))


@case("memory.py:arguments", True, False)
def arguments(rng, arch, flag):
    o, byte = unset(8, dtype=torch.float64), torch.tensor([5], dtype=torch.uint8)
    value = 3 + 2**40 + 0.25
    want = torch.arange(8).double() - (value * (2 if flag else 1) + 5)
    return Launch((1,), (o, flag, 3, 2**40, 0.25, None, byte), expect=((o, want, 0),))


ADDABLE = (torch.int32, torch.int64, torch.float32, torch.float64, torch.float16, torch.bfloat16)


@case("atomics.py:atomic_add", *ADDABLE)
def atomic_add(rng, arch, dtype):
    # Small integers: sums are exact in any order and dtype.
    x, index = integers(rng, -3, 4, 700).to(dtype), integers(rng, 0, 50, 700)
    o = torch.zeros(50, dtype=dtype)
    want = torch.zeros(50, dtype=torch.float64).index_add(0, index, x.double()).to(dtype)
    return Launch((3,), (x, index, o, 700, 256), expect=((o, want, 0),))


@case(
    "atomics.py:atomic_pick",
    *(("max", dtype) for dtype in (torch.int32, torch.uint32, torch.float32, torch.int64)),
    *(("min", dtype) for dtype in (torch.int32, torch.uint32, torch.float32)),
    *((op, torch.int32) for op in ("and", "or", "xor")),
)
def atomic_pick(rng, arch, op, dtype):
    low = 0 if dtype == torch.uint32 else -(2**30)
    x = integers(rng, low, 2**30, 1000, dtype=torch.int64)
    start = {"max": low, "min": 2**30, "and": -1}.get(op, 0)
    o = torch.full((64,), start, dtype=torch.int64).to(dtype)
    combine = {"max": torch.maximum, "min": torch.minimum, "and": torch.bitwise_and}
    combine |= {"or": torch.bitwise_or, "xor": torch.bitwise_xor}
    x = x.to(torch.float32).long() if dtype == torch.float32 else x
    want = torch.full((64,), start, dtype=torch.int64)
    for begin in range(0, 1000, 64):
        row = x[begin : begin + 64]
        want[: len(row)] = combine[op](want[: len(row)], row)
    return Launch((4,), (x.to(dtype), o, 1000, op, 64, 256), expect=((o, want.to(dtype), 0),))


@case("atomics.py:atomic_ticket")
def atomic_ticket(rng, arch):
    count, seen = torch.zeros(1, dtype=torch.int32), unset(12, dtype=torch.int32)
    o = unset(12, dtype=torch.int32)
    numbers = torch.arange(12, dtype=torch.int32)
    return Launch((12,), (count, o, seen), expect=((seen, numbers + 1, 0), (count, count + 12, 0)))


# Triton 3.7 asks LLVM for an intrinsic of a wrong name.
@case("atomics.py:atomic_exchange", since=(3, 9))
def atomic_exchange(rng, arch):
    slots, o = torch.arange(256, 512, dtype=torch.int32), unset(256, dtype=torch.int32)
    return Launch(
        (1,),
        (slots, o, 256),
        expect=((o, slots.clone(), 0), (slots, torch.arange(256).int(), 0)),
    )


@case("atomics.py:spin_lock")
def spin_lock(rng, arch):
    lock, o = torch.zeros(1, dtype=torch.int32), torch.zeros(128)
    return Launch((6,), (lock, o, 128), expect=((o, torch.full((128,), 6.0), 0),))


@case("atomics.py:atomic_cas_tensor")
def atomic_cas_tensor(rng, arch):
    o = torch.arange(256, dtype=torch.int32)
    o[::3] = 1000
    old = unset(256, dtype=torch.int32)
    want = torch.where(o == torch.arange(256), -o, o)
    return Launch((1,), (o, old, 256), expect=((o, want, 0), (old, o.clone(), 0)))
