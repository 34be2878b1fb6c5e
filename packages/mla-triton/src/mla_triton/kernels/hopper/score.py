"""Scores: their shape, their masks and the online softmax's small pieces."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mla_triton.kernels import _math

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)

# Elementwise, so layouts do not enter: the portable kernels' own.
scale_scores = gluon.jit(_math.scale_scores.fn)
finite_or_zero = gluon.jit(_math.finite_or_zero.fn)


@gluon.jit
def hide(s, token, limit, lowest, HAS_WINDOW: gl.constexpr):
    """Replace the scores of keys at or past ``limit``, or before ``lowest``, by -inf."""
    is_seen = token < limit
    if HAS_WINDOW:
        is_seen = is_seen & (token >= lowest)
    return gl.where(is_seen, s, float("-inf"))


@gluon.jit
def finish_rows(m, denom, sink_ptr, head, is_row, is_whole, HAS_SINK: gl.constexpr):
    """Return the factor that normalises an output row, and its log-sum-exp.

    A sink joins the rows of a request that was not cut; the merge adds it to the others.
    """
    factor = gl.full_like(m, 1.0)
    if HAS_SINK:
        sink = gl.load(sink_ptr + head, mask=is_row & is_whole, other=float("-inf")) * LOG2_E
        m_new = gl.maximum(m, sink)
        m_safe = finite_or_zero(m_new)
        factor = gl.exp2(m - m_safe)
        denom = denom * factor + gl.exp2(sink - m_safe)
        m = m_new
    is_nothing = denom == 0.0
    denom = gl.where(is_nothing, 1.0, denom)
    lse = gl.where(is_nothing, float("-inf"), (m + gl.log2(denom)) * LN_2)
    return factor / denom, lse
