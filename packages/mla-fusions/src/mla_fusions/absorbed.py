"""Absorbed projections: batched products with one weight matrix per head, under engines' names.

W_UK is folded into the query before attention, W_UV applied to the output after it; the batch is
the heads. With few tokens the weights are most of the bytes, so that storing them in fewer bits is
what makes these products fast.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mla_core.arch import arch_of
from mla_core.checks import check_tensor
from mla_core.errors import LayoutError
from mla_core.launch import launch
from mla_fusions import rows
from mla_fusions.compiling import uncompiled
from mla_fusions.latent_writers import as_scale
from mla_fusions.rows import power_of_two

#: Kinds of operands, as in `mla_fusions.kernels.absorbed`.
_PLAIN, _FP8, _MXFP4, _PACKED, _NVFP4 = range(5)
_HALF = (torch.bfloat16, torch.float16)
FLOATING = (*_HALF, torch.float32)
#: Name and exponent bias of fp8.
FP8_OF = {torch.float8_e4m3fn: ("fp8_e4m3", 7), torch.float8_e4m3fnuz: ("fp8_e4m3fnuz", 8)}
_SCALE_BYTES = (torch.uint8, torch.float8_e8m0fnu)
#: Chips whose matrix instructions take MXFP4.
_SCALED_DOT = frozenset({"gfx950"})
_GROUP = {_MXFP4: 32, _PACKED: 32, _NVFP4: 16}
#: Programs to have before tiles of weights grow: two for each multiprocessor of a large GPU.
_MIN_PROGRAMS = 256
#: Programs below which K is split, and the least that a split takes of it.
_FEW_PROGRAMS = 48
_MIN_SPLIT = 128
#: Shared memory for operands that are loaded ahead.
_BUFFER_BYTES = {"sm90": 128 << 10}
#: Steps that are under way at a time; with four the pipeliner of Triton 3.6 fails for AMD.
_MAX_STAGES = {"sm90": 4}


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut up; ``splits`` programs share the K of one tile.

    Parameters
    ----------
    block_m, block_n, block_k : int
        Tokens, outputs and elements of a step; powers of two, at least 16, 16 and 32.
    splits, num_warps, num_stages : int
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int

    def of(self, tokens: int, n: int) -> int:
        """Return the number of tiles of one head."""
        return -(-tokens // self.block_m) * -(-n // self.block_n)

    def cut(self, k: int) -> tuple[int, int]:
        """Return how many splits are not empty, and how much of ``k`` each takes."""
        blocks = -(-k // self.block_k)
        per_split = -(-blocks // min(self.splits, blocks))
        return -(-blocks // per_split), per_split * self.block_k


#: What tiles are asked for by: names and numbers, or a string of them as the original makes it.
Config = Mapping[str, int] | str
#: Names that the original's ``config`` has for them; its other entries are without effect.
_CONFIG = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "NUM_KSPLIT": "splits",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
}


def choose_tiles(
    heads: int,
    tokens: int,
    n: int,
    k: int,
    *,
    arch: str,
    bits: int = 16,
    group: int | None = None,
    is_quantised: bool = False,
) -> Tiles:
    """Return the tiles of a product: small ones of weights while there are few programs.

    Parameters
    ----------
    heads, tokens, n, k : int
    arch : str
    bits : int
        Of one weight.
    group : int, optional
        The step in ``k`` where that is given.
    is_quantised : bool
        Whether every program quantises the activations that it multiplies.
    """
    block_m = min(128, max(16, power_of_two(tokens)))
    block_k = group or (128 if block_m < 128 else 64)
    tiles_m = -(-tokens // block_m)
    block_n = 128
    # Many activations are better quantised by fewer programs: measured on sm90.
    is_costly = arch == "sm90" and is_quantised and block_m >= 64
    wanted = _MIN_PROGRAMS // 2 if is_costly else _MIN_PROGRAMS
    while block_n > 16 and heads * tiles_m * -(-n // block_n) < wanted:
        block_n //= 2
    programs = heads * tiles_m * -(-n // block_n)
    splits = 1
    if programs < _FEW_PROGRAMS:
        splits = max(1, min(-(-_FEW_PROGRAMS // max(programs, 1)), k // _MIN_SPLIT))
    warps = 8 if block_m * block_n > 64 * 64 else max(2, min(4, block_m * block_n // 256))
    step_bytes = block_k * (2 * block_m + bits * block_n // 8)
    steps, room = -(-k // (splits * block_k)), _BUFFER_BYTES.get(arch, 64 << 10) // step_bytes
    if arch == "sm90":
        # Copies into shared memory are all under way before one is waited for, which takes a second
        # stage even if there is one step. With enough programs many activations for fp8 are faster
        # loaded into registers, where they are quantised.
        if not (is_costly and bits == 8 and programs >= 2 * _MIN_PROGRAMS):
            steps = max(steps, 2)
        if programs < 2 * _MIN_PROGRAMS:
            # Too few to hide what others do: more threads take a tile.
            warps = max(warps, 8 if block_m >= 64 else 4)
    stages = min(_MAX_STAGES.get(arch, 3), steps, room)
    return Tiles(block_m, block_n, block_k, splits, warps, max(1, stages))


@uncompiled
def batched_gemm_bf16(
    XQ: torch.Tensor,
    WQ: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    splitK: int | None = None,
    YQ: torch.Tensor | None = None,
    config: Config | None = None,
    transpose_bm: bool = False,
    transpose_bm_in: bool = False,
) -> torch.Tensor:
    """Multiply each ``XQ[b]`` with the transpose of ``WQ[b]``, both in bf16 or both in fp16.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    XQ : [B, M, K], or [M, B, K] with ``transpose_bm_in``; bf16 or fp16, last dim contiguous
    WQ : [B, N, K], like ``XQ``, the last or the second dim contiguous
        So the part of a projection's weights that is W_UK, [B, K, N], is taken as a view.
    bias : [B, 1, N] or [B, N], bf16, fp16 or fp32, optional
    dtype : torch.dtype
        Of the result: bf16, fp16 or fp32; None is bf16. That of ``YQ`` wins.
    splitK : int, optional
        Programs that share the K of one tile; by default more than one if there are few tiles.
    YQ : [B, M, N], or [M, B, N] with ``transpose_bm``; last dim contiguous, optional
        Written and returned.
    config : mapping or str, optional
        Any of BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, NUM_KSPLIT, num_warps and num_stages;
        other entries are without effect. A string is JSON, of such an object or of its pairs, which
        is aiter's serialised form.
    transpose_bm, transpose_bm_in : bool
        As said of ``YQ`` and ``XQ``; the original does not have them.

    Returns
    -------
    y : as ``YQ``

    Raises
    ------
    LayoutError

    Notes
    -----
    Differences from aiter: ``splitK`` is not refused, and its sums are added in a fixed order;
    64-bit addresses; no tokens are legal.
    """
    op = "batched_gemm_bf16"
    product = product_of_halves(op, ("XQ", "WQ"), XQ, WQ, is_turned=transpose_bm_in)
    return product.run(bias, dtype, YQ, transpose_bm, config, splitK)


@uncompiled
def batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant(
    X: torch.Tensor,
    WQ: torch.Tensor,
    w_scale: torch.Tensor,
    group_size: int = 128,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    splitK: int | None = None,
    YQ: torch.Tensor | None = None,
    transpose_bm: bool = False,
    transpose_bm_in: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """Quantise activations to fp8 for each token and group, and multiply with fp8 weights.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    X : [B, M, K], or [M, B, K] with ``transpose_bm_in``; bf16, fp16 or fp32, last dim contiguous
    WQ : [B, N, K], float8_e4m3fn or float8_e4m3fnuz, the last or the second dim contiguous
        Activations are quantised to the same flavour, which need not be the chip's own.
    w_scale : fp32, one element
        Dequantisation factor of all weights.
    group_size : int
        Elements of K that share a scale of the activations; a power of two, at least 32.
    bias, dtype, splitK, YQ, transpose_bm, transpose_bm_in, config
        As in `batched_gemm_bf16`; BLOCK_SIZE_K follows from ``group_size``.

    Returns
    -------
    y : as ``YQ``

    Raises
    ------
    LayoutError

    Notes
    -----
    Differences from aiter: activations are divided by their scale, not multiplied by its rounded
    reciprocal; ``splitK`` is not refused; 64-bit addresses; no tokens are legal.
    """
    op = "batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant"
    names = ("X", "WQ", "w_scale")
    product = product_of_fp8(op, names, X, WQ, w_scale, group_size, is_turned=transpose_bm_in)
    return product.run(bias, dtype, YQ, transpose_bm, config, splitK)


@uncompiled
def batched_gemm_a16wfp4(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    dtype: torch.dtype | None = torch.bfloat16,
    y: torch.Tensor | None = None,
    config: Config | None = None,
    transpose_bm: bool = False,
    prequant: bool = True,
    y_scale: torch.Tensor | None = None,
    transpose_bm_in: bool = False,
) -> torch.Tensor:
    """Multiply activations, quantised to MXFP4 here or left in bf16, with MXFP4 weights.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    x : [B, M, K], or [M, B, K] with ``transpose_bm_in``; last dim contiguous
        bf16, fp16 or fp32; bf16 unless ``prequant``. K is a multiple of 32.
    w : [B, N, K / 2], uint8 or float4_e2m1fn_x2, last dim contiguous
        Two e2m1 codes a byte, the even element in the low half.
    w_scales : [B, N, K / 32], uint8 or float8_e8m0fnu, last dim contiguous
        Bytes b stand for ``2 ** (b - 127)``, 255 for NaN.
    dtype, y, config, transpose_bm, transpose_bm_in
        As in `batched_gemm_bf16`, the result being ``y``. That may also be fp8.
    prequant : bool
        Whether activations are quantised, 32 elements of a token with one power of two.
    y_scale : fp32, one element, optional
        The result is divided by it, as for an fp8 ``y``, which saturates.

    Returns
    -------
    y : [B, M, N], or [M, B, N] with ``transpose_bm``

    Raises
    ------
    LayoutError

    Notes
    -----
    Differences from aiter: any architecture, where the original needs one that multiplies MXFP4;
    ``prequant=False`` works; activations that are not finite give NaN; the result is divided by
    ``y_scale`` once, after the splits of K are added, and fp8 saturates.
    """
    op, names = "batched_gemm_a16wfp4", ("x", "w", "w_scales")
    product = product_of_mxfp4(
        op, names, x, w, w_scales, is_quantised=prequant, is_turned=transpose_bm_in
    )
    if y_scale is not None:
        product.y_factor = as_scale(op, "y_scale", y_scale, x.device)
    return product.run(None, dtype, y, transpose_bm, config, None, takes_fp8=True)


@uncompiled
def batched_gemm_afp4wfp4(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scales: torch.Tensor,
    w_scales: torch.Tensor,
    dtype: torch.dtype | None = torch.bfloat16,
    y: torch.Tensor | None = None,
    config: Config | None = None,
    transpose_bm: bool = False,
    transpose_bm_in: bool = False,
) -> torch.Tensor:
    """Multiply MXFP4 activations with MXFP4 weights.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    x : [B, M, K / 2], or [M, B, K / 2] with ``transpose_bm_in``
        uint8 or float4_e2m1fn_x2, last dim contiguous; K is a multiple of 32.
    w, w_scales, dtype, y, config, transpose_bm
        As in `batched_gemm_a16wfp4`; ``y`` is not fp8.
    x_scales : [B, M, K / 32], or [M, B, K / 32] with ``transpose_bm_in``; as ``w_scales``

    Returns
    -------
    y : [B, M, N], or [M, B, N] with ``transpose_bm``

    Raises
    ------
    LayoutError

    Notes
    -----
    Differences from aiter: any architecture; ``y`` may be left out; results may be transposed.
    """
    op = "batched_gemm_afp4wfp4"
    x = _as_bytes(x)
    shape: tuple[int | str, ...] = ("B", "M", "K / 2")
    check_tensor(op, "x", x, shape=shape, dtypes=(torch.uint8,), device=x.device)
    shape = (*x.shape[:2], x.shape[2] // 16)
    check_tensor(op, "x_scales", x_scales, shape=shape, dtypes=_SCALE_BYTES, device=x.device)
    x_scales = _as_bytes(x_scales)
    if transpose_bm_in:
        x, x_scales = x.transpose(0, 1), x_scales.transpose(0, 1)
    product = Product(op, "x", x, "w", w, x_kind=_PACKED, w_kind=_MXFP4, x_scales=x_scales)
    product.check_packed_weights("w_scales", w_scales, _SCALE_BYTES)
    return product.run(None, dtype, y, transpose_bm, config, None)


@uncompiled
def batched_gemm_afp4wfp4_pre_quant(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    dtype: torch.dtype | None = torch.bfloat16,
    y: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Call `batched_gemm_a16wfp4` under the older of its names in ROCm/aiter."""
    return batched_gemm_a16wfp4(x, w, w_scales, dtype, y, config)


