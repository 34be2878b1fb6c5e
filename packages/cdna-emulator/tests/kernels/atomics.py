"""Atomics on global memory, between lanes, waves and workgroups."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def atomic_add(x_ptr, index_ptr, o_ptr, n, BLOCK: tl.constexpr):
    """o[index[i]] += x[i]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    at = tl.load(index_ptr + i, mask=i < n)
    tl.atomic_add(o_ptr + at, x, mask=i < n)


@triton.jit
def atomic_pick(x_ptr, o_ptr, n, OP: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """o[i % BINS] = op(o[i % BINS], x[i])."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    at = o_ptr + i % BINS
    if OP == "max":
        tl.atomic_max(at, x, mask=i < n)
    elif OP == "min":
        tl.atomic_min(at, x, mask=i < n)
    elif OP == "and":
        tl.atomic_and(at, x, mask=i < n)
    elif OP == "or":
        tl.atomic_or(at, x, mask=i < n)
    else:
        tl.atomic_xor(at, x, mask=i < n)


@triton.jit
def atomic_ticket(count_ptr, o_ptr, seen_ptr):
    """Draw a ticket; the program that draws the last one sees every other's value."""
    program = tl.program_id(0)
    tl.store(seen_ptr + program, program + 1)
    ticket = tl.atomic_add(count_ptr, 1, sem="acq_rel")
    tl.store(o_ptr + ticket, program)


@triton.jit
def atomic_exchange(slot_ptr, o_ptr, BLOCK: tl.constexpr):
    """Swap values into slots; each old value comes back once."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o_ptr + i, tl.atomic_xchg(slot_ptr + tl.arange(0, BLOCK), i))


@triton.jit
def spin_lock(lock_ptr, o_ptr, BLOCK: tl.constexpr):
    """Add one to a row under a lock taken with compare-and-swap."""
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    i = tl.arange(0, BLOCK)
    tl.store(o_ptr + i, tl.load(o_ptr + i) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def atomic_cas_tensor(o_ptr, old_ptr, BLOCK: tl.constexpr):
    """Replace what equals its lane number by its negative."""
    i = tl.arange(0, BLOCK)
    tl.store(old_ptr + i, tl.atomic_cas(o_ptr + i, i, -i))
