"""What a code object holds: kernels with their arguments, and segments of the loaded image."""

from __future__ import annotations

from dataclasses import dataclass, field

from cdna_emulator.kernel_descriptor import KernelDescriptor

#: Firmware that preloads kernel arguments enters a kernel this far behind its entry.
PRELOAD_PROLOGUE_BYTES = 256


@dataclass(frozen=True, slots=True)
class KernelArgument:
    """One entry of a kernel's argument block, as its metadata declares it.

    Parameters
    ----------
    name : str
        Empty where the metadata has none, as for hidden arguments.
    offset, size : int
        In bytes, within the argument block.
    value_kind : str
        ``global_buffer``, ``by_value``, ``hidden_block_count_x``, ...
    address_space : str
        Of what a pointer points to; empty when it is no pointer.
    """

    name: str
    offset: int
    size: int
    value_kind: str
    address_space: str = ""

    @property
    def is_hidden(self) -> bool:
        """Whether the runtime fills it in, not the caller."""
        return self.value_kind.startswith("hidden_")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the loaded image.

    Parameters
    ----------
    address : int
        Where it lies.
    data : bytes
        As long as its memory, zeros behind what the file holds.
    is_executable, is_writable : bool
        What the program header asks for.
    """

    address: int
    data: bytes
    is_executable: bool
    is_writable: bool


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of a code object.

    Counts are what the metadata says; `KernelDescriptor` has what hardware allocates.

    Parameters
    ----------
    name : str
        What callers launch it by.
    symbol : str
        Of its descriptor, ``<name>.kd``.
    code : bytes
        Machine code from the entry to the end of the kernel's symbol.
    code_address : int
        Of the first byte of ``code``, within the unrelocated image.
    vgpr_count : int
        Architectural and accumulation registers together.
    reqd_workgroup_size : (int, int, int) or None
        The only work-group size it may be launched with.
    """

    name: str
    symbol: str
    arch: str
    code_object_version: int
    code: bytes = field(repr=False)
    code_address: int
    descriptor: KernelDescriptor
    descriptor_address: int
    arguments: tuple[KernelArgument, ...]
    kernarg_size: int
    kernarg_align: int
    group_segment_size: int
    private_segment_size: int
    vgpr_count: int
    agpr_count: int
    sgpr_count: int
    vgpr_spill_count: int
    sgpr_spill_count: int
    max_flat_workgroup_size: int
    reqd_workgroup_size: tuple[int, int, int] | None
    uses_dynamic_stack: bool

    @property
    def entry_address(self) -> int:
        """Where firmware that does not preload arguments enters."""
        return self.code_address

    @property
    def preload_entry_address(self) -> int | None:
        """Where firmware that preloads arguments enters; None when the kernel asks for none."""
        if not self.descriptor.kernarg_preload_length:
            return None
        return self.code_address + PRELOAD_PROLOGUE_BYTES
