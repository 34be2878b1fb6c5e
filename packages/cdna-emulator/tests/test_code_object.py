"""Code objects are taken apart rightly: what assembler and linker were told comes back."""

from __future__ import annotations

import random

import pytest

from cdna_emulator.assembler import assemble, assemble_kernels, assemble_lines
from cdna_emulator.code_object import CodeObject
from cdna_emulator.errors import CodeObjectError

ARCHS = ("gfx942", "gfx950")

#: A kernel with everything a compiler writes, and data beside it; {} is the architecture.
FULL = """
.amdgcn_target "amdgcn-amd-amdhsa--{arch}"
.amdhsa_code_object_version {version}
.text
.globl first
.p2align 8
.type first,@function
first:
  s_load_dwordx2 s[2:3], s[0:1], 0x0
  s_endpgm
.size first, . - first
.rodata
.p2align 6
.amdhsa_kernel first
  .amdhsa_group_segment_fixed_size 4096
  .amdhsa_private_segment_fixed_size 32
  .amdhsa_kernarg_size 24
  .amdhsa_user_sgpr_kernarg_segment_ptr 1
  .amdhsa_user_sgpr_count 2
  .amdhsa_next_free_vgpr 96
  .amdhsa_next_free_sgpr 40
  .amdhsa_accum_offset 64
.end_amdhsa_kernel
.data
.globl table
.type table,@object
.p2align 3
table: .quad first, 0x1122334455667788, table + 8
.size table, . - table
.bss
.globl zeros
.type zeros,@object
zeros: .zero 100
.size zeros, . - zeros
.amdgpu_metadata
amdhsa.version: [1, 2]
amdhsa.kernels:
  - .name: first
    .symbol: first.kd
    .kernarg_segment_size: 24
    .kernarg_segment_align: 16
    .group_segment_fixed_size: 4096
    .private_segment_fixed_size: 32
    .wavefront_size: 64
    .sgpr_count: 46
    .vgpr_count: 96
    .agpr_count: 32
    .vgpr_spill_count: 3
    .sgpr_spill_count: 5
    .uses_dynamic_stack: true
    .max_flat_workgroup_size: 256
    .reqd_workgroup_size: [64, 2, 1]
    .args:
      - {{.name: out, .offset: 0, .size: 8, .value_kind: global_buffer, .address_space: global}}
      - {{.name: count, .offset: 8, .size: 4, .value_kind: by_value}}
      - {{.offset: 16, .size: 4, .value_kind: hidden_block_count_x}}
.end_amdgpu_metadata
"""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("version", [5, 6])
def test_metadata_of_a_kernel(arch, version):
    code_object = CodeObject.read(assemble(FULL.format(arch=arch, version=version), arch))
    assert code_object.arch == arch
    assert code_object.code_object_version == version
    kernel = code_object.kernel()
    assert list(code_object.kernels) == ["first"]
    assert kernel == code_object.kernel("first")
    assert (kernel.name, kernel.symbol, kernel.arch) == ("first", "first.kd", arch)
    assert kernel.code_object_version == version
    assert (kernel.kernarg_size, kernel.kernarg_align) == (24, 16)
    assert (kernel.group_segment_size, kernel.private_segment_size) == (4096, 32)
    assert (kernel.vgpr_count, kernel.agpr_count, kernel.sgpr_count) == (96, 32, 46)
    assert (kernel.vgpr_spill_count, kernel.sgpr_spill_count) == (3, 5)
    assert (kernel.max_flat_workgroup_size, kernel.reqd_workgroup_size) == (256, (64, 2, 1))
    assert kernel.uses_dynamic_stack
    out, count, hidden = kernel.arguments
    assert (out.name, out.offset, out.size) == ("out", 0, 8)
    assert (out.value_kind, out.address_space) == ("global_buffer", "global")
    assert (count.name, count.offset, count.size) == ("count", 8, 4)
    assert (count.value_kind, count.address_space) == ("by_value", "")
    assert (hidden.name, hidden.offset, hidden.size) == ("", 16, 4)
    assert [argument.is_hidden for argument in kernel.arguments] == [False, False, True]
    # s_load_dwordx2 s[2:3], s[0:1], 0x0 and s_endpgm, as the CDNA3 ISA encodes them.
    assert kernel.code.hex() == "800006c000000000" + "000081bf"


def test_entries_with_and_without_preloading():
    plain = CodeObject.read(assemble_lines(["s_nop 0"], "gfx942")).kernel()
    assert plain.entry_address == plain.code_address
    assert plain.preload_entry_address is None
    wanted = {"user_sgpr_kernarg_preload_length": 2, "user_sgpr_count": 4}
    lines = ["s_nop 0"] * 64 + ["s_nop 7"]
    kernel = CodeObject.read(assemble_lines(lines, "gfx942", directives=wanted)).kernel()
    assert kernel.preload_entry_address == kernel.code_address + 256
    assert kernel.code[256:260] == bytes.fromhex("070080bf")  # s_nop 7


