"""The ``mla_core`` logger: structured one-line records, configured by ``MLA_LOG_LEVEL``."""

from __future__ import annotations

import logging
from typing import TextIO

from mla_core import env

LEVELS = ("debug", "info", "warning", "error")

logger = logging.getLogger("mla_core")


class _Handler(logging.StreamHandler[TextIO]):
    """Marks the handler that `configure` made, and may reformat."""


def configure() -> None:
    """Read the ``MLA_LOG_*`` variables and give the logger one handler.

    Called once on import; call it again after changing the variables. An application that has
    already put a handler on the logger keeps it.
    """
    logger.setLevel(env.choice("MLA_LOG_LEVEL", LEVELS).upper())
    source = " (%(pathname)s:%(lineno)d)" if env.flag("MLA_LOG_SOURCE") else ""
    formatter = logging.Formatter(f"%(name)s %(levelname)s %(message)s{source}")
    ours = [handler for handler in logger.handlers if isinstance(handler, _Handler)]
    if not logger.handlers:
        ours = [_Handler()]
        logger.addHandler(ours[0])
    for handler in ours:
        handler.setFormatter(formatter)


def event(name: str, **values: object) -> None:
    """Log one structured line at level info, ``plan backend=triton kernel=...``."""
    if logger.isEnabledFor(logging.INFO):
        fields = (f"{key}={_quoted(value)}" for key, value in values.items())
        logger.info(" ".join((name, *fields)), stacklevel=2)


def _quoted(value: object) -> str:
    shown = str(value)
    return f'"{shown}"' if " " in shown else shown
