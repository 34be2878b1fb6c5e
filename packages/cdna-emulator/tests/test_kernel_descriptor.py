"""Kernel descriptors say what the assembler was told, field by field."""

from __future__ import annotations

import pytest

from cdna_emulator.assembler import assemble_lines
from cdna_emulator.code_object import CodeObject
from cdna_emulator.errors import CodeObjectError
from cdna_emulator.kernel_descriptor import KernelDescriptor


@pytest.mark.parametrize(
    ("directives", "fields"),
    [
        ({"group_segment_fixed_size": 65536}, {"group_segment_size": 65536}),
        (
            {"private_segment_fixed_size": 48, "enable_private_segment": 1},
            {"private_segment_size": 48, "enable_private_segment": True},
        ),
        ({"kernarg_size": 168}, {"kernarg_size": 168}),
        ({"next_free_vgpr": 1, "accum_offset": 4}, {"vgpr_count": 8, "accum_offset": 4}),
        ({"next_free_vgpr": 129, "accum_offset": 128}, {"vgpr_count": 136, "accum_offset": 128}),
        ({"next_free_sgpr": 10}, {"sgpr_count": 16}),
        ({"next_free_sgpr": 11}, {"sgpr_count": 32}),  # six more are reserved
        ({"float_round_mode_32": 2}, {"round_mode_32": 2, "round_mode_16_64": 0}),
        ({"float_round_mode_16_64": 3}, {"round_mode_32": 0, "round_mode_16_64": 3}),
        ({"float_denorm_mode_32": 1}, {"denorm_mode_32": 1, "denorm_mode_16_64": 3}),
        ({"float_denorm_mode_16_64": 2}, {"denorm_mode_32": 3, "denorm_mode_16_64": 2}),
        ({"dx10_clamp": 0}, {"dx10_clamp": False, "ieee_mode": True}),
        ({"ieee_mode": 0}, {"dx10_clamp": True, "ieee_mode": False}),
        ({"fp16_overflow": 1}, {"fp16_overflow": True}),
        ({"tg_split": 1}, {"tg_split": True}),
        ({"system_sgpr_workgroup_id_x": 0}, {"enable_workgroup_id_x": False}),
        ({"system_sgpr_workgroup_id_y": 0}, {"enable_workgroup_id_y": False}),
        ({"system_sgpr_workgroup_id_z": 0}, {"enable_workgroup_id_z": False}),
        ({"system_sgpr_workgroup_info": 1}, {"enable_workgroup_info": True}),
        ({"system_vgpr_workitem_id": 1}, {"workitem_id_mode": 1}),
        ({"uses_dynamic_stack": 1}, {"uses_dynamic_stack": True}),
        (
            {"user_sgpr_dispatch_ptr": 1, "user_sgpr_queue_ptr": 1, "user_sgpr_count": 6},
            {"enable_dispatch_ptr": True, "enable_queue_ptr": True, "user_sgpr_count": 6},
        ),
        (
            {"user_sgpr_kernarg_segment_ptr": 0, "user_sgpr_count": 0},
            {"enable_kernarg_segment_ptr": False, "user_sgpr_count": 0},
        ),
        (
            {"user_sgpr_dispatch_id": 1, "user_sgpr_count": 4},
            {"enable_dispatch_id": True, "user_sgpr_count": 4},
        ),
        (
            {"user_sgpr_private_segment_size": 1, "user_sgpr_count": 3},
            {"enable_private_segment_size": True, "user_sgpr_count": 3},
        ),
        (
            {
                "user_sgpr_kernarg_preload_length": 7,
                "user_sgpr_kernarg_preload_offset": 3,
                "user_sgpr_count": 9,
            },
            {"kernarg_preload_length": 7, "kernarg_preload_offset": 3, "user_sgpr_count": 9},
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_descriptor_says_what_the_assembler_was_told(directives, fields):
    plain = CodeObject.read(assemble_lines(["s_nop 0"], "gfx950")).kernel().descriptor
    changed = CodeObject.read(assemble_lines(["s_nop 0"], "gfx950", directives=directives))
    found = changed.kernel().descriptor
    assert {name: getattr(found, name) for name in fields} == fields
    # Nothing else is read from the bits that changed.
    same = [name for name in found.__slots__ if getattr(found, name) == getattr(plain, name)]
    assert len(same) >= len(found.__slots__) - len(fields)


def test_initial_registers_follow_the_abi():
    every = {
        "user_sgpr_dispatch_ptr": 1,
        "user_sgpr_queue_ptr": 1,
        "user_sgpr_kernarg_segment_ptr": 1,
        "user_sgpr_dispatch_id": 1,
        "user_sgpr_private_segment_size": 1,
        "user_sgpr_kernarg_preload_length": 4,
        "user_sgpr_count": 13,
        "system_sgpr_workgroup_id_y": 0,
        "system_sgpr_workgroup_info": 1,
    }
    kernel = CodeObject.read(assemble_lines(["s_nop 0"], "gfx942", directives=every)).kernel()
    assert kernel.descriptor.initial_sgprs() == {
        "dispatch_ptr": (0, 2),
        "queue_ptr": (2, 2),
        "kernarg_segment_ptr": (4, 2),
        "dispatch_id": (6, 2),
        "private_segment_size": (8, 1),
        "kernarg_preload": (9, 4),
        "workgroup_id_x": (13, 1),
        "workgroup_id_z": (14, 1),
        "workgroup_info": (15, 1),
    }


def test_what_is_no_descriptor_is_refused():
    with pytest.raises(CodeObjectError, match=r"^k\.kd: size must be 64, got 63 bytes"):
        KernelDescriptor.parse(bytes(63), "k.kd")
    # Bit 10 of the code properties, which lie at byte 56.
    wave32 = bytes(57) + b"\4" + bytes(6)
    with pytest.raises(CodeObjectError, match=r"^k\.kd: wavefront size must be 64, got 32"):
        KernelDescriptor.parse(wave32, "k.kd")
