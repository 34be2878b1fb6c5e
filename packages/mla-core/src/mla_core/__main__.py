"""``python -m mla_core`` is the command ``mla``."""

from __future__ import annotations

import sys

from mla_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
