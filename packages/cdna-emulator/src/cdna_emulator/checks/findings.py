"""What checkers report: one `Finding` for each mistake at each instruction."""

from __future__ import annotations

from dataclasses import dataclass

#: Checks that can be asked for, in the order of the documentation.
CHECKS = (
    "waits",
    "barrier_writes",
    "races",
    "uninitialised",
    "barriers",
    "hazards",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake.

    Parameters
    ----------
    kind : str
        ``out_of_bounds``, ``missing_wait``, ``lds_race``, ... ; the README lists them.
    kernel : str
    address : int
        Of the instruction, in the code object.
    instruction : str
        Its text.
    detail : str
        What is wrong, in words.
    source_line : str, optional
        ``file:line``, when the code object has debug information.
    workgroup : (int, int, int), optional
        Where it happened first; static findings have none.
    wave, lane : int, optional
    count : int
        How often it happened.
    """

    kind: str
    kernel: str
    address: int
    instruction: str
    detail: str
    source_line: str | None = None
    workgroup: tuple[int, int, int] | None = None
    wave: int | None = None
    lane: int | None = None
    count: int = 1

    def __str__(self) -> str:
        """Return one line for a report."""
        where = f"{self.kernel}+{self.address:#x}"
        if self.source_line:
            where += f" ({self.source_line})"
        who = ""
        if self.workgroup is not None:
            who = f" [workgroup {','.join(map(str, self.workgroup))}"
            who += f" wave {self.wave}" if self.wave is not None else ""
            who += f" lane {self.lane}" if self.lane is not None else ""
            who += f", {self.count} times]" if self.count > 1 else "]"
        return f"{self.kind}: {where} `{self.instruction}`: {self.detail}{who}"
