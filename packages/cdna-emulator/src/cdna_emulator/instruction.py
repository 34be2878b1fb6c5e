"""Structured instructions, parsed from LLVM's text and checked against the op table.

LLVM prints an instruction as a mnemonic, operands between commas and modifiers between spaces:

    buffer_load_dwordx4 v[4:7], v1, s[8:11], 0 offen offset:16

`parse` turns that into an `Instruction`. Anything it does not know (a mnemonic, a register, a
modifier, a number of operands) is an `UnknownInstructionError` that shows address and text, so a
program that loads has been understood completely.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from cdna_emulator.disassembler import RawInstruction
from cdna_emulator.errors import UnknownInstructionError
from cdna_emulator.isa import OPS, OpSpec, Slot, Unit

#: First register number of the accumulation registers: ``a5`` is number 261 of one vector file.
AGPR_BASE = 256
#: Scalar registers by their number in machine code.
VCC, M0, EXEC = 106, 124, 126

_SCALAR_NAMES = {
    "flat_scratch": (102, 2),
    "flat_scratch_lo": (102, 1),
    "flat_scratch_hi": (103, 1),
    "xnack_mask": (104, 2),
    "xnack_mask_lo": (104, 1),
    "xnack_mask_hi": (105, 1),
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "m0": (M0, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
}
#: Sources that are neither registers nor constants, numbered for the cores.
SPECIAL = {
    "src_scc": 0,
    "src_vccz": 1,
    "src_execz": 2,
    "src_shared_base": 3,
    "src_shared_limit": 4,
    "src_private_base": 5,
    "src_private_limit": 6,
    "src_lds_direct": 7,
}
_SPECIAL_ALIASES = {"scc": "src_scc", "vccz": "src_vccz", "execz": "src_execz"}
_BANKS = {"v": 0, "a": AGPR_BASE}
_ENCODINGS = ("_e32", "_e64", "_dpp", "_sdwa", "_e64_dpp")
_RANGE = re.compile(r"(v|a|s|ttmp)(?:(\d+)|\[(\d+)(?::(\d+))?\])")
_NUMBER = re.compile(r"-?(?:0x[0-9a-f]+|\d+)")
_FLOAT = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD_MODIFIERS = _words("offen idxen lds sc0 sc1 nt glc slc scc clamp gds tfe off_hi")
_NUMBER_MODIFIERS = _words(
    "offset offset0 offset1 mul div cbsz abid blgp row_shl row_shr row_ror row_newbcast row_bcast"
    " wave_shl wave_shr wave_rol wave_ror bound_ctrl row_mask bank_mask fi bitop3 row_share"
    " row_xmask dpp8 format"
)
_LIST_MODIFIERS = _words("op_sel op_sel_hi neg_lo neg_hi quad_perm neg")
_DPP_WORDS = _words("row_mirror row_half_mirror")
_SELECTS = {
    word: value
    for value, word in enumerate(
        ("BYTE_0", "BYTE_1", "BYTE_2", "BYTE_3", "WORD_0", "WORD_1", "DWORD")
    )
}
_UNUSED = {"UNUSED_PAD": 0, "UNUSED_SEXT": 1, "UNUSED_PRESERVE": 2}
_COUNTERS = re.compile(r"(vmcnt|lgkmcnt|expcnt)\((\d+)\)")
_HWREG = re.compile(r"hwreg\((\w+)(?:, (\d+), (\d+))?\)")
_HWREGS = {"HW_REG_MODE": 1, "HW_REG_STATUS": 2, "HW_REG_TRAPSTS": 3, "HW_REG_HW_ID": 4}
_HWREGS |= {"HW_REG_XCC_ID": 20, "HW_REG_LDS_ALLOC": 6, "HW_REG_GPR_ALLOC": 5}
_GPR_IDX = re.compile(r"gpr_idx\(([A-Z0-9,]*)\)")
_GPR_IDX_BITS = {"SRC0": 1, "SRC1": 2, "SRC2": 4, "DST": 8}


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand.

    ``kind`` is ``vgpr`` (``index`` 0..511, accumulation registers from 256), ``sgpr`` (number in
    machine code), ``constant`` (``bits`` already converted to the operand's type), ``special``
    (number of `SPECIAL`), ``off`` (an absent address) or ``label`` (``bits``: address).
    ``width`` is in registers of 32 bits.
    """

    kind: str
    index: int = 0
    width: int = 1
    bits: int = 0
    neg: bool = False
    abs: bool = False
    sext: bool = False
    slot: Slot = field(default=Slot("s", "b32"))


