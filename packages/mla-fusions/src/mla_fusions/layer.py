"""One layer's way into attention and out of it: `MLAPrologue` and `MLAEpilogue`.

The prologue turns hidden states into absorbed queries and a written cache, the epilogue attention's
latents into the layer's output. Dense projections are torch's products; all that stands between
them is a launch for the norms, and one for absorbed product, rotation and cache write, or for many
tokens two::

    prologue = MLAPrologue.from_module(layer.self_attn)
    epilogue = MLAEpilogue.from_module(layer.self_attn)
    q = prologue(hidden_states, cache, slots, positions, cos, sin)
    rank = prologue.dims.kv_lora_rank
    latents = mla_core.decode(q[..., :rank], q[..., rank:], kv, plan, sm_scale=sm_scale)
    hidden_states = epilogue(latents)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from mla_core.arch import arch_of
from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.dtypes import fp8_of_arch, torch_dtype
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.reference import quant
from mla_fusions.absorbed import (
    Product,
    product_of_fp8,
    product_of_halves,
    product_of_mxfp4,
    product_of_nvfp4,
)
from mla_fusions.absorbed_rope import join
from mla_fusions.compiling import uncompiled
from mla_fusions.norms import fused_qk_rmsnorm
from mla_fusions.rope_writers import written
from mla_fusions.rotation import rotate_and_write
from mla_fusions.rows import require_kernel

#: How W_UK and W_UV are stored: as they are given, or quantised when the layer is made.
Weights = Literal["plain", "fp8", "mxfp4", "nvfp4"]

#: Tokens up to which a prologue absorbs W_UK, rotates and writes in one launch. Few tokens leave
#: multiprocessors idle that the rotation fills; with many, it runs with the registers and the
#: shared memory of the product. `benchmarks/layer.py` times both: on an H200, one launch is faster
#: by a tenth to a third at 64 tokens, and about as fast as two at 256.
MAX_JOINED_TOKENS = 128

#: Stride of what torch multiplies: with one of 2**30, it has read elsewhere on a GPU.
_FARTHEST_ROWS = 2**23
_WEIGHTS = ("plain", "fp8", "mxfp4", "nvfp4")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HALF = (torch.bfloat16, torch.float16)
_FP8_GROUP = 128
#: Elements with one scale, and dtypes of activations, of weights in four bits.
_FP4_GROUP: dict[Weights, int] = {"mxfp4": 32, "nvfp4": 16}
_FP4_DTYPES: dict[Weights, tuple[torch.dtype, ...]] = {"mxfp4": (torch.bfloat16,), "nvfp4": _HALF}
#: The largest number of NVFP4 before the scale for all of it.
_NVFP4_MAX = 448 * 6.0
#: Attributes that are dims, in their order.
_NUMBERS = (
    "num_heads",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
)


class MLAPrologue:
    """Hidden states in, absorbed queries out, and the tokens' keys in the cache.

    Parameters
    ----------
    dims : MLADims
    kv_a_proj_with_mqa : [c + r, hidden], bf16, fp16 or fp32
        ``c`` is ``kv_lora_rank``, ``r`` ``qk_rope_head_dim``, ``h`` ``num_heads``. All weights are
        of one dtype and on one device, and have a contiguous last dimension.
    kv_a_layernorm : [c]
    kv_b_proj : [h * (qk_nope_head_dim + v_head_dim), c]
        Its W_UK is used where it is, unless it is quantised.
    q_proj : [h * (qk_nope_head_dim + r), hidden], optional
        Of models without a latent for the query; otherwise the next three.
    q_a_proj : [q_lora_rank, hidden], optional
    q_a_layernorm : [q_lora_rank], optional
    q_b_proj : [h * (qk_nope_head_dim + r), q_lora_rank], optional
    q_a_bias : [q_lora_rank], optional
    kv_a_bias : [c + r], optional
    q_eps, kv_eps : float
        Added to the mean of the squares in the norms.
    is_neox : bool
        How RoPE pairs elements: True ``i`` with ``i + r / 2`` (half split), False ``2 i`` with
        ``2 i + 1`` (adjacent, GPT-J, DeepSeek). Elements stay at their places.
    weights : "plain", "fp8", "mxfp4" or "nvfp4"
        How W_UK is stored. "fp8" has one scale for all, of the flavour of the device, and
        activations are quantised for each token and 128 elements; "mxfp4" needs bf16, which the
        activations stay in, and ``qk_nope_head_dim`` a multiple of 32; "nvfp4" bf16 or fp16 and a
        multiple of 16, and has a scale for all besides.
    max_joined_tokens : int
        Calls with more tokens multiply in one launch and rotate and write in another; see
        `MLAPrologue.joins`.

    Raises
    ------
    LayoutError
        A weight is missing or has another shape, dtype or device, or ``weights`` is none of these.
    UnsupportedProblemError
        Values of the model include the rotary part, or no kernel is for the weights' device.
    BackendUnavailableError
        Triton is missing, or does not interpret on a CPU.

    Notes
    -----
    The first projections are joined into one matrix, a copy: for DeepSeek-V3 30 MB a layer in bf16.
    Other weights are views of what was given; what is quantised is a copy. Inference only.
    """

    def __init__(
        self,
        dims: MLADims,
        *,
        kv_a_proj_with_mqa: torch.Tensor,
        kv_a_layernorm: torch.Tensor,
        kv_b_proj: torch.Tensor,
        q_proj: torch.Tensor | None = None,
        q_a_proj: torch.Tensor | None = None,
        q_a_layernorm: torch.Tensor | None = None,
        q_b_proj: torch.Tensor | None = None,
        q_a_bias: torch.Tensor | None = None,
        kv_a_bias: torch.Tensor | None = None,
        q_eps: float = 1e-6,
        kv_eps: float = 1e-6,
        is_neox: bool = False,
        weights: Weights = "plain",
        max_joined_tokens: int = MAX_JOINED_TOKENS,
    ) -> None:
        op = "MLAPrologue"
        _check_dims(op, dims)
        require_kernel(op, arch_of(kv_b_proj.device))
        self.dims = dims
        self.max_joined_tokens = int(max_joined_tokens)
        self.q_eps, self.kv_eps, self.is_neox = float(q_eps), float(kv_eps), bool(is_neox)
        checked = _Checker(op, kv_a_proj_with_mqa)
        kv_a = checked("kv_a_proj_with_mqa", kv_a_proj_with_mqa, (dims.latent_dim, "hidden"))
        hidden, q_width = kv_a.shape[1], dims.num_heads * dims.qk_head_dim
        self.kv_norm = checked("kv_a_layernorm", kv_a_layernorm, (dims.kv_lora_rank,))
        latent = (q_a_proj, q_a_layernorm, q_b_proj)
        if any((part is None) != (q_proj is not None) for part in latent):
            raise LayoutError(
                f"{op}: either q_proj alone or all of q_a_proj, q_a_layernorm and q_b_proj must be "
                "given, got another choice"
            )
        self.q_norm: torch.Tensor | None = None
        self._q_b: torch.Tensor | None = None
        if q_proj is not None:
            first = checked("q_proj", q_proj, (q_width, hidden))
            if q_a_bias is not None:
                raise LayoutError(f"{op}: q_a_bias must be None with q_proj, got a tensor")
        else:
            assert q_a_proj is not None
            assert q_a_layernorm is not None
            assert q_b_proj is not None
            first = checked("q_a_proj", q_a_proj, ("q_lora_rank", hidden))
            rank = first.shape[0]
            self.q_norm = checked("q_a_layernorm", q_a_layernorm, (rank,))
            self._q_b = checked("q_b_proj", q_b_proj, (q_width, rank))
        self._first = torch.cat((first, kv_a))
        self._first_bias: torch.Tensor | None = None
        if q_a_bias is not None or kv_a_bias is not None:
            biases = []
            for what, bias, weight in (
                ("q_a_bias", q_a_bias, first),
                ("kv_a_bias", kv_a_bias, kv_a),
            ):
                shape = (weight.shape[0],)
                zeros = weight.new_zeros(shape)
                biases.append(zeros if bias is None else checked(what, bias, shape))
            self._first_bias = torch.cat(biases)
        w_uk = _split_kv_b(checked, kv_b_proj, dims)[0]
        self._w_uk = _Absorbed.of(op, w_uk.transpose(1, 2), weights)

    @classmethod
    def from_module(
        cls,
        module: Any,
        *,
        is_neox: bool | None = None,
        weights: Weights = "plain",
        max_joined_tokens: int = MAX_JOINED_TOKENS,
    ) -> MLAPrologue:
        """Take the weights of an attention module that has DeepSeek's names for them.

        Parameters
        ----------
        module : transformers' DeepseekV2Attention or DeepseekV3Attention, or alike
            With ``num_heads``, ``kv_lora_rank``, ``qk_rope_head_dim``, ``qk_nope_head_dim``,
            ``v_head_dim``, ``kv_a_proj_with_mqa``, ``kv_a_layernorm``, ``kv_b_proj``, and either
            ``q_proj`` or ``q_a_proj``, ``q_a_layernorm`` and ``q_b_proj``. Projections have a
            ``weight`` and may have a ``bias``, norms a ``weight`` and ``variance_epsilon``.
        is_neox : bool, optional
            By default the opposite of ``module.config.rope_interleave``, and False without that.
        weights : "plain", "fp8", "mxfp4" or "nvfp4"
        max_joined_tokens : int

        Raises
        ------
        LayoutError
            The module lacks one of these attributes, or as for the class.
        """
        op = "MLAPrologue.from_module"
        dims = _dims_of(op, module)
        if is_neox is None:
            is_neox = not getattr(getattr(module, "config", None), "rope_interleave", True)
        tensors: dict[str, torch.Tensor | None] = {}
        direct = getattr(module, "q_proj", None) is not None
        names = ("q_proj",) if direct else ("q_a_proj", "q_b_proj")
        for name in (*names, "kv_a_proj_with_mqa", "kv_b_proj"):
            tensors[name] = _attribute(op, module, name, "weight")
        norms = {"kv_eps": "kv_a_layernorm"} | ({} if direct else {"q_eps": "q_a_layernorm"})
        for name in norms.values():
            tensors[name] = _attribute(op, module, name, "weight")
        for name in ("q_proj", "q_b_proj", "kv_b_proj"):
            if getattr(getattr(module, name, None), "bias", None) is not None:
                raise LayoutError(f"{op}: module.{name}.bias must be None, got a tensor")
        if not direct:
            tensors["q_a_bias"] = getattr(module.q_a_proj, "bias", None)
        tensors["kv_a_bias"] = getattr(module.kv_a_proj_with_mqa, "bias", None)
        eps = {
            what: float(_attribute(op, module, name, "variance_epsilon"))
            for what, name in norms.items()
        }
        given: dict[str, Any] = {**tensors, **eps}
        return cls(
            dims,
            is_neox=is_neox,
            weights=weights,
            max_joined_tokens=max_joined_tokens,
            **given,
        )

    def __repr__(self) -> str:
        """Say what the layer is, and which calls take one launch less."""
        weights = self._w_uk.kind if self._w_uk.scales is not None else str(self._w_uk.dtype)
        joined = f"up to {self.max_joined_tokens} tokens" if self._w_uk.has_kernel else "never"
        return f"MLAPrologue({self.dims}, W_UK in {weights}, joined {joined})"

    def joins(self, num_tokens: int) -> bool:
        """Say whether a call absorbs W_UK, rotates and writes the cache in one launch.

        So it does for at most ``max_joined_tokens`` tokens, whatever the layout of the cache and
        the dtype of the queries, unless W_UK is in fp32, which torch multiplies. Otherwise these
        are two launches, or three where K is split, and make the same numbers.
        """
        return self._w_uk.has_kernel and num_tokens <= self.max_joined_tokens

    @uncompiled
    def __call__(
        self,
        hidden_states: torch.Tensor,
        cache: LatentCache,
        slots: torch.Tensor,
        positions: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        q_out: torch.Tensor | None = None,
        q_scale: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Project, norm, absorb, rotate, and write the tokens' keys to the cache.

        Parameters
        ----------
        hidden_states : [T, hidden], like the weights, last dim contiguous
            Normed already, as a layer hands them to attention.
        cache : LatentCache
            Of any layout.
        slots : [T], int64 or int32
            ``page * page_size + offset``, distinct; one outside the cache skips its token's key.
        positions : [>= T], int64 or int32
            Rows of the tables; clamped into them.
        cos, sin : [max_position, r / 2 or r], bf16, fp16 or fp32
            A column for each pair, or for each element.
        q_out : [T, h, c + r or more], bf16, fp16, fp32, fp8 or uint8, or None
            Elements behind ``c + r`` stay; uint8 holds the fp8 flavour of the device.
        q_scale : fp32, one element, or None
            fp8 queries are divided by it; None is 1. A number is copied to the device in each call.

        Returns
        -------
        q : [T, h, c + r], the absorbed part first, like ``hidden_states`` unless given
            ``q[..., :c]`` is ``ql_nope``, ``q[..., c : c + r]`` is ``q_pe``, rotated.

        Raises
        ------
        LayoutError
        UnsupportedProblemError
            A gradient is wanted.
        """
        op, dims = "MLAPrologue", self.dims
        _check_input(op, "hidden_states", hidden_states, ("T", self._first.shape[1]), self._first)
        if hidden_states.shape[0] > 1 and hidden_states.stride(0) > _FARTHEST_ROWS:
            raise LayoutError(
                f"{op}: hidden_states must have rows at most {_FARTHEST_ROWS} elements apart, got "
                f"{hidden_states.stride(0)}"
            )
        if (cache.dims.kv_lora_rank, cache.dims.qk_rope_head_dim) != (
            dims.kv_lora_rank,
            dims.qk_rope_head_dim,
        ):
            raise LayoutError(
                f"{op}: cache must have the layer's kv_lora_rank and qk_rope_head_dim, "
                f"{dims.kv_lora_rank} and {dims.qk_rope_head_dim}, got {cache.dims.kv_lora_rank} "
                f"and {cache.dims.qk_rope_head_dim}"
            )
        num_tokens, rank = hidden_states.shape[0], dims.kv_lora_rank
        first = functional.linear(hidden_states, self._first, self._first_bias)
        q_first, kv_c, k_pe = first.split(
            (first.shape[1] - dims.latent_dim, rank, dims.qk_rope_head_dim), dim=1
        )
        q = self._norm(q_first, kv_c).view(num_tokens, dims.num_heads, dims.qk_head_dim)
        q_nope, q_pe = q.split((dims.qk_nope_head_dim, dims.qk_rope_head_dim), dim=-1)
        if q_out is None:
            q_out = q.new_empty(num_tokens, dims.num_heads, dims.latent_dim)
        product = self._w_uk.product(op, q_nope)
        latent = None
        if product is None:
            latent = q.new_empty(num_tokens, dims.num_heads, rank)
            self._w_uk.multiply(op, q_nope, latent)
        turn, queries, keys, _ = written(
            op,
            latent,
            q_pe,
            kv_c,
            k_pe,
            cache,
            slots,
            positions,
            cos,
            sin,
            is_neox=self.is_neox,
            q_out=q_out,
            q_scale=q_scale,
        )
        if product is not None:
            # The product stores its part where attention reads it; the rotation writes the rest.
            stored = q_out
            if q_out.dtype == torch.uint8:
                stored = q_out.view(torch_dtype(fp8_of_arch(arch_of(q_out.device))))
            y, product.y_factor = stored[..., :rank], queries.factor
            if self.joins(num_tokens):
                join(product, y.transpose(0, 1), turn, queries, keys)
                return q_out
            product.run(None, None, y, True, None, None, takes_fp8=True)
        rotate_and_write(op, turn, queries, keys)
        return q_out

    def _norm(self, q_first: torch.Tensor, kv_c: torch.Tensor) -> torch.Tensor:
        """Norm ``kv_c`` in place and return the queries, [T, h * (qk_nope_head_dim + r)]."""
        if self.q_norm is None:
            fused_qk_rmsnorm(
                q=kv_c, q_weight=self.kv_norm, q_epsilon=self.kv_eps, q_out_unquantized=kv_c
            )
            return q_first
        normed = torch.empty_like(q_first, memory_format=torch.contiguous_format)
        fused_qk_rmsnorm(
            q=q_first,
            q_weight=self.q_norm,
            q_epsilon=self.q_eps,
            q_out_unquantized=normed,
            k=kv_c,
            k_weight=self.kv_norm,
            k_epsilon=self.kv_eps,
            k_out=kv_c,
        )
        assert self._q_b is not None
        return functional.linear(normed, self._q_b)


