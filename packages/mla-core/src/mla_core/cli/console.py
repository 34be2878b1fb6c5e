"""Tables in the terminal, by rich."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mla_core.errors import BackendUnavailableError

if TYPE_CHECKING:
    from rich.console import Console

_PIPED_WIDTH = 140


def make_console(*, stderr: bool = False) -> Console:
    """Return a console; one that is no terminal gets a fixed width, so that logs do not depend.

    Raises
    ------
    BackendUnavailableError
        rich is not installed; the message says how to get it.
    """
    try:
        from rich.console import Console
    except ImportError as exc:
        raise BackendUnavailableError(
            'this command prints with rich; pip install "mla-core[cli]"'
        ) from exc
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Iterable[str] = (),
    whole: Iterable[str] = (),
) -> None:
    """Print a table of plain text.

    Parameters
    ----------
    numbers : iterable of column names
        Right-aligned and never folded.
    whole : iterable of column names
        Left-aligned and never folded; the other columns fold where the terminal is narrow.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    right, unfolded = frozenset(numbers), frozenset(whole)
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column in right | unfolded,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell.split(":")[0], "")) for cell in row))
    console.print(table)


#: Colour of a cell by the words before its first colon.
_STYLES = {
    "ok": "green",
    "yes": "green",
    "chosen": "bold green",
    "no": "yellow",
    "unusable": "bold red",
    "not here": "yellow",
    "empty": "dim",
}
