"""The MLA functions of ROCm/aiter on the backends of `mla_core`.

Names, positional order, defaults, in-place outputs and return values are those of ``aiter.mla`` and
of ``aiter``'s metadata functions. Four things differ everywhere: bad input raises
`mla_core.errors.LayoutError` instead of aborting the process; every returned log-sum-exp is valid,
natural-log and -inf for rows that see nothing (whose output is 0); the storage of an output tensor
is never exchanged; and any head count from 1 to 128, any number of query tokens and any page size
are accepted wherever the selected backend has a kernel.
"""

from mla_core.dropin.aiter.decode import mla_decode_fwd
from mla_core.dropin.aiter.metadata import (
    decode_update_mla_metadata_v1,
    get_mla_metadata_info_v1,
    get_mla_metadata_v1,
    get_ps_metadata_info_v1,
    get_ps_metadata_v1,
    planning_for,
)
from mla_core.dropin.aiter.prefill import mla_prefill_fwd, mla_prefill_ps_fwd
from mla_core.dropin.aiter.reduce import mla_reduce_v1

__all__ = [
    "decode_update_mla_metadata_v1",
    "get_mla_metadata_info_v1",
    "get_mla_metadata_v1",
    "get_ps_metadata_info_v1",
    "get_ps_metadata_v1",
    "mla_decode_fwd",
    "mla_prefill_fwd",
    "mla_prefill_ps_fwd",
    "mla_reduce_v1",
    "planning_for",
]
