"""Build hook: carry the repository's ``hsa/`` into the sdist and the wheel.

In a checkout the catalogs live at the top of the repository, in an sdist inside the package. A
wheel built from either holds them as ``mla_asm/hsa``. Editable installs find the checkout's own
folder at run time (`mla_asm.catalog.hsa_root`), so nothing is copied for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class HsaBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Map ``hsa/`` to where the target wants it, and fail when it is nowhere to be found."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folder to the files of the build; ``version`` is hatchling's build variant."""
        root = Path(self.root)
        if version == "editable" or (root / "src/mla_asm/hsa").is_dir():
            return
        hsa = (root / "../../hsa").resolve()
        if not hsa.is_dir():
            raise FileNotFoundError(
                f"mla-asm: the kernel catalogs must be in {hsa}, and no such directory exists; "
                "build from a full checkout of the repository or from the sdist"
            )
        inside = "src/mla_asm/hsa" if self.target_name == "sdist" else "mla_asm/hsa"
        build_data["force_include"][str(hsa)] = inside
