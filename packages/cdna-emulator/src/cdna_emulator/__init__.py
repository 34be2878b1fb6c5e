"""Execute AMD CDNA3 and CDNA4 (gfx942, gfx950) machine code on a CPU, with checkers."""

from cdna_emulator.__about__ import __version__

__all__ = ["__version__"]