@dataclass(frozen=True, slots=True)
class Instruction:
    """One parsed instruction; ``mnemonic`` is without its encoding suffix."""

    mnemonic: str
    encoding: str
    op: OpSpec
    operands: tuple[Operand, ...]
    modifiers: dict[str, int | tuple[int, ...]]
    address: int
    size: int
    text: str

    @property
    def is_lds_dma(self) -> bool:
        """Whether it copies from memory straight into LDS."""
        return "lds" in self.modifiers or "lds_dma" in self.op.flags

    @property
    def target(self) -> int | None:
        """Address of the instruction it may branch to."""
        for operand in self.operands:
            if operand.kind == "label":
                return operand.bits
        return None


def parse(raw: RawInstruction, arch: str) -> Instruction:
    """Parse one disassembled instruction.

    Raises
    ------
    UnknownInstructionError
        The text has a mnemonic, operand or modifier that is not known on ``arch``.
    """
    try:
        return _parse(raw, arch)
    except _Unknown as exc:
        raise UnknownInstructionError(
            f"{arch}: instruction at {raw.address:#x} `{raw.text}`: {exc}"
        ) from None


class _Unknown(Exception):
    pass


def _parse(raw: RawInstruction, arch: str) -> Instruction:
    mnemonic, _, rest = raw.text.strip().partition(" ")
    name, encoding = _split_encoding(mnemonic)
    op = OPS.get(name)
    if op is None:
        raise _Unknown(f"mnemonic {mnemonic} is not in the op table")
    for only in ("gfx942", "gfx950"):
        if only in op.flags and arch != only:
            raise _Unknown(f"{name} exists on {only} only")
    if name == "s_waitcnt":
        return Instruction(
            name, "", op, (), _wait_counters(rest), raw.address, raw.size, raw.text.strip()
        )
    texts, modifiers = _split(rest.strip(), name)
    slots = _slots(op, len(texts), modifiers)
    operands = tuple(_operand(text, slot, raw) for text, slot in zip(texts, slots, strict=True))
    if encoding == "dpp" and operands and operands[0].kind == "vgpr":
        # Lanes that DPP masks out keep what the register held.
        first = operands[0]
        kept = Slot("x", first.slot.type) if first.slot.role == "d" else first.slot
        operands = (_with_slot(first, kept), *operands[1:])
    elif modifiers.get("dst_unused") == _UNUSED["UNUSED_PRESERVE"]:
        operands = (_with_slot(operands[0], Slot("x", operands[0].slot.type)), *operands[1:])
    return Instruction(
        name, encoding, op, operands, modifiers, raw.address, raw.size, raw.text.strip()
    )


def _with_slot(operand: Operand, slot: Slot) -> Operand:
    return Operand(
        operand.kind,
        operand.index,
        operand.width,
        operand.bits,
        operand.neg,
        operand.abs,
        operand.sext,
        slot,
    )


def _split_encoding(mnemonic: str) -> tuple[str, str]:
    for suffix in _ENCODINGS:
        if mnemonic.endswith(suffix):
            return mnemonic.removesuffix(suffix), suffix[1:]
    return mnemonic, ""


def _split(rest: str, name: str) -> tuple[list[str], dict[str, int | tuple[int, ...]]]:
    """Separate operands from the modifiers that follow the last one."""
    if not rest:
        return [], {}
    parts = _top_level_commas(rest)
    last, *words = _top_level_words(parts[-1])
    texts = [*parts[:-1], last]
    # An instruction without operands begins with its modifiers.
    if len(parts) == 1 and not OPS[name].slots:
        texts, words = [], [last, *words]
    modifiers: dict[str, int | tuple[int, ...]] = {}
    for word in words:
        modifiers.update(_modifier(word))
    return texts, modifiers


