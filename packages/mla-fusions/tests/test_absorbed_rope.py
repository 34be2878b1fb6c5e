"""Absorbed projection, RoPE and cache write in one launch against the same in two."""

from __future__ import annotations

import json

import pytest
import torch

import mla_fusions
from mla_core import LayoutError
from mla_core.reference import gemm, quant
from mla_core.testing.assertions import assert_close
from mla_core.testing.poison import poison_

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
#: Heads, tokens, more keys than tokens, key heads, and the widths p, c, r.
CASES = [(3, 5, 2, 1, 64, 96, 32), (2, 17, 0, 2, 32, 64, 16)]
WEIGHTS = ("bf16", "fp8", "mxfp4", "wide mxfp4", "nvfp4")

a8w8 = mla_fusions.batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant


def draw(*shape, dtype=BF16):
    return torch.randn(shape, device=DEVICE).to(dtype)


class Case:
    """Inputs of one call; ``fused`` makes it, and ``apart`` does the same in two launches."""

    def __init__(self, case, weights, cache_dtype=BF16):
        heads, tokens, extra, key_heads, p, c, r = case
        self.weights, self.shape = weights, (heads, tokens, c, r)
        wide = poison_(torch.empty(tokens, heads, p + r, dtype=BF16, device=DEVICE))
        wide[:] = draw(tokens, heads, p + r)
        self.q_nope, self.q_pe = wide[..., :p].transpose(0, 1), wide[..., p:]
        keys = draw(tokens + extra, key_heads, c + r)
        self.k_nope, self.k_rope = keys[..., :c], keys[..., c:]
        w = draw(heads, c, p, dtype=FP32) / p**0.5
        self.scale = torch.tensor([0.375], device=DEVICE)
        match weights:
            case "bf16":
                self.w = (w.bfloat16(),)
            case "fp8":
                self.w = w.to(OCP), self.scale
            case "nvfp4":
                self.w = quant.quantize_nvfp4(w)
            case _:
                self.w = quant.quantize_mxfp4(w)
        slots = torch.randperm(64, device=DEVICE)[: tokens + extra]
        slots[1] = -1
        self.slots = slots
        self.positions = torch.randint(0, 50, (tokens,), device=DEVICE)
        angles = torch.randn(50, r // 2, device=DEVICE)
        self.tables = angles.cos(), angles.sin()
        self.cache = poison_(torch.empty(64, key_heads, c + r, dtype=cache_dtype, device=DEVICE))

    def fused(self, **named):
        """Call the op of the weights."""
        rest = (
            self.q_pe, self.k_nope, self.k_rope, self.cache, self.slots, self.positions,
            *self.tables,
        )  # fmt: skip
        match self.weights:
            case "bf16":
                call = mla_fusions.fused_bf16_bmm_rope_cat_and_cache_mla
            case "fp8":
                call = mla_fusions.fused_fp8_bmm_rope_cat_and_cache_mla
                named["group_size"] = 32
            case "nvfp4":
                call = mla_fusions.fused_nvfp4_bmm_rope_cat_and_cache_mla
                named["w_k_global_scale"] = self.scale
            case _:
                call = mla_fusions.fused_fp4_bmm_rope_cat_and_cache_mla
                named["prequant"] = self.weights == "mxfp4"
        return call(self.q_nope, *self.w, *rest, **named)

    def expected(self):
        """Return the absorbed part in fp64, [tokens, heads, c]."""
        x, w = self.q_nope, self.w
        match self.weights:
            case "bf16":
                y = gemm.batched_gemm(x, *w)
            case "fp8":
                y = gemm.batched_gemm_a8w8(x, w[0], 0.375, group_size=32)
            case "nvfp4":
                y = gemm.batched_gemm(x, quant.dequantize_nvfp4(*w)) * 0.375
            case "mxfp4":
                y = gemm.batched_gemm_mxfp4(x, *w)
            case _:
                y = gemm.batched_gemm(x, quant.dequantize_mxfp4(*w))
        return y.transpose(0, 1)

    def apart(self, latent, cache, is_neox, k_scale, dtype, num_zeros):
        """Write queries whose latent part is known, and keys, by the op that does only that."""
        return mla_fusions.fused_qk_rope_cat_and_cache_mla(
            latent, self.q_pe, self.k_nope, self.k_rope, cache, self.slots, self.positions,
            *self.tables, k_scale, is_neox, num_zeros, q_out_dtype=dtype,
        )  # fmt: skip


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("is_neox", [False, True], ids=["gptj", "neox"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_as_in_two_launches(weights, case, is_neox, seed, poisoned_empty):
    it = Case(case, weights)
    _, _, c, _ = it.shape
    cache, num_zeros = it.cache.clone(), 3
    q_out, pe_out, k_out, zeros = it.fused(
        is_neox=is_neox, num_decode_toks_for_zeros=num_zeros, q_out_dtype=FP32
    )
    expected = it.expected()
    assert_close(q_out[..., :c], expected, what="absorbed", dtype="fp32")
    latent = draw(*expected.shape)
    wanted = it.apart(latent, cache, is_neox, None, FP32, num_zeros)
    assert torch.equal(q_out[..., c:], wanted[0][..., c:])
    for ours, theirs in zip((pe_out, k_out, zeros), wanted[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(as_bytes(it.cache), as_bytes(cache))


@pytest.mark.parametrize("transpose_bm", [True, False])
@pytest.mark.parametrize("cache_dtype", [OCP, FNUZ, FP32], ids=str)
@pytest.mark.parametrize("q_dtype", [BF16, FP16, OCP, FNUZ], ids=str)
def test_dtypes_of_queries_and_cache(q_dtype, cache_dtype, transpose_bm, seed, poisoned_empty):
    it = Case(CASES[0], "fp8", cache_dtype)
    heads, tokens, c, r = it.shape
    cache = it.cache.clone()
    whole = it.fused(q_out_dtype=FP32)[0]
    it.cache.copy_(cache)
    scale = torch.tensor([0.25], device=DEVICE)
    q_out, *_ = it.fused(q_out_dtype=q_dtype, k_scale=scale, transpose_bm=transpose_bm)
    assert q_out.shape == ((tokens, heads, c + r) if transpose_bm else (heads, tokens, c + r))
    assert q_out.dtype == q_dtype
    rounded = whole[..., :c].clamp(-torch.finfo(q_dtype).max, torch.finfo(q_dtype).max).to(q_dtype)
    q_out = q_out if transpose_bm else q_out.transpose(0, 1)
    assert torch.equal(as_bytes(q_out[..., :c]), as_bytes(rounded))
    wanted = it.apart(draw(tokens, heads, c), cache, False, scale, q_dtype, 0)
    assert torch.equal(as_bytes(q_out[..., c:]), as_bytes(wanted[0][..., c:]))
    assert torch.equal(as_bytes(it.cache), as_bytes(cache))


def test_a_scaled_fp8_query(seed):
    """Both parts are divided by the same scale."""
    it = Case(CASES[0], "mxfp4")
    scale = torch.tensor([0.05], device=DEVICE)
    whole = it.fused(q_out_dtype=FP32)[0]
    got = it.fused(q_out_dtype=OCP, y_scale=scale)[0]
    assert torch.equal(as_bytes(got), as_bytes(quant.to_fp8(whole / scale)))


@pytest.mark.parametrize("weights", ["bf16", "mxfp4"])
def test_many_tokens_and_other_tiles(weights, seed, poisoned_empty):
    it = Case((2, 130, 3, 1, 32, 64, 16), weights)
    it.slots = torch.arange(133, device=DEVICE)
    it.cache = it.cache.repeat(3, 1, 1)
    config = {"BLOCK_SIZE_N": 32, "NUM_KSPLIT": 4, "waves_per_eu": None, "cache_modifier": ".cg"}
    if weights == "mxfp4":
        # As the original serialises it.
        config = json.dumps(sorted(config.items()))
    q_out, *_ = it.fused(config=config, q_out_dtype=FP32)
    assert_close(q_out[..., :64], it.expected(), what="absorbed", dtype="fp32")
    assert q_out.isfinite().all()
    assert it.cache[:133].isfinite().all()


def test_empty_batches(seed):
    it = Case(CASES[0], "bf16")
    it.q_nope, it.q_pe, it.positions = it.q_nope[:, :0], it.q_pe[:0], it.positions[:0]
    q_out, *_ = it.fused()
    assert q_out.shape == (0, 3, 128)
    # Keys alone are written, unturned.
    live = it.slots >= 0
    assert torch.equal(it.cache[it.slots[live]][..., :96], it.k_nope[live])


def change(**changes):
    def apply(it):
        for name, value in changes.items():
            setattr(it, name, value)
        return {}

    return apply


@pytest.mark.parametrize(
    ("weights", "apply", "message"),
    [
        ("fp8", lambda it: {"q_out_dtype": torch.int8}, "q_out_dtype must be"),
        ("mxfp4", lambda it: {"y_scale": it.scale}, "y_scale must be None unless q_out is fp8"),
        ("mxfp4", lambda it: {"config": "BLOCK_SIZE_N=32"}, "config must be JSON of"),
        ("fp8", lambda it: {"config": 32}, "config must be a mapping, a string or None, got int"),
        ("bf16", lambda it: change(q_pe=it.q_pe[1:])(it), "q_pe must be"),
        ("bf16", lambda it: change(k_nope=it.k_nope[..., 1:])(it), "k_nope must be"),
        ("bf16", lambda it: change(w=(it.w[0].half(),))(it), "w_k must be bfloat16"),
        ("nvfp4", lambda it: change(w=(it.w[0], it.w[0]))(it), "w_k_scale must be"),
        ("fp8", lambda it: change(k_nope=it.k_nope[:3], k_rope=it.k_rope[:3])(it), "at least 5"),
        ("fp8", lambda it: {"num_decode_toks_for_zeros": 6}, "num_decode_toks_for_zeros must be"),
        ("fp8", lambda it: change(slots=it.slots.float())(it), "slot_mapping must be"),
    ],
)
def test_refusals(weights, apply, message, seed):
    it = Case(CASES[0], weights)
    named = apply(it)
    with pytest.raises(LayoutError, match=message):
        it.fused(**named)