@uncompiled
def batched_gemm_a16wnvfp4(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    dtype: torch.dtype | None = torch.bfloat16,
    y: torch.Tensor | None = None,
    config: Config | None = None,
    transpose_bm: bool = False,
    w_global_scale: torch.Tensor | None = None,
    transpose_bm_in: bool = False,
) -> torch.Tensor:
    """Multiply activations with NVFP4 weights; the activations stay as they are.

    Parameters
    ----------
    x : [B, M, K], or [M, B, K] with ``transpose_bm_in``; bf16 or fp16, last dim contiguous
        K is a multiple of 16.
    w : [B, N, K / 2], uint8 or float4_e2m1fn_x2, last dim contiguous
        Two e2m1 codes a byte, the even element in the low half.
    w_scales : [B, N, K / 16], float8_e4m3fn, last dim contiguous
    dtype, y, config, transpose_bm, transpose_bm_in
        As in `batched_gemm_a16wfp4`; ``y`` is not fp8.
    w_global_scale : fp32, one element, optional
        Dequantisation factor of all weights, besides ``w_scales``.

    Returns
    -------
    y : [B, M, N], or [M, B, N] with ``transpose_bm``

    Raises
    ------
    LayoutError
    """
    op, names = "batched_gemm_a16wnvfp4", ("x", "w", "w_scales", "w_global_scale")
    product = product_of_nvfp4(op, names, x, w, w_scales, w_global_scale, is_turned=transpose_bm_in)
    return product.run(None, dtype, y, transpose_bm, config, None)


