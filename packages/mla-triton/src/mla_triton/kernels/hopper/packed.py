"""Absorbed MLA decode over fp8 caches, 16 query rows (query token x head) of a request at a time.

s = sm_scale * (ql_nope @ kv_c.T + q_pe @ k_pe.T);  out = softmax(s) @ kv_c

The cached bytes stay in shared memory as they came. Each product takes its tile from there through
registers, where two neighbouring bytes become two fp16 numbers, exactly: a 16-bit load, transposed
or not, hands a thread what the matrix unit wants of it, one operand of the even columns and one of
the odd ones. So latents are worked on by parity: even columns of the queries meet even columns of
the latents, and the output comes out as even and odd columns.

``mma`` multiplies and not ``wgmma``, which takes 32 cycles to fetch 64 x 16 numbers from registers,
however few rows they meet. Programs are small enough for two on a multiprocessor: one multiplies
while the other forms probabilities.

Query rows are brought to fp16 by a power of two each. Scales of groups multiply the scores of their
group in fp32, and the probabilities that meet the group's values; the running maximum takes the
largest scale in, so that those are at most 1 and fit fp16 whatever the scale.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mla_triton.kernels.hopper._gluon import (
    aggregate,
    arrive_copied,
    barrier,
    copy_async,
    reinterpret,
    tma_load,
)
from mla_triton.kernels.hopper.load import TILE
from mla_triton.kernels.hopper.queries import largest_of, load_columns, powers_of
from mla_triton.kernels.hopper.schedule import deal, next_item, view_of
from mla_triton.kernels.hopper.score import finish_rows, finite_or_zero, hide, scale_scores

#: Rows of a program.
M = gl.constexpr(16)
#: Latent elements, bytes, of a chunk: the width of a swizzle.
CHUNK = gl.constexpr(128)
#: Smallest power of two that a token's scales are taken for, which bounds its probabilities.
_LEAST_LOG2_SCALE = gl.constexpr(-100.0)


@gluon.jit
def as_bytes(ptr):
    """Return a pointer to bytes."""
    return ptr.to(gl.pointer_type(gl.uint8))


@aggregate
class PackedTiles:
    """The ring of tiles in shared memory with their barriers; counts run over a whole kernel."""

    latent: gl.shared_memory_descriptor  # [STAGES * D / CHUNK, TILE, CHUNK] u8
    rope: gl.shared_memory_descriptor  # [STAGES, TILE, rope bytes] u8
    scale: gl.shared_memory_descriptor  # [STAGES * groups, TILE] f32; unused without groups
    bias: gl.shared_memory_descriptor  # [STAGES, TILE] f32: 0 for live tokens, -inf for dead ones
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    CHUNKS: gl.constexpr
    GROUPS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, latent, rope, scale, bias, full, free, STAGES, CHUNKS, GROUPS):
        self.latent = latent
        self.rope = rope
        self.scale = scale
        self.bias = bias
        self.full = full
        self.free = free
        self.STAGES = gl.constexpr(STAGES)
        self.CHUNKS = gl.constexpr(CHUNKS)
        self.GROUPS = gl.constexpr(GROUPS)

    @gluon.jit
    def wait(self, count):
        """Wait until the count-th tile has arrived; return its stage."""
        stage = count % self.STAGES
        mbarrier.wait(self.full.index(stage), (count // self.STAGES) & 1)
        return stage

    @gluon.jit
    def release(self, count):
        """Give the count-th tile back to the loader."""
        mbarrier.arrive(self.free.index(count % self.STAGES), count=1)

    @gluon.jit
    def claim(self, count):
        """Wait until the count-th tile may be loaded; return its stage."""
        stage = count % self.STAGES
        mbarrier.wait(self.free.index(stage), ((count // self.STAGES) & 1) ^ 1)
        return stage

    @gluon.jit
    def load_scales(self, stage, layout: gl.constexpr):
        """Return the scales of a tile, [TILE] for each group."""
        scales = ()
        for group in gl.static_range(self.GROUPS):
            scales = scales + (self.scale.index(stage * self.GROUPS + group).load(layout),)
        return scales

    @gluon.jit
    def copy_scales(self, cache, stage, page, offset, is_live):
        """Start copying the scales of tokens; those of dead ones become zeros."""
        row = page * cache.kv_scale_stride_p + offset * cache.kv_scale_stride_t
        for group in gl.static_range(self.GROUPS):
            source = cache.kv_scale_ptr + (row + group)
            copy_async(self.scale.index(stage * self.GROUPS + group), source, mask=is_live)

    @gluon.jit
    def load_whole(self, cache, kv_c_desc, k_pe_desc, page, start, count):
        """Start copying a tile that lies in one page, all of it live: through TMA, but scales."""
        BYTES: gl.constexpr = self.CHUNKS * CHUNK + self.rope.shape[2]
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        row = page * cache.kv_c_page_rows + start % cache.PAGE_SIZE
        rope_row = page * cache.k_pe_page_rows + start % cache.PAGE_SIZE
        stage = self.claim(count)
        full = self.full.index(stage)
        self.bias.index(stage).store(gl.full([TILE], 0.0, gl.float32, flat))
        mbarrier.expect(full, TILE * BYTES)
        for chunk in gl.static_range(self.CHUNKS):
            latent = self.latent.index(stage * self.CHUNKS + chunk)
            tma_load(kv_c_desc, [row, chunk * CHUNK], full, latent)
        tma_load(k_pe_desc, [rope_row, 0], full, self.rope.index(stage))
        if self.GROUPS > 0:
            offset = start % cache.PAGE_SIZE + gl.arange(0, TILE, layout=flat)
            self.copy_scales(cache, stage, page.to(gl.int64), offset.to(gl.int64), offset >= 0)
        arrive_copied(full)

    @gluon.jit
    def load_tokens(self, cache, item, start, count):
        """Start copying a tile token by token; dead tokens become zeros."""
        ROPE_BYTES: gl.constexpr = self.rope.shape[2]
        WARPS: gl.constexpr = gl.num_warps()
        LANES: gl.constexpr = ROPE_BYTES // 16
        wide: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
        narrow: gl.constexpr = gl.BlockedLayout([1, 16], [32 // LANES, LANES], [WARPS, 1], [1, 0])
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        d = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, wide))
        r = gl.arange(0, ROPE_BYTES, layout=gl.SliceLayout(0, narrow))
        token = start + gl.arange(0, TILE, layout=gl.SliceLayout(1, wide))
        page, offset, is_live = cache.find(item.page_begin, token, item.lowest, item.highest)
        kv_c = as_bytes(cache.kv_c_ptr) + (
            page * cache.kv_c_stride_p + offset * cache.kv_c_stride_t
        )
        token = start + gl.arange(0, TILE, layout=gl.SliceLayout(1, narrow))
        page, offset, has_key = cache.find(item.page_begin, token, item.lowest, item.highest)
        k_pe = as_bytes(cache.k_pe_ptr) + (
            page * cache.k_pe_stride_p + offset * cache.k_pe_stride_t
        )
        token = start + gl.arange(0, TILE, layout=flat)
        page, offset, has_bias = cache.find(item.page_begin, token, item.lowest, item.highest)
        stage = self.claim(count)
        self.bias.index(stage).store(gl.where(has_bias, 0.0, float("-inf")))
        for chunk in gl.static_range(self.CHUNKS):
            source = kv_c[:, None] + (d + chunk * CHUNK)[None, :]
            latent = self.latent.index(stage * self.CHUNKS + chunk)
            copy_async(latent, source, mask=is_live[:, None])
        copy_async(self.rope.index(stage), k_pe[:, None] + r[None, :], mask=has_key[:, None])
        if self.GROUPS > 0:
            self.copy_scales(cache, stage, page, offset, has_bias)
        mbarrier.arrive(self.full.index(stage), count=1)
        arrive_copied(self.full.index(stage))


@gluon.jit
def allocate_packed_tiles(
    rope_dtype: gl.constexpr,
    D: gl.constexpr,
    R: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    ARRIVALS: gl.constexpr,
):
    """Allocate the ring and initialise its barriers; a tile is there after so many arrivals."""
    CHUNKS: gl.constexpr = D // CHUNK
    ROPE_BYTES: gl.constexpr = R * rope_dtype.primitive_bitwidth // 8
    latent: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, CHUNK], gl.uint8)
    rope: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, ROPE_BYTES], gl.uint8)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(free.index(stage), count=1)
    return PackedTiles(
        gl.allocate_shared_memory(gl.uint8, [STAGES * CHUNKS, TILE, CHUNK], latent),
        gl.allocate_shared_memory(gl.uint8, [STAGES, TILE, ROPE_BYTES], rope),
        gl.allocate_shared_memory(gl.float32, [STAGES * max(GROUPS, 1), TILE], flat),
        gl.allocate_shared_memory(gl.float32, [STAGES, TILE], flat),
        full,
        free,
        STAGES,
        CHUNKS,
        GROUPS,
    )


@gluon.jit
def allocate_packed_rows(rope_dtype: gl.constexpr, D: gl.constexpr, R: gl.constexpr):
    """Allocate shared memory for latent and rotary parts of query rows.

    [2 * D / CHUNK, M, CHUNK / 2] fp16: for each chunk even columns, then odd ones; and the same of
    the rotary part, [2, M, R / 2], or where keys have 16 bits its values as they are, [1, M, R].
    """
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, CHUNK // 2], gl.float16)
    nope = gl.allocate_shared_memory(gl.float16, [2 * (D // CHUNK), M, CHUNK // 2], half)
    if rope_dtype.primitive_bitwidth == 8:
        parity: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, R // 2], gl.float16)
        return nope, gl.allocate_shared_memory(gl.float16, [2, M, R // 2], parity)
    else:
        whole: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, R], rope_dtype)
        return nope, gl.allocate_shared_memory(rope_dtype, [1, M, R], whole)


@gluon.jit
def allocate_packed_outputs(out_dtype: gl.constexpr, GROUPS: gl.constexpr):
    """Allocate probabilities [max(GROUPS, 1), M, TILE] in fp16, and staging [M, CHUNK]."""
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TILE], gl.float16)
    # Outputs of other widths leave without staging.
    dtype: gl.constexpr = out_dtype if out_dtype.primitive_bitwidth == 16 else gl.bfloat16
    staged: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, CHUNK], dtype)
    weights = gl.allocate_shared_memory(gl.float16, [max(GROUPS, 1), M, TILE], square)
    return weights, gl.allocate_shared_memory(dtype, [M, CHUNK], staged)


@gluon.jit
def _unpack(pairs):
    """Return the numbers in the low and in the high bytes of 16-bit words, e4m3 as fp16."""
    return gl.inline_asm_elementwise(
        """
        {
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
        }
        """,
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _words(tile):
    """Return a tile of bytes as one of 16-bit words."""
    ROWS: gl.constexpr = tile.shape[0]
    WIDTH: gl.constexpr = tile.shape[1] // 2
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], gl.int16)
    return reinterpret(tile, gl.int16, [ROWS, WIDTH], layout)


@gluon.jit
def _split_columns(x):
    """Return the even and the odd columns of a tensor."""
    return gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@gluon.jit
def _load_packed_rows(rows, q_begin, q_len, first_row):
    """Store M query rows as fp16 by column parity; return what each row was divided by.

    Rotary parts that meet 16-bit keys keep their values.
    """
    R: gl.constexpr = rows.rope.shape[0] * rows.rope.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    CHUNKS: gl.constexpr = rows.nope.shape[0] // 2
    row = first_row + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    nope, rope, is_row = rows.find(q_begin, q_len, row)
    q_pe = load_columns(rope, 0, is_row, R, layout)
    latent = ()
    for chunk in gl.static_range(CHUNKS):
        latent = latent + (load_columns(nope, chunk * CHUNK, is_row, CHUNK, layout),)
    largest = largest_of(q_pe)
    for chunk in gl.static_range(CHUNKS):
        largest = gl.maximum(largest, largest_of(latent[chunk]))
    factor, divisor = powers_of(largest)
    barrier()  # every warp is done with the rows before
    for chunk in gl.static_range(CHUNKS):
        even, odd = _split_columns(latent[chunk].to(gl.float32) * factor[:, None])
        rows.nope.index(2 * chunk).store(even.to(gl.float16))
        rows.nope.index(2 * chunk + 1).store(odd.to(gl.float16))
    if rows.rope.shape[0] == 2:
        even, odd = _split_columns(q_pe.to(gl.float32) * factor[:, None])
        rows.rope.index(0).store(even.to(gl.float16))
        rows.rope.index(1).store(odd.to(gl.float16))
    else:
        rows.rope.index(0).store(q_pe.to(rows.rope.dtype))
    barrier()
    return divisor


@gluon.jit
def packed_partition(task, rows, tiles, weights_smem, staging):
    """Form scores, probabilities and output of M rows."""
    batch, shares, output, scaling = task.batch, task.shares, task.output, task.scaling
    worker, block = task.worker, task.block
    CHUNKS: gl.constexpr = tiles.CHUNKS
    GROUPS: gl.constexpr = tiles.GROUPS
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    q_rows: gl.constexpr = gl.SliceLayout(1, layout)
    tokens: gl.constexpr = gl.SliceLayout(0, layout)
    local = gl.arange(0, M, layout=q_rows)
    row = block * M + local
    count = worker * 0
    work = deal(batch, shares, worker)
    kv_scale = scaling.of_cache()
    q_scale = scaling.of_queries()
    request = work.request
    begin = work.begin
    place = work.place
    output.clear_note(worker, block)
    while (place < work.finish) & (request < batch.batch_size):
        item = next_item(batch, work, request, begin, place)
        output.note_end(work, item, worker, block)
        if item.is_item & (block * M < item.q_len * output.num_heads):
            q_idx = row // output.num_heads
            is_row = q_idx < item.q_len
            view = view_of(batch, item, q_idx)
            m = gl.full([M], float("-inf"), gl.float32, q_rows)
            # Summed over tokens at the end: one reduction across warps instead of one a tile.
            weights = gl.zeros([M, TILE], gl.float32, layout)
            acc = ()
            for _ in gl.static_range(2 * CHUNKS):
                acc = acc + (gl.zeros([M, CHUNK // 2], gl.float32, layout),)
            unscale = gl.full([M], 1.0, gl.float32, q_rows)
            if item.first < item.last:
                divisor = _load_packed_rows(rows, item.q_begin, item.q_len, block * M)
                unscale = gl.convert_layout(divisor, q_rows) * (q_scale * kv_scale)
            for tile in range(item.first, item.last):
                start = tile * TILE
                stage = tiles.wait(count)
                scales = tiles.load_scales(stage, tokens)
                s = _scores(rows, tiles, stage, scales, unscale, q_scale, layout)
                bias = tiles.bias.index(stage).load(tokens)
                s = scale_scores(s, scaling.sm_scale_log2, scaling.softcap, scaling.HAS_SOFTCAP)
                s += bias[None, :]
                if view.hides(start, TILE):
                    token = start + gl.arange(0, TILE, layout=tokens)
                    s = hide(
                        s,
                        token[None, :],
                        view.limit[:, None],
                        view.lowest[:, None],
                        view.HAS_WINDOW,
                    )
                m_new = gl.maximum(m, gl.max(_bounds(s, scales), 1))
                m_safe = finite_or_zero(m_new)
                p = gl.exp2(s - m_safe[:, None])
                alpha = gl.exp2(m - m_safe)
                m = m_new
                weights = weights * alpha[:, None] + p
                if GROUPS == 0:
                    weights_smem.index(0).store(p.to(gl.float16))
                for group in gl.static_range(GROUPS):
                    scaled = p * scales[group][None, :]
                    weights_smem.index(group).store(scaled.to(gl.float16))
                rescaled = ()
                for i in gl.static_range(2 * CHUNKS):
                    rescaled = rescaled + (acc[i] * alpha[:, None],)
                acc = _add_values(tiles, stage, weights_smem, rescaled)
                tiles.release(count)
                count += 1
            is_whole = item.is_begin & item.is_end
            factor, lse = finish_rows(
                m,
                gl.sum(weights, 1),
                output.sink_ptr,
                row % output.num_heads,
                is_row,
                is_whole,
                output.HAS_SINK,
            )
            factor *= kv_scale
            partial_row = output.partial_row(worker, item.is_begin, block, M)
            output.store_lse(lse, local, row, item.q_begin, is_row, is_whole, partial_row)
            for chunk in gl.static_range(CHUNKS):
                even = acc[2 * chunk] * factor[:, None]
                odd = acc[2 * chunk + 1] * factor[:, None]
                output.store(
                    gl.reshape(gl.join(even, odd), [M, CHUNK]),
                    staging,
                    chunk * CHUNK,
                    block * M,
                    item.q_begin,
                    item.q_len,
                    is_whole,
                    partial_row,
                )
        begin = item.next_begin
        place = item.next_begin
        request += 1


@gluon.jit
def _scores(rows, tiles, stage, scales, unscale, q_scale, layout: gl.constexpr):
    """Return the products of the query rows with a tile's keys [M, TILE], true to scale."""
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    zeros = gl.zeros([M, TILE], gl.float32, layout)
    s = zeros
    # A product waits for the one it adds to: a sum for each parity.
    s_even = zeros
    s_odd = zeros
    for chunk in gl.static_range(tiles.CHUNKS):
        words = _words(tiles.latent.index(stage * tiles.CHUNKS + chunk))
        even, odd = _unpack(words.permute((1, 0)).load(right))
        query = rows.nope.index(2 * chunk).load(left)
        query_odd = rows.nope.index(2 * chunk + 1).load(left)
        if tiles.GROUPS > 1:
            part = mma_v2(query, even, zeros) + mma_v2(query_odd, odd, zeros)
            s += part * scales[chunk][None, :]
        else:
            s_even = mma_v2(query, even, s_even)
            s_odd = mma_v2(query_odd, odd, s_odd)
    rope = tiles.rope.index(stage)
    if rows.rope.shape[0] == 2:
        even, odd = _unpack(_words(rope).permute((1, 0)).load(right))
        s_even = mma_v2(rows.rope.index(0).load(left), even, s_even)
        s_odd = mma_v2(rows.rope.index(1).load(left), odd, s_odd)
        return (s_even + s_odd) * unscale[:, None]
    else:
        R: gl.constexpr = rows.rope.shape[2]
        rotary: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, R], rows.rope.dtype)
        key = reinterpret(rope, rows.rope.dtype, [TILE, R], rotary).permute((1, 0))
        other = mma_v2(rows.rope.index(0).load(left), key.load(right), zeros)
        if tiles.GROUPS == 0:
            s = s_even + s_odd
        if tiles.GROUPS == 1:
            s = (s_even + s_odd) * scales[0][None, :]
        return s * unscale[:, None] + other * q_scale


@gluon.jit
def _bounds(s, scales):
    """Return scores that bound, in base 2, what a probability is times its largest scale."""
    if len(scales) == 0:
        return s
    else:
        largest = scales[0]
        for group in gl.static_range(1, len(scales)):
            largest = gl.maximum(largest, scales[group])
        return s + gl.maximum(gl.log2(largest), _LEAST_LOG2_SCALE)[None, :]


@gluon.jit
def _add_values(tiles, stage, weights_smem, acc):
    """Return the accumulators with the products of probabilities and a tile's values."""
    layout: gl.constexpr = acc[0].type.layout
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    total = ()
    weight = weights_smem.index(0).load(left)
    for chunk in gl.static_range(tiles.CHUNKS):
        even, odd = _unpack(_words(tiles.latent.index(stage * tiles.CHUNKS + chunk)).load(right))
        if tiles.GROUPS > 1:
            weight = weights_smem.index(chunk).load(left)
        total = total + (
            mma_v2(weight, even, acc[2 * chunk]),
            mma_v2(weight, odd, acc[2 * chunk + 1]),
        )
    return total
