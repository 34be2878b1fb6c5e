"""Build hook: compile the native core into the package.

The compiler comes with the ``ziglang`` package, a build requirement, so a build works on a machine
without one. Wheels are tagged for the platform they were compiled for and, since the core is
loaded through ctypes, for every Python 3.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compile ``native/*.cpp`` for wheels and editable installs; an sdist carries the sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile and add the library to the files of the build."""
        if self.target_name != "wheel":
            return
        build = _load_build_module(Path(self.root))
        library = build.build()
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{build.wheel_platform()}"
        build_data["artifacts"].append(f"/{library.relative_to(self.root).as_posix()}")


def _load_build_module(root: Path) -> ModuleType:
    # By path: the package itself cannot be imported before it and its dependencies are installed.
    path = root / "src/cdna_emulator/native/build.py"
    spec = importlib.util.spec_from_file_location("cdna_emulator_native_build", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cdna-emulator: {path} must be a Python file; restore it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
