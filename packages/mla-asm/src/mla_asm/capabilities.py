"""What the launcher can run of a catalog, as rows that selection, docs and tests read.

Nothing is written twice: a capability is derived from its catalog row and from the one argument
block that `mla_asm.kernargs` declares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mla_asm.catalog import CatalogRow
from mla_asm.kernargs import KV_LORA_RANK, ROPE_DIM
from mla_core.errors import LayoutError
from mla_core.problem import Capability

#: Architectures whose kernels the HIP runtime launches, and the emulator executes.
ARCHS = ("gfx942", "gfx950")


def capability(row: CatalogRow) -> Capability:
    """Derive the capability of one catalog row.

    Raises
    ------
    LayoutError
        The launcher cannot run such a kernel; the message names the file, the line and the column.
    """
    for column, got, accepted in (
        ("the catalog's folder", row.arch, ARCHS),
        ("qType", row.q_type, ("bf16",)),
        ("kvType", row.kv_type, ("bf16",)),
        ("prefill", int(row.is_prefill), (0,)),
        ("cprr", int(row.has_round_robin), (0,)),
        ("layout", row.layout, ("standard",)),
    ):
        if got not in accepted:
            raise LayoutError(
                f"{row.where}: {column} must be {' or '.join(map(str, accepted))} for the launcher "
                f"of mla_asm, got {got}"
            )
    return Capability(
        op="decode",
        kernel=row.symbol,
        archs=frozenset({row.arch}),
        q_dtypes=frozenset({row.q_type}),
        kv_dtypes=frozenset({row.kv_type}),
        layouts=frozenset({row.layout}),
        num_heads=row.num_heads,
        q_lens=range(1, _longest_query(row) + 1) if _longest_query(row) else None,
        page_sizes=frozenset(row.page_sizes),
        kv_lora_ranks=frozenset({KV_LORA_RANK}),
        rope_dims=frozenset({ROPE_DIM}),
        features=_features(row),
        verified=row.verified,
    )


def capabilities(rows: Iterable[CatalogRow]) -> tuple[Capability, ...]:
    """Derive the capabilities of all rows: emulated on the CPU, then on their architecture.

    The emulated ones come first because the first of equally close rows gives the reason when none
    fits: on a CPU that should be that the backend must be named, not that the CPU is no GPU.
    """
    native = [capability(row) for row in rows]
    # Equal rows of two architectures are one on the CPU: MLA_ASM_EMULATE says which is emulated.
    return (*dict.fromkeys(map(_emulated, native)), *native)


def _emulated(row: Capability) -> Capability:
    """Return the same kernel on CPU tensors: slow, so only for callers that name the backend."""
    proofs = tuple(
        replace(proof, arch="cpu") for proof in row.verified if proof.level == "emulated"
    )
    return replace(row, archs=frozenset({"cpu"}), automatic=False, verified=proofs)


def _longest_query(row: CatalogRow) -> int:
    """Most query tokens of a request, 0 for any: one where the kernel cannot mask causally."""
    return row.q_seq_len if row.is_causal else 1


def _features(row: CatalogRow) -> frozenset[str]:
    has = {
        "lse": row.writes_lse,
        # The mask is an argument: a kernel that can apply it can leave it out.
        "non_causal": True,
        # A fixed number of splits cuts a request by its own length alone, a work list does not.
        "batch_invariant": not row.is_persistent,
    }
    return frozenset(name for name, supported in has.items() if supported)
