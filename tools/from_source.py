"""Run Python on this checkout without installing it: ``python tools/from_source.py -m pytest``.

For machines without a package index whose Python has torch already, such as a GPU node. Backends
are found through entry points, which need installed metadata; this writes a minimal copy of it into
a temporary directory and puts that and the sources on ``PYTHONPATH``:

    python tools/from_source.py -m pytest -m gpu packages/mla-triton
    python tools/from_source.py -m mla_core doctor
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Its core is compiled and its dependencies are installed; sources alone do not run.
NEEDS_INSTALLING = "cdna-emulator"


def main(arguments: list[str]) -> int:
    """Run ``python ARGUMENTS`` with the checkout's packages importable and discoverable."""
    if not arguments:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory(prefix="mla-metadata-") as metadata:
        places = [metadata]
        for project in sorted(ROOT.glob("packages/*/src")):
            if project.parent.name == NEEDS_INSTALLING:
                continue
            write_metadata(project.parent, Path(metadata))
            places.append(str(project))
        if inherited := os.environ.get("PYTHONPATH"):
            places.append(inherited)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        return subprocess.call([sys.executable, *arguments], env=environment)


def write_metadata(project: Path, target: Path) -> None:
    """Write the ``.dist-info`` that lets `importlib.metadata` find a project's entry points."""
    table = tomllib.loads((project / "pyproject.toml").read_text())
    name = table["project"]["name"]
    about = runpy.run_path(str(project / table["tool"]["hatch"]["version"]["path"]))
    version = about["__version__"]
    folder = target / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in table["project"].get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
