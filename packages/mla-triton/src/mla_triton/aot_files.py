"""Kernels that were compiled ahead of time: from a folder into Triton's cache."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from mla_core import env
from mla_core.errors import LayoutError
from mla_core.logs import logger

MANIFEST = "manifest.json"


@functools.cache
def install_named(arch: str) -> int:
    """Install what ``MLA_AOT_DIR`` holds for an architecture, once in a process; 0 without it."""
    folder = env.directory("MLA_AOT_DIR")
    return 0 if folder is None else install(folder, arch)


def install(folder: Path, arch: str | None = None) -> int:
    """Put kernels of a folder into Triton's cache, where launches find them.

    Parameters
    ----------
    folder : path
        As `mla_triton.aot.save` wrote it.
    arch : str, optional
        Only those of this architecture.

    Returns
    -------
    int
        Kernels of this Triton release and architecture, those included that were there already.

    Raises
    ------
    LayoutError
        There is no manifest, or a file is missing or is not the one it lists.
    """
    import triton
    from triton.runtime.cache import FileCacheManager

    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise LayoutError(
            f"aot: {folder} must hold {MANIFEST}, got none; make one with `mla aot --out`"
        )
    entries = json.loads(manifest.read_text(encoding="utf-8"))["kernels"]
    fitting = [entry for entry in entries if arch in (None, entry["arch"])]
    usable = [entry for entry in fitting if entry["triton"] == triton.__version__]
    if len(usable) < len(fitting):
        logger.warning(
            "%s: %d of %d kernels were compiled by another Triton than %s and are not used",
            manifest,
            len(fitting) - len(usable),
            len(fitting),
            triton.__version__,
        )
    for entry in usable:
        content = {}
        for name, digest in entry["files"].items():
            path = folder / entry["key"] / name
            data = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(data).hexdigest() != digest:
                raise LayoutError(
                    f"aot: {path} must be the file whose SHA-256 {MANIFEST} lists, got another or "
                    "none; compile again"
                )
            content[name] = data
        cache = FileCacheManager(entry["key"])
        head = next(name for name in content if name.endswith(".json"))
        if cache.get_group(head) is None:
            places = {name: cache.put(data, name) for name, data in content.items()}
            cache.put_group(head, places)
    return len(usable)