def _top_level_commas(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()]


def _top_level_words(text: str) -> list[str]:
    words, depth, word = [], 0, ""
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == " " and depth == 0:
            words.append(word)
            word = ""
        else:
            word += letter
    return [part for part in [*words, word] if part]


def _modifier(word: str) -> dict[str, int | tuple[int, ...]]:
    key, colon, value = word.partition(":")
    if not colon and key in _WORD_MODIFIERS:
        return {key: 1}
    if not colon and key in _DPP_WORDS:
        return {key: 1}
    if key in _LIST_MODIFIERS and colon:
        return {key: tuple(int(item, 0) for item in value.strip("[]").split(","))}
    if key in ("dst_sel", "src0_sel", "src1_sel") and value in _SELECTS:
        return {key: _SELECTS[value]}
    if key == "dst_unused" and value in _UNUSED:
        return {key: _UNUSED[value]}
    if key == "offset" and value.startswith("swizzle("):
        return {"offset": _swizzle(value)}
    if key in _NUMBER_MODIFIERS and _NUMBER.fullmatch(value):
        return {key: int(value, 0)}
    raise _Unknown(f"modifier {word} is not known")


def _swizzle(value: str) -> int:
    """Encode a named swizzle of ``ds_swizzle_b32`` as its 16-bit pattern."""
    mode, *numbers = [part.strip() for part in value[len("swizzle(") : -1].split(",")]
    if mode == "QUAD_PERM":
        lanes = [int(number) for number in numbers]
        return 0x8000 | sum(lane << (2 * position) for position, lane in enumerate(lanes))
    if mode == "BITMASK_PERM":
        and_mask = or_mask = xor_mask = 0
        for bit, letter in enumerate(reversed(numbers[0].strip('"'))):
            and_mask |= (letter in "pi") << bit
            or_mask |= (letter == "1") << bit
            xor_mask |= (letter == "i") << bit
        return and_mask | or_mask << 5 | xor_mask << 10
    amount = int(numbers[0])
    if mode == "SWAP":
        return 0x1F | amount << 10
    if mode == "REVERSE":
        return 0x1F | (amount - 1) << 10
    if mode == "BROADCAST":
        return (0x1F & -amount) | int(numbers[1]) << 5
    raise _Unknown(f"swizzle mode {mode} is not known")


def _slots(op: OpSpec, count: int, modifiers: dict[str, int | tuple[int, ...]]) -> tuple[Slot, ...]:
    slots = op.slots
    if op.unit is Unit.BUFFER and "lds" in modifiers:
        slots = slots[1:]
    if "atomic" in op.flags and op.unit is not Unit.BUFFER and count == len(slots) - 1:
        slots = slots[1:]
    if "atomic" in op.flags and op.unit is Unit.BUFFER and "sc0" not in modifiers:
        slots = (Slot("s", slots[0].type), *slots[1:])
    required = [slot for slot in slots if not slot.optional]
    if len(required) <= count < len(slots):
        slots = tuple(required)[:count]
    if count != len(slots):
        raise _Unknown(f"{op.name} has {len(slots)} operands, got {count}")
    return slots


def _wait_counters(rest: str) -> dict[str, int | tuple[int, ...]]:
    found: dict[str, int | tuple[int, ...]] = {
        name: int(value) for name, value in _COUNTERS.findall(rest)
    }
    if _NUMBER.fullmatch(rest.strip()):
        value = int(rest, 0)
        found = {
            "vmcnt": value & 0xF | (value >> 14 & 3) << 4,
            "expcnt": value >> 4 & 7,
            "lgkmcnt": value >> 8 & 0xF,
        }
    if not found:
        raise _Unknown("s_waitcnt names no counter")
    return found


