"""A layer's prologue and epilogue against transformers' own attention module, run eagerly."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

import transformers
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

import mla_core
from mla_core import (
    BackendUnavailableError,
    LatentCache,
    LayoutError,
    MLADims,
    PagedKV,
    UnsupportedProblemError,
)
from mla_core.arch import arch_of
from mla_core.batch import indptr_of
from mla_core.dtypes import dtype_name, fp8_of_arch, torch_dtype
from mla_core.launch import launch
from mla_core.reference import quant
from mla_core.testing.assertions import assert_close, relative_l2
from mla_core.testing.poison import poison_
from mla_fusions import MLAEpilogue, MLAPrologue, fused_qk_rope_write_kv_cache
from mla_fusions.layer import MAX_JOINED_TOKENS

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NUM_TOKENS = 20
#: Prefill of two requests, a chunk with a padded row between, and a decode step.
STEPS = ((5, 3), (1, 4), (1, 1))
#: Every step in one launch less, the last one alone, and none.
PATHS = ["joined", "some joined", "apart"]

WIDTHS = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 40,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "attn_implementation": "eager",
}
MODELS = {
    "v3": (transformers.DeepseekV3Config, modeling_deepseek_v3.DeepseekV3Attention, {}),
    "v3-half-split-no-q-lora": (
        transformers.DeepseekV3Config,
        modeling_deepseek_v3.DeepseekV3Attention,
        {"rope_interleave": False, "q_lora_rank": None},
    ),
    "v3-bias": (
        transformers.DeepseekV3Config,
        modeling_deepseek_v3.DeepseekV3Attention,
        {"attention_bias": True},
    ),
    "v2": (transformers.DeepseekV2Config, modeling_deepseek_v2.DeepseekV2Attention, {}),
}


def module_of(name, dtype=FP32, **changes):
    """Return an attention module whose every weight and bias matters."""
    config_class, module_class, own = MODELS[name]
    module = module_class(config_class(**(WIDTHS | own | changes)), layer_idx=0)
    for parameter_name, parameter in module.named_parameters():
        is_norm = "layernorm" in parameter_name
        torch.nn.init.normal_(parameter, float(is_norm), 0.3 if is_norm else 0.2)
    return module.to(device=DEVICE, dtype=dtype).eval()


def angles_of(module, num_positions):
    """Return a column for each pair: [num_positions, r / 2], fp32."""
    pairs = module.qk_rope_head_dim // 2
    frequencies = 1.0 / 30 ** (torch.arange(pairs, device=DEVICE) / pairs)
    return torch.arange(num_positions, device=DEVICE)[:, None] * frequencies


def eager(module, hidden_states, dtype):
    """Return the module's own output for one request from its beginning: [T, hidden]."""
    angles = angles_of(module, hidden_states.shape[0])
    if isinstance(module, modeling_deepseek_v2.DeepseekV2Attention):
        position = torch.polar(torch.ones_like(angles), angles)[None]
    else:
        twice = torch.cat((angles, angles), dim=-1)[None]
        position = (twice.cos().to(dtype), twice.sin().to(dtype))
    length = hidden_states.shape[0]
    mask = torch.full((length, length), -torch.inf, device=DEVICE, dtype=dtype).triu(1)
    with torch.no_grad():
        out, _ = module(
            hidden_states=hidden_states[None],
            position_embeddings=position,
            attention_mask=mask[None, None],
        )
    return out[0]


