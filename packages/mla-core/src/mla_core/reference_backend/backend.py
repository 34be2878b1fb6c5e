"""Descriptor of the ``reference`` backend."""

from __future__ import annotations

from mla_core.backend import Backend
from mla_core.problem import Capability, Verified

_FLOATS = frozenset({"bf16", "fp16", "fp32"})
_QUERIES = _FLOATS | {"fp8_e4m3", "fp8_e4m3fnuz"}


def _ran_on_cpu(evidence: str) -> tuple[Verified, ...]:
    return (Verified("cpu", "ran", "2026-11-21", evidence),)


BACKEND = Backend(
    name="reference",
    priority=0,
    description="Plain torch on any device and layout; always installed.",
    ops={
        "plan_decode": "mla_core.reference_backend.decode:plan_decode",
        "decode": "mla_core.reference_backend.decode:decode",
        "prefill": "mla_core.reference_backend.prefill:prefill",
        "prefill_backward": "mla_core.reference_backend.prefill:prefill_backward",
        "sparse_decode": "mla_core.reference_backend.sparse:sparse_decode",
        "write_kv_cache": "mla_core.reference_backend.cache:write_kv_cache",
    },
    capabilities=(
        Capability(
            op="decode",
            kernel="torch_online_softmax",
            q_dtypes=_QUERIES,
            value_includes_rope=True,
            features=frozenset(
                {
                    "lse",
                    "non_causal",
                    "window",
                    "softcap",
                    "sink",
                    "cp_round_robin",
                    "rope",
                    "rope_write_back",
                    "batch_invariant",
                }
            ),
            verified=_ran_on_cpu("packages/mla-core/tests/test_reference_backend_decode.py"),
        ),
        Capability(
            op="prefill",
            kernel="torch_blocked_softmax",
            q_dtypes=_FLOATS,
            same_dtypes=True,
            layouts=frozenset({"expanded"}),
            features=frozenset({"lse", "non_causal", "window", "softcap", "backward"}),
            verified=_ran_on_cpu("packages/mla-core/tests/test_reference_backend_prefill.py"),
        ),
        Capability(
            op="sparse_decode",
            kernel="torch_online_softmax",
            q_dtypes=_QUERIES,
            value_includes_rope=True,
            features=frozenset({"lse", "softcap", "sink", "topk_length"}),
            verified=_ran_on_cpu("packages/mla-core/tests/test_reference_backend_sparse.py"),
        ),
        Capability(
            op="write_kv_cache",
            kernel="torch_scatter",
            q_dtypes=_FLOATS,
            value_includes_rope=True,
            verified=_ran_on_cpu("packages/mla-core/tests/test_reference_backend_cache.py"),
        ),
    ),
)
