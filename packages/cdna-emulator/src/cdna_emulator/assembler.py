"""Assembly text to a code object, reproducible byte for byte, and a report of what came out.

Assembler and linker are LLVM's, from the pip package ``ziglang`` (``pip install
"cdna-emulator[assemble]"``). Sources may use everything LLVM's assembler has: ``.macro``,
``.rept``, ``.if``, ``.include``, symbols given by ``defines``.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdna_emulator.code_object import CodeObject
from cdna_emulator.disassembler import ARCHS
from cdna_emulator.errors import ToolchainError

_TARGET = "--target=amdgcn-amd-amdhsa"
#: Drops the linker's name and version, and keeps the default layout of everything else.
_LINKER_SCRIPT = "SECTIONS { /DISCARD/ : { *(.comment) } } INSERT AFTER .text;\n"


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """What one kernel of a code object takes.

    Parameters
    ----------
    vgprs, agprs, sgprs : int
        As the metadata counts them; ``vgprs`` has the accumulation registers in it.
    accum_offset : int
        Number of the first register of the vector file that is an accumulation register.
    lds_bytes, scratch_bytes : int
        For each workgroup, and for each work-item.
    spills : int
        Vector and scalar registers spilled.
    code_bytes, kernarg_bytes : int
        Size of the machine code and of the argument block.
    """

    kernel: str
    vgprs: int
    agprs: int
    sgprs: int
    accum_offset: int
    lds_bytes: int
    scratch_bytes: int
    spills: int
    code_bytes: int
    kernarg_bytes: int


def assemble(
    source: str | Path,
    arch: str,
    *,
    defines: Mapping[str, int] | None = None,
    include_dirs: Sequence[str | Path] = (),
    debug: bool = False,
) -> bytes:
    """Assemble and link one source.

    Parameters
    ----------
    source : str or Path
        The text itself, or the file that holds it; a file's own folder is searched for includes.
    arch : str
        ``gfx942`` or ``gfx950``.
    defines : mapping of str to int
        Symbols that the source may test, as by ``.if NAME == 1``.
    include_dirs : sequence of path
        Searched for ``.include`` and ``.incbin``.
    debug : bool
        Keep symbols and line numbers of the source, so that findings name its lines. The bytes
        then depend on where the source lies.

    Returns
    -------
    bytes
        The code object. Equal sources give equal bytes, wherever they lie, unless ``debug``.

    Raises
    ------
    ToolchainError : the source is not accepted; the message is the assembler's, with its lines
    """
    if arch not in ARCHS:
        raise ToolchainError(f"assemble: arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    if importlib.util.find_spec("ziglang") is None:
        raise ToolchainError(
            'assemble: ziglang must be installed; run `pip install "cdna-emulator[assemble]"`'
        )
    with tempfile.TemporaryDirectory(prefix="cdna-assemble-") as folder:
        place = Path(folder)
        if isinstance(source, Path):
            path = source
        else:
            path = place / "source.s"
            path.write_text(source)
        script, compiled, linked = place / "link.ld", place / "object.o", place / "object.co"
        script.write_text(_LINKER_SCRIPT)
        options = [f"-Wa,-defsym,{name}={value}" for name, value in (defines or {}).items()]
        options += [f"-Wa,-I{included}" for included in (path.parent, *include_dirs)]
        _zig(
            *("clang", _TARGET, f"-mcpu={arch}", "-x", "assembler", "-Wa,--fatal-warnings"),
            *("-g" if debug else "-g0", *options, "-c", str(path), "-o", str(compiled)),
            folder=folder,
        )
        _zig(
            *("ld.lld", "-shared", "--build-id=none", "-T", str(script)),
            *([] if debug else ["--strip-all"]),
            *(str(compiled), "-o", str(linked)),
            folder=folder,
        )
        return linked.read_bytes()


def _zig(*arguments: str, folder: str) -> None:
    """Run one tool of ziglang; what it complains of becomes the error, less the scratch folder."""
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.replace(f"{folder}/", "").strip()
        raise ToolchainError(f"assemble: {arguments[0]} must accept its input, got\n{reason}")


def assemble_lines(
    lines: Iterable[str], arch: str, *, name: str = "kernel", **options: Any
) -> bytes:
    """Wrap instructions into a code object with one kernel; see `assemble_kernels`."""
    return assemble_kernels({name: lines}, arch, **options)


def assemble_kernels(
    kernels: Mapping[str, Iterable[str]],
    arch: str,
    *,
    pointers: int = 0,
    group_segment_size: int = 0,
    private_segment_size: int = 0,
    directives: Mapping[str, int] | None = None,
    debug: bool = False,
) -> bytes:
    """Wrap instructions into a code object, for tests and experiments.

    A kernel finds its argument block at ``s[0:1]``, workgroup ids in ``s2``, ``s3`` and ``s4``, and
    its work-item id (x, y and z in ten bits each) in ``v0``. It has all scalar registers, 256
    architectural and 256 accumulation registers, keeps denormals, and says that it takes 1024
    work-items, more than hardware has registers for. ``s_endpgm`` is added after the last line.

    Parameters
    ----------
    kernels : mapping of str to iterable of str
        Instructions, labels and directives of each kernel, by its name. Labels are shared by all.
    arch : str
        ``gfx942`` or ``gfx950``.
    pointers : int
        Number of 8-byte global pointers in the argument block, called ``arg0``, ``arg1``, ...
    group_segment_size, private_segment_size : int
        Bytes of LDS and of scratch.
    directives : mapping of str to int
        More ``.amdhsa_`` directives without that prefix, or other values for those used here.
    debug : bool
        Keep line numbers: instructions then come from lines of a file called as their kernel.

    Returns
    -------
    bytes
        The code object.

    Raises
    ------
    ToolchainError : a line is not accepted; the message names the kernel and counts its lines
    """
    settings = {
        "group_segment_fixed_size": group_segment_size,
        "private_segment_fixed_size": private_segment_size,
        "enable_private_segment": int(private_segment_size > 0),
        "kernarg_size": 8 * pointers,
        "user_sgpr_kernarg_segment_ptr": 1,
        "user_sgpr_count": 2,
        "system_sgpr_workgroup_id_x": 1,
        "system_sgpr_workgroup_id_y": 1,
        "system_sgpr_workgroup_id_z": 1,
        "system_vgpr_workitem_id": 2,
        "float_denorm_mode_32": 3,
        "next_free_vgpr": 512,
        "next_free_sgpr": 96,  # and six that are reserved; s[0:101] exist whatever is asked for
        "accum_offset": 256,
        **(directives or {}),
    }
    source = [f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"', ".amdhsa_code_object_version 5"]
    for name, lines in kernels.items():
        source += _kernel(name, lines, settings)
    source += [".amdgpu_metadata", "amdhsa.version: [1, 2]", "amdhsa.kernels:"]
    for name in kernels:
        source += _metadata(name, pointers, settings)
    source += [".end_amdgpu_metadata"]
    return assemble("\n".join(source) + "\n", arch, debug=debug)


def _kernel(name: str, lines: Iterable[str], settings: Mapping[str, int]) -> list[str]:
    """Return the source of one kernel and its descriptor."""
    return [
        ".text",
        f".globl {name}",
        ".p2align 8",
        f".type {name},@function",
        f"{name}:",
        f'# 1 "{name}"',  # lines count from here in messages
        *lines,
        f'# 1 "directives of {name}"',
        "s_endpgm",
        f".size {name}, . - {name}",
        ".rodata",
        ".p2align 6",
        f".amdhsa_kernel {name}",
        *(f"  .amdhsa_{key} {value}" for key, value in settings.items()),
        ".end_amdhsa_kernel",
    ]


def _metadata(name: str, pointers: int, settings: Mapping[str, int]) -> list[str]:
    """Return the metadata of one kernel."""
    registers = settings["next_free_vgpr"]
    values = {
        "kernarg_segment_size": 8 * pointers,
        "kernarg_segment_align": 8,
        "group_segment_fixed_size": settings["group_segment_fixed_size"],
        "private_segment_fixed_size": settings["private_segment_fixed_size"],
        "wavefront_size": 64,
        "sgpr_count": settings["next_free_sgpr"],
        "vgpr_count": registers,
        "agpr_count": max(0, registers - settings["accum_offset"]),
        "max_flat_workgroup_size": 1024,
    }
    return [
        f"  - .name: {name}",
        f"    .symbol: {name}.kd",
        *(f"    .{key}: {value}" for key, value in values.items()),
        *(["    .args:"] if pointers else []),
        *(
            f"      - {{.name: arg{i}, .offset: {8 * i}, .size: 8, .value_kind: global_buffer, "
            ".address_space: global}"
            for i in range(pointers)
        ),
    ]


def object_report(code_object: CodeObject | bytes | str | Path) -> list[ObjectRow]:
    """List what each kernel of a code object takes, in the object's order."""
    if not isinstance(code_object, CodeObject):
        code_object = CodeObject.read(code_object)
    return [
        ObjectRow(
            kernel=kernel.name,
            vgprs=kernel.vgpr_count,
            agprs=kernel.agpr_count,
            sgprs=kernel.sgpr_count,
            accum_offset=kernel.descriptor.accum_offset,
            lds_bytes=kernel.group_segment_size,
            scratch_bytes=kernel.private_segment_size,
            spills=kernel.vgpr_spill_count + kernel.sgpr_spill_count,
            code_bytes=len(kernel.code),
            kernarg_bytes=kernel.kernarg_size,
        )
        for kernel in code_object.kernels.values()
    ]
