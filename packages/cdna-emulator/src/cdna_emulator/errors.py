"""The exceptions callers see: one tree, so that ``except EmulatorError`` catches all of ours.

Messages follow one form: ``where: thing must be X, got Y; what to do``.
"""

from __future__ import annotations

from collections.abc import Sequence


class EmulatorError(Exception):
    """Base of every error this package raises on purpose."""


class CodeObjectError(EmulatorError, ValueError):
    """A file is not a code object this package can load; the message names what is wrong in it."""


class UnknownInstructionError(EmulatorError, NotImplementedError):
    """Machine code holds something that cannot be decoded or is not modelled; found at load."""


class ArgumentError(EmulatorError, ValueError):
    """A launch was asked for with arguments, sizes or options that the kernel does not take."""


class ToolchainError(EmulatorError, RuntimeError):
    """An assembler, linker, disassembler or compiler is missing or refused its input."""


class CheckError(EmulatorError, AssertionError):
    """A kernel ran, and the checkers found mistakes in it.

    Parameters
    ----------
    findings : sequence of Finding
        Everything that was found; kept in ``findings``.
    """

    #: How many findings the message spells out; all are in ``findings``.
    SHOWN = 20

    def __init__(self, findings: Sequence[object]) -> None:
        self.findings = tuple(findings)
        count = len(self.findings)
        lines = [f"the checkers found {count} mistake{'s' if count != 1 else ''}"]
        lines += [f"  {finding}" for finding in self.findings[: self.SHOWN]]
        if count > self.SHOWN:
            lines.append(f"  and {count - self.SHOWN} more; see the findings of this error")
        super().__init__("\n".join(lines))
