"""What holds for every op of the package: strides honoured or refused by name, empty batches."""

from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo.testing

import mla_fusions
from mla_core import LayoutError
from mla_core.testing.assertions import relative_l2
from mla_core.testing.poison import poison_

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_or_refusal(it):
    """Return an example's results, or the message that refuses it."""
    try:
        return it.run(), ""
    except LayoutError as exc:
        return [], str(exc)


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


def test_there_is_an_example_of_every_op(example_names):
    assert {name.split()[0] for name in example_names} == {*mla_fusions.__all__} - {"__version__"}


def test_what_an_example_writes_does_not_stay_poisoned(example, poisoned_empty):
    it = example(DEVICE)
    it.reset()
    before = [as_bytes(tensor).clone() for tensor in it.written]
    results = it.run()
    assert results
    assert not any(torch.equal(as_bytes(a), b) for a, b in zip(it.written, before, strict=True))
    for tensor in results[: len(results) - len(it.written)]:
        if not any(tensor.data_ptr() == other.data_ptr() for other in it.written):
            assert not tensor.float().isnan().any()


def spread(tensor):
    """Return the same numbers with a poisoned one between two of them."""
    wide = torch.stack((tensor, poison_(torch.empty_like(tensor))), -1)
    return wide[..., 0], wide[..., 1]


def sliced(tensor):
    """Return the same numbers in rows that are wider."""
    wide = poison_(torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 16, dtype=tensor.dtype))
    wide = wide.to(tensor.device)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]], wide[..., tensor.shape[-1] :]


def turned(tensor):
    """Return the same numbers, the first dimension varying fastest but for the last one."""
    if tensor.ndim < 3:
        return None
    order = [*reversed(range(tensor.ndim - 1)), tensor.ndim - 1]
    return tensor.permute(order).contiguous().permute(order), tensor.new_empty(0)


@pytest.mark.parametrize("arrange", [spread, sliced, turned])
def test_other_strides_are_right_or_refused_by_name(example, arrange, poisoned_empty):
    """Every tensor in turn; what lies between its elements stays as it is."""
    plain = example(DEVICE)
    plain.reset()
    expected = plain.run()
    for name in plain.tensors:
        other = example(DEVICE)
        arranged = arrange(other.args[name])
        if arranged is None or arranged[0].numel() < 2:
            continue
        changed, gaps = arranged
        before, old = as_bytes(gaps).clone(), other.args[name]
        other.written = tuple(changed if each is old else each for each in other.written)
        other.args[name] = changed
        other.reset()
        poison_(gaps)
        results, refusal = run_or_refusal(other)
        if refusal:
            assert re.search(rf"\b{name} must ", refusal)
            continue
        assert torch.equal(as_bytes(gaps), before), name
        for ours, theirs in zip(results, expected, strict=True):
            if other.is_exact:
                assert torch.equal(as_bytes(ours), as_bytes(theirs)), name
            else:
                ours, theirs = (each.float().nan_to_num(7.0) for each in (ours, theirs))
                assert relative_l2(ours, theirs) < 1e-2, name


def test_no_tokens(example, poisoned_empty):
    it = example(DEVICE, num_tokens=0)
    it.reset()
    before = [as_bytes(tensor).clone() for tensor in it.written]
    returned = it.run()
    for tensor, old in zip(it.written, before, strict=True):
        assert torch.equal(as_bytes(tensor), old)
    results = returned[: len(returned) - len(it.written)]
    plain = example(DEVICE).run()
    for ours, theirs in zip(results, plain, strict=False):
        assert ours.ndim == theirs.ndim
        assert ours.dtype == theirs.dtype


def test_torch_compile_calls_it_between_two_graphs(example):
    it = example(DEVICE)
    it.reset()
    expected = [as_bytes(tensor) for tensor in it.run()]

    def step(x, args):
        return x + 1, it.op(**args), x * 2

    x = torch.ones(2, device=DEVICE)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(step, backend=counter)
    for _ in range(2):
        it.reset()
        one, returned, two = compiled(x, it.args)
        assert torch.equal(one, x + 1)
        assert torch.equal(two, x * 2)
        for ours, theirs in zip(it.results(returned), expected, strict=True):
            assert torch.equal(as_bytes(ours), theirs)
    # What is before the op, and what is behind it.
    assert counter.frame_count == 2
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="are no custom ops of torch"):
        torch.compile(step, backend="eager", fullgraph=True)(x, it.args)
