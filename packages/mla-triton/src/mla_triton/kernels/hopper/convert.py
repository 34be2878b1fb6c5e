"""The partition that loads tiles of an fp8 cache and turns them into 16-bit ones in shared memory.

The partitions that multiply with wgmma then see 16-bit tiles, as over any other cache. Bytes land
inside the buffers of the tiles that they become and are converted in place, through registers, so
that there is room for two tiles. With warps of their own for loading, threads would have fewer
registers than wgmma takes.

Without scales for groups tiles are fp16, which holds every e4m3 number. With them, they are bf16:
products with scales are rounded, as a cache in bf16 would have been.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mla_triton.kernels.hopper._gluon import (
    aggregate,
    arrive_copied,
    barrier,
    copy_async,
    reinterpret,
    tma_load,
)
from mla_triton.kernels.hopper.load import TILE, Tiles, load_tile
from mla_triton.kernels.hopper.packed import CHUNK, as_bytes
from mla_triton.kernels.hopper.schedule import deal, next_item


@gluon.jit
def _to_fp16(x):
    """Return e4m3 bytes as fp16, exactly."""
    return gl.inline_asm_elementwise(
        """
        {
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
        }
        """,
        "=r,=r,r",
        [x],
        dtype=gl.float16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _landing(half):
    """View a half [TILE, HALF] of a tile as chunks of bytes; the last half of them is landed in."""
    CHUNKS: gl.constexpr = 2 * half.shape[1] // CHUNK
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, CHUNK], gl.uint8)
    return reinterpret(half, gl.uint8, [CHUNKS, TILE, CHUNK], layout)


@gluon.jit
def _scales(half):
    """View a half of a tile as rows [TILE] of fp32; the first ones are where scales land."""
    ROWS: gl.constexpr = half.shape[1] // 2
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return reinterpret(half, gl.float32, [ROWS, TILE], layout)


@gluon.jit
def _rope_landing(rope, ROPE_BYTES: gl.constexpr):
    """View a rotary part [TILE, R] as bytes: its last half, or all of it for 16-bit keys."""
    PARTS: gl.constexpr = 2 * rope.shape[1] // ROPE_BYTES
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, ROPE_BYTES], gl.uint8)
    return reinterpret(rope, gl.uint8, [PARTS, TILE, ROPE_BYTES], layout).index(PARTS - 1)


@aggregate
class Landing:
    """Tiles in shared memory in which bytes land; counts run over a whole kernel."""

    tiles: Tiles
    landed_a: gl.shared_memory_descriptor  # barriers: the bytes of half a have arrived
    landed_b: gl.shared_memory_descriptor
    ROPE_BYTES: gl.constexpr  # of a token
    GROUPS: gl.constexpr  # scales of a token: none, one, or one for each chunk

    @gluon.constexpr_function
    def __init__(self, tiles, landed_a, landed_b, ROPE_BYTES, GROUPS):
        self.tiles = tiles
        self.landed_a = landed_a
        self.landed_b = landed_b
        self.ROPE_BYTES = gl.constexpr(ROPE_BYTES)
        self.GROUPS = gl.constexpr(GROUPS)

    @gluon.jit
    def claim(self, count, NTH: gl.constexpr):
        """Wait until half a (0) or b (1) may be loaded for the count-th tile; return its stage."""
        if NTH == 0:
            return self.tiles.claim_a(count)
        else:
            return self.tiles.claim_b(count)

    @gluon.jit
    def half(self, stage, NTH: gl.constexpr):
        """Return half a (0) or b (1) of a stage, and the barrier of its bytes."""
        if NTH == 0:
            return self.tiles.a.index(stage), self.landed_a.index(stage)
        else:
            return self.tiles.b.index(stage), self.landed_b.index(stage)

    @gluon.jit
    def copy_scales(self, half, cache, page, offset, is_live, NTH: gl.constexpr):
        """Start copying the scales that a half of a tile needs; dead tokens' become zeros."""
        source = cache.kv_scale_ptr + (
            page * cache.kv_scale_stride_p + offset * cache.kv_scale_stride_t
        )
        COUNT: gl.constexpr = (self.GROUPS + 1) // 2
        for i in gl.static_range(COUNT):
            group = NTH * (self.GROUPS // 2) + i
            copy_async(_scales(half).index(i), source + group, mask=is_live)

    @gluon.jit
    def _load_whole(self, cache, kv_c_desc, k_pe_desc, page, start, count, NTH: gl.constexpr):
        """Start copying half a tile, see `load_whole`."""
        HALF: gl.constexpr = self.tiles.a.shape[2]
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        row = page * cache.kv_c_page_rows + start % cache.PAGE_SIZE
        stage = self.claim(count, NTH)
        half, landed = self.half(stage, NTH)
        if NTH == 0:
            self.tiles.bias.index(stage).store(gl.full([TILE], 0.0, gl.float32, flat))
            mbarrier.expect(landed, TILE * (HALF + self.ROPE_BYTES))
            rope_row = page * cache.k_pe_page_rows + start % cache.PAGE_SIZE
            rope = _rope_landing(self.tiles.rope.index(stage), self.ROPE_BYTES)
            tma_load(k_pe_desc, [rope_row, 0], landed, rope)
        else:
            mbarrier.expect(landed, TILE * HALF)
        for chunk in gl.static_range(HALF // CHUNK):
            latent = _landing(half).index(HALF // CHUNK + chunk)
            tma_load(kv_c_desc, [row, NTH * HALF + chunk * CHUNK], landed, latent)
        if self.GROUPS > 0:
            offset = (start % cache.PAGE_SIZE + gl.arange(0, TILE, layout=flat)).to(gl.int64)
            self.copy_scales(half, cache, page.to(gl.int64), offset, offset >= 0, NTH)
        arrive_copied(landed)

    @gluon.jit
    def _load_tokens(self, cache, item, start, count, NTH: gl.constexpr):
        """Start copying half a tile, see `load_tokens`."""
        HALF: gl.constexpr = self.tiles.a.shape[2]
        WARPS: gl.constexpr = gl.num_warps()
        LANES: gl.constexpr = self.ROPE_BYTES // 16
        wide: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
        narrow: gl.constexpr = gl.BlockedLayout([1, 16], [32 // LANES, LANES], [WARPS, 1], [1, 0])
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        token = start + gl.arange(0, TILE, layout=gl.SliceLayout(1, wide))
        page, offset, is_live = cache.find(item.page_begin, token, item.lowest, item.highest)
        d = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, wide))
        kv_c = page * cache.kv_c_stride_p + offset * cache.kv_c_stride_t + NTH * HALF
        kv_c = (as_bytes(cache.kv_c_ptr) + kv_c)[:, None] + d[None, :]
        token = start + gl.arange(0, TILE, layout=flat)
        scale_page, scale_offset, has_bias = cache.find(
            item.page_begin, token, item.lowest, item.highest
        )
        stage = self.claim(count, NTH)
        half, landed = self.half(stage, NTH)
        if NTH == 0:
            self.tiles.bias.index(stage).store(gl.where(has_bias, 0.0, float("-inf")))
            token = start + gl.arange(0, TILE, layout=gl.SliceLayout(1, narrow))
            page, offset, has_key = cache.find(item.page_begin, token, item.lowest, item.highest)
            r = gl.arange(0, self.ROPE_BYTES, layout=gl.SliceLayout(0, narrow))
            k_pe = page * cache.k_pe_stride_p + offset * cache.k_pe_stride_t
            k_pe = (as_bytes(cache.k_pe_ptr) + k_pe)[:, None] + r[None, :]
            rope = _rope_landing(self.tiles.rope.index(stage), self.ROPE_BYTES)
            copy_async(rope, k_pe, mask=has_key[:, None])
        for chunk in gl.static_range(HALF // CHUNK):
            latent = _landing(half).index(HALF // CHUNK + chunk)
            copy_async(latent, kv_c + chunk * CHUNK, mask=is_live[:, None])
        self.copy_scales(half, cache, scale_page, scale_offset, has_bias, NTH)
        mbarrier.arrive(landed, count=1)
        arrive_copied(landed)

    @gluon.jit
    def load_whole(self, cache, kv_c_desc, k_pe_desc, page, start, count):
        """Start copying a tile that lies in one page, all of it live: through TMA, but scales."""
        self._load_whole(cache, kv_c_desc, k_pe_desc, page, start, count, 0)
        self._load_whole(cache, kv_c_desc, k_pe_desc, page, start, count, 1)

    @gluon.jit
    def load_tokens(self, cache, item, start, count):
        """Start copying a tile token by token; dead tokens become zeros."""
        self._load_tokens(cache, item, start, count, 0)
        self._load_tokens(cache, item, start, count, 1)

    @gluon.jit
    def convert(self, count):
        """Convert the count-th tile, half by half, and hand it over."""
        stage = count % self.tiles.STAGES_A
        parity = (count // self.tiles.STAGES_A) & 1
        half_a, landed_a = self.half(stage, 0)
        mbarrier.wait(landed_a, parity)
        if self.tiles.rope.shape[2] == self.ROPE_BYTES:
            _convert_rope(self.tiles.rope.index(stage), self.ROPE_BYTES)
        _convert_half(half_a, self.GROUPS)
        mbarrier.arrive(self.tiles.full_a.index(stage), count=1)
        half_b, landed_b = self.half(stage, 1)
        mbarrier.wait(landed_b, parity)
        _convert_half(half_b, self.GROUPS)
        mbarrier.arrive(self.tiles.full_b.index(stage), count=1)


@gluon.jit
def _convert_rope(rope, ROPE_BYTES: gl.constexpr):
    """Convert the rotary part of a tile in place."""
    LANES: gl.constexpr = ROPE_BYTES // 16
    narrow: gl.constexpr = gl.BlockedLayout(
        [1, 16], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0]
    )
    key = _rope_landing(rope, ROPE_BYTES).load(narrow)
    barrier()  # every warp has read what the stores go over
    rope.store(_to_fp16(key))


@gluon.jit
def _convert_half(half, GROUPS: gl.constexpr):
    """Convert half a tile in place."""
    CHUNKS: gl.constexpr = half.shape[1] // CHUNK
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    packed = ()
    scales = ()
    for chunk in gl.static_range(CHUNKS):
        packed = packed + (_landing(half).index(CHUNKS + chunk).load(wide),)
    for i in gl.static_range((GROUPS + 1) // 2):
        scales = scales + (_scales(half).index(i).load(gl.SliceLayout(1, wide)),)
    barrier()  # every warp has read what the stores go over
    for chunk in gl.static_range(CHUNKS):
        x = _to_fp16(packed[chunk])
        if GROUPS > 0:
            scale = scales[chunk % len(scales)]
            x = (x.to(gl.float32) * scale[:, None]).to(half.dtype)
        half.slice(chunk * CHUNK, CHUNK, dim=1).store(x)
    fence_async_shared()


@gluon.jit
def allocate_landing(tiles, ROPE_BYTES: gl.constexpr, GROUPS: gl.constexpr, ARRIVALS: gl.constexpr):
    """Initialise the barriers of bytes; a half has landed after so many arrivals."""
    # Tiles have one dtype: fp16 holds fp8 keys, and bf16 what scales of groups multiplied.
    gl.static_assert((tiles.rope.shape[2] == ROPE_BYTES) == (GROUPS == 0))
    STAGES: gl.constexpr = tiles.STAGES_A
    landed_a = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    landed_b = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(landed_a.index(stage), count=ARRIVALS)
        mbarrier.init(landed_b.index(stage), count=ARRIVALS)
    return Landing(tiles, landed_a, landed_b, ROPE_BYTES, GROUPS)


@gluon.jit
def convert_partition(task, cache, kv_c_desc, k_pe_desc, landing, M: gl.constexpr):
    """Convert the tiles of a worker's share, with the next one on its way.

    A buffer is free again once its tile is used up, which is later than converted.
    """
    batch, shares, num_heads = task.batch, task.shares, task.output.num_heads
    worker, block = task.worker, task.block
    AHEAD: gl.constexpr = landing.tiles.STAGES_A - 1
    count = worker * 0
    work = deal(batch, shares, worker)
    request = work.request
    begin = work.begin
    place = work.place
    while (place < work.finish) & (request < batch.batch_size):
        item = next_item(batch, work, request, begin, place)
        if item.is_item & (block * M < item.q_len * num_heads):
            for tile in range(item.first, gl.minimum(item.first + AHEAD, item.last)):
                nth = count + tile - item.first
                load_tile(cache, kv_c_desc, k_pe_desc, landing, item, tile, nth)
            for tile in range(item.first, item.last):
                landing.convert(count)
                ahead = tile + AHEAD
                if ahead < item.last:
                    load_tile(cache, kv_c_desc, k_pe_desc, landing, item, ahead, count + AHEAD)
                count += 1
        begin = item.next_begin
        place = item.next_begin
        request += 1
