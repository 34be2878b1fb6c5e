"""Reciprocals, roots, exponentials, logarithms, sine and cosine.

Hardware computes these to about one unit in the last place. Here results are computed in float64
and rounded once, so tests compare them within that distance. The f32 forms neither read nor give
denormals.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cdna_emulator.numpy_core.registry import Step, add_lanewise
from cdna_emulator.numpy_core.rounding import flush
from cdna_emulator.numpy_core.state import Array

#: Arguments of sine and cosine are valid up to here.
_MAX_TURNS = 256.0


def _reciprocal_root(x: Array) -> Array:
    # The root of minus zero keeps its sign, and so does the reciprocal.
    return 1.0 / np.sqrt(x)


def _turns(x: Array) -> Array:
    """Drop whole turns, which float64 does exactly, and go to radians."""
    return (x - np.trunc(x)) * (2.0 * np.pi)


def sine(x: Array) -> Array:
    """Return the sine of a number of turns; zero beyond 256 of them."""
    value = np.where(np.abs(x) > _MAX_TURNS, 0.0, _exact_quarters(x, np.sin(_turns(x)), 0))
    return np.where(np.isfinite(x), value, np.nan)


def cosine(x: Array) -> Array:
    """Return the cosine of a number of turns; one beyond 256 of them."""
    value = np.where(np.abs(x) > _MAX_TURNS, 1.0, _exact_quarters(x, np.cos(_turns(x)), 1))
    return np.where(np.isfinite(x), value, np.nan)


def _exact_quarters(x: Array, value: Array, shift: int) -> Array:
    """Put 0, 1 and -1 where a quarter turn gives them exactly."""
    quarters = 4 * (x - np.trunc(x))
    whole = quarters == np.trunc(quarters)
    index = np.where(whole, quarters, 0).astype(np.int64) + shift & 3
    exact = np.array([0.0, 1.0, 0.0, -1.0])[index]
    exact = np.where(exact == 0, np.copysign(0.0, x) if shift == 0 else 0.0, exact)
    return np.where(whole, exact, value)


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp2,
    "log": np.log2,
    "rcp": lambda x: 1.0 / x,
    "rsq": _reciprocal_root,
    "sqrt": np.sqrt,
    "sin": sine,
    "cos": cosine,
}


def _single(function: Callable[[Array], Array]) -> Callable[[Step, Array], Array]:
    def compute(step: Step, a: Array) -> Array:
        values = flush(a, True).astype(np.float64)
        return flush(function(values).astype(np.float32), True)

    return compute


def _half(function: Callable[[Array], Array]) -> Callable[[Step, Array], Array]:
    return lambda step, a: function(a.astype(np.float64)).astype(np.float16)


for _name, _function in _FUNCTIONS.items():
    add_lanewise(f"v_{_name}_f32", _single(_function))
    add_lanewise(f"v_{_name}_f16", _half(_function))
    if _name in ("rcp", "rsq", "sqrt"):
        add_lanewise(f"v_{_name}_f64", lambda step, a, _f=_function: _f(a))
    if _name in ("exp", "log"):
        add_lanewise(f"v_{_name}_legacy_f32", _single(_function))
add_lanewise("v_rcp_iflag_f32", _single(_FUNCTIONS["rcp"]))
