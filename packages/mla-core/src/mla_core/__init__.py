"""MLA kernels: dims, cache layouts, batches, plans, ops and the registry of backends.

The public surface is ``__all__``; everything else may change. Importing this package loads torch
and nothing heavier: no triton, no driver, no backend.
"""

from mla_core import logs
from mla_core.__about__ import __version__
from mla_core.batch import PagedKV
from mla_core.cache import LatentCache
from mla_core.dims import MODELS, MLADims
from mla_core.errors import (
    BackendUnavailableError,
    LayoutError,
    MLAError,
    UnsupportedProblemError,
)
from mla_core.ops import (
    decode,
    prefill,
    reduce_partials,
    replan,
    sparse_decode,
    write_kv_cache,
)
from mla_core.plan import AttentionOptions, DecodePlan, plan_decode
from mla_core.problem import Capability, Problem
from mla_core.reduce import LseBase
from mla_core.registry import records as backends
from mla_core.rope import FusedRope
from mla_core.select import explain, use_backend

__all__ = [
    "MODELS",
    "AttentionOptions",
    "BackendUnavailableError",
    "Capability",
    "DecodePlan",
    "FusedRope",
    "LatentCache",
    "LayoutError",
    "LseBase",
    "MLADims",
    "MLAError",
    "PagedKV",
    "Problem",
    "UnsupportedProblemError",
    "__version__",
    "backends",
    "decode",
    "explain",
    "plan_decode",
    "prefill",
    "reduce_partials",
    "replan",
    "sparse_decode",
    "use_backend",
    "write_kv_cache",
]

logs.configure()
