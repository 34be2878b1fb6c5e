"""DeepSeek models of transformers whose layers run fused, against their own eager attention."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

import transformers

from mla_core.demo.pages import PagePool, Request, batch_arrays
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.integrations.transformers import PagedLatentCache
from mla_core.testing.assertions import relative_l2
from mla_core.testing.poison import poison_
from mla_fusions.integrations.transformers import FusedAttention, fuse

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB_SIZE = 53
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "v3-yarn": (
        transformers.DeepseekV3Config,
        transformers.DeepseekV3ForCausalLM,
        {"rope_parameters": YARN},
    ),
    "v3-no-q-lora": (
        transformers.DeepseekV3Config,
        transformers.DeepseekV3ForCausalLM,
        {"q_lora_rank": None, "rope_interleave": False},
    ),
    "v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM, {}),
}


def build(name, seed, dtype=torch.float32, **options):
    """Return (fused, eager): one model twice, with the same weights."""
    config_class, model_class, changes = MODELS[name]
    transformers.set_seed(seed)
    widths = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 32,
        "v_head_dim": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        # Every expert is asked, so that rounding cannot choose another one.
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "initializer_range": 0.15,
        "attn_implementation": "eager",
    }
    eager = model_class(config_class(**(widths | changes))).to(DEVICE, dtype).eval()
    fused = copy.deepcopy(eager)
    fuse(fused, **options)
    return fused, eager


class Served:
    """Two requests of random tokens, fed in chunks from a poisoned cache."""

    def __init__(self, model, layout, *, prefill="absorbed", page_size=4):
        self.model, self.page_size = model, page_size
        self.cache = PagedLatentCache.allocate(
            model.config,
            num_pages=10,
            page_size=page_size,
            layout=layout,
            q_dtype=model.dtype,
            device=DEVICE,
            prefill=prefill,
        )
        for cache in self.cache.caches:
            for buffer in cache.buffers:
                poison_(buffer)
        self.pool = PagePool(10, 0)
        tokens = torch.randint(VOCAB_SIZE, (2, 14)).tolist()
        self.requests = [Request(str(i), 14, 0, row) for i, row in enumerate(tokens)]
        self.logits = [[], []]

    def prepare(self, lens):
        """Return the packed tokens and the inputs of a step."""
        packed = []
        for request, new in zip(self.requests, lens, strict=True):
            request.resize(request.num_cached + new, self.page_size, self.pool)
            packed += request.tokens[request.num_cached : request.num_cached + new]
        arrays = batch_arrays(self.requests, list(lens), self.page_size, DEVICE)
        return torch.tensor([packed], device=DEVICE), self.cache.begin_step(*arrays)

    def feed(self, *lens):
        packed, inputs = self.prepare(lens)
        with torch.no_grad():
            logits = self.model(input_ids=packed, **inputs).logits[0]
        for request, new, part in zip(self.requests, lens, logits.split(lens), strict=True):
            request.num_cached += new
            self.logits[int(request.name)].append(part)

    def run(self):
        """Prefill, a chunk and a decode step, drafts; return all logits in order."""
        self.feed(9, 3)
        self.feed(1, 7)
        self.feed(4, 4)
        return torch.cat([torch.cat(parts) for parts in self.logits])

    def run_eagerly(self, model):
        with torch.no_grad():
            rows = [torch.tensor([request.tokens], device=DEVICE) for request in self.requests]
            return torch.cat([model(input_ids=row).logits[0] for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_eager(name, seed):
    fused, eager = build(name, seed)
    served = Served(fused, "fp32")
    expected = served.run_eagerly(eager)
    assert expected.std() > 0.1
    torch.testing.assert_close(served.run(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", ["plain", "mxfp4", "nvfp4"])
def test_bf16_is_near_eager(weights, seed):
    fused, eager = build("v3-yarn", seed, torch.bfloat16, weights=weights)
    served = Served(fused, "bf16")
    actual, rounded = served.run(), served.run_eagerly(eager)
    truth = served.run_eagerly(eager.float())
    limit = 1.5 * relative_l2(rounded, truth)
    print("relative error", relative_l2(actual, truth), "eager", relative_l2(rounded, truth))
    assert relative_l2(actual, truth) < (limit if weights == "plain" else 0.4)


def test_only_attention_is_replaced(seed):
    fused, _ = build("v2", seed)
    replaced = [module for module in fused.modules() if isinstance(module.forward, FusedAttention)]
    assert len(replaced) == 2
    assert all(hasattr(module, "kv_b_proj") for module in replaced)


def test_what_a_fused_layer_cannot_do_is_refused(seed, monkeypatch):
    monkeypatch.setenv("MLA_CHECK", "1")  # compare positions on a GPU too
    fused, _ = build("v2", seed)
    packed, inputs = Served(fused, "fp32", prefill="expanded").prepare((3, 2))
    with pytest.raises(LayoutError, match="prefill='absorbed', got 'expanded'"):
        fused(input_ids=packed, **inputs)
    packed, inputs = Served(fused, "fp32").prepare((3, 2))
    with pytest.raises(LayoutError, match=r"mla_cache must be .* got None; call the model with"):
        fused(input_ids=packed, **(inputs | {"mla_cache": None}))
    shape = {"position_ids": torch.zeros(1, 4, dtype=torch.long, device=DEVICE)}
    with pytest.raises(LayoutError, match="position_ids must be those of begin_step"):
        fused(input_ids=packed[:, :4], **(inputs | shape))
    with pytest.raises(LayoutError, match="attention_mask must be None"):
        fused(input_ids=packed, attention_mask=torch.zeros(1, 5, device=DEVICE), **inputs)
    with pytest.raises(UnsupportedProblemError, match="must not require a gradient"):
        fused(input_ids=packed, **inputs)
    layer = fused.model.layers[0].self_attn
    with pytest.raises(LayoutError, match=r"input_ids must be \[1, 5\] as begin_step was told"):
        layer(torch.zeros(1, 4, 32, device=DEVICE), None, mla_cache=inputs["mla_cache"])


def test_other_models_are_refused():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(UnsupportedProblemError, match=r"must be of type deepseek_v2 or .* 'llama'"):
        fuse(transformers.LlamaForCausalLM(config))
