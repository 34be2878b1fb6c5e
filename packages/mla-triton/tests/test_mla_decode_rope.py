"""The drop-in for aiter's fused-RoPE decode, against the formula written out in torch."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import mla_triton
from mla_core import LayoutError, use_backend
from mla_core.testing.assertions import assert_close
from mla_core.testing.poison import poison_
from mla_triton import decode_attention_fwd_grouped_rope

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENS = (37, 1, 0, 70)


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def turn(x, position, table, is_neox):
    """Rotate one row, pair by pair, in Python floats."""
    half = table.shape[1] // 2
    result = x.double().clone()
    for i in range(half):
        a, b = (i, i + half) if is_neox else (2 * i, 2 * i + 1)
        cos, sin = float(table[position, i]), float(table[position, half + i])
        result[..., a] = x[..., a].double() * cos - x[..., b].double() * sin
        result[..., b] = x[..., b].double() * cos + x[..., a].double() * sin
    return result


def expected(call):
    """Return ``o`` and ``k_pe_tokens`` of a call, in fp64."""
    q, rows, rank = call["q"].cpu(), call["k_buffer"].cpu()[:, 0], call["kv_lora_rank"]
    indptr, indices = call["kv_indptr"].tolist(), call["kv_indices"].cpu().long()
    out = torch.zeros(*q.shape[:2], rank, dtype=torch.float64)
    tokens = torch.zeros(q.shape[0], q.shape[2] - rank, dtype=torch.float64)
    for b in range(q.shape[0]):
        keys = rows[indices[indptr[b] : indptr[b + 1]]].double()
        if not len(keys):
            continue
        query = q[b].double()
        if call["use_rope"]:
            table = call["cos_sin_cache"].cpu()
            position = int(call["positions"].flatten()[b])
            arguments = position, table, call["is_neox_style"]
            query[:, rank:] = turn(query[:, rank:], *arguments).to(q.dtype).double()
            keys[-1, rank:] = turn(keys[-1, rank:], *arguments).to(rows.dtype).double()
            tokens[b] = keys[-1, rank:]
        scores = query @ keys.T * call["sm_scale"]
        if call["logit_cap"] > 0:
            scores = call["logit_cap"] * torch.tanh(scores / call["logit_cap"])
        out[b] = scores.softmax(-1) @ keys[:, :rank]
    return out, tokens


def make(
    seed,
    dtype=torch.bfloat16,
    heads=3,
    rank=64,
    rope=32,
    lens=LENS,
    rotary_dim=32,
    index_dtype=torch.int32,
    **changes,
):
    torch.manual_seed(seed)
    total = sum(lens)
    rows = poison_(torch.empty(total + 3, 1, rank + rope + 8, dtype=dtype))
    kv_indices = torch.randperm(total + 3)[:total].to(index_dtype)
    rows[kv_indices.long(), :, : rank + rope] = torch.randn(total, 1, rank + rope).to(dtype)
    k_buffer = rows.to(DEVICE)[..., : rank + rope]
    batch = len(lens)
    call = {
        "q": torch.randn(batch, heads, rank + rope).to(DEVICE, dtype),
        "k_buffer": k_buffer,
        "v_buffer": k_buffer[..., :rank],
        "o": poison_(torch.empty(batch, heads, rank, dtype=dtype, device=DEVICE)),
        "kv_indptr": torch.tensor([0, *lens]).cumsum(0).to(DEVICE, index_dtype),
        "kv_indices": kv_indices.to(DEVICE),
        "k_pe_tokens": poison_(torch.empty(batch, rope, dtype=dtype, device=DEVICE)),
        "kv_lora_rank": rank,
        "rotary_dim": rotary_dim,
        "cos_sin_cache": torch.randn(99, rotary_dim).to(DEVICE, dtype),
        "positions": torch.randint(99, (batch,)).to(DEVICE),
        "attn_logits": torch.empty(batch, heads, 4, rank + 1, device=DEVICE),
        "num_kv_splits": 4,
        "sm_scale": 1 / math.sqrt(192),
        "logit_cap": 0.0,
        "use_rope": True,
        "is_neox_style": False,
    }
    return {**call, **changes}


def check(call):
    want, want_tokens = expected(call)
    before = call["k_buffer"].clone()
    assert decode_attention_fwd_grouped_rope(*call.values()) is None
    assert_close(call["o"], want, what="o")
    if call["use_rope"]:
        assert_close(call["k_pe_tokens"], want_tokens, what="k_pe_tokens")
    assert torch.equal(call["k_buffer"].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 12])
def test_both_pairings_whole_and_partial(backend, seed, is_neox, rotary_dim):
    check(make(seed, is_neox_style=is_neox, rotary_dim=rotary_dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(backend, seed, dtype):
    check(make(seed, dtype))


def test_the_dims_of_deepseek_v3(backend, seed):
    check(make(seed, heads=16, rank=512, rope=64, rotary_dim=64, lens=(40, 3)))


def test_soft_cap(backend, seed):
    check(make(seed, logit_cap=3.0))


@pytest.mark.parametrize("num_kv_splits", [1, 16])
def test_splits_and_index_dtypes(backend, seed, num_kv_splits):
    positions = torch.randint(99, (len(LENS), 1)).to(DEVICE, torch.int32)
    splits = {"num_kv_splits": num_kv_splits, "positions": positions}
    check(make(seed, index_dtype=torch.int64, **splits))


def test_without_rope_everything_is_taken_as_rotated(backend, seed):
    unused = {"k_pe_tokens": None, "cos_sin_cache": None, "positions": None, "attn_logits": None}
    check(make(seed, use_rope=False, **unused))
    call = make(seed, use_rope=False)
    tokens = call["k_pe_tokens"].clone()
    check(call)
    assert torch.equal(call["k_pe_tokens"].isnan(), tokens.isnan())


def test_a_sequence_without_rows_gives_zeros(backend, seed):
    call = make(seed, lens=(0, 0))
    decode_attention_fwd_grouped_rope(**call)
    assert not call["o"].any()
    assert not call["k_pe_tokens"].any()


def test_key_output_is_optional_and_any_strides_are_fine(backend, seed):
    call = make(seed)
    keys = torch.empty(len(LENS), 1, 32, dtype=torch.bfloat16, device=DEVICE)
    _, tokens = expected(call)
    decode_attention_fwd_grouped_rope(**{**call, "k_pe_tokens": keys})
    assert_close(keys[:, 0], tokens, what="k_pe_tokens")

    call = make(seed, k_pe_tokens=None)
    wide = torch.full((len(LENS), 5, 100), 7.0, dtype=torch.bfloat16, device=DEVICE)
    q = torch.nn.functional.pad(call["q"].transpose(0, 1), (4, 4))[..., 4:-4].transpose(0, 1)
    call.update(q=q, o=wide[:, 1:4, 20:84])
    want, _ = expected(call)
    decode_attention_fwd_grouped_rope(**call)
    assert_close(call["o"], want, what="o")
    assert (wide[:, [0, 4]] == 7).all()
    assert (wide[..., 84:] == 7).all()


def test_a_configuration_is_checked():
    config = {
        "fwd_grouped_kernel_stage1_rope": {"BLOCK_N": 32, "BLOCK_H": 16, "waves_per_eu": 1},
        "fwd_kernel_stage2": {"num_stages": 2},
    }
    with use_backend("reference"):
        check(make(0, config=config))
        with pytest.raises(LayoutError, match=r"config must have sections among .* got stage3"):
            decode_attention_fwd_grouped_rope(**make(0, config={"stage3": {}}))
        wrong = {"fwd_kernel_stage2": {"BLOCK_X": 1}}
        with pytest.raises(LayoutError, match=r"must have keys among .* got BLOCK_X"):
            decode_attention_fwd_grouped_rope(**make(0, config=wrong))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_buffer": "copy"}, r"v_buffer must be k_buffer\[..., :64\], the same memory"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be in 1..96"),
        ({"kv_lora_rank": 128}, "kv_lora_rank must be in 1..96"),
        ({"num_kv_splits": 0}, r"num_kv_splits must be in 1\.\.256, got 0"),
        ({"rotary_dim": 7}, "rotary_dim must be an even number"),
        ({"rotary_dim": 34}, "dim_offset \\+ rotary_dim <= qk_rope_head_dim=32, got 0 \\+ 34"),
        ({"cos_sin_cache": None}, "cos_sin_cache must be given"),
        ({"positions": None}, "positions must be given"),
        ({"kv_indptr": torch.zeros(3, dtype=torch.int32)}, r"kv_indptr must be \[5\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    call = make(0)
    if change.get("v_buffer") == "copy":
        change = {"v_buffer": call["v_buffer"].contiguous()}
    if "kv_indptr" in change:
        change = {"kv_indptr": change["kv_indptr"].to(DEVICE)}
    with pytest.raises(LayoutError, match=message), use_backend("reference"):
        decode_attention_fwd_grouped_rope(**{**call, **change})


def test_the_call_is_aiters():
    names = (
        "q k_buffer v_buffer o kv_indptr kv_indices k_pe_tokens kv_lora_rank rotary_dim "
        "cos_sin_cache positions attn_logits num_kv_splits sm_scale logit_cap use_rope "
        "is_neox_style config"
    )
    parameters = inspect.signature(mla_triton.decode_attention_fwd_grouped_rope).parameters
    assert list(parameters) == names.split()
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    assert defaults == {
        "logit_cap": 0.0,
        "use_rope": False,
        "is_neox_style": False,
        "config": None,
    }
