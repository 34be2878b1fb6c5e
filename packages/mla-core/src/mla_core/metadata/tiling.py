"""How query heads and tokens map to the rows of one workgroup: rules as a table of data.

A workgroup multiplies a tile of *packed rows*, ``query tokens * heads``, with the cache. Which
shapes a kernel family takes as they are, which must first be folded into groups of 16 heads, and
how many packed rows fit a tile, differs by architecture and dtype. Those facts are the rows below;
the first row that matches decides. The CDNA rows describe AITER's persistent decode kernels
(ROCm/aiter); every other architecture takes any head count as it is.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from mla_core.dtypes import FP8_DTYPES
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.metadata.profile import DeviceProfile, ceil_div

FOLDED_HEADS = 16
DEFAULT_PACKED_ROWS = 128
_FP8 = ("fp8", "fp8")
_BF16 = ("bf16", "bf16")
_942 = frozenset({"gfx942"})
_950 = frozenset({"gfx950"})
_CDNA = _942 | _950


@dataclass(frozen=True, slots=True)
class Shape:
    """What rules look at; ``q_len`` is -1 when unknown, and ``rows`` is then negative."""

    arch: str
    dtypes: tuple[str, str]
    num_heads: int
    q_len: int
    experimental: bool

    @classmethod
    def of(
        cls, num_heads: int, q_len: int, q_dtype: str, kv_dtype: str, profile: DeviceProfile
    ) -> Shape:
        """Name the dtypes by family: both fp8 encodings tile alike."""
        family = ["fp8" if name in FP8_DTYPES else name for name in (q_dtype, kv_dtype)]
        known_q = q_len if q_len >= 1 else -1
        return cls(profile.arch, (family[0], family[1]), num_heads, known_q, profile.experimental)

    @property
    def rows(self) -> int:
        """Packed query rows of one request."""
        return self.num_heads * self.q_len


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a table; a field left ``None`` matches anything."""

    archs: Container[str] | None = None
    dtypes: tuple[str, str] | None = None
    heads: Container[int] | None = None
    q_lens: Container[int] | None = None
    rows: Container[int] | None = None
    experimental: bool = False

    def matches(self, shape: Shape) -> bool:
        """Whether every field given accepts the shape."""
        return (
            (self.archs is None or shape.arch in self.archs)
            and (self.dtypes is None or shape.dtypes == self.dtypes)
            and (self.heads is None or shape.num_heads in self.heads)
            and (self.q_lens is None or shape.q_len in self.q_lens)
            and (self.rows is None or shape.rows in self.rows)
            and (shape.experimental or not self.experimental)
        )


_ANY = 1 << 30  # beyond every head count and row count
_EXPERIMENTAL_128 = Rule(_942, _FP8, {16, 32, 64}, rows={128}, experimental=True)

#: Shapes a CDNA kernel takes as they are. Other head counts fold when 16 divides them.
NATIVE: tuple[Rule, ...] = (
    Rule(heads={16}),
    Rule(_CDNA, _FP8, {64}, q_lens={1}),
    Rule(_942, _FP8, {128}),
    Rule(_942, _BF16, {8}, q_lens={2}),
    _EXPERIMENTAL_128,
    Rule(_950, _BF16),
    Rule(_950, _FP8, {32, 64, 128}),
    Rule(_950, _FP8, {8}, q_lens={4}),
)

#: Shapes whose tile holds 64 packed rows instead of 128.
NARROW_TILES: tuple[Rule, ...] = (
    Rule(_950, _BF16, range(1, 65), rows=range(64, 128)),
    Rule(_950, _BF16, {48}, rows=range(64, _ANY)),
    Rule(_950, _FP8, {32}, q_lens={3}),
)

#: Pieces of every request under equal splitting, where a kernel family fixes them.
FIXED_SPLITS: dict[str, int] = {"gfx942": 16}

#: Shapes whose kernel runs two workgroups on one compute unit.
TWO_PER_CU: tuple[Rule, ...] = (Rule(_950, _FP8, rows={64}, experimental=True),)