class MLAEpilogue:
    """Attention's latents in, the values of all heads or the layer's output out.

    Parameters
    ----------
    dims : MLADims
    kv_b_proj : [h * (qk_nope_head_dim + v_head_dim), c], bf16, fp16 or fp32
        Its W_UV is used where it is, unless it is quantised.
    o_proj : [hidden, h * v_head_dim], like ``kv_b_proj``, optional
    o_bias : [hidden], like ``kv_b_proj``, optional
    weights : "plain", "fp8", "mxfp4" or "nvfp4"
        How W_UV is stored, as in `MLAPrologue`.

    Raises
    ------
    LayoutError
        A weight has another shape, dtype or device, or ``weights`` is none of these.
    UnsupportedProblemError, BackendUnavailableError
        As for `MLAPrologue`.
    """

    def __init__(
        self,
        dims: MLADims,
        *,
        kv_b_proj: torch.Tensor,
        o_proj: torch.Tensor | None = None,
        o_bias: torch.Tensor | None = None,
        weights: Weights = "plain",
    ) -> None:
        op = "MLAEpilogue"
        _check_dims(op, dims)
        require_kernel(op, arch_of(kv_b_proj.device))
        self.dims = dims
        checked = _Checker(op, kv_b_proj)
        self._w_uv = _Absorbed.of(op, _split_kv_b(checked, kv_b_proj, dims)[1], weights)
        self._o: torch.Tensor | None = None
        self._o_bias: torch.Tensor | None = None
        if o_proj is not None:
            self._o = checked("o_proj", o_proj, ("hidden", dims.num_heads * dims.v_head_dim))
        if o_bias is not None:
            if self._o is None:
                raise LayoutError(f"{op}: o_bias must be None without o_proj, got a tensor")
            self._o_bias = checked("o_bias", o_bias, (self._o.shape[0],))

    @classmethod
    def from_module(
        cls, module: Any, *, with_o_proj: bool = True, weights: Weights = "plain"
    ) -> MLAEpilogue:
        """Take the weights of an attention module that has DeepSeek's names for them.

        Parameters
        ----------
        module : as in `MLAPrologue.from_module`, with ``kv_b_proj`` and ``o_proj``
        with_o_proj : bool
            Whether ``o_proj`` is applied too.
        weights : "plain", "fp8", "mxfp4" or "nvfp4"

        Raises
        ------
        LayoutError
            The module lacks an attribute, or as for the class.
        """
        op = "MLAEpilogue.from_module"
        dims = _dims_of(op, module)
        return cls(
            dims,
            kv_b_proj=_attribute(op, module, "kv_b_proj", "weight"),
            o_proj=_attribute(op, module, "o_proj", "weight") if with_o_proj else None,
            o_bias=getattr(module.o_proj, "bias", None) if with_o_proj else None,
            weights=weights,
        )

    @uncompiled
    def __call__(self, latents: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Apply W_UV, and ``o_proj`` where there is one.

        Parameters
        ----------
        latents : [T, h, c], like the weights, last dim contiguous
            What `mla_core.decode` returns.
        out : [T, h * v_head_dim], contiguous, like ``latents``, optional
            Gets the values of all heads, the input of ``o_proj``.

        Returns
        -------
        values : [T, h * v_head_dim], ``out`` where given; or [T, hidden] with ``o_proj``

        Raises
        ------
        LayoutError
        UnsupportedProblemError
            A gradient is wanted.
        """
        op, dims = "MLAEpilogue", self.dims
        shape: tuple[int | str, ...] = ("T", dims.num_heads, dims.kv_lora_rank)
        _check_input(op, "latents", latents, shape, self._w_uv)
        num_tokens = latents.shape[0]
        width = dims.num_heads * dims.v_head_dim
        if out is None:
            out = latents.new_empty(num_tokens, width)
        dtypes = (latents.dtype,)
        shape = (num_tokens, width)
        check_tensor(op, "out", out, shape=shape, dtypes=dtypes, device=latents.device)
        if not out.is_contiguous():
            raise LayoutError(f"{op}: out must be contiguous, got strides {out.stride()}")
        self._w_uv.multiply(op, latents, out.view(num_tokens, dims.num_heads, dims.v_head_dim))
        return out if self._o is None else functional.linear(out, self._o, self._o_bias)


@dataclass(frozen=True, slots=True)
class _Absorbed:
    """One matrix [n, k] for each head, and how it is multiplied.

    Parameters
    ----------
    weight : [h, n, k], or [h, n, k / 2] for MXFP4 and NVFP4
    scales : of the whole weight, or of each group, or None
    dtype, device
        Of activations.
    factor : fp32 [1], or None
        Of the whole weight, besides ``scales``.
    """

    weight: torch.Tensor
    scales: torch.Tensor | None
    kind: Weights
    dtype: torch.dtype
    device: torch.device
    factor: torch.Tensor | None = None

    @classmethod
    def of(cls, op: str, weight: torch.Tensor, kind: Weights) -> _Absorbed:
        """Store ``weight`` [h, n, k] as asked for.

        Raises
        ------
        LayoutError
        """
        if kind not in _WEIGHTS:
            raise LayoutError(f"{op}: weights must be one of {', '.join(_WEIGHTS)}, got {kind!r}")
        device, dtype = weight.device, weight.dtype
        if kind == "plain":
            return cls(weight, None, kind, dtype, device)
        if kind == "fp8":
            fp8 = fp8_of_arch(arch_of(device))
            stored, scale = quant.quantize_per_tensor(weight, fp8=fp8)
            return cls(stored, scale.reshape(1), kind, dtype, device)
        if dtype not in _FP4_DTYPES[kind]:
            accepted = " or ".join(str(each).removeprefix("torch.") for each in _FP4_DTYPES[kind])
            raise LayoutError(f"{op}: weights={kind!r} must be made of {accepted}, got {dtype}")
        if weight.shape[2] % _FP4_GROUP[kind]:
            raise LayoutError(
                f"{op}: weights={kind!r} must have a multiple of {_FP4_GROUP[kind]} elements to "
                f"sum over, got {weight.shape[2]}"
            )
        if kind == "mxfp4":
            packed, scales = quant.quantize_mxfp4(weight.contiguous())
            return cls(packed, scales, kind, dtype, device)
        # Scales of groups are fp8, so that one for all brings them into its range.
        largest = weight.abs().amax().float()
        factor = torch.where(largest > 0, largest / _NVFP4_MAX, 1.0).reshape(1)
        packed, scales = quant.quantize_nvfp4(weight.float() / factor)
        return cls(packed, scales, kind, dtype, device, factor)

    @property
    def has_kernel(self) -> bool:
        """Whether our kernels multiply it; fp32 as it is, for debugging, is torch's."""
        return self.scales is not None or self.dtype in _HALF

    def product(self, op: str, x: torch.Tensor) -> Product | None:
        """Return the product of ``x`` [T, h, k] with every head's matrix; None for torch's."""
        if not self.has_kernel:
            return None
        if self.scales is None:
            return product_of_halves(op, ("x", "w"), x, self.weight, is_turned=True)
        names = ("x", "w", "w_scale")
        if self.kind == "fp8":
            return product_of_fp8(
                op, names, x, self.weight, self.scales, _FP8_GROUP, is_turned=True
            )
        if self.kind == "nvfp4":
            return product_of_nvfp4(
                op,
                (*names, "w_factor"),
                x,
                self.weight,
                self.scales,
                self.factor,
                is_turned=True,
            )
        return product_of_mxfp4(
            op, names, x, self.weight, self.scales, is_quantised=False, is_turned=True
        )

    def multiply(self, op: str, x: torch.Tensor, out: torch.Tensor) -> None:
        """Store the product of ``x`` [T, h, k] with every head's matrix in ``out`` [T, h, n]."""
        product = self.product(op, x)
        if product is not None:
            product.run(None, None, out, True, None, None)
        else:
            torch.bmm(x.transpose(0, 1), self.weight.transpose(1, 2), out=out.transpose(0, 1))


class _Checker:
    """Checks weights, which are to be like the first one, and takes them out of autograd."""

    def __init__(self, op: str, like: torch.Tensor) -> None:
        if like.dtype not in _DTYPES:
            raise LayoutError(f"{op}: weights must be bf16, fp16 or fp32, got {like.dtype}")
        self.op, self.dtype, self.device = op, like.dtype, like.device

    def __call__(self, name: str, weight: torch.Tensor, shape: Sequence[int | str]) -> torch.Tensor:
        weight, dtypes = weight.detach(), (self.dtype,)
        check_tensor(self.op, name, weight, shape=shape, dtypes=dtypes, device=self.device)
        return weight


def _split_kv_b(
    checked: _Checker, kv_b_proj: torch.Tensor, dims: MLADims
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W_UK [h, qk_nope_head_dim, c] and W_UV [h, v_head_dim, c] as views."""
    rows = dims.num_heads * (dims.qk_nope_head_dim + dims.v_head_dim)
    kv_b = checked("kv_b_proj", kv_b_proj, (rows, dims.kv_lora_rank))
    heads = kv_b.unflatten(0, (dims.num_heads, -1))
    return heads[:, : dims.qk_nope_head_dim], heads[:, dims.qk_nope_head_dim :]


def _check_dims(op: str, dims: MLADims) -> None:
    if dims.value_includes_rope:
        raise UnsupportedProblemError(
            f"{op}: dims must have value_includes_rope=False, got True; such models have no W_UV"
        )


def _check_input(
    op: str,
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | str],
    like: torch.Tensor | _Absorbed,
) -> None:
    check_tensor(op, name, tensor, shape=shape, dtypes=(like.dtype,), device=like.device)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise UnsupportedProblemError(
            f"{op}: {name} must not require a gradient, got one that does; call it under "
            "torch.no_grad()"
        )


def _dims_of(op: str, module: Any) -> MLADims:
    heads, latent, rope, nope, value = (int(_attribute(op, module, name)) for name in _NUMBERS)
    return MLADims(heads, latent, rope, nope, value)


def _attribute(op: str, module: Any, *path: str) -> Any:
    """Return an attribute of an attribute of a module.

    Raises
    ------
    LayoutError
        There is none, or it is None.
    """
    value, walked = module, "module"
    for name in path:
        walked += f".{name}"
        value = getattr(value, name, None)
        if value is None:
            raise LayoutError(
                f"{op}: {walked} must be there, got a {type(module).__name__} without it; pass the "
                "weights to the class itself"
            )
    return value
