"""The demo: a small DeepSeek-V3-shaped model that decodes real text from a paged latent cache.

Everything it does is checked against transformers' eager attention. `main` runs it; so do
``mla demo`` and ``python -m mla_core.demo``. It needs the extra ``mla-core[demo]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mla_core.errors import BackendUnavailableError, LayoutError

if TYPE_CHECKING:
    from rich.console import Console

    from mla_core.integrations.transformers import Prefill

_NEEDS = ("transformers", "tokenizers", "rich", "matplotlib")
_DTYPES = ("fp32", "bf16")
_SIZES = ("small", "tiny")
_PREFILLS = ("expanded", "absorbed")


def main(
    *,
    steps: int = 60,
    requests: int = 6,
    out_dir: str | Path = "demo-output",
    device: str = "cpu",
    backend: str | None = None,
    dtype: str = "fp32",
    page_size: int = 16,
    seed: int = 0,
    size: str = "small",
    contexts: Sequence[int] = (128, 512, 1024, 2048, 4096),
    prefill: Prefill = "expanded",
    fused: bool = False,
    console: Console | None = None,
) -> int:
    """Run the demo.

    Parameters
    ----------
    steps : int
        Decode steps; each generates one token per running request.
    requests : int
        Requests served at a time; a third more wait for the first to finish.
    out_dir : path
        Where ``latent_cache.png`` goes.
    device : str
        A torch device.
    backend : str, optional
        Backends to choose from, tried in this order: "triton,reference". Default: by priority.
    dtype : "fp32" or "bf16"
        Of the model and the cache.
    page_size : int
        Tokens per cache page.
    seed : int
        Of the weights, the lengths and the order of the pages.
    size : "small" or "tiny"
        "small" has DeepSeek-V3's attention widths; "tiny" is for tests.
    contexts : sequence of int
        Context lengths of the figure.
    prefill : "expanded" or "absorbed"
        How prompts run: through `mla_core.prefill` over keys and values of each head, or through
        `mla_core.decode` over the latent cache, which needs no other kernel and is more work.
    fused : bool
        Whether attention layers run through the fused launches of mla-fusions; with ``prefill``
        "absorbed" only.
    console : rich Console, optional

    Returns
    -------
    int : 0, or 1 when a logit or a greedy token differs from eager attention

    Raises
    ------
    BackendUnavailableError
        transformers, rich or matplotlib is missing, or mla-fusions where ``fused`` wants it.
    LayoutError
        An argument is outside what is listed above.
    UnsupportedProblemError
        None of the backends has a kernel for an op; for want of one for ``prefill`` the message
        names ``prefill="absorbed"``.
    """
    if missing := [name for name in _NEEDS if find_spec(name) is None]:
        raise BackendUnavailableError(
            f"demo: {', '.join(_NEEDS)} must be installed, got none of {', '.join(missing)}; "
            'pip install "mla-core[demo]"'
        )
    for name, value, least in (
        ("steps", steps, 4),
        ("requests", requests, 1),
        ("page_size", page_size, 1),
        ("contexts", min(contexts, default=0), 1),
    ):
        if value < least:
            raise LayoutError(f"demo: {name} must be >= {least}, got {value}")
    for name, word, words in (
        ("dtype", dtype, _DTYPES),
        ("size", size, _SIZES),
        ("prefill", prefill, _PREFILLS),
    ):
        if word not in words:
            raise LayoutError(f"demo: {name} must be one of {', '.join(words)}, got {word!r}")
    if fused and prefill != "absorbed":
        raise LayoutError(f"demo: prefill must be absorbed with fused, got {prefill!r}")

    from rich.console import Console as RichConsole

    console = console or RichConsole()
    with console.status("loading transformers"):
        from mla_core.demo.run import run
        from mla_core.demo.session import Options

    options = Options(
        steps=steps,
        requests=requests,
        out_dir=Path(out_dir),
        device=device,
        backends=tuple(name.strip() for name in (backend or "").split(",") if name.strip()),
        dtype=dtype,
        page_size=page_size,
        seed=seed,
        size=size,
        contexts=tuple(contexts),
        prefill=prefill,
        fused=fused,
    )
    return run(options, console)
