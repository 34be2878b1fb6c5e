"""DeepSeek models of transformers, attending through our ops, against their own eager attention."""

from __future__ import annotations

import copy
import random

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from mla_core.batch import indptr_of
from mla_core.demo.pages import PagePool, Request, batch_arrays
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.integrations.transformers import (
    ATTENTION_NAME,
    PagedLatentCache,
    dims_of,
    enable,
)
from mla_core.testing.poison import poison_

TOLERANCE = 1e-4
VOCAB_SIZE = 97

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
    "v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, {}),
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


def build(name: str, seed: int):
    """Return (ours, eager): one model twice, with the same weights."""
    config_class, model_class, changes = MODELS[name]
    transformers.set_seed(seed)
    widths = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        # Attention must be far from uniform, or errors in it would hardly move the logits.
        "initializer_range": 0.15,
        "attn_implementation": "eager",
    }
    config = config_class(**(widths | changes))
    eager = model_class(config).eval()
    ours = model_class(copy.deepcopy(config)).eval()
    ours.load_state_dict(eager.state_dict())
    enable(ours)
    return ours, eager


class Batch:
    """Feeds chunks of given sequences to our model from a hostile cache, and keeps the logits."""

    def __init__(self, model, sequences, page_size, layout="fp32", prefill="expanded", seed=0):
        num_pages = 2 + sum(-(-len(sequence) // page_size) for sequence in sequences)
        self.model = model
        self.cache = PagedLatentCache.allocate(
            model.config,
            num_pages=num_pages,
            page_size=page_size,
            layout=layout,
            q_dtype=torch.float32,
            prefill=prefill,
        )
        for cache in self.cache.caches:
            for buffer in cache.buffers:
                poison_(buffer)
        self.pool = PagePool(num_pages, seed)
        self.page_size = page_size
        self.requests = [Request(str(i), len(s), 0, list(s)) for i, s in enumerate(sequences)]
        self.logits = [[] for _ in sequences]

    def feed(self, lens):
        """Run the next ``lens[b]`` tokens of each request; 0 leaves a request out of the step."""
        live = [(r, n) for r, n in zip(self.requests, lens, strict=True) if n]
        packed = []
        for request, new in live:
            request.resize(request.num_cached + new, self.page_size, self.pool)
            packed += request.tokens[request.num_cached : request.num_cached + new]
        new_lens = [new for _, new in live]
        arrays = batch_arrays([request for request, _ in live], new_lens, self.page_size, "cpu")
        inputs = self.cache.begin_step(*arrays)
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([packed]), **inputs).logits[0]
        for (request, new), part in zip(live, logits.split(new_lens), strict=True):
            request.num_cached += new
            self.logits[int(request.name)].append(part)


class HeldCache(transformers.DynamicCache):
    """transformers' cache, if it had stored exactly what ours holds for one request."""

    def __init__(self, batch, request, config):
        super().__init__(config=config)
        page = torch.tensor(request.pages)[:, None] * batch.page_size
        slots = (page + torch.arange(batch.page_size)).flatten()[: request.num_cached]
        self.held = [cache.read(slots) for cache in batch.cache.caches]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        held = [rows[None, None] for rows in self.held[layer_idx]]
        # bf16 keeps 8 bits: half a unit in the last place is 2**-9.
        for given, kept in zip((key_states, value_states), held, strict=True):
            torch.testing.assert_close(kept, given, rtol=2**-8, atol=1e-4)
        return super().update(*held, layer_idx, *args, **kwargs)


def expected_logits(eager, sequence, cache=None):
    with torch.no_grad():
        return eager(
            input_ids=torch.tensor([sequence]), past_key_values=cache, use_cache=cache is not None
        ).logits[0]


def random_sequences(seed, lens):
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in lens]


