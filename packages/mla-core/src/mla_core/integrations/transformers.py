"""Hugging Face transformers: run DeepSeek-V2 and V3 models from our paged latent cache.

transformers (5.15 and later) hands its attention modules' caches the latents and expands them to
per-head keys and values afterwards, in ``expand_kv``. So nothing of the model needs patching:
`enable` makes ``expand_kv`` the identity and selects an attention function that absorbs W_UK into
the query, attends to the latents through `mla_core.decode`, and applies W_UV to the result.

A ragged batch is one row of packed tokens, ``input_ids`` [1, total_q]. `PagedLatentCache` writes
their latents to pages and gives each token its own request's context, so one forward serves
requests of any lengths::

    enable(model)
    cache = PagedLatentCache.allocate(model.config, num_pages=256, page_size=16, layout="bf16")
    inputs = cache.begin_step(qo_indptr, kv_indptr, kv_page_indices, kv_last_page_len)
    logits = model(input_ids=packed_tokens, **inputs).logits  # [1, total_q, vocab_size]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

import mla_core
from mla_core import LatentCache, MLADims, PagedKV, env
from mla_core.errors import LayoutError, UnsupportedProblemError

#: Name of our attention function in transformers' registries.
ATTENTION_NAME = "mla_core"

#: ``config.model_type`` of the models whose attention is dense MLA with ``expand_kv``.
MODEL_TYPES = ("deepseek_v2", "deepseek_v3")

Prefill = Literal["expanded", "absorbed"]


def dims_of(config: PreTrainedConfig) -> MLADims:
    """Return the MLA dimensions of a DeepSeek model's configuration."""
    return MLADims(
        num_heads=config.num_attention_heads,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim,
    )


def enable(model: PreTrainedModel) -> None:
    """Make a model attend through our ops; its weights and its forward stay as they are.

    Parameters
    ----------
    model : a DeepSeek-V2 or DeepSeek-V3 model

    Raises
    ------
    UnsupportedProblemError
        The model is of another type, or transformers is older than 5.15.
    """
    model_type = model.config.model_type
    if model_type not in MODEL_TYPES:
        raise UnsupportedProblemError(
            f"enable: model must be of type {' or '.join(MODEL_TYPES)}, got {model_type!r}"
        )
    modules = [module for module in model.modules() if hasattr(module, "expand_kv")]
    if not modules:
        raise UnsupportedProblemError(
            "enable: model must have attention modules with expand_kv, got none; "
            "install transformers>=5.15"
        )
    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
    for module in modules:
        module.expand_kv = _keep_latents
    model.set_attn_implementation(ATTENTION_NAME)