def test_kernels_lie_where_their_symbols_are():
    names = {f"k{i}": [f"s_nop {i}"] * (i + 1) for i in range(5)}
    code_object = CodeObject.read(assemble_kernels(names, "gfx950"))
    assert list(code_object.kernels) == list(names)
    for i, kernel in enumerate(code_object.kernels.values()):
        words = [0xBF800000 + i] * (i + 1) + [0xBF810000]
        assert kernel.code == b"".join(word.to_bytes(4, "little") for word in words)
        assert code_object.symbols[kernel.name] == (kernel.code_address, len(kernel.code))
        assert code_object.symbols[kernel.symbol] == (kernel.descriptor_address, 64)
        (segment,) = [s for s in code_object.segments if s.is_executable]
        start = kernel.code_address - segment.address
        assert segment.data[start : start + len(kernel.code)] == kernel.code
    with pytest.raises(CodeObjectError, match=r"kernel must be one of k0, k1, .*got nothing"):
        code_object.kernel("nothing")
    with pytest.raises(CodeObjectError, match="kernel must be one of"):
        code_object.kernel()


def test_a_symbol_without_size_ends_at_the_next():
    source = FULL.format(arch="gfx942", version=5).replace(".size first, . - first", "")
    tail = ".globl second\nsecond: s_nop 0\n"
    source = source.replace("  s_endpgm\n", f"  s_endpgm\n{tail}")
    assert CodeObject.read(assemble(source, "gfx942")).kernel().code.hex()[-8:] == "000081bf"


def test_loading_moves_segments_and_their_pointers():
    code_object = CodeObject.read(assemble(FULL.format(arch="gfx942", version=5), "gfx942"))
    base = 0x12_3400_0000
    table, _ = code_object.symbols["table"]
    zeros, size = code_object.symbols["zeros"]
    assert size == 100

    def read(segments, address, count):
        (segment,) = [s for s in segments if s.address <= address < s.address + len(s.data)]
        start = address - segment.address
        assert segment.is_writable
        assert not segment.is_executable
        assert start + count <= len(segment.data)
        return segment.data[start : start + count]

    loaded = code_object.load(base)
    assert [s.address - base for s in loaded] == [s.address for s in code_object.segments]
    words = [read(loaded, base + table + 8 * i, 8) for i in range(3)]
    first = code_object.kernel().code_address
    wanted = [base + first, 0x1122334455667788, base + table + 8]
    assert [int.from_bytes(word, "little") for word in words] == wanted
    assert read(loaded, base + zeros, 100) == bytes(100)
    # Constants stay where descriptors and code expect them.
    descriptor = code_object.kernel().descriptor_address
    (constants,) = [s for s in loaded if s.address <= base + descriptor < s.address + len(s.data)]
    assert not constants.is_writable


def change(data: bytes, offset: int, value: int) -> bytes:
    return data[:offset] + bytes([value]) + data[offset + 1 :]


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, 0, r"content must be a well-formed ELF file"),
        (18, 62, r"machine must be AMDGPU, got EM_X86_64"),
        (7, 0, r"OS ABI must be 64 \(HSA\), got 0"),
        (8, 2, r"code object version must be 5 or 6 .*got ABI version 2"),
        (16, 1, r"type must be ET_DYN .*got ET_REL; link it"),
        (48, 0x3F, r"architecture must be gfx942 or gfx950, got machine 0x3f"),
    ],
)
def test_a_wrong_header_is_named(offset, value, message):
    data = assemble_lines(["s_nop 0"], "gfx942")
    with pytest.raises(CodeObjectError, match=message):
        CodeObject.read(change(data, offset, value))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"first.kd", b"third.kd", r"symbol first\.kd must be defined|symbol third\.kd must be"),
        (b".vgpr_count", b".vgpr_cuont", r"metadata of kernel first must have \.vgpr_count"),
        (b"amdhsa.kernels", b"amdhsa.kennels", r"metadata note must be msgpack"),
        (b"AMDGPU\0", b"AMDGPV\0", r"metadata note .* must be there, got none"),
    ],
)
def test_wrong_metadata_is_named(before, after, message):
    data = assemble(FULL.format(arch="gfx942", version=5), "gfx942")
    assert before in data
    with pytest.raises(CodeObjectError, match=message):
        CodeObject.read(data.replace(before, after, 1))


def test_unresolved_symbols_are_refused():
    source = FULL.format(arch="gfx942", version=5).replace("table + 8", "elsewhere")
    with pytest.raises(CodeObjectError, match=r"pointers into the object itself.*elsewhere"):
        CodeObject.read(assemble(source, "gfx942"))


def test_damaged_files_are_errors_of_ours(seed):
    rng = random.Random(seed)
    data = assemble(FULL.format(arch="gfx950", version=6), "gfx950")
    refused = 0
    for turn in range(300):
        damaged = bytearray(data)
        if turn % 3 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(damaged) if turn % 3 == 1 else 64)] = rng.randrange(256)
        try:
            CodeObject.read(bytes(damaged))
        except CodeObjectError:
            refused += 1
    assert refused > 100


def test_files_are_read_and_named(tmp_path):
    path = tmp_path / "kernel.co"
    path.write_bytes(assemble_lines(["s_nop 0"], "gfx942"))
    assert CodeObject.read(path) == CodeObject.read(str(path)) == CodeObject.read(path.read_bytes())
    path.write_bytes(b"text")
    with pytest.raises(CodeObjectError, match=r"kernel\.co: content must be a well-formed ELF"):
        CodeObject.read(path)
    with pytest.raises(CodeObjectError, match=r"missing\.co: file must be readable"):
        CodeObject.read(tmp_path / "missing.co")
