"""The functions of deepseek-ai/FlashMLA on the backends of `mla_core`.

Names, positional order, defaults and return values are those of ``flash_mla``. What differs: bad
input raises `mla_core.errors.LayoutError`; any page size, any head count from 1 to 128 and any
top-k are accepted wherever the selected backend has a kernel; and a row that sees nothing returns
-inf, the neutral element of a merge, where FlashMLA returns +inf. Every log-sum-exp is a natural
logarithm and leaves ``attn_sink`` out, as in FlashMLA. There is no top-level
``flash_attn_varlen_func``; that is `mla_core.prefill`.
"""

from mla_core.dropin.flash_mla.decode import flash_mla_with_kvcache
from mla_core.dropin.flash_mla.schedule import FlashMLASchedMeta, get_mla_metadata
from mla_core.dropin.flash_mla.sparse import flash_mla_sparse_fwd

__all__ = [
    "FlashMLASchedMeta",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
