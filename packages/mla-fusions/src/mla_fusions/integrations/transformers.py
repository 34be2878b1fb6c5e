"""Hugging Face transformers: DeepSeek-V2 and V3 models whose attention layers run fused.

`fuse` goes further than ``mla_core.integrations.transformers.enable``, which it calls: each
attention module's forward becomes `mla_fusions.MLAPrologue`, `mla_core.decode` and
`mla_fusions.MLAEpilogue`. Caches and steps are those of mla-core's integration::

    fuse(model)
    cache = PagedLatentCache.allocate(
        model.config, num_pages=256, page_size=16, layout="bf16", prefill="absorbed"
    )
    inputs = cache.begin_step(qo_indptr, kv_indptr, kv_page_indices, kv_last_page_len)
    logits = model(input_ids=packed_tokens, **inputs).logits  # [1, total_q, vocab_size]
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from mla_core.errors import LayoutError
from mla_core.integrations.transformers import PagedLatentCache, checked_step, enable
from mla_fusions.layer import MLAEpilogue, MLAPrologue, Weights


def fuse(model: PreTrainedModel, *, weights: Weights = "plain") -> None:
    """Make a model's attention layers run through fused launches.

    Call it when the model has its weights, dtype and device: some of the weights are copied.

    Parameters
    ----------
    model : a DeepSeek-V2 or DeepSeek-V3 model
    weights : "plain", "fp8", "mxfp4" or "nvfp4"
        How W_UK and W_UV are stored; see `mla_fusions.MLAPrologue`.

    Raises
    ------
    UnsupportedProblemError
        The model is of another type, or transformers is older than 5.15.
    LayoutError
        A module's weights are not what `mla_fusions.MLAPrologue` takes.

    Notes
    -----
    Steps take a ``PagedLatentCache`` with ``prefill="absorbed"``: prompts run through decode too.
    Rotated elements stay at their places in the cache, and transformers moves them for DeepSeek-V3,
    so a cache is for fused models or for others, not for both.
    """
    enable(model)
    rotations = _Rotations()
    for module in model.modules():
        if hasattr(module, "expand_kv"):
            module.forward = FusedAttention(module, rotations, weights)


class FusedAttention:
    """The forward of one attention module; `fuse` makes it.

    Parameters
    ----------
    module : DeepseekV2Attention or DeepseekV3Attention
    rotations : shared by the layers of a model
    weights : "plain", "fp8", "mxfp4" or "nvfp4"
    """

    def __init__(self, module: Any, rotations: _Rotations, weights: Weights) -> None:
        self.layer_idx: int = module.layer_idx
        self.sm_scale = float(module.scaling)
        self.prologue = MLAPrologue.from_module(module, weights=weights)
        self.epilogue = MLAEpilogue.from_module(module, weights=weights)
        self._rotations = rotations

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None = None,
        *,
        mla_cache: PagedLatentCache | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend packed tokens, each to its own request.

        Parameters
        ----------
        hidden_states : [1, total_q, hidden]
        position_embeddings : (cos, sin), each [1, total_q, r], or complex [1, total_q, r / 2]
            Of each token, as transformers' models make them.
        attention_mask : None
        mla_cache : PagedLatentCache
        position_ids : [1, total_q]

        Returns
        -------
        out : [1, total_q, hidden]
        weights : None

        Raises
        ------
        LayoutError
            The arguments are not those of `PagedLatentCache.begin_step`, or the cache expands
            prompts.
        """
        del kwargs
        mla_cache, step = checked_step(mla_cache, attention_mask, position_ids)
        step.check_packed(*hidden_states.shape[:2])
        if step.plan is None:
            raise LayoutError(
                "fuse: mla_cache must be a PagedLatentCache with prefill='absorbed', got "
                f"{mla_cache.prefill!r}; a fused layer keeps no keys of each head"
            )
        cache = mla_cache.layers[self.layer_idx].cache
        cos, sin, rows = self._rotations.of(position_embeddings)
        q = self.prologue(hidden_states[0], cache, step.slots, rows, cos, sin)
        ql_nope, q_pe = q.split((mla_cache.dims.kv_lora_rank, mla_cache.dims.qk_rope_head_dim), -1)
        latents = step.attend(cache, ql_nope, q_pe, self.sm_scale)
        return self.epilogue(latents)[None], None


class _Rotations:
    """What the layers of a model share: the angles of one forward, as the fused launch takes them.

    Every layer of a forward is handed the same object, so all but the first find it here.
    """

    def __init__(self) -> None:
        self._made_of: Any = None
        self._tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def of(self, position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return cos and sin with a column for each pair, [total_q, r / 2], and their row ids."""
        if self._tables is None or position_embeddings is not self._made_of:
            if isinstance(position_embeddings, torch.Tensor):
                # DeepSeek-V2: complex numbers, whose parts are not contiguous.
                angles = position_embeddings[0]
                cos, sin = angles.real.contiguous(), angles.imag.contiguous()
            else:
                # DeepSeek-V3: the columns of all pairs, twice.
                pairs = position_embeddings[0].shape[-1] // 2
                cos, sin = (table[0, :, :pairs] for table in position_embeddings)
            rows = torch.arange(cos.shape[0], device=cos.device)
            self._made_of, self._tables = position_embeddings, (cos, sin, rows)
        return self._tables
