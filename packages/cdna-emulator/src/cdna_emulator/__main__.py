"""``python -m cdna_emulator``."""

from cdna_emulator.cli import main

main()
