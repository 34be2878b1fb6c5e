"""What only a GPU shows of every op: replays in a CUDA graph, another GPU, rows far apart."""

from __future__ import annotations

import re

import pytest
import torch

from mla_core import LayoutError
from mla_core.testing.assertions import relative_l2
from mla_core.testing.poison import poison_
from mla_core.testing.sync import no_sync

pytestmark = pytest.mark.gpu


def run_or_refusal(it):
    """Return an example's results, or the message that refuses it."""
    try:
        return it.run(), ""
    except LayoutError as exc:
        return [], str(exc)


def as_bytes(tensor):
    return tensor.cpu().contiguous().view(torch.uint8)


def test_replays_follow_changed_inputs(example):
    """Capture once, then change every input in place and replay: the bits of an eager call."""
    it = example("cuda", seed=1)
    it.reset()
    it.run()
    with no_sync():
        it.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = it.run()
    before = None
    for seed in (2, 3, 4):
        other = example("cuda", seed=seed)
        for name, tensor in it.inputs.items():
            tensor.copy_(other.inputs[name])
        for tensor in captured:
            poison_(tensor)
        it.reset()
        graph.replay()
        got = [as_bytes(tensor) for tensor in captured]
        it.reset()
        expected = [as_bytes(tensor) for tensor in it.run()]
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs)
        if before is not None:
            assert not all(map(torch.equal, before, got))
        before = got


def test_calls_happen_where_the_tensors_are(example):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    here, there = example("cuda:0"), example("cuda:1")
    here.reset()
    expected = here.run()
    # The second call skips what the first one looks up.
    for _ in range(2):
        there.reset()
        got = there.run()
        assert torch.cuda.current_device() == 0
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.device == torch.device("cuda:1")
            assert torch.equal(as_bytes(ours), as_bytes(theirs))


def far(tensor):
    """Return the same numbers, the last row more than 2 ** 32 elements behind the first."""
    if tensor.ndim < 2 or tensor.shape[0] < 2 or not tensor.is_contiguous():
        return None
    stride = (2**32 // (tensor.shape[0] - 1) // 16 + 8) * 16
    memory = torch.empty(
        stride * (tensor.shape[0] - 1) + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device
    )
    poison_(memory)
    apart = memory.as_strided(tensor.shape, (stride, *tensor.stride()[1:]))
    return apart.copy_(tensor)


@pytest.mark.large
def test_rows_more_than_4_gib_apart_are_right_or_refused_by_name(example):
    plain = example("cuda")
    plain.reset()
    expected = plain.run()
    for name in plain.tensors:
        other = example("cuda")
        old = other.args[name]
        apart = far(old)
        if apart is None:
            continue
        other.written = tuple(apart if each is old else each for each in other.written)
        other.args[name] = apart
        other.reset()
        results, refusal = run_or_refusal(other)
        if refusal:
            assert re.search(rf"\b{name} must ", refusal)
            continue
        for ours, theirs in zip(results, expected, strict=True):
            if other.is_exact:
                assert torch.equal(as_bytes(ours), as_bytes(theirs)), name
            else:
                ours, theirs = (each.float().nan_to_num(7.0) for each in (ours, theirs))
                assert relative_l2(ours, theirs) < 1e-2, name