def product_of_halves(
    op: str, names: tuple[str, str], x: torch.Tensor, w: torch.Tensor, *, is_turned: bool = False
) -> Product:
    """Check bf16 or fp16 on both sides; ``is_turned`` says that x is [tokens, heads, K]."""
    check_tensor(op, names[0], x, shape=("B", "M", "K"), dtypes=_HALF, device=x.device)
    product = Product(op, names[0], x.transpose(0, 1) if is_turned else x, names[1], w)
    product.check_weights((x.dtype,), x.shape[2])
    return product


def product_of_fp8(
    op: str,
    names: tuple[str, str, str],
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    group_size: int,
    *,
    is_turned: bool = False,
) -> Product:
    """Check fp8 weights, and activations to be quantised."""
    check_tensor(op, names[0], x, shape=("B", "M", "K"), dtypes=FLOATING, device=x.device)
    if group_size < 32 or group_size & (group_size - 1):
        raise LayoutError(f"{op}: group_size must be a power of two from 32 on, got {group_size}")
    x = x.transpose(0, 1) if is_turned else x
    product = Product(op, names[0], x, names[1], w, x_kind=_FP8, w_kind=_FP8)
    product.check_weights(tuple(FP8_OF), x.shape[2])
    product.w_factor = as_scale(op, names[2], w_scale, x.device)
    # A group that is shorter because K ends has a scale of its own too.
    product.group = min(group_size, max(32, power_of_two(x.shape[2])))
    return product


