"""What is asked (`Problem`), what a kernel family can do (`Capability`), and how we know.

A capability is one row of data. Selection, error texts, ``mla explain``, the support matrix of the
docs and the conformance suite all read the same rows through `Capability.why_not`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mla_core.dims import MLADims
from mla_core.errors import LayoutError

#: Operations a backend can offer.
OPS: tuple[str, ...] = ("decode", "prefill", "sparse_decode", "write_kv_cache")

#: Optional behaviours a problem may ask for, each with its meaning.
FEATURES: dict[str, str] = {
    "lse": "return the log-sum-exp of each row",
    "non_causal": "every query token sees the whole context",
    "window": "sliding window",
    "softcap": "scores are cap * tanh(score / cap)",
    "sink": "one extra logit per head with a zero value",
    "cp_round_robin": "context parallel rank holding every W-th token",
    "rope": "queries and each request's newest keys are rotated by position",
    "rope_write_back": "the rotated keys are stored in the cache",
    "persistent": "one workgroup per worker, which walks its works in a work list",
    "batch_invariant": "a request's bits do not depend on its batch mates",
    "backward": "gradients of q, k and v",
    "topk_length": "per-row number of valid top-k indices",
}

Level = Literal["ran", "emulated", "interpreted", "compiled"]

#: Verification levels, strongest first; see docs/conventions.
LEVELS: tuple[Level, ...] = ("ran", "emulated", "interpreted", "compiled")

IntSet = frozenset[int] | range | None


@dataclass(frozen=True, slots=True)
class Problem:
    """One question to the registry: an op on an architecture with dtypes, shapes and features.

    Parameters
    ----------
    op : one of ``OPS``
    arch : str
        As `mla_core.arch.arch_of` names it.
    q_dtype, kv_dtype : str
        Short dtype names; ``kv_dtype`` is the dtype of the cached latent.
    dims : MLADims
    layout : str
        Layout family of the cache, ``"expanded"`` for separate per-head K and V.
    page_size : int
        Tokens per page; 1 where there are no pages.
    q_len : int
        Most query tokens of one request.
    features : frozenset of ``FEATURES`` keys
    """

    op: str
    arch: str
    q_dtype: str
    kv_dtype: str
    dims: MLADims
    layout: str = "standard"
    page_size: int = 1
    q_len: int = 1
    features: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Refuse words that no capability could ever match."""
        if self.op not in OPS:
            raise LayoutError(f"Problem: op must be one of {', '.join(OPS)}, got {self.op!r}")
        if unknown := sorted(self.features - FEATURES.keys()):
            raise LayoutError(
                f"Problem: features must be among {', '.join(FEATURES)}, got {', '.join(unknown)}"
            )

    def __str__(self) -> str:
        """One line for logs and messages."""
        dims = self.dims
        parts = [
            f"{self.op} on {self.arch}",
            f"q={self.q_dtype} kv={self.kv_dtype} layout={self.layout} page_size={self.page_size}",
            f"heads={dims.num_heads} q_len={self.q_len}",
            f"kv_lora={dims.kv_lora_rank} rope={dims.qk_rope_head_dim}",
        ]
        if self.features:
            parts.append("+".join(sorted(self.features)))
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Verified:
    """Evidence that a capability row is true on one architecture.

    ``ran`` means executed there, ``emulated`` that the machine code was executed by a CPU emulator,
    ``interpreted`` that Triton's interpreter ran the kernel, ``compiled`` assembled only.
    """

    arch: str
    level: Level
    date: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Capability:
    """One row of what a kernel family can do. A field left ``None`` means any value.

    Parameters
    ----------
    op : one of ``OPS``
    kernel : str
        Name of the kernel family, printed by ``mla explain``.
    archs, q_dtypes, kv_dtypes, layouts : frozenset of str, or None
    num_heads, q_lens, page_sizes, kv_lora_ranks, rope_dims : frozenset or range of int, or None
    head_dims : frozenset of (qk_head_dim, v_head_dim), or None
        For prefill over expanded keys and values.
    features : frozenset of str
        Every feature the family supports; a problem that asks for another one is refused.
    automatic : bool
        ``False`` keeps the row out of automatic choice: it is used only when its backend is named.
    verified : tuple of Verified
    """

    op: str
    kernel: str
    archs: frozenset[str] | None = None
    q_dtypes: frozenset[str] | None = None
    kv_dtypes: frozenset[str] | None = None
    same_dtypes: bool = False
    layouts: frozenset[str] | None = None
    num_heads: IntSet = None
    q_lens: IntSet = None
    page_sizes: IntSet = None
    kv_lora_ranks: IntSet = None
    rope_dims: IntSet = None
    head_dims: frozenset[tuple[int, int]] | None = None
    value_includes_rope: bool = False
    features: frozenset[str] = frozenset()
    automatic: bool = True
    verified: tuple[Verified, ...] = ()

    def why_not(self, problem: Problem) -> list[str]:
        """Return one reason per mismatch, ``num_heads=12 (needs 16, 128)``; [] means yes."""
        if problem.op != self.op:
            return [f"op={problem.op} (needs {self.op})"]
        dims = problem.dims
        asked: list[tuple[str, object, Iterable[object] | None]] = [
            ("arch", problem.arch, self.archs),
            ("q_dtype", problem.q_dtype, self.q_dtypes),
            ("kv_dtype", problem.kv_dtype, self.kv_dtypes),
            ("layout", problem.layout, self.layouts),
            ("page_size", problem.page_size, self.page_sizes),
            ("num_heads", dims.num_heads, self.num_heads),
            ("q_len", problem.q_len, self.q_lens),
            ("kv_lora_rank", dims.kv_lora_rank, self.kv_lora_ranks),
            ("qk_rope_head_dim", dims.qk_rope_head_dim, self.rope_dims),
            ("head_dims", (dims.qk_head_dim, dims.v_head_dim), self.head_dims),
        ]
        reasons = [
            f"{name}={value} (needs {describe_values(accepted)})"
            for name, value, accepted in asked
            if accepted is not None and value not in accepted
        ]
        if self.same_dtypes and problem.q_dtype != problem.kv_dtype:
            reasons.append(f"q_dtype={problem.q_dtype} (needs kv_dtype={problem.kv_dtype})")
        if dims.value_includes_rope and not self.value_includes_rope:
            reasons.append("value_includes_rope=True (needs False)")
        reasons.extend(
            f"feature {feature} (needs {describe_values(self.features)})"
            for feature in sorted(problem.features - self.features)
        )
        return reasons


def describe_values(values: Iterable[object]) -> str:
    """Say which values are accepted: ``1..128``, ``32..1024 by 32``, ``16, 64`` or ``none``."""
    if isinstance(values, range) and len(values) > 2:
        by = "" if values.step == 1 else f" by {values.step}"
        return f"{values[0]}..{values[-1]}{by}"
    listed = sorted(values, key=lambda value: (str(type(value)), value))
    return ", ".join(map(str, listed)) or "none"
