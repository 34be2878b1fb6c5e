"""What compilers say of a kernel's resources, as they write it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mla_core.errors import BackendUnavailableError, LayoutError
from mla_core.resources import LIMITS, Resources, of_amdgcn, of_usage

AMDGCN = """
	.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     64
    .args: []
    .group_segment_fixed_size: 1024
    .private_segment_fixed_size: 8
    .sgpr_count:     106
    .sgpr_spill_count: 20
    .vgpr_count:     320
    .vgpr_spill_count: 3
...
"""
USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function decode_kernel:
  REG:255 STACK:208 SHARED:1024 LOCAL:16 CONSTANT[0]:712 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
MODEST = Resources(128, 0, 1024, 0, 0, 0, 256)


def test_amd():
    assert of_amdgcn(AMDGCN, 32768, 256) == Resources(320, 64, 33792, 8, 3, 20, 256)


def test_nvidia():
    assert of_usage(USAGE, 94208, 128) == Resources(255, 0, 94208, 224, 0, 0, 128)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (of_amdgcn, AMDGCN.replace("vgpr_spill", "spill"), r"state \.vgpr_spill_count once, got 0"),
        (of_amdgcn, AMDGCN + AMDGCN, r"state \.vgpr_count once, got 2 times"),
        (of_usage, "nothing", "cuobjdump must list one function, got 0"),
        (of_usage, USAGE + USAGE, "cuobjdump must list one function, got 2"),
    ],
    ids=["missing", "two", "none", "many"],
)
def test_another_form_is_refused(read, text, message):
    with pytest.raises(BackendUnavailableError, match=message):
        read(text, 0, 128)


def test_limits():
    assert all(not MODEST.excess(arch) for arch in LIMITS)
    greedy = Resources(600, 256, 200 * 1024, 4, 2, 9, 256)
    assert greedy.excess("gfx950") == [
        "registers of a thread: 600, at most 512",
        "registers of a work-group: 153600, at most 131072",
        "bytes of shared memory: 204800, at most 163840",
        "bytes of local memory of a thread: 4, at most 0",
        "spilled registers: 2, at most 0",
    ]
    assert replace(MODEST, shared_bytes=65537).excess("gfx942") == [
        "bytes of shared memory: 65537, at most 65536"
    ]
    with pytest.raises(LayoutError, match="arch must be one of sm90, gfx942, gfx950, got 'sm80'"):
        MODEST.excess("sm80")
