"""A small call of every op of the package, for tests that hold for all of them.

Tests that take ``example`` run once for each op; ``example(device, seed, num_tokens)`` makes its
inputs. The same seed makes the same numbers on every device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import mla_fusions
from mla_core import LatentCache, MLADims
from mla_core.reference import quant
from mla_core.testing.poison import poison_

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
HEADS, P, C, R = 3, 32, 64, 16
KEY_HEADS, NUM_PAGES, PAGE_SIZE, NUM_POSITIONS = 2, 4, 16, 50
NUM_SLOTS = NUM_PAGES * PAGE_SIZE
HIDDEN = 24


@dataclass
class Example:
    """One call: an op, its arguments, and tensors that it writes in place.

    It is exact unless torch multiplies too, which may sum in another order over other strides.
    """

    op: Callable[..., Any]
    args: dict[str, Any]
    written: tuple[torch.Tensor, ...] = ()
    is_exact: bool = True

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Arguments that are tensors."""
        return {name: value for name, value in self.args.items() if isinstance(value, torch.Tensor)}

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Tensors that a call only reads."""
        places = {tensor.data_ptr() for tensor in self.written if tensor.numel()}
        return {
            name: tensor for name, tensor in self.tensors.items() if tensor.data_ptr() not in places
        }

    def reset(self) -> None:
        """Poison what a call writes."""
        for tensor in self.written:
            poison_(tensor)

    def run(self) -> list[torch.Tensor]:
        """Call the op; return what it returns and what it wrote."""
        return self.results(self.op(**self.args))

    def results(self, returned: Any) -> list[torch.Tensor]:
        """Return all results of a call that returned this."""
        alone = isinstance(returned, torch.Tensor)
        return [*((returned,) if alone else returned or ()), *self.written]


class Maker:
    """Draws the tensors of one example."""

    def __init__(self, device: Any, seed: int, num_tokens: int) -> None:
        self.device, self.num_tokens = torch.device(device), num_tokens
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        """Draw normal numbers."""
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def split(self, heads: int, *widths: int) -> tuple[torch.Tensor, ...]:
        """Draw rows [tokens, heads, ...] of several parts."""
        return tuple(self.rows(self.num_tokens, heads, width) for width in widths)

    def empty(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        """Return poison."""
        return poison_(torch.empty(shape, dtype=dtype, device=self.device))

    def scale(self, value: float = 0.25) -> torch.Tensor:
        """Return a factor, another one for each seed."""
        return torch.tensor([value], device=self.device) * (1 + self.generator.initial_seed() % 3)

    @functools.cached_property
    def slots(self) -> torch.Tensor:
        """Slots of which the second is none."""
        slots = torch.randperm(NUM_SLOTS, generator=self.generator)[: self.num_tokens]
        slots[1:2] = -1
        return slots.to(self.device)

    @functools.cached_property
    def turning(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Positions and tables of both functions."""
        generator = self.generator
        positions = torch.randint(NUM_POSITIONS, (self.num_tokens,), generator=generator)
        angles = torch.randn(NUM_POSITIONS, R // 2, generator=generator).to(self.device)
        return positions.to(self.device), angles.cos(), angles.sin()


EXAMPLES: dict[str, Callable[[Maker], Example]] = {}


def example_of(*names: str) -> Callable[..., Any]:
    """Enter a function that makes the arguments of an op, and what it writes of them."""

    def enter(make: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            EXAMPLES[name] = functools.partial(_build, name, make)
        return make

    return enter


def _build(name: str, make: Callable[..., Any], maker: Maker) -> Example:
    args, *written = make(maker, name) if make.__code__.co_argcount > 1 else make(maker)
    op = args.pop("op", None) or getattr(mla_fusions, name)
    return Example(op, args, tuple(written), is_exact=not name.startswith("MLA"))


@example_of("batched_gemm_bf16")
def _(it):
    y = it.empty(HEADS, it.num_tokens, C)
    return {
        "XQ": it.rows(HEADS, it.num_tokens, P),
        "WQ": it.rows(HEADS, C, P),
        "bias": it.rows(HEADS, C),
        "YQ": y,
        "splitK": 1,
    }, y


@example_of("batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant")
def _(it):
    # Two splits of K, for the launch that adds them.
    y = it.empty(HEADS, it.num_tokens, C)
    return {
        "X": it.rows(HEADS, it.num_tokens, 2 * P),
        "WQ": it.rows(HEADS, C, 2 * P, dtype=FP8),
        "w_scale": it.scale(),
        "group_size": 32,
        "YQ": y,
        "splitK": 2,
    }, y


@example_of("batched_gemm_a16wfp4", "batched_gemm_afp4wfp4_pre_quant")
def _(it):
    w, scales = quant.quantize_mxfp4(it.rows(HEADS, C, P))
    y = it.empty(HEADS, it.num_tokens, C)
    return {"x": it.rows(HEADS, it.num_tokens, P), "w": w, "w_scales": scales, "y": y}, y


@example_of("batched_gemm_afp4wfp4")
def _(it):
    w, w_scales = quant.quantize_mxfp4(it.rows(HEADS, C, P))
    x, x_scales = quant.quantize_mxfp4(it.rows(HEADS, it.num_tokens, P))
    y = it.empty(HEADS, it.num_tokens, C)
    return {"x": x, "w": w, "x_scales": x_scales, "w_scales": w_scales, "y": y}, y


@example_of("batched_gemm_a16wnvfp4")
def _(it):
    w, scales = quant.quantize_nvfp4(it.rows(HEADS, C, P))
    y = it.empty(HEADS, it.num_tokens, C)
    x = it.rows(HEADS, it.num_tokens, P)
    return {"x": x, "w": w, "w_scales": scales, "w_global_scale": it.scale(), "y": y}, y


@example_of(
    "fused_bf16_bmm_rope_cat_and_cache_mla",
    "fused_fp8_bmm_rope_cat_and_cache_mla",
    "fused_fp4_bmm_rope_cat_and_cache_mla",
    "fused_nvfp4_bmm_rope_cat_and_cache_mla",
)
def _(it, name):
    w = it.rows(HEADS, C, P)
    args = {"q_nope": it.rows(HEADS, it.num_tokens, P)}
    match name.split("_")[1]:
        case "bf16":
            args["w_k"] = w
        case "fp8":
            args |= {"w_k": w.to(FP8), "w_k_scale": it.scale(), "group_size": 32}
        case "fp4":
            args["w_k"], args["w_k_scale"] = quant.quantize_mxfp4(w)
        case _:
            args["w_k"], args["w_k_scale"] = quant.quantize_nvfp4(w)
            args["w_k_global_scale"] = it.scale()
    (args["q_pe"],) = it.split(HEADS, R)
    args["k_nope"], args["k_rope"] = it.split(KEY_HEADS, C, R)
    args["positions"], args["cos"], args["sin"] = it.turning
    cache = it.empty(NUM_SLOTS, KEY_HEADS, C + R, dtype=FP8)
    args |= {"kv_cache": cache, "slot_mapping": it.slots, "k_scale": it.scale()}
    return args | {"num_decode_toks_for_zeros": min(2, it.num_tokens)}, cache


@example_of("concat_and_cache_mla", "concat_and_cache_mla_seg")
def _(it, name):
    kv_c, k_pe = it.rows(it.num_tokens, C), it.rows(it.num_tokens, R)
    shape = (PAGE_SIZE * (C + R),) if name.endswith("seg") else (PAGE_SIZE, C + R)
    cache = it.empty(NUM_PAGES, *shape, dtype=FP8)
    args = {"kv_c": kv_c, "k_pe": k_pe, "kv_cache": cache, "slot_mapping": it.slots}
    return args | {"kv_cache_dtype": "fp8", "scale": it.scale()}, cache


@example_of("cat_and_cache_mla")
def _(it):
    k_nope, k_pe = it.split(KEY_HEADS, C, R)
    cache = it.empty(NUM_SLOTS, KEY_HEADS, C + R)
    args = {"k_nope": k_nope, "k_pe": k_pe, "kv_cache": cache, "slot_mapping": it.slots}
    return args | {"k_scale": None}, cache


def pages(it, dtype, *, asm_layout=False):
    """Return keys, values and their pages, whose innermost run is 16 bytes."""
    x = 16 // dtype.itemsize
    key, value = it.split(KEY_HEADS, C, P)
    keys = it.empty(NUM_PAGES, KEY_HEADS, C // x, PAGE_SIZE, x, dtype=dtype)
    shape = (PAGE_SIZE // x, P, x) if asm_layout else (P, PAGE_SIZE)
    values = it.empty(NUM_PAGES, KEY_HEADS, *shape, dtype=dtype)
    return {"key": key, "value": value, "key_cache": keys, "value_cache": values}, keys, values


@example_of("reshape_and_cache")
def _(it):
    args, keys, values = pages(it, FP8)
    args |= {"slot_mapping": it.slots, "kv_cache_dtype": "fp8"}
    return args | {"k_scale": it.scale(), "v_scale": it.scale(0.5)}, keys, values


@example_of("reshape_and_cache_flash")
def _(it):
    key, value = it.split(KEY_HEADS, C, P)
    keys = it.empty(NUM_PAGES, PAGE_SIZE, KEY_HEADS, C)
    values = it.empty(NUM_PAGES, PAGE_SIZE, KEY_HEADS, P)
    args = {"key": key, "value": value, "key_cache": keys, "value_cache": values}
    args |= {"slot_mapping": it.slots, "kv_cache_dtype": "auto"}
    return args | {"k_scale": None, "v_scale": None}, keys, values


@example_of("reshape_and_cache_with_pertoken_quant")
def _(it):
    args, keys, values = pages(it, FP8)
    scales = [it.empty(KEY_HEADS, NUM_SLOTS, dtype=torch.float32) for _ in range(2)]
    args |= {"k_dequant_scales": scales[0], "v_dequant_scales": scales[1]}
    return args | {"slot_mapping": it.slots, "asm_layout": False}, keys, values, *scales


@example_of("reshape_and_cache_with_block_quant", "reshape_and_cache_with_block_quant_for_asm_pa")
def _(it, name):
    args, keys, values = pages(it, FP8, asm_layout=True)
    blocks = 2 if name.endswith("pa") else NUM_PAGES
    scales = [it.empty(blocks, KEY_HEADS, dtype=torch.float32) for _ in range(2)]
    # From the beginning of a block, which another seed moves.
    first = it.generator.initial_seed() % 2 * 2 * PAGE_SIZE
    slots = torch.arange(first, first + it.num_tokens, device=it.device)
    args |= {"k_dequant_scales": scales[0], "v_dequant_scales": scales[1], "slot_mapping": slots}
    if name.endswith("pa"):
        args["ori_block_size"] = 2 * PAGE_SIZE
    return args | {"asm_layout": True}, keys, values, *scales


@example_of("fused_qk_rope_concat_and_cache_mla", "fused_qk_rope_concat_and_cache_mla_seg")
def _(it, name):
    q_nope, q_pe = it.split(HEADS, C, R)
    kv_c, k_pe = it.rows(it.num_tokens, C), it.rows(it.num_tokens, R)
    positions, cos, sin = it.turning
    shape = (PAGE_SIZE * (C + R),) if name.endswith("seg") else (PAGE_SIZE, C + R)
    cache = it.empty(NUM_PAGES, *shape, dtype=FP8)
    q_out = it.empty(it.num_tokens, HEADS, C + R, dtype=FP8)
    return {
        **{"q_nope": q_nope, "q_pe": q_pe, "kv_c": kv_c, "k_pe": k_pe},
        **{"kv_cache": cache, "q_out": q_out, "slot_mapping": it.slots, "positions": positions},
        **{"k_scale": it.scale(), "q_scale": it.scale(0.5), "cos_cache": cos, "sin_cache": sin},
        **{"is_neox": True, "is_nope_first": True},
    }, cache, q_out  # fmt: skip


@example_of("fused_qk_cat", "fused_qk_rope_cat")
def _(it, name):
    names = ("q1", "q2", "k1", "k2")
    args = {}
    if name == "fused_qk_rope_cat":
        names = ("q_nope", "q_pe", "k_nope", "k_pe")
        args["pos"], args["cos"], args["sin"] = it.turning
        args["is_neox"] = True
    parts = (*it.split(HEADS, C, R), *it.split(KEY_HEADS, C, R))
    return (args | dict(zip(names, parts, strict=True)),)


@example_of("fused_qk_rope_cat_and_cache_mla")
def _(it):
    (q_nope, q_pe), (k_nope, k_pe) = it.split(HEADS, C, R), it.split(KEY_HEADS, C, R)
    pos, cos, sin = it.turning
    cache = it.empty(NUM_SLOTS, KEY_HEADS, C + R, dtype=FP8)
    return {
        **{"q_nope": q_nope, "q_pe": q_pe, "k_nope": k_nope, "k_pe": k_pe, "kv_cache": cache},
        **{"slot_mapping": it.slots, "pos": pos, "cos": cos, "sin": sin, "k_scale": it.scale()},
        **{"is_neox": False, "num_decode_toks_for_zeros": min(2, it.num_tokens)},
    }, cache  # fmt: skip


@example_of("fused_qk_rope_reshape_and_cache", "fused_qk_rope_cosine_cache_llama")
def _(it):
    args, keys, values = pages(it, FP8)
    args["k"], args["v"] = args.pop("key"), args.pop("value")
    (args["q"],) = it.split(HEADS, C)
    args["pos"], args["cos"], args["sin"] = it.turning
    args |= {"slot_mapping": it.slots, "k_scale": it.scale(), "v_scale": it.scale(0.5)}
    args |= {"is_neox": True, "flash_layout": False, "rotary_dim": R}
    return args, keys, values


@example_of("fused_qk_rope_write_kv_cache")
def _(it):
    cache = LatentCache.allocate(
        "bf16", MLADims(HEADS, C, R), NUM_PAGES, PAGE_SIZE, device=it.device
    )
    q_nope, q_pe = it.split(HEADS, C, R)
    kv_c, k_pe = it.rows(it.num_tokens, C), it.rows(it.num_tokens, R)
    positions, cos, sin = it.turning
    return {
        **{"q_nope": q_nope, "q_pe": q_pe, "kv_c": kv_c, "k_pe": k_pe, "cache": cache},
        **{"slots": it.slots, "positions": positions, "cos": cos, "sin": sin, "is_neox": False},
    }, *cache.buffers  # fmt: skip


def latents(it):
    """Return both latents with their weights and outputs of their norms."""
    args = {"q": it.rows(it.num_tokens, C), "q_weight": it.rows(C)}
    args |= {"k": it.rows(it.num_tokens, P), "k_weight": it.rows(P)}
    return args | {"k_out": it.empty(it.num_tokens, P)}


@example_of("fused_qk_rmsnorm")
def _(it):
    args, out = latents(it), it.empty(it.num_tokens, C)
    return args | {"q_out_unquantized": out}, out, args["k_out"]


@example_of("fused_qk_rmsnorm_group_quant", "fused_qk_rmsnorm_per_token_quant")
def _(it, name):
    args, out = latents(it), it.empty(it.num_tokens, C, dtype=FP8)
    groups = 2 if name.endswith("group_quant") else 1
    scales, kept = it.empty(it.num_tokens, groups, dtype=torch.float32), it.empty(it.num_tokens, C)
    args |= {"q_out_quantized": out, "q_out_scale": scales, "q_res_out": kept, "q_epsilon": 1e-6}
    args["q_residual"] = it.rows(it.num_tokens, C)
    if groups == 2:
        args["group_size"] = C // 2
    return args, out, scales, kept, args["k_out"]


@example_of("fused_kv_norm_rope_write_kv_cache")
def _(it):
    dims = MLADims(HEADS, C, R)
    cache = LatentCache.allocate("bf16", dims, NUM_PAGES, PAGE_SIZE, device=it.device)
    positions, cos, sin = it.turning
    args = {"kv_c": it.rows(it.num_tokens, C), "k_pe": it.rows(it.num_tokens, R), "cache": cache}
    args |= {"kv_weight": it.rows(C), "slots": it.slots, "positions": positions, "cos": cos}
    args |= {"sin": sin, "is_neox": False, "q": it.rows(it.num_tokens, P), "q_weight": it.rows(P)}
    outs = [it.empty(it.num_tokens, width) for width in (C, R, P)]
    args |= {"kv_out": outs[0], "k_pe_out": outs[1], "q_out_unquantized": outs[2]}
    return args, *outs, *cache.buffers


@example_of("fused_kv_norm_rope_group_quant")
def _(it):
    pages, tails = (
        it.empty(NUM_PAGES, PAGE_SIZE, width, dtype=dtype)
        for width, dtype in ((512, torch.uint8), (64, BF16))
    )
    args = {"kv": it.rows(it.num_tokens, 512), "kv_weight": it.rows(512), "eps": 1e-6}
    args |= {"positions": it.turning[0], "slot_mapping": it.slots, "k_rope_buff": tails}
    args |= {name: it.rows(NUM_POSITIONS, 32, dtype=torch.float32) for name in ("cos", "sin")}
    return args | {"k_nope_scale_buff": pages}, pages, tails


@example_of("indexer_k_quant_and_cache")
def _(it):
    cache = it.empty(NUM_PAGES, PAGE_SIZE, C + 4, dtype=torch.uint8)
    args = {"k": it.rows(it.num_tokens, C), "kv_cache": cache, "slot_mapping": it.slots}
    return args | {"quant_block_size": C, "scale_fmt": None}, cache


@example_of("indexer_qk_rope_quant_and_cache")
def _(it):
    cache = it.empty(NUM_PAGES, PAGE_SIZE, C + 4, dtype=torch.uint8)
    q_out = it.empty(it.num_tokens, HEADS, C, dtype=FP8)
    weights_out = it.empty(it.num_tokens, HEADS, dtype=torch.float32)
    positions, cos, sin = it.turning
    (q,) = it.split(HEADS, C)
    args = {"q": q, "q_out": q_out, "weights": it.rows(it.num_tokens, HEADS)}
    args |= {"weights_out": weights_out, "k": it.rows(it.num_tokens, C), "kv_cache": cache}
    args |= {"slot_mapping": it.slots, "norm_weight": it.rows(C), "norm_bias": it.rows(C)}
    args |= {"positions": positions, "cos_cache": cos, "sin_cache": sin, "epsilon": 1e-6}
    args |= {"quant_block_size": C, "scale_fmt": "ue8m0", "weights_scale": 0.125}
    return args, cache, q_out, weights_out


def kv_b_of(it):
    """Return the dims of a layer and the projection that holds W_UK and W_UV."""
    return MLADims(HEADS, C, R, P, 16), it.rows(HEADS * (P + 16), C)


@example_of("MLAPrologue", "MLAPrologue apart")
def _(it, name):
    dims, kv_b = kv_b_of(it)
    prologue = mla_fusions.MLAPrologue(
        dims,
        kv_a_proj_with_mqa=it.rows(C + R, HIDDEN),
        kv_a_layernorm=it.rows(C),
        kv_b_proj=kv_b,
        q_a_proj=it.rows(40, HIDDEN),
        q_a_layernorm=it.rows(40),
        q_b_proj=it.rows(HEADS * (P + R), 40),
        max_joined_tokens=0 if name.endswith("apart") else it.num_tokens,
    )
    cache = LatentCache.allocate("bf16", dims, NUM_PAGES, PAGE_SIZE, device=it.device)
    positions, cos, sin = it.turning
    args = {"op": prologue.__call__, "hidden_states": it.rows(it.num_tokens, HIDDEN)}
    args |= {"slots": it.slots, "positions": positions, "cos": cos, "sin": sin, "cache": cache}
    return args, *cache.buffers


@example_of("MLAEpilogue")
def _(it):
    dims, kv_b = kv_b_of(it)
    o_proj = it.rows(HIDDEN, HEADS * 16)
    epilogue = mla_fusions.MLAEpilogue(dims, kv_b_proj=kv_b, o_proj=o_proj)
    return ({"op": epilogue.__call__, "latents": it.rows(it.num_tokens, HEADS, C)},)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes an example once for each op."""
    if "example" in metafunc.fixturenames:
        metafunc.parametrize("example", EXAMPLES, indirect=True)


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Callable[..., Example]:
    """Return a function that makes the op's example."""
    build = EXAMPLES[request.param]

    def make(device: Any, seed: int = 0, num_tokens: int = 5) -> Example:
        return build(Maker(device, seed, num_tokens))

    make.name = request.param
    return make


@pytest.fixture
def example_names() -> tuple[str, ...]:
    """Return the names of all examples."""
    return tuple(EXAMPLES)
