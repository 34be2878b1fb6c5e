"""The op table: what every instruction of gfx942 and gfx950 reads and writes.

`OPS` maps a mnemonic without its encoding suffix (``v_add_f32``, not ``v_add_f32_e32``) to an
`OpSpec`. The parser checks operands against it, both cores and the checkers take roles and types
from it, and a mnemonic that is not in it is refused when a program is loaded.
"""

from cdna_emulator.isa.spec import OpSpec, Slot, Unit
from cdna_emulator.isa.table import OPS

__all__ = ["OPS", "OpSpec", "Slot", "Unit"]
