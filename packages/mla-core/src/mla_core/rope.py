"""RoPE fused into decode: what a plan fixes (`FusedRope`) and what a call brings (`RopeInputs`).

Query ``i`` of a request with ``q_len`` query tokens is the token of its key
``kv_len - q_len + i``. Those newest keys arrive in the cache as projected; decode rotates them and
the queries by ``positions``, and leaves older keys alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core import env
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.errors import LayoutError

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class FusedRope:
    """How decode rotates ``q_pe`` and each request's newest keys.

    ``x`` becomes ``x * cos + rot(x) * sin`` in fp32, ``rot`` mapping each pair (a, b) to (-b, a).

    Parameters
    ----------
    is_neox : bool
        True pairs element ``i`` with ``i + rotary_dim / 2`` (half split), False ``2 i`` with
        ``2 i + 1`` (adjacent, GPT-J, DeepSeek).
    rotary_dim : int
        Even, at least 2: how many elements of the rotary part turn. The others pass through.
    dim_offset : int
        Elements ``dim_offset .. dim_offset + rotary_dim - 1`` of the rotary part turn.
    position_offset : int
        Added to every position.
    write_back : bool
        Afterwards the cache holds the rotated keys. Otherwise it is only read.

    Notes
    -----
    The result is that of rotating first and attending then: a rotated key is rounded to the dtype
    the cache stores it in (with the cache's scale, if it has one), written back or not, and a
    rotated query to its own dtype, an fp8 query to bf16.
    """

    is_neox: bool
    rotary_dim: int
    dim_offset: int = 0
    position_offset: int = 0
    write_back: bool = False

    def __post_init__(self) -> None:
        """Refuse values no kernel can mean."""
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise LayoutError(
                f"FusedRope: rotary_dim must be an even number >= 2, got {self.rotary_dim}"
            )
        if self.dim_offset < 0:
            raise LayoutError(f"FusedRope: dim_offset must be >= 0, got {self.dim_offset}")

    @property
    def features(self) -> frozenset[str]:
        """The feature words of a problem with this rotation."""
        return frozenset({"rope", "rope_write_back"} if self.write_back else {"rope"})

    def check_dims(self, op: str, dims: MLADims) -> None:
        """Refuse a rotation that reaches past the rotary part.

        Raises
        ------
        LayoutError
        """
        if self.dim_offset + self.rotary_dim > dims.qk_rope_head_dim:
            raise LayoutError(
                f"{op}: options.rope must have dim_offset + rotary_dim <= qk_rope_head_dim="
                f"{dims.qk_rope_head_dim}, got {self.dim_offset} + {self.rotary_dim}"
            )


@dataclass(frozen=True, slots=True)
class RopeInputs:
    """The tensors of one call with fused RoPE; `mla_core.decode` makes and checks it.

    Parameters
    ----------
    cos_sin_cache : [max_position, rotary_dim], bf16, fp16 or fp32
        Cosines of each pair, then sines.
    positions : [total_q], int32 or int64
    k_pe_tokens : [total_q, qk_rope_head_dim], bf16, fp16 or fp32, or None
        Receives the rotated key of each query token, 0 where its key is not in the cache.
    """

    cos_sin_cache: torch.Tensor
    positions: torch.Tensor
    k_pe_tokens: torch.Tensor | None = None

    @classmethod
    def checked(
        cls,
        op: str,
        rope: FusedRope | None,
        dims: MLADims,
        qo_indptr: torch.Tensor,
        total_q: int,
        cos_sin_cache: torch.Tensor | None,
        positions: torch.Tensor | None,
        k_pe_tokens: torch.Tensor | None,
    ) -> RopeInputs | None:
        """Bind the tensors of a call, or return None when the plan rotates nothing.

        Raises
        ------
        LayoutError
            A tensor is missing, or has another shape, dtype or device.
        """
        if rope is None:
            for name, tensor in (
                ("cos_sin_cache", cos_sin_cache),
                ("positions", positions),
                ("k_pe_tokens", k_pe_tokens),
            ):
                if tensor is not None:
                    raise LayoutError(
                        f"{op}: {name} must be None with a plan without options.rope, "
                        f"got {tuple(tensor.shape)}"
                    )
            return None
        for name, tensor in (("cos_sin_cache", cos_sin_cache), ("positions", positions)):
            if tensor is None:
                raise LayoutError(f"{op}: {name} must be given with options.rope, got None")
        assert cos_sin_cache is not None
        assert positions is not None
        device = qo_indptr.device
        check_tensor(
            op,
            "cos_sin_cache",
            cos_sin_cache,
            shape=("max_position", rope.rotary_dim),
            dtypes=_FLOATS,
            device=device,
        )
        check_tensor(op, "positions", positions, shape=(total_q,), dtypes=_INTEGERS, device=device)
        if k_pe_tokens is not None:
            shape = (total_q, dims.qk_rope_head_dim)
            check_tensor(op, "k_pe_tokens", k_pe_tokens, shape=shape, dtypes=_FLOATS, device=device)
        return cls(cos_sin_cache, positions, k_pe_tokens)

    def check_values(self, op: str, rope: FusedRope, qo_indptr: torch.Tensor) -> None:
        """Check on the CPU, or under ``MLA_CHECK=1``, that each position has a row of the table.

        Raises
        ------
        LayoutError
        """
        if self.positions.device.type != "cpu" and not env.flag("MLA_CHECK"):
            return
        used = self.positions[: int(qo_indptr[-1])].long() + rope.position_offset
        num_rows = self.cos_sin_cache.shape[0]
        bad = (used < 0) | (used >= num_rows)
        if bool(bad.any()):
            where = int(bad.int().argmax())
            raise LayoutError(
                f"{op}: positions (plus position_offset={rope.position_offset}) must be in "
                f"0..{num_rows - 1}, the rows of cos_sin_cache, got {int(used[where])} at {where}"
            )
