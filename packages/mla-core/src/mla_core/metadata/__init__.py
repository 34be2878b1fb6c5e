"""Schedules of persistent kernels: what each workgroup computes, and which partials are merged.

Planners take plain index tensors and a `DeviceProfile` and return a `WorkList`. They know nothing
of caches or backends; what differs between kernel families is data in `mla_core.metadata.tiling`.
"""

from mla_core.metadata.device import plan_v1_2_device, scratch_size
from mla_core.metadata.prefill import plan_prefill
from mla_core.metadata.profile import DeviceProfile
from mla_core.metadata.recipe import WorkListRecipe
from mla_core.metadata.sizes import WorkListSizes, decode_sizes, prefill_sizes
from mla_core.metadata.splits import choose_num_kv_splits, split_indptr
from mla_core.metadata.update import decode_update
from mla_core.metadata.v1_0 import plan_v1_0
from mla_core.metadata.v1_1 import plan_v1_1
from mla_core.metadata.v1_2 import plan_v1_2
from mla_core.metadata.worklist import WorkList

__all__ = [
    "DeviceProfile",
    "WorkList",
    "WorkListRecipe",
    "WorkListSizes",
    "choose_num_kv_splits",
    "decode_sizes",
    "decode_update",
    "plan_prefill",
    "plan_v1_0",
    "plan_v1_1",
    "plan_v1_2",
    "plan_v1_2_device",
    "prefill_sizes",
    "scratch_size",
    "split_indptr",
]
