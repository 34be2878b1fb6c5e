"""Every named layout, one row each."""

from __future__ import annotations

from mla_core.errors import LayoutError
from mla_core.layouts import arrange
from mla_core.layouts.codecs import Cast, GroupScaled, NvFp4, PerTensor, TokenScaled
from mla_core.layouts.layout import Layout

_BF16 = Cast("bf16")
_OCP, _FNUZ = "fp8_e4m3", "fp8_e4m3fnuz"
_V4 = (448, 64)
_INDEXER = (128, 0)


def _standard(name: str, dtype: str) -> Layout:
    cast = Cast(dtype)
    summary = f"{dtype} [num_pages, page_size, kv_c ‖ k_pe]"
    return Layout(name, "standard", summary, cast, cast, arrange.standard)


def _standard_fp8(name: str, dtype: str) -> Layout:
    codec = PerTensor(dtype)
    summary = f"{dtype} [num_pages, page_size, kv_c ‖ k_pe], one scale for all"
    return Layout(name, "standard", summary, codec, codec, arrange.standard)


def _seg656(name: str, dtype: str) -> Layout:
    latent = GroupScaled(dtype, 128)
    summary = f"byte page: {dtype} latents, fp32 scales per 128, bf16 ropes, segment after segment"
    return Layout(name, "seg656", summary, latent, _BF16, arrange.segmented, rank_multiple=128)


def _seg644(name: str, dtype: str) -> Layout:
    latent = TokenScaled(dtype)
    summary = (
        f"byte page: {dtype} latents, fp32 scales per token, bf16 ropes, segment after segment"
    )
    return Layout(name, "seg644", summary, latent, _BF16, arrange.segmented)


def _ds656(name: str, dtype: str) -> Layout:
    summary = f"FlashMLA's 656 bytes per token: 512 {dtype}, 4 fp32 scales per 128, 64 bf16"
    latent = GroupScaled(dtype, 128)
    return Layout(name, "ds656", summary, latent, _BF16, arrange.interleaved, rank_multiple=128)


def _seg576(name: str, dtype: str) -> Layout:
    summary = f"byte page: {dtype} latents, then ropes, one scale for all"
    codec = PerTensor(dtype)
    return Layout(name, "seg576", summary, codec, codec, arrange.segmented)


def _ds32(name: str, dtype: str) -> Layout:
    summary = f"separate arrays: {dtype} latents, bf16 ropes, E8M0 scales per 32"
    return Layout(name, "ds32", summary, GroupScaled(dtype, 32, e8m0=True), _BF16, arrange.separate)


def _shuffled(name: str, codec: Cast | PerTensor) -> Layout:
    summary = f"{codec.dtype} in 16-token tiles of 16-byte lanes, latent region then rope region"
    return Layout(
        name,
        "shuffled",
        summary,
        codec,
        codec,
        arrange.shuffled,
        page_multiple=16,
        rope_multiple=16,
    )


def _indexer(name: str, dtype: str, *, tiled: bool = False) -> Layout:
    order = "in 16 x 16 tiles" if tiled else "token by token"
    return Layout(
        name,
        "indexer_shuffled" if tiled else "indexer",
        f"sparse indexer: {dtype} keys of 128 {order}, then one fp32 scale per token",
        GroupScaled(dtype, 128, min_amax=1e-4),
        _BF16,
        arrange.indexer_shuffled if tiled else arrange.indexer,
        page_multiple=16 if tiled else 1,
        only=_INDEXER,
    )


#: All layouts by name.
ALL: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        _standard("bf16", "bf16"),
        _standard("fp16", "fp16"),
        _standard("fp32", "fp32"),
        _standard_fp8("fp8", _OCP),
        _standard_fp8("fp8_fnuz", _FNUZ),
        _seg656("fp8_seg656", _OCP),
        _seg656("fp8_seg656_fnuz", _FNUZ),
        _seg644("fp8_seg644", _OCP),
        _seg644("fp8_seg644_fnuz", _FNUZ),
        _ds656("fp8_ds656", _OCP),
        _ds656("fp8_ds656_fnuz", _FNUZ),
        _seg576("fp8_seg576", _OCP),
        _seg576("fp8_seg576_fnuz", _FNUZ),
        _ds32("fp8_ds32", _OCP),
        _ds32("fp8_ds32_fnuz", _FNUZ),
        Layout(
            "v4_nm",
            "v4_nm",
            "DeepSeek-V4: rows of 448 fp8, doubled E8M0 scales per 64, padding; bf16 ropes apart",
            GroupScaled(_OCP, 64, e8m0=True),
            _BF16,
            arrange.v4_nm,
            only=_V4,
        ),
        Layout(
            "v4_584",
            "v4_584",
            "DeepSeek-V4: rows of 448 fp8 and 64 bf16, then 8 bytes of E8M0 scales per token",
            GroupScaled(_OCP, 64, e8m0=True),
            _BF16,
            arrange.v4_584,
            only=_V4,
        ),
        Layout(
            "v4_bf16",
            "standard",
            "DeepSeek-V4: bf16 rows of 512, value and key alike",
            _BF16,
            _BF16,
            arrange.standard,
            only=_V4,
        ),
        _shuffled("shuffled_bf16", _BF16),
        _shuffled("shuffled_fp8", PerTensor(_OCP)),
        _shuffled("shuffled_fp8_fnuz", PerTensor(_FNUZ)),
        Layout(
            "nvfp4_shuffled",
            "nvfp4_shuffled",
            "e2m1 pairs and e4m3 scales per 16, in the tiles of scaled matrix instructions",
            NvFp4(),
            NvFp4(),
            arrange.nvfp4_shuffled,
            page_multiple=128,
            rank_multiple=256,
            rope_multiple=64,
        ),
        _indexer("indexer", _OCP),
        _indexer("indexer_fnuz", _FNUZ),
        _indexer("indexer_shuffled", _OCP, tiled=True),
        _indexer("indexer_shuffled_fnuz", _FNUZ, tiled=True),
    )
}


def names() -> tuple[str, ...]:
    """Return the names of all layouts."""
    return tuple(ALL)


def get(name: str) -> Layout:
    """Return a layout by name.

    Raises
    ------
    LayoutError
        There is none; the message lists the names.
    """
    try:
        return ALL[name]
    except KeyError:
        raise LayoutError(f"layout: name must be one of {', '.join(ALL)}, got {name!r}") from None
