"""The 64-byte kernel descriptor: what hardware sets up before a kernel's first instruction.

Field positions are those of *Kernel Descriptor* and *compute_pgm_rsrc1..3 for GFX6-GFX12* in the
LLVM documentation *User Guide for AMDGPU Backend*, as they hold for gfx942 and gfx950.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cdna_emulator.errors import CodeObjectError

DESCRIPTOR_BYTES = 64
_LAYOUT = struct.Struct("<3I4xq20x3IHH4x")
_VGPR_GRANULE = 8
_SGPR_GRANULE = 16


def _bits(word: int, low: int, width: int = 1) -> int:
    """Return ``width`` bits of a word, from bit ``low`` up."""
    return word >> low & (1 << width) - 1


@dataclass(frozen=True, slots=True)
class KernelDescriptor:
    """A kernel descriptor, field by field.

    Parameters
    ----------
    group_segment_size, private_segment_size : int
        Bytes of LDS for each workgroup, and of scratch for each work-item.
    kernarg_size : int
        Bytes of the argument block; 0 is allowed for kernels that do not say.
    entry_offset : int
        From the descriptor to the kernel's entry.
    vgpr_count : int
        Vector registers allocated to each lane: architectural and accumulation together.
    accum_offset : int
        Number of architectural vector registers; accumulation registers are the rest.
    sgpr_count : int
        Scalar registers allocated, VCC and others included.
    round_mode_32, round_mode_16_64 : int
        0 nearest even, 1 up, 2 down, 3 to zero.
    denorm_mode_32, denorm_mode_16_64 : int
        Bit 0 keeps denormal inputs, bit 1 denormal results.
    dx10_clamp, ieee_mode, fp16_overflow : bool
        Initial bits of the MODE register.
    user_sgpr_count : int
        Registers initialised before the workgroup ids.
    workitem_id_mode : int
        0 gives x alone, 1 x and y, 2 all three, packed into v0 in ten bits each.
    tg_split : bool
        Waves of a workgroup may run on different compute units; LDS is then not available.
    kernarg_preload_length, kernarg_preload_offset : int
        In dwords: how much of the argument block is preloaded to registers, and from where.
    """

    group_segment_size: int
    private_segment_size: int
    kernarg_size: int
    entry_offset: int
    # compute_pgm_rsrc1
    vgpr_count: int
    sgpr_count: int
    round_mode_32: int
    round_mode_16_64: int
    denorm_mode_32: int
    denorm_mode_16_64: int
    dx10_clamp: bool
    ieee_mode: bool
    fp16_overflow: bool
    # compute_pgm_rsrc2
    enable_private_segment: bool
    user_sgpr_count: int
    enable_workgroup_id_x: bool
    enable_workgroup_id_y: bool
    enable_workgroup_id_z: bool
    enable_workgroup_info: bool
    workitem_id_mode: int
    # compute_pgm_rsrc3
    accum_offset: int
    tg_split: bool
    # kernel_code_properties
    enable_private_segment_buffer: bool
    enable_dispatch_ptr: bool
    enable_queue_ptr: bool
    enable_kernarg_segment_ptr: bool
    enable_dispatch_id: bool
    enable_flat_scratch_init: bool
    enable_private_segment_size: bool
    uses_dynamic_stack: bool
    kernarg_preload_length: int
    kernarg_preload_offset: int

    @classmethod
    def parse(cls, data: bytes, where: str = "kernel descriptor") -> KernelDescriptor:
        """Read a descriptor; ``where`` names it in messages."""
        if len(data) != DESCRIPTOR_BYTES:
            raise CodeObjectError(
                f"{where}: size must be {DESCRIPTOR_BYTES}, got {len(data)} bytes"
            )
        group, private, kernarg, entry, rsrc3, rsrc1, rsrc2, properties, preload = _LAYOUT.unpack(
            data
        )
        if _bits(properties, 10):
            raise CodeObjectError(
                f"{where}: wavefront size must be 64, got 32; compile for gfx942 or gfx950"
            )
        return cls(
            group_segment_size=group,
            private_segment_size=private,
            kernarg_size=kernarg,
            entry_offset=entry,
            vgpr_count=(_bits(rsrc1, 0, 6) + 1) * _VGPR_GRANULE,
            # Granules of eight are counted, though they are allocated in pairs.
            sgpr_count=(_bits(rsrc1, 6, 4) // 2 + 1) * _SGPR_GRANULE,
            round_mode_32=_bits(rsrc1, 12, 2),
            round_mode_16_64=_bits(rsrc1, 14, 2),
            denorm_mode_32=_bits(rsrc1, 16, 2),
            denorm_mode_16_64=_bits(rsrc1, 18, 2),
            dx10_clamp=bool(_bits(rsrc1, 21)),
            ieee_mode=bool(_bits(rsrc1, 23)),
            fp16_overflow=bool(_bits(rsrc1, 26)),
            enable_private_segment=bool(_bits(rsrc2, 0)),
            user_sgpr_count=_bits(rsrc2, 1, 5),
            enable_workgroup_id_x=bool(_bits(rsrc2, 7)),
            enable_workgroup_id_y=bool(_bits(rsrc2, 8)),
            enable_workgroup_id_z=bool(_bits(rsrc2, 9)),
            enable_workgroup_info=bool(_bits(rsrc2, 10)),
            workitem_id_mode=_bits(rsrc2, 11, 2),
            accum_offset=(_bits(rsrc3, 0, 6) + 1) * 4,
            tg_split=bool(_bits(rsrc3, 16)),
            enable_private_segment_buffer=bool(_bits(properties, 0)),
            enable_dispatch_ptr=bool(_bits(properties, 1)),
            enable_queue_ptr=bool(_bits(properties, 2)),
            enable_kernarg_segment_ptr=bool(_bits(properties, 3)),
            enable_dispatch_id=bool(_bits(properties, 4)),
            enable_flat_scratch_init=bool(_bits(properties, 5)),
            enable_private_segment_size=bool(_bits(properties, 6)),
            uses_dynamic_stack=bool(_bits(properties, 11)),
            kernarg_preload_length=_bits(preload, 0, 7),
            kernarg_preload_offset=_bits(preload, 7, 9),
        )

    def initial_sgprs(self) -> dict[str, tuple[int, int]]:
        """Return first register and number of registers of each value set up at entry.

        User registers come first, in the fixed order of the ABI, each where its predecessors end;
        preloaded arguments fill the user registers from there; workgroup ids follow behind all
        user registers.
        """
        user = {
            "private_segment_buffer": 4 * self.enable_private_segment_buffer,
            "dispatch_ptr": 2 * self.enable_dispatch_ptr,
            "queue_ptr": 2 * self.enable_queue_ptr,
            "kernarg_segment_ptr": 2 * self.enable_kernarg_segment_ptr,
            "dispatch_id": 2 * self.enable_dispatch_id,
            "flat_scratch_init": 2 * self.enable_flat_scratch_init,
            "private_segment_size": 1 * self.enable_private_segment_size,
            "kernarg_preload": self.kernarg_preload_length,
        }
        system = {
            "workgroup_id_x": int(self.enable_workgroup_id_x),
            "workgroup_id_y": int(self.enable_workgroup_id_y),
            "workgroup_id_z": int(self.enable_workgroup_id_z),
            "workgroup_info": int(self.enable_workgroup_info),
        }
        placed: dict[str, tuple[int, int]] = {}
        for first, values in ((0, user), (self.user_sgpr_count, system)):
            for name, count in values.items():
                if count:
                    placed[name] = (first, count)
                    first += count
        return placed
