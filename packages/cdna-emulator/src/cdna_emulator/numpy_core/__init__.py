"""A second implementation of every instruction, in plain NumPy.

It is slow and says what it does: one short function for each instruction, over arrays of 64 lanes.
Tests run it beside the native core, instruction by instruction; where the two differ, one of them
misreads the instruction set documents.
"""

from cdna_emulator.numpy_core.core import HANDLERS, run_wave, run_workgroup
from cdna_emulator.numpy_core.state import Fault, Mode, WaveState

__all__ = ["HANDLERS", "Fault", "Mode", "WaveState", "run_wave", "run_workgroup"]