def _operand(text: str, slot: Slot, raw: RawInstruction) -> Operand:
    neg = abs_ = sext = False
    if text.startswith("sext(") and text.endswith(")"):
        text, sext = text[5:-1], True
    if text.startswith("neg(") and text.endswith(")"):
        text, neg = text[4:-1], True
    if text.startswith("-") and not _NUMBER.fullmatch(text) and not _FLOAT.fullmatch(text):
        text, neg = text[1:], True
    if text.startswith("|") and text.endswith("|"):
        text, abs_ = text[1:-1], True
    if text.startswith("abs(") and text.endswith(")"):
        text, abs_ = text[4:-1], True
    kind, index, width, bits = _base(text, slot, raw)
    return Operand(kind, index, width, bits, neg, abs_, sext, slot)


def _base(text: str, slot: Slot, raw: RawInstruction) -> tuple[str, int, int, int]:
    if text in ("off", "null"):
        return "off", 0, 0, 0
    if match := _RANGE.fullmatch(text):
        bank, single, first, last = match.groups()
        begin = int(single if single is not None else first)
        width = 1 if last is None else int(last) - begin + 1
        if bank in _BANKS:
            return "vgpr", _BANKS[bank] + begin, width, 0
        return "sgpr", begin + (108 if bank == "ttmp" else 0), width, 0
    if text in _SCALAR_NAMES:
        index, width = _SCALAR_NAMES[text]
        return "sgpr", index, width, 0
    name = _SPECIAL_ALIASES.get(text, text)
    if name in SPECIAL:
        return "special", SPECIAL[name], 2 if "base" in name or "limit" in name else 1, 0
    if slot.type == "label":
        if not _NUMBER.fullmatch(text):
            raise _Unknown(f"branch target {text} is not a number")
        words = int(text, 0) & 0xFFFF
        words -= (words & 0x8000) << 1
        return "label", 0, 0, raw.address + 4 + 4 * words
    if slot.type == "imm":
        return "constant", 0, 1, _immediate(text)
    return "constant", 0, _constant_width(slot.type), _constant(text, slot.type)


def _immediate(text: str) -> int:
    if match := _HWREG.fullmatch(text):
        name, offset, size = match.groups()
        if name not in _HWREGS:
            raise _Unknown(f"hardware register {name} is not known")
        return _HWREGS[name] | int(offset or 0) << 6 | (int(size or 32) - 1) << 11
    if match := _GPR_IDX.fullmatch(text):
        return sum(_GPR_IDX_BITS[word] for word in match[1].split(",") if word)
    if text.startswith("sendmsg("):
        return 0
    if _NUMBER.fullmatch(text):
        return int(text, 0) & 0xFFFFFFFF
    raise _Unknown(f"immediate {text} is not known")


def _constant_width(kind: str) -> int:
    return 2 if kind in ("f64", "b64", "i64", "u64", "mask", "pkf32") else 1


def _constant(text: str, kind: str) -> int:
    """Return the bits a constant has as an operand of this type.

    Inline floats take the operand's own format; a hexadecimal literal is 32 bits as they stand,
    the high half of an ``f64``, and extends to 64-bit integers. Inline integers are bits also for
    float operands.
    """
    wide = _constant_width(kind) == 2
    if _FLOAT.fullmatch(text):
        value = float(text)
        if kind == "f64":
            return int.from_bytes(struct.pack("<d", value), "little")
        if kind in ("f16", "u16", "i16"):
            return int.from_bytes(struct.pack("<e", value), "little")
        single = int.from_bytes(struct.pack("<f", value), "little")
        if kind == "bf16":
            return single >> 16
        if kind == "pk16":
            return int.from_bytes(struct.pack("<e", value), "little")
        return single
    if not _NUMBER.fullmatch(text):
        raise _Unknown(f"operand {text} is not known")
    value = int(text, 0)
    is_literal = "0x" in text
    if kind == "f64" and is_literal:
        return (value & 0xFFFFFFFF) << 32
    if wide:
        signed = value - (1 << 32) if is_literal and kind == "i64" and value >> 31 else value
        return signed & 0xFFFFFFFFFFFFFFFF
    return value & 0xFFFFFFFF