class Served:
    """Two requests whose chunks run through prologue, decode and epilogue."""

    def __init__(self, module, dtype, layout, page_size, weights="plain", **options):
        self.module, self.page_size = module, page_size
        self.prologue = MLAPrologue.from_module(module, weights=weights, **options)
        self.epilogue = MLAEpilogue.from_module(module, weights=weights)
        self.dims = self.prologue.dims
        scale = torch.tensor([0.05], device=DEVICE)
        needs_scale = mla_core.layouts.get(layout).needs_scale
        self.cache = LatentCache.allocate(
            layout,
            self.dims,
            -(-NUM_TOKENS // page_size) + 1,
            page_size,
            device=DEVICE,
            scale=scale if needs_scale else None,
        )
        for buffer in self.cache.buffers:
            poison_(buffer)
        angles = angles_of(module, NUM_TOKENS)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        pages = torch.randperm(self.cache.num_slots // page_size).tolist()
        self.pages = pages[::2], pages[1 : len(pages) // 2 * 2 : 2]
        self.lens = [0, 0]

    def slot(self, request, t):
        return self.pages[request][t // self.page_size] * self.page_size + t % self.page_size

    def step(self, chunks):
        """Run the next tokens of each request, with one padded token at the end."""
        packed, positions, slots = [], [], []
        for b, chunk in enumerate(chunks):
            for t in range(self.lens[b], self.lens[b] + len(chunk)):
                positions.append(t)
                slots.append(self.slot(b, t))
            self.lens[b] += len(chunk)
            packed.append(chunk)
        num_live = len(slots)
        packed = torch.cat((*packed, packed[0][:1]))
        slots = torch.tensor([*slots, -1], device=DEVICE)
        positions = torch.tensor([*positions, 0], device=DEVICE)
        latent = self.dims.latent_dim
        wide = poison_(
            torch.empty(len(packed), self.dims.num_heads, latent + 8, dtype=packed.dtype)
        )
        q_out = wide.to(DEVICE)
        q = self.prologue(packed, self.cache, slots, positions, self.cos, self.sin, q_out=q_out)
        assert q is q_out
        assert q[..., latent:].isnan().all()
        assert not q[..., :latent].isnan().any()
        q = q[:num_live]
        table = torch.tensor(
            [pages[: len(self.pages[1])] for pages in self.pages], dtype=torch.int32, device=DEVICE
        )
        lens = torch.tensor(self.lens, dtype=torch.int32, device=DEVICE)
        kv = PagedKV.from_block_table(self.cache, table, lens)
        indptr = indptr_of(torch.tensor([len(chunk) for chunk in chunks], device=DEVICE))
        plan = mla_core.plan_decode(self.dims, indptr, kv, q_dtype=q.dtype, backend="reference")
        rank = self.dims.kv_lora_rank
        latents = mla_core.decode(
            q[..., :rank], q[..., rank:latent], kv, plan, sm_scale=self.module.scaling
        )
        values = poison_(latents.new_empty(num_live, self.dims.num_heads * self.dims.v_head_dim))
        out = self.epilogue(latents.to(packed.dtype), out=values)
        assert not values.isnan().any()
        return out.split([len(chunk) for chunk in chunks])


def serve(module, dtype, layout, page_size=4, **options):
    """Return what the layer makes of two requests, and their hidden states."""
    served = Served(module, dtype, layout, page_size, **options)
    total = [sum(lens) for lens in zip(*STEPS, strict=True)]
    inputs = [torch.randn(n, WIDTHS["hidden_size"], device=DEVICE).to(dtype) for n in total]
    outs = [[], []]
    starts = [0, 0]
    for lens in STEPS:
        chunks = [x[s : s + n] for x, s, n in zip(inputs, starts, lens, strict=True)]
        starts = [s + n for s, n in zip(starts, lens, strict=True)]
        for b, part in enumerate(served.step(chunks)):
            outs[b].append(part)
    return torch.cat([torch.cat(parts) for parts in outs]), inputs


def run_eagerly(module, inputs, dtype=FP32):
    """Return the module's outputs when it computes in a dtype, whatever its weights are in."""
    module = copy.deepcopy(module).to(dtype)
    return torch.cat([eager(module, x.to(dtype), dtype) for x in inputs])


@pytest.mark.parametrize("name", MODELS)
def test_fp32_equals_the_module(name, seed, poisoned_empty):
    module = module_of(name)
    actual, inputs = serve(module, FP32, "fp32")
    expected = run_eagerly(module, inputs)
    assert expected.std() > 0.1
    assert_close(actual, expected, what="out", dtype="fp32")


@pytest.mark.parametrize(
    ("dtype", "layout", "page_size"),
    [(BF16, "bf16", 4), (FP16, "fp16", 1), (BF16, "shuffled_bf16", 16), (FP16, "fp32", 5)],
    ids=str,
)
@pytest.mark.parametrize("name", ["v3", "v2"])
@pytest.mark.parametrize("max_joined_tokens", [MAX_JOINED_TOKENS, 3, 0], ids=PATHS)
def test_half_precision_rounds_no_more_than_the_module(
    max_joined_tokens, name, dtype, layout, page_size, seed, poisoned_empty
):
    module = module_of(name, dtype)
    options = {"max_joined_tokens": max_joined_tokens}
    actual, inputs = serve(module, dtype, layout, page_size, **options)
    truth = run_eagerly(module, inputs)
    unfused = relative_l2(run_eagerly(module, inputs, dtype), truth)
    assert relative_l2(actual, truth) < 1.5 * unfused


@pytest.mark.parametrize("max_joined_tokens", [MAX_JOINED_TOKENS, 3, 0], ids=PATHS)
def test_fp8_cache(max_joined_tokens, seed, poisoned_empty):
    module = module_of("v3", BF16)
    actual, inputs = serve(module, BF16, "fp8", max_joined_tokens=max_joined_tokens)
    assert relative_l2(actual, run_eagerly(module, inputs)) < 6e-2


@pytest.mark.parametrize(("weights", "limit"), [("fp8", 6e-2), ("mxfp4", 2e-2), ("nvfp4", 2e-2)])
@pytest.mark.parametrize("max_joined_tokens", [MAX_JOINED_TOKENS, 0], ids=["joined", "apart"])
def test_quantised_weights(max_joined_tokens, weights, limit, seed, poisoned_empty):
    """Against a module that has the dequantised weights."""
    module = module_of("v3", BF16)
    options = {"weights": weights, "max_joined_tokens": max_joined_tokens}
    actual, inputs = serve(module, BF16, "bf16", **options)
    kv_b = module.kv_b_proj.weight.data.unflatten(0, (3, -1))
    for part, turn in ((slice(0, 32), True), (slice(32, None), False)):
        w = kv_b[:, part].transpose(1, 2) if turn else kv_b[:, part]
        if weights == "fp8":
            stored, scale = quant.quantize_per_tensor(w, fp8=fp8_of_arch(arch_of(w.device)))
            dequantised = stored.float() * scale
        elif weights == "nvfp4":
            factor = w.abs().amax().float() / 2688
            dequantised = factor * quant.dequantize_nvfp4(*quant.quantize_nvfp4(w.float() / factor))
        else:
            dequantised = quant.dequantize_mxfp4(*quant.quantize_mxfp4(w))
        assert not torch.equal(dequantised.float(), w.float())
        kv_b[:, part] = (dequantised.transpose(1, 2) if turn else dequantised).to(BF16)
    truth = run_eagerly(module, inputs)
    assert relative_l2(actual, truth) < limit


class Tokens:
    """Arguments of a prologue's call for a few tokens of one request."""

    def __init__(self, module, dtype, layout="fp32", num_tokens=5, **options):
        self.prologue = MLAPrologue.from_module(module, **options)
        kind = mla_core.layouts.get(layout)
        scale = torch.tensor([0.05], device=DEVICE) if kind.needs_scale else None
        page_size = max(8, kind.page_multiple)
        self.cache = LatentCache.allocate(
            kind, self.prologue.dims, 2, page_size, device=DEVICE, scale=scale
        )
        for buffer in self.cache.buffers:
            poison_(buffer)
        self.hidden_states = torch.randn(num_tokens, 48, device=DEVICE).to(dtype)
        self.slots = torch.arange(num_tokens, device=DEVICE).flip(0)
        self.positions = torch.arange(num_tokens, device=DEVICE)
        angles = angles_of(module, NUM_TOKENS)
        self.tables = angles.cos(), angles.sin()

    def __call__(self, **named):
        given = {
            "hidden_states": self.hidden_states,
            "cache": self.cache,
            "slots": self.slots,
            "positions": self.positions,
            "cos": self.tables[0],
            "sin": self.tables[1],
        }
        return self.prologue(**(given | named))


def launched(monkeypatch, call):
    """Return the names of the kernels that a call launches, and its result."""
    names = []

    def spy(kernel, *args, **constants):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **constants)

    with monkeypatch.context() as patch:
        for module in ("absorbed", "absorbed_rope", "norms", "rotation"):
            patch.setattr(f"mla_fusions.{module}.launch", spy)
        result = call()
    return names, result


@pytest.mark.parametrize("weights", ["plain", "fp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize(
    "layout",
    ["bf16", "fp8", "fp8_seg656", "fp8_ds32", "shuffled_fp8", "nvfp4_shuffled"],
)
def test_one_launch_or_two(layout, weights, monkeypatch, seed, poisoned_empty):
    """Both ways to write every kind of cache, and which of them a number of tokens takes."""
    options = {"layout": layout, "weights": weights}
    # Of a width that every layout takes.
    module = module_of("v3", BF16, kv_lora_rank=256, qk_rope_head_dim=64)
    tokens = Tokens(module, BF16, **options, max_joined_tokens=5)
    prologue = tokens.prologue
    assert [prologue.joins(n) for n in (0, 1, 5, 6)] == [True, True, True, False]
    written = []
    for maximum, kernels in (
        (5, ["norm_rows_kernel", "absorbed_rope_kernel"]),
        (4, ["norm_rows_kernel", "absorbed_kernel", "rope_rows_kernel"]),
    ):
        prologue.max_joined_tokens = maximum
        for buffer in tokens.cache.buffers:
            poison_(buffer)
        names, q = launched(monkeypatch, tokens)
        assert names == kernels
        written.append((q, [buffer.clone() for buffer in tokens.cache.buffers]))
    joined, apart = written
    assert not joined[0].isnan().any()
    rank = prologue.dims.kv_lora_rank
    # Sums of the product may be contracted in one of the two.
    assert_close(joined[0][..., :rank], apart[0][..., :rank], what="absorbed", dtype="bf16")
    assert torch.equal(joined[0][..., rank:], apart[0][..., rank:])
    for ours, theirs in zip(joined[1], apart[1], strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_which_calls_join_is_told(monkeypatch):
    """By `joins` and by the representation; fp32 as it is never joins."""
    told = {
        "plain": "W_UK in torch.bfloat16, joined up to 256 tokens",
        "fp8": "W_UK in fp8, joined up to 256 tokens",
    }
    module = module_of("v3", BF16)
    for weights, message in told.items():
        prologue = MLAPrologue.from_module(module, weights=weights, max_joined_tokens=256)
        assert message in repr(prologue)
    tokens = Tokens(module_of("v3"), FP32)
    assert "W_UK in torch.float32, joined never" in repr(tokens.prologue)
    assert not tokens.prologue.joins(1)
    assert launched(monkeypatch, tokens)[0] == ["norm_rows_kernel", "rope_rows_kernel"]
    prologue = MLAPrologue.from_module(module_of("v3"), weights="fp8")
    assert prologue.joins(MAX_JOINED_TOKENS)
    assert not prologue.joins(MAX_JOINED_TOKENS + 1)


@pytest.mark.parametrize("name", ["v3", "v3-half-split-no-q-lora"])
@pytest.mark.parametrize(
    "q_dtype", [BF16, FP16, FP32, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.uint8], ids=str
)
@pytest.mark.parametrize("max_joined_tokens", [MAX_JOINED_TOKENS, 0], ids=["joined", "apart"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_queries_of_any_dtype(dtype, max_joined_tokens, q_dtype, name, seed, poisoned_empty):
    """Absorbed queries are rounded once, from fp32 to what they are stored in."""
    module = module_of(name, dtype)
    tokens = Tokens(module, dtype, max_joined_tokens=max_joined_tokens)
    plain = tokens(q_out=torch.empty(5, 3, 80, device=DEVICE))
    rows = [part.clone() for part in tokens.cache.read(tokens.slots)]
    q_out = poison_(torch.empty(*plain.shape, dtype=q_dtype, device=DEVICE))
    factor = torch.tensor([0.03125], device=DEVICE)
    is_fp8 = q_dtype.itemsize == 1
    assert tokens(q_out=q_out, q_scale=factor if is_fp8 else None) is q_out
    if is_fp8:
        flavour = torch_dtype(fp8_of_arch(arch_of(q_out.device)))
        stored = q_out.view(flavour) if q_dtype == torch.uint8 else q_out
        name = dtype_name(stored.dtype)
        assert torch.equal(
            stored.view(torch.uint8), quant.to_fp8(plain / factor, name).view(torch.uint8)
        )
    else:
        assert torch.equal(q_out, plain.to(q_dtype))
    for again, row in zip(tokens.cache.read(tokens.slots), rows, strict=True):
        assert torch.equal(again, row)


@pytest.mark.parametrize("max_joined_tokens", [MAX_JOINED_TOKENS, 0], ids=["joined", "apart"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_model_without_a_rotary_part(dtype, max_joined_tokens, seed, poisoned_empty):
    dims = MLADims(2, 32, 0, 16, 16)
    given = {
        "kv_a_proj_with_mqa": torch.randn(32, 8, device=DEVICE).to(dtype),
        "kv_a_layernorm": torch.randn(32, device=DEVICE).to(dtype),
        "kv_b_proj": torch.randn(64, 32, device=DEVICE).to(dtype),
        "q_proj": torch.randn(32, 8, device=DEVICE).to(dtype),
    }
    prologue = MLAPrologue(dims, **given, max_joined_tokens=max_joined_tokens)
    cache = LatentCache.allocate("fp32", dims, 1, 8, device=DEVICE)
    x = torch.randn(3, 8, device=DEVICE).to(dtype)
    index = torch.arange(3, device=DEVICE)
    table = torch.ones(4, 0, device=DEVICE)
    q = prologue(x, cache, index, index, table, table)
    given = {name: weight.double() for name, weight in given.items()}
    x, tolerance = x.double(), "fp32" if dtype == FP32 else "bf16"
    w_uk = given["kv_b_proj"].view(2, 32, 32)[:, :16]
    # What the projections make is rounded: products may cancel to less than that.
    heads = (x @ given["q_proj"].T).to(dtype).double().view(3, 2, 16)
    expected = torch.einsum("thn,hnc->thc", heads, w_uk)
    assert_close(q, expected, what="q", dtype=tolerance)
    kv_c = torch.nn.functional.rms_norm(
        (x @ given["kv_a_proj_with_mqa"].T).to(dtype).double(),
        (32,),
        given["kv_a_layernorm"],
        1e-6,
    )
    assert_close(cache.read(index)[0], kv_c, what="kv_c", dtype=tolerance)


def test_no_tokens():
    module = module_of("v3", BF16)
    tokens = Tokens(module, BF16, num_tokens=0)
    assert tokens().shape == (0, 3, 80)
    latents = torch.empty(0, 3, 64, dtype=BF16, device=DEVICE)
    assert MLAEpilogue.from_module(module)(latents).shape == (0, 48)
    assert MLAEpilogue.from_module(module, with_o_proj=False)(latents).shape == (0, 72)


def test_weights_are_read_where_they_are():
    """Absorbed weights follow the module's; those that are joined are copies."""
    module = module_of("v3", BF16)
    epilogue = MLAEpilogue.from_module(module, with_o_proj=False)
    latents = torch.randn(2, 3, 64, device=DEVICE).to(BF16)
    before = epilogue(latents)
    module.kv_b_proj.weight.data *= 2
    assert torch.equal(epilogue(latents), 2 * before)


def test_wrong_weights_are_refused():
    module = module_of("v3", BF16)
    for name in ("kv_a_layernorm", "num_heads", "q_a_proj", "kv_b_proj"):
        broken = copy.deepcopy(module)
        delattr(broken, name)
        with pytest.raises(LayoutError, match=rf"from_module: module\.{name} must be there"):
            MLAPrologue.from_module(broken)
    broken = copy.deepcopy(module)
    del broken.o_proj
    with pytest.raises(LayoutError, match=r"MLAEpilogue.from_module: module\.o_proj must be"):
        MLAEpilogue.from_module(broken)
    MLAEpilogue.from_module(broken, with_o_proj=False)
    broken = copy.deepcopy(module)
    broken.q_b_proj.bias = torch.nn.Parameter(torch.zeros(144))
    with pytest.raises(LayoutError, match=r"q_b_proj\.bias must be None"):
        MLAPrologue.from_module(broken)
    broken = copy.deepcopy(module)
    broken.kv_b_proj.float()
    with pytest.raises(LayoutError, match="kv_b_proj must be bfloat16"):
        MLAPrologue.from_module(broken)
    for make in (MLAPrologue, MLAEpilogue):
        with pytest.raises(
            LayoutError, match="weights must be one of plain, fp8, mxfp4, nvfp4, got 'fp6'"
        ):
            make.from_module(module, weights="fp6")
        with pytest.raises(LayoutError, match="weights='mxfp4' must be made of bfloat16"):
            make.from_module(module_of("v3", FP16), weights="mxfp4")
        with pytest.raises(LayoutError, match="weights must be bf16, fp16 or fp32, got"):
            make.from_module(copy.deepcopy(module).double())
        with pytest.raises(LayoutError, match="kv_b_proj must be"):
            make.from_module(broken_widths(module))
    with pytest.raises(LayoutError, match="a multiple of 32 elements to sum over, got 24"):
        MLAPrologue.from_module(module_of("v3", BF16, qk_nope_head_dim=24), weights="mxfp4")
    with pytest.raises(LayoutError, match="a multiple of 16 elements to sum over, got 24"):
        MLAPrologue.from_module(module_of("v3", BF16, qk_nope_head_dim=24), weights="nvfp4")
    with pytest.raises(LayoutError, match="weights='nvfp4' must be made of bfloat16 or float16"):
        MLAPrologue.from_module(module_of("v3", torch.float32), weights="nvfp4")
    dims = MLADims(1, value_includes_rope=True)
    one = torch.ones(1, 1, device=DEVICE)
    with pytest.raises(UnsupportedProblemError, match="value_includes_rope=False"):
        MLAEpilogue(dims, kv_b_proj=one)
    dims = MLADims(1, 32, 2, 4, 4)
    weights = {
        "kv_a_proj_with_mqa": torch.ones(34, 8, device=DEVICE),
        "kv_a_layernorm": torch.ones(32, device=DEVICE),
        "kv_b_proj": torch.ones(8, 32, device=DEVICE),
    }
    q_proj = torch.ones(6, 8, device=DEVICE)
    for wrong in ({}, {"q_proj": q_proj, "q_a_proj": q_proj}, {"q_a_proj": q_proj}):
        with pytest.raises(LayoutError, match="either q_proj alone or all of"):
            MLAPrologue(dims, **weights, **wrong)
    with pytest.raises(LayoutError, match="q_a_bias must be None with q_proj"):
        MLAPrologue(dims, **weights, q_proj=q_proj, q_a_bias=q_proj[0])
    with pytest.raises(LayoutError, match="o_bias must be None without o_proj"):
        MLAEpilogue(dims, kv_b_proj=weights["kv_b_proj"], o_bias=q_proj[0])


def broken_widths(module):
    broken = copy.deepcopy(module)
    broken.v_head_dim += 1
    return broken


def test_wrong_inputs_are_refused():
    module = module_of("v3", BF16)
    tokens = Tokens(module, BF16)
    epilogue = MLAEpilogue.from_module(module)
    x = tokens.hidden_states
    with pytest.raises(LayoutError, match=r"hidden_states must be \[T, 48\]"):
        tokens(hidden_states=x[:, :40])
    with pytest.raises(LayoutError, match="hidden_states must be bfloat16"):
        tokens(hidden_states=x.float())
    with pytest.raises(UnsupportedProblemError, match="hidden_states must not require a gradient"):
        tokens(hidden_states=x.requires_grad_())
    tokens.hidden_states = x.detach()
    far = torch.empty_strided((5, 48), (2**23 + 1, 1), dtype=x.dtype, device=DEVICE)
    with pytest.raises(LayoutError, match="hidden_states must have rows at most 8388608 elements"):
        tokens(hidden_states=far)
    with pytest.raises(LayoutError, match="q_out must have at least 80 elements"):
        tokens(q_out=x.new_empty(5, 3, 79))
    with pytest.raises(LayoutError, match=r"q_out must be \[5, 3, 80 or more\]"):
        tokens(q_out=x.new_empty(4, 3, 80))
    other = LatentCache.allocate("fp32", MLADims(3, 32, 16), 2, 8, device=DEVICE)
    with pytest.raises(LayoutError, match="cache must have the layer's kv_lora_rank"):
        tokens(cache=other)
    with pytest.raises(LayoutError, match=r"slots must be \[5\]"):
        tokens(slots=tokens.slots[:4])
    latents = x.new_zeros(2, 3, 64).detach()
    with pytest.raises(LayoutError, match=r"latents must be \[T, 3, 64\]"):
        epilogue(latents[:, :2])
    with pytest.raises(LayoutError, match=r"out must be \[2, 72\]"):
        epilogue(latents, out=latents.new_empty(2, 73))
    with pytest.raises(LayoutError, match="out must be contiguous"):
        epilogue(latents, out=latents.new_empty(2, 80)[:, :72])


def test_absorbed_queries_that_stand_in_place(seed, poisoned_empty):
    """Rotation alone, where the product has written its part: the bits of rotating both."""
    dims = MLADims(3, 32, 8)
    q_nope, q_pe = torch.randn(4, 3, 32, device=DEVICE), torch.randn(4, 3, 8, device=DEVICE)
    kv_c, k_pe = torch.randn(4, 32, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    index = torch.arange(4, device=DEVICE)
    tables = torch.randn(6, 4, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    results = []
    for first in (q_nope, None):
        cache = LatentCache.allocate("fp32", dims, 1, 4, device=DEVICE)
        q_out = poison_(torch.empty(4, 3, 44, device=DEVICE))
        q_out[..., :32] = q_nope
        got = fused_qk_rope_write_kv_cache(
            first, q_pe, kv_c, k_pe, cache, index, index, *tables, is_neox=False, q_out=q_out
        )
        assert got is q_out
        assert q_out[..., 40:].isnan().all()
        results.append((q_out[..., :40], cache.buffers[0]))
    for joined, alone in zip(*results, strict=True):
        assert torch.equal(joined, alone)

    def call(**named):
        fused_qk_rope_write_kv_cache(
            None, q_pe, kv_c, k_pe, cache, index, index, *tables, is_neox=False, **named
        )

    with pytest.raises(LayoutError, match=r"q_out must be \[T, h, 40 or more\] without q_nope"):
        call()
    with pytest.raises(LayoutError, match="q_out must have at least 40 elements"):
        call(q_out=q_out[..., :39])
    with pytest.raises(LayoutError, match=r"q_out must be \[4, 3, 40 or more\]"):
        call(q_out=q_out[:3])


def test_a_machine_without_the_kernels_is_refused(monkeypatch):
    def missing(op, arch):
        raise BackendUnavailableError(f"{op} on {arch}")

    module = module_of("v3", BF16)
    monkeypatch.setattr("mla_fusions.layer.require_kernel", missing)
    for make in (MLAPrologue, MLAEpilogue):
        with pytest.raises(BackendUnavailableError, match=f"{make.__name__} on "):
            make.from_module(module)