@dataclass(frozen=True)
class Step:
    """Everything one forward needs besides the tokens, planned once for all layers.

    Parameters
    ----------
    kv : PagedKV
        Lengths include the step's own tokens. Bound to the first layer's cache.
    qo_indptr : [batch_size + 1], int32
    position_ids : [1, total_q], int64
        Position of each packed token in its own request.
    slots : [total_q], int64
        Where each token's latent goes.
    plan : DecodePlan, or None
        None when no request has earlier context and prefill runs over expanded heads.
    """

    kv: PagedKV
    qo_indptr: torch.Tensor
    position_ids: torch.Tensor
    slots: torch.Tensor
    plan: mla_core.DecodePlan | None

    def check_packed(self, batch: int, length: int) -> None:
        """Refuse tokens ``input_ids`` [batch, length] that are not the step's.

        Raises
        ------
        LayoutError
        """
        if (batch, length) != (1, self.slots.numel()):
            raise LayoutError(
                f"PagedLatentCache: input_ids must be [1, {self.slots.numel()}] as begin_step was "
                f"told, got {[batch, length]}; pack the batch into one row"
            )

    def attend(
        self, cache: LatentCache, ql_nope: torch.Tensor, q_pe: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        """Attend absorbed queries to one layer's cache: [total_q, num_heads, kv_lora_rank]."""
        assert self.plan is not None
        kv = replace(self.kv, cache=cache)
        out = mla_core.decode(ql_nope, q_pe, kv, self.plan, sm_scale=sm_scale)
        assert isinstance(out, torch.Tensor)
        return out


class PagedLatentLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's latents; transformers calls `update` with ``kv_c`` and ``k_pe`` of new tokens."""

    def __init__(self, cache: LatentCache, owner: PagedLatentCache) -> None:
        super().__init__()
        self.cache = cache
        self._owner = owner
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the pages are allocated up front."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's latents to their slots and return them unchanged.

        Parameters
        ----------
        key_states, value_states : [1, 1, total_q, kv_lora_rank], [1, 1, total_q, qk_rope_head_dim]
            ``kv_c`` and ``k_pe``, as transformers names them.
        """
        del args, kwargs
        step = self._owner.step
        step.check_packed(key_states.shape[0], key_states.shape[2])
        mla_core.write_kv_cache(key_states[0, 0], value_states[0, 0], self.cache, step.slots)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return a length and offset; the attention function masks by itself."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: a packed batch has no single length, `PagedLatentCache.begin_step` has all."""
        return 0

    def get_max_length(self) -> int:
        """Return the tokens the layer can hold, over all requests."""
        return self.cache.num_slots

    def reset(self) -> None:
        """Nothing to do: which pages are live is the caller's knowledge."""


class PagedLatentCache(Cache):  # type: ignore[misc]
    """A transformers cache of paged latents, shared by a ragged batch.

    Page ids mean the same in every layer, so one set of index arrays serves the whole model. Who
    owns which page is the caller's business, as in any serving engine.

    Parameters
    ----------
    caches : one LatentCache per layer, alike in everything but their memory
    dims : MLADims
    q_dtype : torch.dtype
        Dtype the model computes in.
    prefill : "expanded" or "absorbed"
        How a step without earlier context runs: through `mla_core.prefill` over per-head keys and
        values, which is several times less work, or through `mla_core.decode` like all other steps.
    """

    def __init__(
        self,
        caches: list[LatentCache],
        dims: MLADims,
        *,
        q_dtype: torch.dtype,
        prefill: Prefill = "expanded",
    ) -> None:
        super().__init__(layers=[PagedLatentLayer(cache, self) for cache in caches])
        self.dims = dims
        self.q_dtype = q_dtype
        self.prefill = prefill
        self._step: Step | None = None

    @classmethod
    def allocate(
        cls,
        config: PreTrainedConfig,
        *,
        num_pages: int,
        page_size: int,
        layout: str = "bf16",
        q_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        scale: torch.Tensor | None = None,
        prefill: Prefill = "expanded",
    ) -> PagedLatentCache:
        """Allocate the pages of every layer of a model.

        Parameters
        ----------
        config : configuration of a DeepSeek-V2 or V3 model
        layout : name of a cache layout
        scale : [1], fp32, for per-tensor fp8 layouts
        """
        dims = dims_of(config)
        caches = [
            LatentCache.allocate(layout, dims, num_pages, page_size, device=device, scale=scale)
            for _ in range(config.num_hidden_layers)
        ]
        return cls(caches, dims, q_dtype=q_dtype, prefill=prefill)

    @property
    def caches(self) -> list[LatentCache]:
        """The latent cache of each layer."""
        return [layer.cache for layer in self.layers]

    @property
    def step(self) -> Step:
        """The step `begin_step` prepared.

        Raises
        ------
        LayoutError
            There is none yet.
        """
        if self._step is None:
            raise LayoutError("PagedLatentCache: step must be prepared first; call begin_step")
        return self._step

    @step.setter
    def step(self, step: Step) -> None:
        self._step = step

    def begin_step(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_page_indices: torch.Tensor,
        kv_last_page_len: torch.Tensor,
    ) -> dict[str, Any]:
        """Plan one forward over a ragged batch.

        Parameters
        ----------
        qo_indptr : [batch_size + 1], int32
            Prefix sums of the new tokens of each request, in the order they are packed.
        kv_indptr, kv_page_indices, kv_last_page_len
            As in `PagedKV`; lengths include the new tokens.

        Returns
        -------
        dict : keyword arguments for the model's forward, besides ``input_ids`` [1, total_q]

        Raises
        ------
        LayoutError
            An index array is malformed, or a request has more new tokens than its length.
        """
        first = self.layers[0].cache
        kv = PagedKV.from_csr(first, kv_indptr, kv_page_indices, kv_last_page_len)
        q_lens, seq_lens = qo_indptr.diff(), kv.seq_lens
        if qo_indptr.numel() != kv.batch_size + 1 or bool((q_lens > seq_lens).any()):
            raise LayoutError(
                f"PagedLatentCache.begin_step: qo_indptr must be [batch_size + 1]="
                f"({kv.batch_size + 1},) with no more new tokens than each request's length, "
                f"got shape {tuple(qo_indptr.shape)}; lengths include the new tokens"
            )
        is_fresh = self.prefill == "expanded" and bool((q_lens == seq_lens).all())
        plan = None
        if not is_fresh:
            plan = mla_core.plan_decode(self.dims, qo_indptr, kv, q_dtype=self.q_dtype)
        position, slots = _token_positions(qo_indptr, q_lens, kv)
        self.step = Step(kv, qo_indptr, position[None], slots, plan)
        return {
            "position_ids": self.step.position_ids,
            "past_key_values": self,
            "use_cache": True,
            "mla_cache": self,
        }


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    mla_cache: PagedLatentCache | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend packed queries, each to its own request; the function `enable` registers.

    Parameters
    ----------
    module : DeepseekV2Attention or DeepseekV3Attention
    query : [1, num_heads, total_q, qk_nope_head_dim + qk_rope_head_dim]
    key, value : [1, 1, total_q, kv_lora_rank], [1, 1, total_q, qk_rope_head_dim]
        The step's own latents, already written to the cache.
    attention_mask : None
    scaling : float
        The model's ``sm_scale``, YaRN's factor included.
    mla_cache : PagedLatentCache

    Returns
    -------
    out : [1, total_q, num_heads, v_head_dim]
    weights : None
    """
    del kwargs
    mla_cache, step = checked_step(mla_cache, attention_mask, position_ids)
    dims = mla_cache.dims
    kv_b = module.kv_b_proj.weight.view(dims.num_heads, -1, dims.kv_lora_rank)
    if step.plan is None:
        out = _attend_expanded(query, key[0, 0], value[0, 0], kv_b, step, dims, scaling)
        return out[None], None
    w_uk, w_uv = kv_b.split((dims.qk_nope_head_dim, dims.v_head_dim), dim=1)
    q_nope, q_pe = query[0].split((dims.qk_nope_head_dim, dims.qk_rope_head_dim), dim=-1)
    ql_nope = torch.bmm(q_nope, w_uk).transpose(0, 1)
    cache = mla_cache.layers[module.layer_idx].cache
    latents = step.attend(cache, ql_nope, q_pe.transpose(0, 1), scaling)
    out = torch.bmm(latents.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
    return out[None], None


def checked_step(
    mla_cache: PagedLatentCache | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> tuple[PagedLatentCache, Step]:
    """Return the cache and the step of a forward, whose arguments must be those of `begin_step`.

    Raises
    ------
    LayoutError
        There is no cache, a mask, or positions are others.
    """
    if mla_cache is None:
        raise LayoutError(
            "mla_core attention: mla_cache must be a PagedLatentCache, got None; "
            "call the model with **cache.begin_step(...)"
        )
    if attention_mask is not None:
        _refuse_mask(attention_mask)
    step = mla_cache.step
    _check_positions(position_ids, step)
    return mla_cache, step


def _attend_expanded(
    query: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b: torch.Tensor,
    step: Step,
    dims: MLADims,
    sm_scale: float,
) -> torch.Tensor:
    """Attend to the step's own tokens over per-head keys and values."""
    expanded = torch.einsum("tc,hdc->thd", kv_c, kv_b)
    k_nope, v = expanded.split((dims.qk_nope_head_dim, dims.v_head_dim), dim=-1)
    k = torch.cat((k_nope, k_pe[:, None].expand(-1, dims.num_heads, -1)), dim=-1)
    q = query[0].transpose(0, 1)
    cu_seqlens = step.qo_indptr
    out = mla_core.prefill(q, k, v, cu_seqlens, cu_seqlens, sm_scale=sm_scale)
    assert isinstance(out, torch.Tensor)
    return out


def _token_positions(
    qo_indptr: torch.Tensor, q_lens: torch.Tensor, kv: PagedKV
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the position in its request and the slot of each new token, both [total_q] int64."""
    total_q = int(qo_indptr[-1])
    rows = torch.arange(kv.batch_size, device=qo_indptr.device)
    request = torch.repeat_interleave(rows, q_lens, output_size=total_q)
    nth = torch.arange(total_q, device=qo_indptr.device) - qo_indptr[request]
    position = (kv.seq_lens - q_lens)[request] + nth
    page = kv.kv_page_indices[kv.kv_indptr[request] + position // kv.page_size].long()
    slots = page * kv.page_size + position % kv.page_size
    # A hidden page (-1) keeps nothing; write_kv_cache skips negative slots.
    return position.long(), torch.where(page >= 0, slots, -1)


def _keep_latents(kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for ``expand_kv``: the attention function wants the latents."""
    return kv_nope, k_rot


def _no_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Build no mask, and refuse padding, which a packed batch cannot have."""
    del args, kwargs
    if attention_mask is not None and not bool(attention_mask.all()):
        _refuse_mask(attention_mask)


def _refuse_mask(attention_mask: torch.Tensor) -> None:
    raise LayoutError(
        "mla_core attention: attention_mask must be None, got a mask of shape "
        f"{tuple(attention_mask.shape)}; pack requests into one row instead of padding them"
    )


def _check_positions(position_ids: torch.Tensor | None, step: Step) -> None:
    """Compare positions where that needs no device sync, and everywhere under ``MLA_CHECK=1``."""
    if position_ids is None or not (position_ids.device.type == "cpu" or env.flag("MLA_CHECK")):
        return
    if not torch.equal(position_ids, step.position_ids):
        raise LayoutError(
            f"mla_core attention: position_ids must be those of begin_step, "
            f"{tuple(step.position_ids.shape)}, got others of shape {tuple(position_ids.shape)}; "
            "call the model with **cache.begin_step(...)"
        )
