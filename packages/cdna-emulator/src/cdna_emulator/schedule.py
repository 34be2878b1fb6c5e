"""Orders in which the waves of a workgroup take turns.

Hardware promises no order between barriers. A kernel that is right only when waves advance
together, or only when they do not, is wrong; the schedules here are chosen to tell.
"""

from __future__ import annotations

from dataclasses import dataclass

from cdna_emulator.errors import ArgumentError

#: A set that covers both extremes, fine and coarse interleaving, and late copies into LDS.
SCHEDULES = (
    "run_to_barrier",
    "reversed",
    "round_robin:1",
    "round_robin:7",
    "round_robin:64",
    "random:1",
    "run_to_barrier+late_dma",
    "reversed+late_dma",
)
DEFAULT_SCHEDULE = "round_robin:64"
_KINDS = ("run_to_barrier", "reversed", "round_robin", "random")
#: Numbers that kinds take, as wide as the native core's fields for them.
_NUMBERS = {"round_robin": range(1, 1 << 32), "random": range(1 << 64)}


@dataclass(frozen=True, slots=True)
class Schedule:
    """A parsed schedule.

    Parameters
    ----------
    kind : str
        ``run_to_barrier`` (wave after wave, each as far as it gets), ``reversed`` (the same from
        the last wave), ``round_robin`` or ``random``.
    number : int
        Instructions of a slice of ``round_robin``, seed of ``random``.
    late_dma : bool
        Copies from memory into LDS land when a wait retires them, not when they are issued.
    """

    kind: str
    number: int = 0
    late_dma: bool = False

    @property
    def kind_number(self) -> int:
        """Number of the kind for the native core."""
        return _KINDS.index(self.kind)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read ``kind``, ``kind:number`` and an optional ``+late_dma``."""
        rest, plus, extra = text.partition("+")
        kind, colon, number = rest.partition(":")
        allowed = _NUMBERS.get(kind)
        is_number = number.isascii() and number.isdecimal()
        if (
            kind not in _KINDS
            or bool(colon) != (allowed is not None)
            or (allowed is not None and (not is_number or int(number) not in allowed))
            or (plus and extra != "late_dma")
        ):
            raise ArgumentError(
                "schedule must be run_to_barrier, reversed, round_robin:SLICE or random:SEED, "
                f"optionally followed by +late_dma, got {text!r}"
            )
        return cls(kind, int(number or 0), bool(plus))
