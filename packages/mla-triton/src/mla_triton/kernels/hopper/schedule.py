"""Who attends to what: which run of tiles of which requests a worker takes.

EVEN: every request is cut into the same number of runs, fewer if they would get too short, and each
worker takes one run. The cuts of a request depend on its own length alone.

Otherwise all requests lie one after another on a line. A request takes as many places as it has
tiles, at least one, and a few more for what starting it costs; the line is cut into one span for
each worker, wherever that falls. If the longest request fits a span, each worker takes a request.

Every program works this out from the lengths in device memory when it starts, so a replayed graph
follows its inputs, and neither a planning kernel nor the host takes part.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from mla_triton.kernels.hopper._gluon import aggregate

#: Places on the line that starting a request costs, in tiles.
START_COST = gl.constexpr(3)
#: Requests that are looked at together: eight to a lane, the same in every warp.
BLOCK = gl.constexpr(256)


@aggregate
class Batch:
    """Index arrays of a batch and the options that decide which keys are visible.

    Local key ``j`` of a context-parallel rank is global key ``j * cp_world_size + cp_rank``.
    """

    batch_size: gl.tensor
    qo_indptr_ptr: gl.tensor  # [batch_size + 1] i32
    kv_indptr_ptr: gl.tensor  # [batch_size + 1] i32, pages
    kv_last_page_len_ptr: gl.tensor  # [batch_size] i32
    global_kv_lens_ptr: gl.tensor  # [batch_size] i32; read only with IS_CP
    window: gl.tensor
    cp_world_size: gl.tensor
    cp_rank: gl.tensor
    PAGE_SIZE: gl.constexpr
    TILE: gl.constexpr
    IS_CAUSAL: gl.constexpr
    HAS_WINDOW: gl.constexpr
    IS_CP: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        batch_size,
        qo_indptr_ptr,
        kv_indptr_ptr,
        kv_last_page_len_ptr,
        global_kv_lens_ptr,
        window,
        cp_world_size,
        cp_rank,
        PAGE_SIZE,
        TILE,
        IS_CAUSAL,
        HAS_WINDOW,
        IS_CP,
    ):
        self.batch_size = batch_size
        self.qo_indptr_ptr = qo_indptr_ptr
        self.kv_indptr_ptr = kv_indptr_ptr
        self.kv_last_page_len_ptr = kv_last_page_len_ptr
        self.global_kv_lens_ptr = global_kv_lens_ptr
        self.window = window
        self.cp_world_size = cp_world_size
        self.cp_rank = cp_rank
        self.PAGE_SIZE = gl.constexpr(PAGE_SIZE)
        self.TILE = gl.constexpr(TILE)
        self.IS_CAUSAL = gl.constexpr(IS_CAUSAL)
        self.HAS_WINDOW = gl.constexpr(HAS_WINDOW)
        self.IS_CP = gl.constexpr(IS_CP)

    @gluon.jit
    def lengths(self, request):
        """Return query tokens, keys, and keys over all ranks; of one request or of several."""
        is_real = request < self.batch_size
        q_begin = gl.load(self.qo_indptr_ptr + request, mask=is_real, other=0)
        q_len = gl.load(self.qo_indptr_ptr + request + 1, mask=is_real, other=0) - q_begin
        page_begin = gl.load(self.kv_indptr_ptr + request, mask=is_real, other=0)
        num_pages = gl.load(self.kv_indptr_ptr + request + 1, mask=is_real, other=0) - page_begin
        last = gl.load(self.kv_last_page_len_ptr + request, mask=is_real, other=0)
        kv_len = gl.where(num_pages > 0, (num_pages - 1) * self.PAGE_SIZE + last, 0)
        global_len = kv_len
        if self.IS_CP:
            global_len = gl.load(self.global_kv_lens_ptr + request, mask=is_real, other=0)
        return q_len, kv_len, global_len

    @gluon.jit
    def limit(self, q_idx, q_len, kv_len, global_len):
        """Return how many keys a query token sees, window aside; bottom-right aligned."""
        limit = global_len + q_idx * 0
        if self.IS_CAUSAL:
            limit = global_len - (q_len - 1 - q_idx)
        if self.IS_CP:
            limit = (limit - self.cp_rank + self.cp_world_size - 1) // self.cp_world_size
        return gl.minimum(limit, kv_len)

    @gluon.jit
    def lowest(self, q_idx, q_len, global_len):
        """Return the first key inside a query token's window."""
        lowest = global_len - (q_len - 1 - q_idx) - self.window
        if self.IS_CP:
            lowest = (lowest - self.cp_rank + self.cp_world_size - 1) // self.cp_world_size
        return gl.maximum(lowest, 0)

    @gluon.jit
    def tiles(self, q_len, kv_len, global_len):
        """Return the first tile that any query token sees and one past the last."""
        last = self.limit(q_len - 1, q_len, kv_len, global_len)
        end = (gl.maximum(last, 0) + self.TILE - 1) // self.TILE
        begin = end * 0
        if self.HAS_WINDOW:
            begin = gl.minimum(self.lowest(q_len * 0, q_len, global_len) // self.TILE, end)
        return begin, end


@aggregate
class Shares:
    """How the work is dealt: to so many workers, or each request in up to so many runs."""

    num_workers: gl.tensor
    max_runs: gl.tensor
    min_tiles: gl.tensor
    EVEN: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, num_workers, max_runs, min_tiles, EVEN):
        self.num_workers = num_workers
        self.max_runs = max_runs
        self.min_tiles = min_tiles
        self.EVEN = gl.constexpr(EVEN)