def assert_all_logits(batch, eager, *, over_held=False):
    for parts, request in zip(batch.logits, batch.requests, strict=True):
        held = HeldCache(batch, request, eager.config) if over_held else None
        expected = expected_logits(eager, request.tokens, held)
        assert expected.std() > 0.1
        torch.testing.assert_close(torch.cat(parts), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_ragged_prefill_chunk_decode_and_verify_equal_eager(name, page_size, seed):
    ours, eager = build(name, seed)
    batch = Batch(ours, random_sequences(seed, (39, 20, 33)), page_size, seed=seed)
    batch.feed((31, 12, 0))  # prefill of two requests
    batch.feed((0, 0, 17))  # another one joins
    batch.feed((1, 1, 1))  # decode
    batch.feed((3, 6, 11))  # a chunk of each, attending to earlier context
    batch.feed((4, 1, 4))  # drafts of two requests, one plain token
    assert [request.num_cached for request in batch.requests] == [39, 20, 33]
    assert_all_logits(batch, eager)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("layout", ["bf16", "fp16"])
def test_a_16_bit_cache_equals_eager_over_the_rounded_latents(layout, page_size, seed):
    ours, eager = build("v3", seed)
    sequences = random_sequences(seed, (25, 40))
    batch = Batch(ours, sequences, page_size, layout=layout, prefill="absorbed", seed=seed)
    batch.feed((20, 38))
    batch.feed((1, 1))
    batch.feed((4, 1))
    assert_all_logits(batch, eager, over_held=True)


def test_absorbed_prefill_equals_expanded_prefill(seed):
    ours, eager = build("v3", seed)
    sequences = random_sequences(seed, (25, 40))
    for prefill in ("absorbed", "expanded"):
        batch = Batch(ours, sequences, 16, prefill=prefill, seed=seed)
        batch.feed((25, 40))
        assert (batch.cache.step.plan is None) == (prefill == "expanded")
        assert_all_logits(batch, eager)


def test_one_plan_serves_all_layers(seed, monkeypatch):
    import mla_core

    ours, _ = build("v3", seed)
    batch = Batch(ours, random_sequences(seed, (9,)), 4, seed=seed)
    batch.feed((8,))
    planned, plan_decode = [], mla_core.plan_decode
    monkeypatch.setattr(
        mla_core, "plan_decode", lambda *a, **k: planned.append(1) or plan_decode(*a, **k)
    )
    batch.feed((1,))
    assert len(planned) == 1
    assert ours.config.num_hidden_layers == 2


def test_a_corrupted_row_changes_the_logits(seed):
    ours, eager = build("v3", seed)
    batch = Batch(ours, random_sequences(seed, (30,)), 16, seed=seed)
    batch.feed((29,))
    batch.cache.caches[1].rows()[batch.requests[0].pages[0], 3] += 1.0
    batch.feed((1,))
    expected = expected_logits(eager, batch.requests[0].tokens)[-1]
    assert (batch.logits[0][-1][0] - expected).abs().max() > 10 * TOLERANCE


def test_hidden_pages_are_neither_written_nor_read(seed):
    ours, _ = build("v3", seed)
    cache = PagedLatentCache.allocate(
        ours.config, num_pages=2, page_size=4, layout="fp32", q_dtype=torch.float32
    )
    indptr = indptr_of(torch.tensor([6], dtype=torch.int32))
    pages = torch.tensor([-1, 1], dtype=torch.int32)
    last = torch.tensor([2], dtype=torch.int32)
    inputs = cache.begin_step(indptr, torch.tensor([0, 2], dtype=torch.int32), pages, last)
    assert cache.step.slots.tolist() == [-1, -1, -1, -1, 4, 5]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    with torch.no_grad():
        ours(input_ids=torch.arange(6)[None], **inputs)
    assert cache.caches[0].rows()[0].abs().max() == 0
    assert cache.caches[0].rows()[1, :2].abs().min() > 0


def test_the_cache_answers_as_transformers_expects():
    config = transformers.DeepseekV3Config(num_hidden_layers=3, num_attention_heads=16)
    cache = PagedLatentCache.allocate(config, num_pages=5, page_size=8)
    assert len(cache) == 3
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(7, 0) == (7, 0)
    assert cache.get_max_length() == 40
    assert cache.caches[2].layout.name == "bf16"
    cache.reset()
    cache.layers[0].lazy_initialization(torch.empty(0), torch.empty(0))
    assert cache.is_initialized


def test_dims_of_reads_the_configuration():
    dims = dims_of(transformers.DeepseekV3Config())
    assert (dims.num_heads, dims.kv_lora_rank, dims.qk_rope_head_dim) == (128, 512, 64)
    assert (dims.qk_nope_head_dim, dims.v_head_dim) == (128, 128)


@pytest.fixture
def prepared(seed):
    """Return our model and the inputs of a first step over six tokens."""
    ours, _ = build("v3", seed)
    batch = Batch(ours, random_sequences(seed, (6,)), 4, seed=seed)
    batch.requests[0].resize(6, 4, batch.pool)
    return ours, batch.cache.begin_step(*batch_arrays(batch.requests, [6], 4, "cpu"))


TOKENS = torch.arange(6)[None]


def test_a_forward_without_our_cache_says_how_to_call(prepared):
    model, inputs = prepared
    del inputs["mla_cache"]
    with pytest.raises(LayoutError, match=r"mla_cache must be .* got None; call the model with"):
        model(input_ids=TOKENS, **inputs)


def test_padding_is_refused(prepared):
    model, inputs = prepared
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    with pytest.raises(LayoutError, match=r"attention_mask must be None, got .*\(1, 6\); pack"):
        model(input_ids=TOKENS, attention_mask=mask, **inputs)


def test_a_mask_of_ones_is_no_padding(prepared):
    model, inputs = prepared
    with torch.no_grad():
        masked = model(input_ids=TOKENS, attention_mask=torch.ones(1, 6), **inputs).logits
        assert torch.equal(masked, model(input_ids=TOKENS, **inputs).logits)


def test_a_ready_made_mask_is_refused(prepared):
    model, inputs = prepared
    with pytest.raises(LayoutError, match=r"attention_mask must be None, got .*\(1, 1, 6, 6\)"):
        model(input_ids=TOKENS, attention_mask=torch.zeros(1, 1, 6, 6), **inputs)


def test_other_positions_are_refused(prepared):
    model, inputs = prepared
    inputs["position_ids"] = inputs["position_ids"] + 1
    with pytest.raises(LayoutError, match="position_ids must be those of begin_step"):
        model(input_ids=TOKENS, **inputs)


@pytest.mark.parametrize("shape", [(1, 5), (2, 3)])
def test_tokens_that_are_not_the_packed_step_are_refused(prepared, shape):
    model, inputs = prepared
    inputs["position_ids"] = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(LayoutError, match=r"input_ids must be \[1, 6\] .* pack the batch"):
        model(input_ids=torch.zeros(shape, dtype=torch.long), **inputs)


def test_a_step_longer_than_its_request_is_refused(prepared):
    _, inputs = prepared
    int32 = [torch.tensor(x, dtype=torch.int32) for x in ([0, 7], [0, 2], [0, 1], [2])]
    with pytest.raises(LayoutError, match=r"qo_indptr must be .*lengths include the new tokens"):
        inputs["mla_cache"].begin_step(*int32)


def test_a_batch_of_another_size_is_refused(prepared):
    _, inputs = prepared
    int32 = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 6], [0, 2], [0, 1], [2])]
    with pytest.raises(LayoutError, match=r"qo_indptr must be \[batch_size \+ 1\]=\(2,\)"):
        inputs["mla_cache"].begin_step(*int32)


def test_a_step_must_be_prepared():
    config = transformers.DeepseekV3Config(num_hidden_layers=1, num_attention_heads=16)
    cache = PagedLatentCache.allocate(config, num_pages=1, page_size=1)
    with pytest.raises(LayoutError, match="step must be prepared first; call begin_step"):
        _ = cache.step


def test_other_models_are_refused():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(UnsupportedProblemError, match=r"must be of type deepseek_v2 or .* 'llama'"):
        enable(model)
    assert model.config._attn_implementation != ATTENTION_NAME


def test_a_transformers_without_expand_kv_is_refused():
    class Old(torch.nn.Module):
        config = transformers.DeepseekV3Config()

    with pytest.raises(UnsupportedProblemError, match=r"got none; install transformers>=5\.15"):
        enable(Old())
