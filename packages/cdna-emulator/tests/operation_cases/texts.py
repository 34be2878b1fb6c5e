"""Random operand texts for every instruction of the op table.

A form is a way to write an instruction: an encoding, or a combination of address operands. What
LLVM does not take is dropped later, so a form may be tried where it does not exist.
"""

from __future__ import annotations

import re

import numpy as np

from cdna_emulator.isa import OPS, OpSpec, Slot, Unit

#: Registers that hold addresses in the states of memory instructions; nothing writes them.
ADDRESS_PAIR, OFFSET, LDS_ADDRESS, INDEX_PAIR = "v[2:3]", "v4", "v5", "v[6:7]"
BASE, RESOURCE, STRUCTURED, SWIZZLED = "s[8:9]", "s[12:15]", "s[16:19]", "s[20:23]"
SCALAR_OFFSET, SCRATCH_OFFSET, SCRATCH_BASE = "s24", "v8", "s25"
_WIDTHS = {
    "f64": 2,
    "b64": 2,
    "i64": 2,
    "u64": 2,
    "pkf32": 2,
    "mask": 2,
    "b128": 4,
    "b192": 6,
    "b512": 16,
    "b1024": 32,
}
_FLOATS = ("f16", "bf16", "f32", "f64")
_INLINE = ("0.5", "1.0", "-4.0", "0.15915494", "0", "1", "-1", "-16", "64", "13")
_LITERALS = ("0x3f9d70a4", "0x80000001", "0x7f800001", "0x12345678", "0x3c00", "0xffff")
_DPP = (
    "quad_perm:[0,1,2,3]",
    "quad_perm:[3,1,0,2]",
    "row_shl:1",
    "row_shl:15",
    "row_shr:3",
    "row_ror:5",
    "row_mirror",
    "row_half_mirror",
    "row_bcast:15",
    "row_bcast:31",
    "row_newbcast:7",
    "wave_shl:1",
    "wave_rol:1",
    "wave_shr:1",
    "wave_ror:1",
)
_SELECTS = ("BYTE_0", "BYTE_1", "BYTE_2", "BYTE_3", "WORD_0", "WORD_1", "DWORD")
_UNUSED = ("UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE")
_MATRIX = re.compile(r"v_mfma_(?:scale_)?(f32|i32|f64)_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_(\w+)")


