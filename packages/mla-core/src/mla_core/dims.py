"""Model dimensions of Multi-head Latent Attention and the table of known models."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from mla_core.errors import LayoutError

MAX_HEADS = 128


@dataclass(frozen=True, slots=True)
class MLADims:
    """The five numbers that shape every MLA kernel, plus one flag.

    Parameters
    ----------
    num_heads : int
        Local query heads, 1..128 (after tensor parallelism).
    kv_lora_rank : int
        Width of the cached latent ``kv_c``, a multiple of 32 up to 1024.
    qk_rope_head_dim : int
        Width of the cached shared rotary key ``k_pe``; an even number up to 128, 0 for models
        without one.
    qk_nope_head_dim, v_head_dim : int
        Per-head widths *before* absorption; decode kernels never see them, prefill kernels do.
    value_includes_rope : bool
        DeepSeek-V4 attends with V = the whole cached row (448 + 64 = 512), not only the latent.

    Raises
    ------
    LayoutError
        A number is outside the range above.
    """

    num_heads: int
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    value_includes_rope: bool = False

    def __post_init__(self) -> None:
        """Refuse dimensions no model has, naming the field."""
        for field in fields(self):
            value = getattr(self, field.name)
            wanted = bool if field.name == "value_includes_rope" else int
            if type(value) is not wanted:
                raise LayoutError(
                    f"MLADims: {field.name} must be {wanted.__name__}, got {type(value).__name__}"
                )
        _require(1 <= self.num_heads <= MAX_HEADS, "num_heads", f"1..{MAX_HEADS}", self.num_heads)
        rank_ok = 32 <= self.kv_lora_rank <= 1024 and self.kv_lora_rank % 32 == 0
        _require(rank_ok, "kv_lora_rank", "a multiple of 32 in 32..1024", self.kv_lora_rank)
        rope_ok = 0 <= self.qk_rope_head_dim <= 128 and self.qk_rope_head_dim % 2 == 0
        _require(rope_ok, "qk_rope_head_dim", "an even number in 0..128", self.qk_rope_head_dim)
        for name in ("qk_nope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            _require(1 <= value <= 1024, name, "in 1..1024", value)

    @property
    def latent_dim(self) -> int:
        """Width of one cached row, ``kv_lora_rank + qk_rope_head_dim`` (576 for DeepSeek-V3)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def value_dim(self) -> int:
        """Width of one absorbed output row, which for DeepSeek-V4 includes the rotary part."""
        return self.latent_dim if self.value_includes_rope else self.kv_lora_rank

    @property
    def qk_head_dim(self) -> int:
        """Width of one expanded query or key head (192 for DeepSeek-V3)."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def sm_scale(self) -> float:
        """``(nope + rope) ** -0.5``, without YaRN's mscale: from the width *before* absorption."""
        return float(self.qk_head_dim**-0.5)

    def with_heads(self, num_heads: int) -> MLADims:
        """Return the same model with another local head count."""
        return replace(self, num_heads=num_heads)

    def tensor_parallel(self, world_size: int) -> MLADims:
        """Return the dims one rank sees when heads are split over ``world_size`` ranks."""
        if world_size < 1 or self.num_heads % world_size:
            raise LayoutError(
                f"MLADims: world_size must divide num_heads={self.num_heads}, got {world_size}"
            )
        return self.with_heads(self.num_heads // world_size)


def _require(ok: bool, name: str, expected: str, value: int) -> None:
    if not ok:
        raise LayoutError(f"MLADims: {name} must be {expected}, got {value}")


_V4 = MLADims(64, kv_lora_rank=448, qk_nope_head_dim=448, v_head_dim=512, value_includes_rope=True)

#: Dimensions of released models, whole (before tensor parallelism).
MODELS: dict[str, MLADims] = {
    "deepseek-v2": MLADims(128),
    "deepseek-v2-lite": MLADims(16),
    "moonlight": MLADims(16),
    "deepseek-v3": MLADims(128),
    "deepseek-r1": MLADims(128),
    "deepseek-v3.2": MLADims(128),
    "deepseek-v4-flash": _V4,
    "deepseek-v4-pro": _V4.with_heads(128),
    "deepseek-v4.1-flash": _V4,
    "kimi-k2": MLADims(64),
    "kimi-linear-48b": MLADims(32),
    "kimi-k3": MLADims(96),
    "longcat-flash": MLADims(64),
    "glm-4.7-flash": MLADims(20, qk_nope_head_dim=192, v_head_dim=256),
    "glm-5": MLADims(64, qk_nope_head_dim=192, v_head_dim=256),
    "glm-5.3-flash": MLADims(64, qk_rope_head_dim=0, qk_nope_head_dim=256, v_head_dim=256),
    "minicpm3-4b": MLADims(
        40, kv_lora_rank=256, qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64
    ),
    "mistral-small-4": MLADims(32, kv_lora_rank=256, qk_nope_head_dim=64),
    "mistral-large-3": MLADims(128),
    "ling-2.5-1t": MLADims(64),
    "hy4-preview": MLADims(64),
    "dots3-note": MLADims(64, kv_lora_rank=1024, qk_nope_head_dim=192),
}