def product_of_mxfp4(
    op: str,
    names: tuple[str, str, str],
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    *,
    is_quantised: bool,
    is_turned: bool = False,
) -> Product:
    """Check MXFP4 weights, and activations to be quantised or not."""
    dtypes = FLOATING if is_quantised else (torch.bfloat16,)
    check_tensor(op, names[0], x, shape=("B", "M", "K"), dtypes=dtypes, device=x.device)
    x, kind = x.transpose(0, 1) if is_turned else x, _MXFP4 if is_quantised else _PLAIN
    product = Product(op, names[0], x, names[1], w, x_kind=kind, w_kind=_MXFP4)
    product.check_packed_weights(names[2], w_scales, _SCALE_BYTES)
    return product


def product_of_nvfp4(
    op: str,
    names: tuple[str, str, str, str],
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    global_scale: torch.Tensor | None,
    *,
    is_turned: bool = False,
) -> Product:
    """Check NVFP4 weights."""
    check_tensor(op, names[0], x, shape=("B", "M", "K"), dtypes=_HALF, device=x.device)
    x = x.transpose(0, 1) if is_turned else x
    product = Product(op, names[0], x, names[1], w, w_kind=_NVFP4)
    product.check_packed_weights(names[2], w_scales, (torch.float8_e4m3fn,))
    if global_scale is not None:
        product.w_factor = as_scale(op, names[3], global_scale, x.device)
    return product


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return bytes of dtypes that are only ways to read them."""
    is_bytes = tensor.dtype in (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu)
    return tensor.view(torch.uint8) if is_bytes else tensor


@dataclass(slots=True)
class Product:
    """A product that is being checked: x [heads, tokens, K] and what weights it meets."""

    op: str
    x_name: str
    x: torch.Tensor
    w_name: str
    w: torch.Tensor
    x_kind: int = _PLAIN
    w_kind: int = _PLAIN
    x_scales: torch.Tensor | None = None
    w_scales: torch.Tensor | None = None
    w_factor: torch.Tensor | None = None
    y_factor: torch.Tensor | None = None
    k: int = 0
    group: int | None = None

    def check_weights(self, dtypes: tuple[torch.dtype, ...], k: int) -> None:
        """Check weights [heads, N, k] whose last or second dimension is contiguous."""
        w = self.w
        heads = self.x.shape[0]
        shape: tuple[int | str, ...] = (heads, "N", k)
        if w.ndim == 3 and w.stride(-1) != 1 and w.stride(1) == 1:
            w, shape = w.transpose(1, 2), (heads, k, "N")
        check_tensor(self.op, self.w_name, w, shape=shape, dtypes=dtypes, device=self.x.device)
        self._set_k(k)

    def check_packed_weights(
        self, name: str, scales: torch.Tensor, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        """Check fp4 weights and their scales."""
        k, group, device = self.x.shape[2], _GROUP[self.w_kind], self.x.device
        if self.x_kind == _PACKED:
            k *= 2
        if k % group:
            raise LayoutError(
                f"{self.op}: {self.x_name} must have a multiple of {group} as K, got {k}"
            )
        self.w, heads = _as_bytes(self.w), self.x.shape[0]
        shape: tuple[int | str, ...] = (heads, "N", k // 2)
        dtype = (torch.uint8,)
        check_tensor(self.op, self.w_name, self.w, shape=shape, dtypes=dtype, device=device)
        shape = (heads, self.w.shape[1], k // group)
        check_tensor(self.op, name, scales, shape=shape, dtypes=dtypes, device=device)
        self.w_scales = scales.view(torch.uint8)
        self._set_k(k)

    def _set_k(self, k: int) -> None:
        if not k:
            raise LayoutError(f"{self.op}: {self.x_name} must have at least 1 as K, got 0")
        self.k = k

    def run(
        self,
        bias: torch.Tensor | None,
        dtype: torch.dtype | None,
        y: torch.Tensor | None,
        transpose_out: bool,
        config: Config | None,
        splits: int | None,
        *,
        takes_fp8: bool = False,
    ) -> torch.Tensor:
        """Check the rest, launch, and return the result."""
        op, device = self.op, self.x.device
        heads, tokens, n = *self.x.shape[:2], self.w.shape[1]
        if bias is not None:
            if bias.ndim == 3 and bias.shape[1] == 1:
                bias = bias[:, 0]
            check_tensor(op, "bias", bias, shape=(heads, n), dtypes=FLOATING, device=device)
        shape = (tokens, heads, n) if transpose_out else (heads, tokens, n)
        accepted = (*FLOATING, *FP8_OF) if takes_fp8 else FLOATING
        if y is None:
            dtype = torch.bfloat16 if dtype is None else dtype
            if dtype not in accepted:
                raise LayoutError(
                    f"{op}: dtype must be {' or '.join(map(str, accepted))}, got {dtype}"
                )
            y = torch.empty(shape, dtype=dtype, device=device)
        name = "y" if self.w_name == "w" else "YQ"
        check_tensor(op, name, y, shape=shape, dtypes=accepted, device=device)
        tiles = self.tiles(config, splits)
        if y.numel():
            self._launch(bias, y.transpose(0, 1) if transpose_out else y, tiles)
        return y

    def tiles(self, config: Config | None, splits: int | None) -> Tiles:
        """Return how to cut the product up, as far as the caller does not say."""
        tiles = choose_tiles(
            self.x.shape[0],
            self.x.shape[1],
            self.w.shape[1],
            self.k,
            arch=arch_of(self.x.device),
            bits=4 if self.w_kind in _GROUP else 8 * self.w.element_size(),
            group=self.group,
            is_quantised=self.x_kind in (_FP8, _MXFP4),
        )
        return _configured(self.op, tiles, config, splits, fixed_k=self.x_kind == _FP8)

    def _launch(self, bias: torch.Tensor | None, y: torch.Tensor, tiles: Tiles) -> None:
        rows.require_kernel(self.op, arch_of(y.device))
        # Imported at the first launch: Triton costs a second and may be absent.
        from mla_fusions.kernels.absorbed import absorbed_kernel, reduce_splits_kernel

        heads, tokens, n = y.shape
        splits = tiles.cut(self.k)[0]
        sums = None
        if splits > 1:
            sums = torch.empty(splits, heads, tokens, n, dtype=torch.float32, device=y.device)
        last = self.w_factor, bias, self.y_factor
        programs = tiles.of(tokens, n)
        args, constants = self.arguments(last, y, sums, tiles)
        options = {"num_warps": tiles.num_warps}
        stages = {"num_stages": tiles.num_stages}
        launch(absorbed_kernel, (programs, heads, splits), *args, **constants, **options, **stages)
        if sums is None:
            return
        names = ("Y_BIAS", "Y_IS_NATIVE", "BLOCK_M", "BLOCK_N")
        launch(
            reduce_splits_kernel,
            (programs, heads),
            sums,
            *last,
            _as_bytes_of_fp8(y)[0],
            tokens,
            *sums.stride()[:2],
            0 if bias is None else bias.stride(0),
            *y.stride()[:2],
            N=n,
            NUM_SPLITS=splits,
            **{name: constants[name] for name in names},
            **options,
        )

    def arguments(
        self,
        last: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
        y: torch.Tensor,
        sums: torch.Tensor | None,
        tiles: Tiles,
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return the arguments and the constants of `absorbed_kernel`.

        ``last`` are the weights' factor, the bias and the result's factor; ``sums`` receives the
        splits of K, if there are, in place of ``y`` [heads, tokens, N].
        """
        arch, x = arch_of(y.device), self.x
        w, w_fp8, w_bias = _as_bytes_of_fp8(self.w)
        y, y_fp8, y_bias = _as_bytes_of_fp8(y)
        bias = last[1]
        out = y if sums is None else sums
        args = (
            x,
            self.x_scales,
            w,
            self.w_scales,
            *(last if sums is None else (None, None, None)),
            out,
            y.shape[1],
            *x.stride()[:2],
            *_strides(self.x_scales),
            *w.stride(),
            *_strides(self.w_scales),
            0 if bias is None else bias.stride(0),
            0 if sums is None else sums.stride(0),
            *out.stride()[-3:-1],
        )
        constants: dict[str, object] = {
            "N": y.shape[2],
            "K": self.k,
            "IN_WORDS": self._are_words(tiles.block_k),
            "SPLIT_K": tiles.cut(self.k)[1],
            "IS_SPLIT": sums is not None,
            "X_KIND": self.x_kind,
            "W_KIND": self.w_kind,
            "BIAS": w_bias or 7,
            "IS_NATIVE": rows.NATIVE_FP8.get(arch) == w_fp8,
            "HAS_SCALED_DOT": arch in _SCALED_DOT,
            "HAS_PTX": arch.startswith("sm"),
            "IS_ONE_TILE": y.shape[1] <= tiles.block_m,
            "Y_BIAS": y_bias,
            "Y_IS_NATIVE": rows.NATIVE_FP8.get(arch) == y_fp8,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
        }
        return args, constants

    def _are_words(self, block_k: int) -> bool:
        """Return whether the weights' scales of each step are words of four, all of them there."""
        if self.w_scales is None:
            return False
        group, strides = _GROUP[self.w_kind], self.w_scales.stride()[:2]
        is_aligned = not any(place % 4 for place in (self.w_scales.data_ptr(), *strides))
        return is_aligned and self.k % block_k == 0 and block_k % (4 * group) == 0


