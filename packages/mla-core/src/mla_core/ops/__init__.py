"""The public operations: check the arguments, then run the chosen backend.

Each op writes into ``out`` (and ``lse``) when given, else allocates. Called eagerly it goes
straight to the backend's function. Under ``torch.compile`` it goes through a custom op of the
``mla`` namespace with the same name, which carries the same arguments as plain tensors, numbers
and strings, and ends in the same function.
"""

from mla_core.ops.decode import decode
from mla_core.ops.prefill import prefill
from mla_core.ops.reduce_partials import reduce_partials
from mla_core.ops.replan import replan
from mla_core.ops.sparse_decode import sparse_decode
from mla_core.ops.write_kv_cache import write_kv_cache

__all__ = ["decode", "prefill", "reduce_partials", "replan", "sparse_decode", "write_kv_cache"]