class Writer:
    """Writes random instructions.

    Parameters
    ----------
    rng : numpy.random.Generator
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def chance(self, share: float) -> bool:
        """Return true so often."""
        return bool(self.rng.random() < share)

    def pick(self, options: tuple[str, ...]) -> str:
        """Return one of some texts."""
        return options[int(self.rng.integers(len(options)))]

    def vector(self, words: int = 1, bank: str = "v", low: int = 10, high: int = 60) -> str:
        """Return vector registers; tuples begin at an even number."""
        if words == 1:
            return f"{bank}{int(self.rng.integers(low, high))}"
        first = 2 * int(self.rng.integers(low // 2, max(low // 2 + 1, high // 2)))
        return f"{bank}[{first}:{first + words - 1}]"

    def scalar(self, words: int = 1) -> str:
        """Return scalar registers aligned to their number, at most to four."""
        if words == 1:
            return self.pick((f"s{int(self.rng.integers(28, 90))}", "vcc_lo", "m0", "exec_hi"))
        step = min(words, 4)
        first = step * int(self.rng.integers(28 // step, (96 - words) // step))
        return f"s[{first}:{first + words - 1}]"

    def constant(self) -> str:
        """Return a constant that fits into the instruction's own bits."""
        return self.pick(_INLINE)

    # --- vector ALU

    def destination(self, slot: Slot, form: str) -> str:
        """Return a written operand of a vector instruction."""
        if slot.type == "mask":
            return "vcc" if form in ("e32", "dpp") else self.pick(("vcc", self.scalar(2)))
        return self.vector(_WIDTHS.get(slot.type, 1))

    def source(self, slot: Slot, form: str, which: int, state: dict[str, str]) -> str:
        """Return a read operand; ``state`` remembers the one scalar that an instruction may use."""
        words = _WIDTHS.get(slot.type, 1)
        if slot.type == "mask":
            return "vcc" if form in ("e32", "dpp", "sdwa") else self.pick(("vcc", self.scalar(2)))
        if slot.type == "imm":
            return self.pick(_LITERALS)
        plain = self.vector(words)
        if words > 4 or self.chance(0.6):
            return self._modified(plain, slot, form)
        if form == "e32" and which == 0:
            return self.pick((self.scalar(words), self.constant(), self.pick(_LITERALS), plain))
        if form in ("e64", "plain") or (form == "sdwa" and which < 2):
            if "scalar" not in state and self.chance(0.5):
                state["scalar"] = self.scalar(words)
                return self._modified(state["scalar"], slot, form)
            if form != "sdwa":
                return self.constant()
        return self._modified(plain, slot, form)

    def _modified(self, text: str, slot: Slot, form: str) -> str:
        if form == "e32" or (slot.type not in _FLOATS and form != "sdwa"):
            return text
        if slot.type not in _FLOATS:
            return f"sext({text})" if self.chance(0.3) else text
        if self.chance(0.2):
            text = f"|{text}|"
        return f"-{text}" if self.chance(0.2) else text

    def vector_alu(self, op: OpSpec, form: str) -> str:
        """Return one vector ALU instruction in a form."""
        suffix = "" if form == "plain" else f"_{form}"
        state: dict[str, str] = {}
        operands, which, floats = [], 0, False
        for slot in op.slots:
            if slot.role == "d" or (slot.role == "x" and which == 0 and not operands):
                operands.append(self.destination(slot, form))
                continue
            floats |= slot.type in _FLOATS
            if op.name.startswith("v_cvt_scalef32") and which == 0:
                # LLVM aborts on a constant here.
                operands.append(self.vector(_WIDTHS.get(slot.type, 1)))
            else:
                operands.append(self.source(slot, form, which, state))
            which += 1
        text = f"{op.name}{suffix} " + ", ".join(operands)
        # No document says which half op_sel takes of a constant.
        selects = all(operand.strip("-|")[0] in "vas" for operand in operands)
        return (text + self._modifiers(op, form, which, floats, selects)).strip()

    def _modifiers(self, op: OpSpec, form: str, count: int, floats: bool, selects: bool) -> str:
        if form == "dpp":
            return self._dpp()
        words = []
        if form == "sdwa":
            words = self._sdwa(op, count)
        packed = op.slots and op.slots[-1].type in ("pk16", "pkf32")
        if "bitop3" in op.name:
            words.append(f"bitop3:{int(self.rng.integers(256)):#x}")
        if form in ("e64", "plain"):
            if packed or ("_mix" in op.name and selects) or "dot" in op.name or "pk_" in op.name:
                keys = ["op_sel", "op_sel_hi"]
                if op.name.endswith(("_f16", "_bf16", "_f32")):
                    # Only floats are negated.
                    keys += ["neg_lo", "neg_hi"]
                words += [f"{key}:{self._bits(count)}" for key in keys if self.chance(0.3)]
                if "dot2" in op.name:
                    # Nor do documents say what these do to a third source of 32 bits.
                    words = [re.sub(r"(neg_..:.*),[01]\]", r"\1,0]", word) for word in words]
            if selects and ("16" in op.name or "8" in op.name or "fp4" in op.name):
                extra = 1 if self.chance(0.7) else 0
                if self.chance(0.4) and not any("op_sel" in word for word in words):
                    words.append(f"op_sel:{self._bits(min(4, count + extra))}")
                if "scalef32_sr" in op.name:
                    # The first two numbers choose part of a source whose use is not documented.
                    words = [re.sub(r"op_sel:.[01],[01]", "op_sel:[0,0", word) for word in words]
        if form != "e32" and "div_scale" not in op.name and self.chance(0.25):
            words.append("clamp")
        if form in ("e64", "plain", "sdwa") and floats and self.chance(0.2):
            words.append(self.pick(("mul:2", "mul:4", "div:2")))
        # LLVM wants op_sel first and clamp after it.
        words.sort(key=lambda word: not word.startswith("bitop3"))
        return "".join(f" {word}" for word in words)

    def _bits(self, count: int) -> str:
        return "[" + ",".join(str(bit) for bit in self.rng.integers(0, 2, count)) + "]"

    def _dpp(self) -> str:
        text = f" {self.pick(_DPP)}"
        rows = ("0xf", "0xf", "0xa", "0x5")
        text += f" row_mask:{self.pick(rows)} bank_mask:{self.pick(rows)}"
        return text + (" bound_ctrl:0" if self.chance(0.5) else "")

    def _sdwa(self, op: OpSpec, count: int) -> list[str]:
        words = []
        if op.slots and op.slots[0].type != "mask":
            selects, unused = _SELECTS, _UNUSED
            if op.slots[0].type in _FLOATS:
                # What a NaN carries, and its sign that UNUSED_SEXT would spread, is not documented.
                selects = _SELECTS[4:] if op.slots[0].type == "f16" else _SELECTS[6:]
                unused = (_UNUSED[0], _UNUSED[2])
            words += [f"dst_sel:{self.pick(selects)}", f"dst_unused:{self.pick(unused)}"]
        words += [f"src{k}_sel:{self.pick(_SELECTS)}" for k in range(min(count, 2))]
        return words

    # --- instructions with operands of their own

    def special(self, name: str) -> str | None:
        """Return instructions that mix register files."""
        lane = self.pick((self.scalar(), str(int(self.rng.integers(0, 64)))))
        texts = {
            "v_readfirstlane_b32": f"{name} s40, {self.vector()}",
            "v_readlane_b32": f"{name} s41, {self.vector()}, {lane}",
            "v_writelane_b32": f"{name} {self.vector()}, {self.pick(('s44', '17'))}, {lane}",
            "v_accvgpr_read_b32": f"{name} {self.vector()}, {self.vector(bank='a')}",
            "v_accvgpr_write_b32": f"{name} {self.vector(bank='a')}, "
            + self.pick((self.vector(), "1.0", "s50", "-3")),
            "v_accvgpr_mov_b32": f"{name} {self.vector(bank='a')}, {self.vector(bank='a')}",
            "v_swap_b32": f"{name} {self.vector()}, {self.vector()}",
            "v_permlane16_swap_b32": f"{name} {self.vector()}, {self.vector()}",
            "v_permlane32_swap_b32": f"{name} {self.vector()}, {self.vector()}",
        }
        return texts.get(name)

    def scalar_alu(self, op: OpSpec) -> str:
        """Return one scalar ALU instruction."""
        field = self.pick(("0, 4", "4, 4", "8, 2", "2, 2", "0, 10", "23, 1"))
        mode = f"hwreg(HW_REG_MODE, {field})"
        texts = {
            "s_getreg_b32": f"{op.name} s30, {mode}",
            "s_setreg_b32": f"{op.name} {mode}, s40",
            "s_setreg_imm32_b32": f"{op.name} {mode}, {int(self.rng.integers(1 << 10)):#x}",
            "s_set_gpr_idx_on": f"{op.name} s40, gpr_idx({self.pick(('SRC0', 'DST', 'SRC0,DST'))})",
            "s_set_gpr_idx_mode": f"{op.name} gpr_idx({self.pick(('SRC1', 'SRC0,SRC2,DST'))})",
        }
        if op.name in texts:
            return texts[op.name]
        operands = []
        for slot in op.slots:
            words = _WIDTHS.get(slot.type, 1)
            if slot.type == "imm":
                operands.append(hex(int(self.rng.integers(0, 0x8000))))
            elif slot.is_written:
                operands.append(self.scalar(words) if words > 1 else self.pick(("s30", "s31")))
            else:
                plain = f"s{int(self.rng.integers(28, 80))}" if words == 1 else self.scalar(words)
                others = (plain, plain, self.pick(_INLINE[4:]), self.pick(_LITERALS))
                operands.append(self.pick(others))
        return f"{op.name} " + ", ".join(operands)

    def matrix(self, op: OpSpec) -> str:
        """Return one matrix instruction, its result in either register file."""
        match = _MATRIX.fullmatch(op.name)
        assert match is not None
        result, rows, columns, depth, blocks, kind = match.groups()
        count = int(rows) * int(columns) * int(blocks or 1) // 64 * (2 if result == "f64" else 1)
        held = int(rows) * int(depth) * int(blocks or 1) // 64
        modifiers = []
        words = [1, 1]
        if kind == "f8f6f4":
            formats = [int(value) for value in self.rng.integers(0, 5, 2)]
            words = [{0: 8, 1: 8, 2: 6, 3: 6, 4: 4}[form] for form in formats]
            modifiers = [f"cbsz:{formats[0]}", f"blgp:{formats[1]}"]
        else:
            bits = {"f32": 32, "xf32": 32, "f16": 16, "bf16": 16, "i8": 8, "f64": 64}
            width = max(1, held * bits.get(kind, 8) // 32)
            words = [width, width]
            if blocks and result != "f64":
                top = int(blocks).bit_length() - 1
                size = int(self.rng.integers(0, min(top, 4) + 1))
                if size and self.chance(0.5):
                    modifiers = [f"cbsz:{size}", f"abid:{int(self.rng.integers(0, 1 << size))}"]
                if self.chance(0.5):
                    modifiers.append(f"blgp:{int(self.rng.integers(0, 8))}")
            if result == "f64" and self.chance(0.5):
                modifiers.append(f"neg:{self._bits(3)}")
        bank = self.pick(("v", "a"))
        target = self.vector(count, bank, 100, 110)
        start = self.pick((target, self.vector(count, bank, 150, 160), "0", "1.0"))
        sides = [
            self.vector(size, self.pick(("v", "a")), 10 + 40 * k, 40 + 40 * k)
            for k, size in enumerate(words)
        ]
        operands = [target, *sides, start]
        if "_scale_" in op.name:
            operands += [self.vector(), self.vector()]
            # Which byte of the scales' registers: two bits for A and for B.
            bytes_ = [f"{key}:{self._bits(2)[:-1]},0]" for key in ("op_sel", "op_sel_hi")]
            modifiers = [*bytes_, *modifiers]
        return f"{op.name} {', '.join(operands)}" + "".join(f" {word}" for word in modifiers)


def forms(op: OpSpec) -> tuple[str, ...]:
    """Return the forms to try."""
    if op.unit not in (Unit.VALU, Unit.TRANS):
        return ("plain",)
    if op.name.startswith("v_cmpx_"):
        # LLVM assembles the long encoding of these and does not decode it again.
        return ("e32", "dpp", "sdwa")
    return ("e32", "e64", "plain", "dpp", "sdwa")


def write(writer: Writer, op: OpSpec, form: str) -> str | None:
    """Return a random text of an instruction, None where other tests cover it."""
    if op.unit in (Unit.VALU, Unit.TRANS):
        special = writer.special(op.name)
        if special is not None:
            return special if form == "plain" else None
        return writer.vector_alu(op, form)
    if op.unit is Unit.SALU:
        return writer.scalar_alu(op) if op.slots else op.name
    if op.unit is Unit.MFMA:
        return writer.matrix(op)
    return None


def register_ops() -> list[OpSpec]:
    """Return every instruction that works on registers alone."""
    units = (Unit.VALU, Unit.TRANS, Unit.SALU, Unit.MFMA)
    return [op for op in OPS.values() if op.unit in units]