def _as_bytes_of_fp8(tensor: torch.Tensor) -> tuple[torch.Tensor, str, int]:
    """Return fp8 as bytes, with its name and exponent bias; other tensors with "" and 0."""
    name, bias = FP8_OF.get(tensor.dtype, ("", 0))
    return (tensor.view(torch.uint8) if name else tensor), name, bias


def _strides(scales: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if scales is None else scales.stride()[:2]


def _configured(
    op: str, tiles: Tiles, config: Config | None, splits: int | None, *, fixed_k: bool
) -> Tiles:
    """Return tiles with what the caller wants instead.

    Raises
    ------
    LayoutError
    """
    if isinstance(config, str):
        config = _parsed(op, config)
    if config is not None and not isinstance(config, Mapping):
        raise LayoutError(
            f"{op}: config must be a mapping, a string or None, got {type(config).__name__}"
        )
    wanted = {_CONFIG[name]: value for name, value in (config or {}).items() if name in _CONFIG}
    if fixed_k:
        wanted.pop("block_k", None)
    if splits is not None:
        wanted["splits"] = splits
    for name, least in (("block_m", 16), ("block_n", 16), ("block_k", 32), ("num_warps", 1)):
        value = wanted.get(name, least)
        if value < least or value & (value - 1):
            raise LayoutError(
                f"{op}: config must have a power of two from {least} on as {name}, got {value}"
            )
    for name in ("splits", "num_stages"):
        if wanted.get(name, 1) < 1:
            raise LayoutError(f"{op}: {name} must be at least 1, got {wanted[name]}")
    return replace(tiles, **wanted) if wanted else tiles


@functools.lru_cache(maxsize=64)
def _parsed(op: str, config: str) -> Mapping[str, int]:
    """Return a serialised config.

    Raises
    ------
    LayoutError
    """
    try:
        return dict(json.loads(config))
    except (TypeError, ValueError) as exc:
        raise LayoutError(
            f"{op}: config must be JSON of names and numbers or of pairs of them, got {config!r}"
        ) from exc