@aggregate
class View:
    """Which keys of a request its query rows see: [lowest, limit), row by row."""

    limit: gl.tensor
    lowest: gl.tensor
    first_limit: gl.tensor  # of the first query token: every row sees the keys before it
    last_lowest: gl.tensor  # of the last query token: every row sees the keys from it on
    HAS_WINDOW: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, limit, lowest, first_limit, last_lowest, HAS_WINDOW):
        self.limit = limit
        self.lowest = lowest
        self.first_limit = first_limit
        self.last_lowest = last_lowest
        self.HAS_WINDOW = gl.constexpr(HAS_WINDOW)

    @gluon.jit
    def hides(self, start, TILE: gl.constexpr):
        """Return whether some row does not see all of a tile."""
        return (start + TILE > self.first_limit) | (start < self.last_lowest)


@gluon.jit
def view_of(batch, item, q_idx):
    """Return what rows of the query tokens ``q_idx`` see."""
    lowest = q_idx * 0
    last_lowest = item.q_len * 0
    if batch.HAS_WINDOW:
        lowest = batch.lowest(q_idx, item.q_len, item.global_len)
        last_lowest = batch.lowest(item.q_len - 1, item.q_len, item.global_len)
    return View(
        batch.limit(q_idx, item.q_len, item.kv_len, item.global_len),
        lowest,
        batch.limit(item.q_len * 0, item.q_len, item.kv_len, item.global_len),
        last_lowest,
        batch.HAS_WINDOW,
    )


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _num_tiles(batch, request):
    """Tiles of one or several requests; one for a request that sees nothing, 0 past the last."""
    q_len, kv_len, global_len = batch.lengths(request)
    begin, end = batch.tiles(q_len, kv_len, global_len)
    return gl.where(request < batch.batch_size, gl.maximum(end - begin, 1), 0)


@aggregate
class Work:
    """The work of one worker: it begins in ``request`` and covers [place, finish) of the line.

    ``begin`` is the place where the request begins. A span is what a worker covers. With EVEN the
    line is that of one request, and ``extra`` is how many workers may share it; otherwise ``extra``
    says whether each worker takes one whole request.
    """

    request: gl.tensor
    begin: gl.tensor
    place: gl.tensor
    finish: gl.tensor
    span: gl.tensor
    extra: gl.tensor
    EVEN: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, request, begin, place, finish, span, extra, EVEN):
        self.request = request
        self.begin = begin
        self.place = place
        self.finish = finish
        self.span = span
        self.extra = extra
        self.EVEN = gl.constexpr(EVEN)

    @gluon.jit
    def first_worker(self):
        """Return the worker that begins the first request of this one."""
        if self.EVEN:
            return self.request * self.extra
        else:
            return self.begin // self.span

    @gluon.jit
    def note(self, worker):
        """Return the place of a request's note: its number, or the worker that ends it."""
        if self.EVEN:
            return self.request
        else:
            return worker

    @gluon.jit
    def cost(self, num_tiles):
        """Return the places that a request of so many tiles takes on the line."""
        if self.EVEN:
            return num_tiles
        else:
            return _cost(num_tiles, self.span, self.extra != 0)


@gluon.jit
def _cost(num_tiles, span, is_uncut):
    return gl.where(num_tiles > 0, gl.where(is_uncut, span, num_tiles + START_COST), 0)