#: Packed rows assumed when buffers are sized: (rows of a tile, heads may exceed half a tile,
#: rules). With more heads than half a tile every token is a tile of its own.
BUFFER_TILES: tuple[tuple[int, bool, tuple[Rule, ...]], ...] = (
    (64, True, NARROW_TILES),
    (
        128,
        False,
        (
            Rule(heads={16}),
            Rule(_942, _FP8, {128}),
            _EXPERIMENTAL_128,
            Rule(_950, _FP8, {32}, q_lens={4}),
            Rule(_950, _FP8, {64, 128}),
            Rule(_CDNA, _FP8, {64}, q_lens={1}),
        ),
    ),
    (
        128,
        True,
        (
            Rule(_950, _BF16, (set(range(1, 129)) - {48}), rows=range(128, _ANY)),
            Rule(_950, _BF16, range(65, _ANY)),
        ),
    ),
    (16, False, (Rule(),)),
)


@dataclass(frozen=True, slots=True)
class HeadTiling:
    """How a shape runs: ``fold`` groups of ``num_heads`` heads, tiles of ``packed_rows`` rows.

    ``one_tile`` says that all query tokens of any request fit one tile.
    """

    fold: int
    num_heads: int
    packed_rows: int
    one_tile: bool

    @property
    def one_token(self) -> bool:
        """Whether heads fill more than half a tile, so that a tile holds one token."""
        return 2 * self.num_heads > self.packed_rows

    def num_tiles(self, q_len: int) -> int:
        """Query tiles of a request with ``q_len`` query tokens, all of about the same size."""
        if q_len == 0 or self.one_tile:
            return min(q_len, 1)
        if self.one_token:
            return q_len
        wanted = ceil_div(q_len * self.num_heads, self.packed_rows)
        # Equal sizes, rounded up, may need fewer tiles: 9 tokens in 4 tiles are 3 + 3 + 3.
        return ceil_div(q_len, ceil_div(q_len, wanted))

    def max_tiles(self, q_len: int) -> int:
        """Most query tiles of any request with up to ``q_len`` query tokens."""
        if q_len == 0 or self.one_tile:
            return min(q_len, 1)
        return q_len if self.one_token else ceil_div(q_len * self.num_heads, self.packed_rows)

    def max_tile_tokens(self, q_len: int) -> int:
        """Most query tokens of a tile of any request with up to ``q_len`` of them."""
        if q_len == 0 or self.one_tile:
            return q_len
        return 1 if self.one_token else min(q_len, ceil_div(self.packed_rows, self.num_heads))


def head_tiling(
    op: str, num_heads: int, q_len: int, q_dtype: str, kv_dtype: str, profile: DeviceProfile
) -> HeadTiling:
    """Look up how a shape runs on a device.

    Parameters
    ----------
    op : str
        Named in errors.
    num_heads, q_len : int
        Local query heads; most query tokens of a request, below 1 when unknown.
    q_dtype, kv_dtype : str
        Short dtype names.
    profile : DeviceProfile

    Raises
    ------
    LayoutError
        ``num_heads`` is not positive.
    UnsupportedProblemError
        The architecture's kernels take neither this head count nor 16 heads of it at a time.
    """
    if num_heads < 1:
        raise LayoutError(f"{op}: num_heads must be >= 1, got {num_heads}")
    shape = Shape.of(num_heads, q_len, q_dtype, kv_dtype, profile)
    fold = 1
    if shape.arch in _CDNA and not _any(NATIVE, shape):
        if num_heads % FOLDED_HEADS:
            raise UnsupportedProblemError(
                f"{op}: num_heads must be a multiple of {FOLDED_HEADS} for "
                f"{shape.dtypes[0]} queries and a {shape.dtypes[1]} cache on {shape.arch}, got "
                f"num_heads={num_heads} with max_seqlen_qo={q_len}; pad the heads"
            )
        fold = num_heads // FOLDED_HEADS
    packed = 64 if _any(NARROW_TILES, shape) else DEFAULT_PACKED_ROWS
    return HeadTiling(fold, num_heads // fold, packed, one_tile=0 < shape.rows <= packed)


def workgroups_per_cu(shape: Shape) -> int:
    """How many persistent workgroups of the shape's kernel share a compute unit."""
    return 2 if _any(TWO_PER_CU, shape) else 1


def buffer_tiles(shape: Shape) -> int:
    """Upper bound of the query tiles of one request, folds included, for sizing buffers."""
    for packed, may_be_one_token, rules in BUFFER_TILES:
        if _any(rules, shape):
            if may_be_one_token and 2 * shape.num_heads > packed:
                return shape.q_len
            return ceil_div(shape.rows, packed)
    raise AssertionError("the last row of BUFFER_TILES matches every shape")


def _any(rules: tuple[Rule, ...], shape: Shape) -> bool:
    return any(rule.matches(shape) for rule in rules)
