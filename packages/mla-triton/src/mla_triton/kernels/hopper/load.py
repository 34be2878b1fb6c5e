"""The partition that loads: query rows and tiles of cached tokens into shared memory.

A tile is 64 tokens in two halves, ``a`` (the first half of the latent, and the rotary part) and
``b`` (the other half), each with its own ring of buffers and barriers, so that one half can be
refilled while the other is still read. A whole tile inside one page comes through TMA; every other
one token by token with ``cp.async``, where dead tokens become zeros and get a bias of -inf.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
)

from mla_triton.kernels.hopper._gluon import (
    aggregate,
    arrive_copied,
    barrier,
    copy_async,
    tma_load,
)
from mla_triton.kernels.hopper.schedule import deal, next_item

#: Cached tokens of a tile.
TILE = gl.constexpr(64)


@aggregate
class Rows:
    """Where query rows come from, and where they go in shared memory."""

    ql_nope_ptr: gl.tensor  # [total_q, num_heads, D]
    q_pe_ptr: gl.tensor  # [total_q, num_heads, R]
    num_heads: gl.tensor
    ql_nope_stride_t: gl.tensor  # elements
    ql_nope_stride_h: gl.tensor
    q_pe_stride_t: gl.tensor
    q_pe_stride_h: gl.tensor
    nope: gl.shared_memory_descriptor  # [2, M, D / 2]; over fp8 caches as `packed` says
    rope: gl.shared_memory_descriptor  # [M, R]; likewise

    @gluon.constexpr_function
    def __init__(
        self,
        ql_nope_ptr,
        q_pe_ptr,
        num_heads,
        ql_nope_stride_t,
        ql_nope_stride_h,
        q_pe_stride_t,
        q_pe_stride_h,
        nope,
        rope,
    ):
        self.ql_nope_ptr = ql_nope_ptr
        self.q_pe_ptr = q_pe_ptr
        self.num_heads = num_heads
        self.ql_nope_stride_t = ql_nope_stride_t
        self.ql_nope_stride_h = ql_nope_stride_h
        self.q_pe_stride_t = q_pe_stride_t
        self.q_pe_stride_h = q_pe_stride_h
        self.nope = nope
        self.rope = rope

    @gluon.jit
    def find(self, q_begin, q_len, row):
        """Return pointers to both parts of rows of a request, and which rows exist."""
        token = (q_begin + row // self.num_heads).to(gl.int64)
        head = (row % self.num_heads).to(gl.int64)
        nope = self.ql_nope_ptr + (token * self.ql_nope_stride_t + head * self.ql_nope_stride_h)
        rope = self.q_pe_ptr + (token * self.q_pe_stride_t + head * self.q_pe_stride_h)
        return nope, rope, row < q_len * self.num_heads


@aggregate
class Cache:
    """A paged cache in device memory.

    The descriptors are absent where TMA does not apply: pages that are no multiple of a tile.
    """

    kv_c_ptr: gl.tensor  # [num_pages, PAGE_SIZE, D]; by the byte if packed
    k_pe_ptr: gl.tensor  # [num_pages, PAGE_SIZE, R]; likewise
    kv_scale_ptr: gl.tensor  # [num_pages, PAGE_SIZE, groups] f32; unused without groups
    page_indices_ptr: gl.tensor
    num_pages: gl.tensor
    kv_c_stride_p: gl.tensor  # elements, bytes of an fp8 cache
    kv_c_stride_t: gl.tensor
    k_pe_stride_p: gl.tensor
    k_pe_stride_t: gl.tensor
    kv_scale_stride_p: gl.tensor
    kv_scale_stride_t: gl.tensor
    kv_c_page_rows: gl.tensor  # rows of a descriptor's view from one page to the next
    k_pe_page_rows: gl.tensor
    PAGE_SIZE: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        kv_c_ptr,
        k_pe_ptr,
        kv_scale_ptr,
        page_indices_ptr,
        num_pages,
        kv_c_stride_p,
        kv_c_stride_t,
        k_pe_stride_p,
        k_pe_stride_t,
        kv_scale_stride_p,
        kv_scale_stride_t,
        kv_c_page_rows,
        k_pe_page_rows,
        PAGE_SIZE,
    ):
        self.kv_c_ptr = kv_c_ptr
        self.k_pe_ptr = k_pe_ptr
        self.kv_scale_ptr = kv_scale_ptr
        self.page_indices_ptr = page_indices_ptr
        self.num_pages = num_pages
        self.kv_c_stride_p = kv_c_stride_p
        self.kv_c_stride_t = kv_c_stride_t
        self.k_pe_stride_p = k_pe_stride_p
        self.k_pe_stride_t = k_pe_stride_t
        self.kv_scale_stride_p = kv_scale_stride_p
        self.kv_scale_stride_t = kv_scale_stride_t
        self.kv_c_page_rows = kv_c_page_rows
        self.k_pe_page_rows = k_pe_page_rows
        self.PAGE_SIZE = gl.constexpr(PAGE_SIZE)

    @gluon.jit
    def find(self, page_begin, token, lowest, highest):
        """Return page, offset in it and liveness of tokens of a request.

        Tokens that nobody sees, on hidden pages or outside [lowest, highest), are dead: their
        memory may hold NaN.
        """
        is_seen = (token >= lowest) & (token < highest)
        ids = self.page_indices_ptr + page_begin
        page = gl.load(ids + token // self.PAGE_SIZE, mask=is_seen, other=-1)
        is_live = (page >= 0) & (page < self.num_pages)
        return page.to(gl.int64), (token % self.PAGE_SIZE).to(gl.int64), is_live


@aggregate
class Tiles:
    """The rings of tiles in shared memory with their barriers; counts run over a whole kernel.

    `load_tile` asks of any kind of tiles that it starts copying the count-th one: ``load_whole``
    and ``load_tokens``.
    """

    a: gl.shared_memory_descriptor  # [STAGES_A, TILE, D / 2]
    b: gl.shared_memory_descriptor  # [STAGES_B, TILE, D / 2]
    rope: gl.shared_memory_descriptor  # [STAGES_A, TILE, R]
    bias: gl.shared_memory_descriptor  # [STAGES_A, TILE] f32: 0 for live tokens, -inf for dead ones
    full_a: gl.shared_memory_descriptor
    free_a: gl.shared_memory_descriptor
    full_b: gl.shared_memory_descriptor
    free_b: gl.shared_memory_descriptor
    STAGES_A: gl.constexpr
    STAGES_B: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, a, b, rope, bias, full_a, free_a, full_b, free_b, STAGES_A, STAGES_B):
        self.a = a
        self.b = b
        self.rope = rope
        self.bias = bias
        self.full_a = full_a
        self.free_a = free_a
        self.full_b = full_b
        self.free_b = free_b
        self.STAGES_A = gl.constexpr(STAGES_A)
        self.STAGES_B = gl.constexpr(STAGES_B)

    @gluon.jit
    def wait_a(self, count):
        """Wait until half a of the count-th tile has arrived; return its stage."""
        stage = count % self.STAGES_A
        mbarrier.wait(self.full_a.index(stage), (count // self.STAGES_A) & 1)
        return stage

    @gluon.jit
    def wait_b(self, count):
        """Wait until half b of the count-th tile has arrived; return its stage."""
        stage = count % self.STAGES_B
        mbarrier.wait(self.full_b.index(stage), (count // self.STAGES_B) & 1)
        return stage

    @gluon.jit
    def release_a(self, count):
        """Give half a of the count-th tile back to the loader."""
        mbarrier.arrive(self.free_a.index(count % self.STAGES_A), count=1)

    @gluon.jit
    def release_b(self, count):
        """Give half b of the count-th tile back to the loader."""
        mbarrier.arrive(self.free_b.index(count % self.STAGES_B), count=1)

    @gluon.jit
    def claim_a(self, count):
        """Wait until half a may be overwritten for the count-th tile; return its stage."""
        stage = count % self.STAGES_A
        mbarrier.wait(self.free_a.index(stage), ((count // self.STAGES_A) & 1) ^ 1)
        return stage

    @gluon.jit
    def claim_b(self, count):
        """Wait until half b may be overwritten for the count-th tile; return its stage."""
        stage = count % self.STAGES_B
        mbarrier.wait(self.free_b.index(stage), ((count // self.STAGES_B) & 1) ^ 1)
        return stage

    @gluon.jit
    def load_whole(self, cache, kv_c_desc, k_pe_desc, page, start, count):
        """Start copying a tile that lies in one page, all of it live, through TMA."""
        HALF: gl.constexpr = self.a.shape[2]
        BYTES: gl.constexpr = self.a.dtype.primitive_bitwidth // 8
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        row = page * cache.kv_c_page_rows + start % cache.PAGE_SIZE
        rope_row = page * cache.k_pe_page_rows + start % cache.PAGE_SIZE
        a = self.claim_a(count)
        self.bias.index(a).store(gl.full([TILE], 0.0, gl.float32, flat))
        mbarrier.expect(self.full_a.index(a), TILE * (HALF + self.rope.shape[2]) * BYTES)
        tma_load(kv_c_desc, [row, 0], self.full_a.index(a), self.a.index(a))
        tma_load(k_pe_desc, [rope_row, 0], self.full_a.index(a), self.rope.index(a))
        arrive_copied(self.full_a.index(a))
        b = self.claim_b(count)
        mbarrier.expect(self.full_b.index(b), TILE * HALF * BYTES)
        tma_load(kv_c_desc, [row, HALF], self.full_b.index(b), self.b.index(b))
        arrive_copied(self.full_b.index(b))

    @gluon.jit
    def load_tokens(self, cache, item, start, count):
        """Start copying a tile token by token; dead tokens become zeros."""
        HALF: gl.constexpr = self.a.shape[2]
        R: gl.constexpr = self.rope.shape[2]
        WARPS: gl.constexpr = gl.num_warps()
        LANES: gl.constexpr = R // 8
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        d = gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
        r = gl.arange(0, R, layout=gl.SliceLayout(0, layout))
        token = start + gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
        page, offset, is_live = cache.find(item.page_begin, token, item.lowest, item.highest)
        token = start + gl.arange(0, TILE, layout=flat)
        _, _, is_live_again = cache.find(item.page_begin, token, item.lowest, item.highest)
        is_live = is_live[:, None]
        kv_c = cache.kv_c_ptr + (page * cache.kv_c_stride_p + offset * cache.kv_c_stride_t)
        k_pe = cache.k_pe_ptr + (page * cache.k_pe_stride_p + offset * cache.k_pe_stride_t)
        a = self.claim_a(count)
        self.bias.index(a).store(gl.where(is_live_again, 0.0, float("-inf")))
        copy_async(self.a.index(a), kv_c[:, None] + d[None, :], mask=is_live)
        copy_async(self.rope.index(a), k_pe[:, None] + r[None, :], mask=is_live)
        mbarrier.arrive(self.full_a.index(a), count=1)
        arrive_copied(self.full_a.index(a))
        b = self.claim_b(count)
        copy_async(self.b.index(b), kv_c[:, None] + (d + HALF)[None, :], mask=is_live)
        mbarrier.arrive(self.full_b.index(b), count=1)
        arrive_copied(self.full_b.index(b))


@gluon.jit
def allocate_tiles(
    dtype: gl.constexpr,
    HALF: gl.constexpr,
    R: gl.constexpr,
    STAGES_A: gl.constexpr,
    STAGES_B: gl.constexpr,
    ARRIVALS: gl.constexpr,
):
    """Allocate the rings and initialise their barriers; a tile is there after so many arrivals."""
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, HALF], dtype)
    rope: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, R], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    full_a = gl.allocate_shared_memory(gl.int64, [STAGES_A, 1], mbarrier.MBarrierLayout())
    free_a = gl.allocate_shared_memory(gl.int64, [STAGES_A, 1], mbarrier.MBarrierLayout())
    full_b = gl.allocate_shared_memory(gl.int64, [STAGES_B, 1], mbarrier.MBarrierLayout())
    free_b = gl.allocate_shared_memory(gl.int64, [STAGES_B, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES_A):
        mbarrier.init(full_a.index(stage), count=ARRIVALS)
        mbarrier.init(free_a.index(stage), count=1)
    for stage in gl.static_range(STAGES_B):
        mbarrier.init(full_b.index(stage), count=ARRIVALS)
        mbarrier.init(free_b.index(stage), count=1)
    return Tiles(
        gl.allocate_shared_memory(dtype, [STAGES_A, TILE, HALF], half),
        gl.allocate_shared_memory(dtype, [STAGES_B, TILE, HALF], half),
        gl.allocate_shared_memory(dtype, [STAGES_A, TILE, R], rope),
        gl.allocate_shared_memory(gl.float32, [STAGES_A, TILE], flat),
        full_a,
        free_a,
        full_b,
        free_b,
        STAGES_A,
        STAGES_B,
    )


@gluon.jit
def allocate_rows(dtype: gl.constexpr, M: gl.constexpr, D: gl.constexpr, R: gl.constexpr):
    """Allocate shared memory for the latent halves and the rotary parts of query rows."""
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D // 2], dtype)
    rope: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, R], dtype)
    nope_smem = gl.allocate_shared_memory(dtype, [2, M, D // 2], half)
    return nope_smem, gl.allocate_shared_memory(dtype, [M, R], rope)


@gluon.jit
def load_rows(rows, q_begin, q_len, first_row, M: gl.constexpr, D: gl.constexpr, R: gl.constexpr):
    """Copy M query rows for the calling partition; rows past the request's last become zeros."""
    HALF: gl.constexpr = D // 2
    LANES: gl.constexpr = R // 8
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0]
    )
    row = first_row + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
    r = gl.arange(0, R, layout=gl.SliceLayout(0, layout))
    nope, rope, is_row = rows.find(q_begin, q_len, row)
    is_row = is_row[:, None]
    barrier()  # every warp is done with the rows before
    for half in gl.static_range(2):
        source = nope[:, None] + (d + half * HALF)[None, :]
        copy_async(rows.nope.index(half), source, mask=is_row)
    copy_async(rows.rope, rope[:, None] + r[None, :], mask=is_row)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()