@gluon.jit
def deal_even(batch, worker, max_runs, min_tiles):
    """Deal every request to ``max_runs`` workers, in runs of at least ``min_tiles`` tiles."""
    request = worker // max_runs
    run = worker % max_runs
    num_tiles = _num_tiles(batch, request)
    runs = gl.maximum(gl.minimum(num_tiles // min_tiles, max_runs), 1)
    place = gl.minimum(run, runs) * num_tiles // runs
    finish = gl.minimum(run + 1, runs) * num_tiles // runs
    return Work(request, place * 0, place, finish, num_tiles, max_runs, True)


@gluon.jit
def deal_line(batch, worker, num_workers, NUM_WARPS: gl.constexpr):
    """Deal spans of the line of all requests."""
    layout: gl.constexpr = gl.BlockedLayout([BLOCK // 32], [32], [NUM_WARPS], [0])
    lane = gl.arange(0, BLOCK, layout=layout)
    total = batch.batch_size * 0
    longest = batch.batch_size * 0
    for first in range(0, batch.batch_size, BLOCK):
        tiles = _num_tiles(batch, first + lane)
        total += gl.sum(tiles, 0)
        longest = gl.maximum(longest, gl.max(tiles, 0))
    span = (total + START_COST * batch.batch_size + num_workers - 1) // num_workers
    is_uncut = (longest <= span) & (batch.batch_size <= num_workers)
    place = worker * span
    request = worker * 0
    begin = worker * 0
    passed = worker * 0
    for first in range(0, batch.batch_size, BLOCK):
        cost = _cost(_num_tiles(batch, first + lane), span, is_uncut)
        end = gl.associative_scan(cost, 0, _add) + passed
        is_before = (end <= place) & (first + lane < batch.batch_size)
        request += gl.sum(is_before.to(gl.int32), 0)
        begin += gl.sum(gl.where(is_before, cost, 0), 0)
        passed += gl.sum(cost, 0)
    finish = gl.minimum(place + span, passed)
    return Work(request, begin, place, finish, span, is_uncut.to(gl.int32), False)


@gluon.jit
def deal(batch, shares, worker):
    """Return the work of a worker; every partition works it out for itself.

    Before, no partition reads or writes what kernels before this one may still write or read: the
    kernel is launched while they end.
    """
    gdc_wait()
    if shares.EVEN:
        return deal_even(batch, worker, shares.max_runs, shares.min_tiles)
    else:
        return deal_line(batch, worker, shares.num_workers, gl.num_warps())


@aggregate
class Item:
    """The part of a request that lies inside a worker's span.

    ``is_item`` is false if there is none, when the span begins in the request's start cost.
    """

    q_begin: gl.tensor
    q_len: gl.tensor
    kv_len: gl.tensor
    global_len: gl.tensor
    lowest: gl.tensor  # first key that any query token sees
    highest: gl.tensor  # one past the last key that any query token sees
    page_begin: gl.tensor
    first: gl.tensor  # tile
    last: gl.tensor  # one past the last tile
    is_begin: gl.tensor  # whether the part begins the request
    is_end: gl.tensor
    is_item: gl.tensor
    next_begin: gl.tensor  # place on the line where the next request begins

    @gluon.constexpr_function
    def __init__(
        self,
        q_begin,
        q_len,
        kv_len,
        global_len,
        lowest,
        highest,
        page_begin,
        first,
        last,
        is_begin,
        is_end,
        is_item,
        next_begin,
    ):
        self.q_begin = q_begin
        self.q_len = q_len
        self.kv_len = kv_len
        self.global_len = global_len
        self.lowest = lowest
        self.highest = highest
        self.page_begin = page_begin
        self.first = first
        self.last = last
        self.is_begin = is_begin
        self.is_end = is_end
        self.is_item = is_item
        self.next_begin = next_begin


@gluon.jit
def next_item(batch, work, request, begin, place):
    """Return the part of a request, which begins at ``begin``, from ``place`` on."""
    q_len, kv_len, global_len = batch.lengths(request)
    first, last = batch.tiles(q_len, kv_len, global_len)
    num_tiles = gl.maximum(last - first, 1)
    skip = place - begin
    stop = gl.minimum(skip + work.finish - place, num_tiles)
    lowest = kv_len * 0
    if batch.HAS_WINDOW:
        lowest = batch.lowest(kv_len * 0, q_len, global_len)
    return Item(
        gl.load(batch.qo_indptr_ptr + request),
        q_len,
        kv_len,
        global_len,
        lowest,
        gl.maximum(batch.limit(q_len - 1, q_len, kv_len, global_len), 0),
        gl.load(batch.kv_indptr_ptr + request),
        gl.minimum(first + skip, last),
        gl.minimum(first + stop, last),
        skip == 0,
        stop == num_tiles,
        skip < num_tiles,
        begin + work.cost(num_tiles),
    )
