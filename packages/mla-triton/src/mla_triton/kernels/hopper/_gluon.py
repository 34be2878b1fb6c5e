"""What is missing of Gluon: names that moved between the releases we support, a shorthand."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma
from triton.language.core import _aggregate as aggregate

#: Copy a tile through a tensor descriptor: ``(descriptor, coordinates, barrier, shared memory)``.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
#: Copy elements asynchronously: ``(shared memory, pointers, mask=)``.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
#: View shared memory as of another type: ``(shared memory, dtype, shape, layout)``.
reinterpret = (
    getattr(gl.shared_memory_descriptor, "reinterpret", None)
    or gl.shared_memory_descriptor._reinterpret
)
#: Wait for the threads of the partition.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def arrive_copied(barrier):
    """Let every thread of the partition arrive at a barrier once its copies are done."""
    async_copy.mbarrier_arrive(barrier, increment_count=False)


__all__ = ["aggregate", "arrive_copied", "barrier", "copy_async", "reinterpret", "tma_load"]
