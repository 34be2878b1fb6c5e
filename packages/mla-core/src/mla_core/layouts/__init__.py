"""Cache layouts: the bytes of every known paged latent cache, as data.

>>> get("fp8_ds656").summary
"FlashMLA's 656 bytes per token: 512 fp8_e4m3, 4 fp32 scales per 128, 64 bf16"
"""

from __future__ import annotations

from mla_core.layouts.catalog import ALL, get, names
from mla_core.layouts.fields import Arrangement, BufferSpec, Digit, Field, Region
from mla_core.layouts.heads import HEADS, HeadLayout, get_heads
from mla_core.layouts.layout import Layout

__all__ = [
    "ALL",
    "HEADS",
    "Arrangement",
    "BufferSpec",
    "Digit",
    "Field",
    "HeadLayout",
    "Layout",
    "Region",
    "get",
    "get_heads",
    "names",
]
