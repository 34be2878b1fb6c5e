"""What every partition of a program is told: the batch, its share of it, and where results go."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mla_triton.kernels.hopper._gluon import aggregate
from mla_triton.kernels.hopper.output import Output
from mla_triton.kernels.hopper.schedule import Batch, Shares


@aggregate
class Scaling:
    """What scores are multiplied with, and the scale of an fp8 cache as a whole."""

    sm_scale_log2: gl.tensor  # sm_scale * log2(e)
    softcap: gl.tensor  # unused without HAS_SOFTCAP
    kv_scale_ptr: gl.tensor  # [1] f32; unused without HAS_KV_SCALE
    q_scale_ptr: gl.tensor  # [1] f32; unused without HAS_Q_SCALE
    HAS_SOFTCAP: gl.constexpr
    HAS_KV_SCALE: gl.constexpr
    HAS_Q_SCALE: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        sm_scale_log2,
        softcap,
        kv_scale_ptr,
        q_scale_ptr,
        HAS_SOFTCAP,
        HAS_KV_SCALE,
        HAS_Q_SCALE,
    ):
        self.sm_scale_log2 = sm_scale_log2
        self.softcap = softcap
        self.kv_scale_ptr = kv_scale_ptr
        self.q_scale_ptr = q_scale_ptr
        self.HAS_SOFTCAP = gl.constexpr(HAS_SOFTCAP)
        self.HAS_KV_SCALE = gl.constexpr(HAS_KV_SCALE)
        self.HAS_Q_SCALE = gl.constexpr(HAS_Q_SCALE)

    @gluon.jit
    def of_cache(self):
        """Return the scale of the cache, 1 without."""
        scale = 1.0
        if self.HAS_KV_SCALE:
            scale = gl.load(self.kv_scale_ptr)
        return scale

    @gluon.jit
    def of_queries(self):
        """Return the scale of fp8 queries, 1 for others."""
        scale = 1.0
        if self.HAS_Q_SCALE:
            scale = gl.load(self.q_scale_ptr)
        return scale


@aggregate
class Task:
    """The work of a program: block ``block`` of the query rows in the share of ``worker``."""

    batch: Batch
    shares: Shares
    output: Output
    scaling: Scaling
    worker: gl.tensor
    block: gl.tensor

    @gluon.constexpr_function
    def __init__(self, batch, shares, output, scaling, worker, block):
        self.batch = batch
        self.shares = shares
        self.output = output
        self.scaling = scaling
        self.worker = worker
        self.block = block
