"""``python -m mla_core.demo``."""

from __future__ import annotations

import sys

from mla_core.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