@gluon.jit
def load_tile(cache, kv_c_desc, k_pe_desc, tiles, item, tile, count):
    """Start copying a tile of a request as the count-th one."""
    start = tile * TILE
    if kv_c_desc is None:
        tiles.load_tokens(cache, item, start, count)
    else:
        page = gl.load(cache.page_indices_ptr + item.page_begin + start // cache.PAGE_SIZE)
        is_inside = (start >= item.lowest) & (start + TILE <= item.highest)
        if is_inside & (page >= 0) & (page < cache.num_pages):
            tiles.load_whole(cache, kv_c_desc, k_pe_desc, page, start, count)
        else:
            tiles.load_tokens(cache, item, start, count)


@gluon.jit
def load_partition(task, cache, kv_c_desc, k_pe_desc, tiles, M: gl.constexpr):
    """Feed the spans of a worker to the partitions that compute."""
    batch, shares, num_heads = task.batch, task.shares, task.output.num_heads
    worker, block = task.worker, task.block
    count = worker * 0
    work = deal(batch, shares, worker)
    request = work.request
    begin = work.begin
    place = work.place
    while (place < work.finish) & (request < batch.batch_size):
        item = next_item(batch, work, request, begin, place)
        if item.is_item & (block * M < item.q_len * num_heads):
            for tile in range(item.first, item.last):
                load_tile(cache, kv_c_desc, k_pe_desc, tiles, item, tile, count)
                count += 1
        begin = item.next_begin
        place = item.next_begin
        request += 1
