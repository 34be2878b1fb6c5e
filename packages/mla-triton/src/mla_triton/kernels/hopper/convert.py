"""The partition that loads tiles of an fp8 cache and turns them into fp16 in shared memory.

The partitions that multiply with wgmma then see 16-bit tiles, as over any other cache. With warps
of their own for loading, threads would have fewer registers than wgmma takes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mla_triton.kernels.hopper.load import load_tiles
from mla_triton.kernels.hopper.packed import CHUNK
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
def _convert_tile(packed, tiles, count):
    """Turn the count-th tile of bytes into one of fp16, half by half."""
    CHUNKS: gl.constexpr = packed.CHUNKS // 2  # of a half
    ROPE_BYTES: gl.constexpr = packed.rope.shape[2]
    LANES: gl.constexpr = ROPE_BYTES // 16
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout(
        [1, 16], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0]
    )
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    stage = packed.wait(count)
    a = tiles.claim_a(count)
    tiles.bias.index(a).store(packed.bias.index(stage).load(flat))
    tiles.rope.index(a).store(_to_fp16(packed.rope.index(stage).load(narrow)))
    for chunk in gl.static_range(CHUNKS):
        x = _to_fp16(packed.latent.index(stage * packed.CHUNKS + chunk).load(wide))
        tiles.a.index(a).slice(chunk * CHUNK, CHUNK, dim=1).store(x)
    fence_async_shared()
    mbarrier.arrive(tiles.full_a.index(a), count=1)
    b = tiles.claim_b(count)
    for chunk in gl.static_range(CHUNKS):
        x = _to_fp16(packed.latent.index(stage * packed.CHUNKS + CHUNKS + chunk).load(wide))
        tiles.b.index(b).slice(chunk * CHUNK, CHUNK, dim=1).store(x)
    fence_async_shared()
    mbarrier.arrive(tiles.full_b.index(b), count=1)
    packed.release(count)


@gluon.jit
def convert_partition(
    task,
    cache,
    kv_c_desc,
    k_pe_desc,
    packed,
    tiles,
    M: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Convert the tiles of a worker's share, with loads of the next ones on their way."""
    batch, shares, num_heads = task.batch, task.shares, task.output.num_heads
    worker, block = task.worker, task.block
    loaded = worker * 0
    converted = worker * 0
    work = deal(batch, shares, worker)
    request = work.request
    begin = work.begin
    place = work.place
    while (place < work.finish) & (request < batch.batch_size):
        item = next_item(batch, work, request, begin, place)
        if item.is_item & (block * M < item.q_len * num_heads):
            # Before the first tile: as many as there are stages; then one after each conversion.
            for tile in range(item.first - 1, item.last):
                start = tile + packed.STAGES
                if tile < item.first:
                    start = item.first
                else:
                    _convert_tile(packed, tiles, converted)
                    converted += 1
                loaded = load_tiles(
                    cache,
                    kv_c_desc,
                    k_pe_desc,
                    packed,
                    item.page_begin,
                    start,
                    gl.minimum(tile + packed.STAGES + 1, item.last),
                    item.lowest,
                    item.highest,
                    loaded,
                    WARPS,
                )
        begin = item.next_begin
        place = item.next_begin
        request += 1
