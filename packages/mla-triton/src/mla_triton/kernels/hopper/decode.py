"""Absorbed MLA decode on Hopper: one kernel, whose warps take the roles that the rows ask for.

Grid (num_workers * row_blocks): a program owns a block of M query rows (query token x head) of each
request in the share of its worker.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from mla_triton.kernels.hopper.convert import allocate_landing, convert_partition
from mla_triton.kernels.hopper.load import (
    TILE,
    Cache,
    Rows,
    allocate_rows,
    allocate_tiles,
    load_partition,
)
from mla_triton.kernels.hopper.narrow import allocate_weights, narrow_partition
from mla_triton.kernels.hopper.output import Output
from mla_triton.kernels.hopper.packed import (
    allocate_packed_outputs,
    allocate_packed_rows,
    allocate_packed_tiles,
    packed_partition,
)
from mla_triton.kernels.hopper.schedule import Batch, Shares
from mla_triton.kernels.hopper.task import Scaling, Task
from mla_triton.kernels.hopper.wide import M as WIDE
from mla_triton.kernels.hopper.wide import allocate_exchange, left_partition, right_partition


@gluon.jit(
    do_not_specialize=[
        "batch_size",
        "num_heads",
        "num_pages",
        "window",
        "cp_world_size",
        "cp_rank",
        "row_blocks",
        "num_workers",
        "max_runs",
        "min_tiles",
        "lse_stride_t",
        "lse_stride_h",
        "kv_scale_stride_p",
        "kv_scale_stride_t",
        "kv_c_page_rows",
        "k_pe_page_rows",
    ]
)
def hopper_decode_kernel(
    out_ptr,  # [total_q, num_heads, D]
    lse_ptr,  # [total_q, num_heads] f32, natural log; unused without HAS_LSE
    partial_out_ptr,  # [slots, row_blocks, M, D] f32
    partial_lse_ptr,  # [slots, row_blocks, M] f32
    note_ptr,  # [notes, 4] i32, see merge
    ql_nope_ptr,  # [total_q, num_heads, D]
    q_pe_ptr,  # [total_q, num_heads, R]
    kv_c_ptr,  # [num_pages, PAGE_SIZE, D]
    k_pe_ptr,  # [num_pages, PAGE_SIZE, R]
    kv_scale_ptr,  # [1] f32 or, by groups, [num_pages, PAGE_SIZE, GROUPS]; unused without either
    kv_c_desc,  # rows of kv_c in boxes of 64 tokens, see the tiles; None without TMA
    k_pe_desc,  # rows of k_pe in boxes of 64 tokens
    qo_indptr_ptr,  # [batch_size + 1] i32
    kv_indptr_ptr,  # [batch_size + 1] i32, pages
    kv_page_indices_ptr,  # [>= kv_indptr[-1]] i32
    kv_last_page_len_ptr,  # [batch_size] i32
    global_kv_lens_ptr,  # [batch_size] i32; unused without IS_CP
    sink_ptr,  # [num_heads] f32; unused without HAS_SINK
    q_scale_ptr,  # [1] f32; unused without HAS_Q_SCALE
    sm_scale_log2,  # sm_scale * log2(e)
    softcap,  # unused without HAS_SOFTCAP
    window,  # unused without HAS_WINDOW
    cp_world_size,
    cp_rank,
    batch_size,
    num_heads,
    num_pages,
    kv_c_page_rows,  # rows of the descriptors from page to page
    k_pe_page_rows,
    row_blocks,  # programs of a worker, each with M rows of every request
    num_workers,
    max_runs,  # with EVEN: runs of a request, workers for each
    min_tiles,  # with EVEN: shortest run
    out_stride_t,  # elements
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    ql_nope_stride_t,
    ql_nope_stride_h,
    q_pe_stride_t,
    q_pe_stride_h,
    kv_c_stride_p,  # elements, bytes of an fp8 cache
    kv_c_stride_t,
    k_pe_stride_p,
    k_pe_stride_t,
    kv_scale_stride_p,
    kv_scale_stride_t,
    M: gl.constexpr,  # rows of a program: 8, 16, 32 or 64
    D: gl.constexpr,  # kv_lora_rank
    R: gl.constexpr,  # qk_rope_head_dim
    PAGE_SIZE: gl.constexpr,
    EVEN: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    IS_CP: gl.constexpr,
    HAS_LSE: gl.constexpr,
    HAS_SINK: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    STAGES_A: gl.constexpr,
    STAGES_B: gl.constexpr,
    LOADERS: gl.constexpr,  # warps
    LOADER_REGISTERS: gl.constexpr,
    RIGHT_REGISTERS: gl.constexpr,  # unused below 64 rows
    GROUPS: gl.constexpr,  # scales of a token; only of fp8 caches, like what follows
    HAS_KV_SCALE: gl.constexpr,  # one scale for the whole cache
    HAS_Q_SCALE: gl.constexpr,
):
    """Attend M rows of each request in the share of this worker."""
    dtype: gl.constexpr = kv_c_ptr.dtype.element_ty
    rope_dtype: gl.constexpr = k_pe_ptr.dtype.element_ty
    worker = gl.program_id(0) // row_blocks
    block = gl.program_id(0) % row_blocks
    batch = Batch(
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
    )
    shares = Shares(num_workers, max_runs, min_tiles, EVEN)
    gdc_launch_dependents()

    cache = Cache(
        kv_c_ptr,
        k_pe_ptr,
        kv_scale_ptr,
        kv_page_indices_ptr,
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
    )
    output = Output(
        out_ptr,
        lse_ptr,
        partial_out_ptr,
        partial_lse_ptr,
        note_ptr,
        sink_ptr,
        num_heads,
        out_stride_t,
        out_stride_h,
        lse_stride_t,
        lse_stride_h,
        row_blocks,
        D,
        EVEN,
        HAS_LSE,
        HAS_SINK,
    )
    queries = (
        ql_nope_ptr,
        q_pe_ptr,
        num_heads,
        ql_nope_stride_t,
        ql_nope_stride_h,
        q_pe_stride_t,
        q_pe_stride_h,
    )
    scaling = Scaling(
        sm_scale_log2, softcap, kv_scale_ptr, q_scale_ptr, HAS_SOFTCAP, HAS_KV_SCALE, HAS_Q_SCALE
    )
    task = Task(batch, shares, output, scaling, worker, block)
    # The arguments stand inside the calls: a constant bound to a name would become a value.
    if dtype.primitive_bitwidth == 8:
        if M == WIDE:
            half_dtype: gl.constexpr = gl.float16 if GROUPS == 0 else gl.bfloat16
            tiles = allocate_tiles(half_dtype, D // 2, R, STAGES_A, STAGES_B, 1)
            nope_smem, rope_smem = allocate_rows(half_dtype, M, D, R)
            rows = Rows(*queries, nope_smem, rope_smem)
            exchange = allocate_exchange(half_dtype)
            landing = allocate_landing(
                tiles, R * rope_dtype.primitive_bitwidth // 8, GROUPS, 32 * LOADERS + 1
            )
            gl.warp_specialize(
                [
                    (left_partition, (task, rows, tiles, exchange, True)),
                    (right_partition, (task, rows, tiles, exchange)),
                    (convert_partition, (task, cache, kv_c_desc, k_pe_desc, landing, M)),
                ],
                [4, LOADERS],
                [RIGHT_REGISTERS, LOADER_REGISTERS],
            )
        else:
            # Every loading thread arrives when its copies are done, and once more for TMA's bytes.
            packed = allocate_packed_tiles(rope_dtype, D, R, GROUPS, STAGES_A, 32 * LOADERS + 1)
            nope_smem, rope_smem = allocate_packed_rows(rope_dtype, D, R)
            rows = Rows(*queries, nope_smem, rope_smem)
            weights, staging = allocate_packed_outputs(out_ptr.dtype.element_ty, GROUPS)
            gl.warp_specialize(
                [
                    (packed_partition, (task, rows, packed, weights, staging)),
                    (load_partition, (task, cache, kv_c_desc, k_pe_desc, packed, M)),
                ],
                [LOADERS],
                [LOADER_REGISTERS],
            )
    else:
        tiles = allocate_tiles(dtype, D // 2, R, STAGES_A, STAGES_B, 32 * LOADERS + 1)
        nope_smem, rope_smem = allocate_rows(dtype, M, D, R)
        rows = Rows(*queries, nope_smem, rope_smem)
        if M == WIDE:
            exchange = allocate_exchange(dtype)
            gl.warp_specialize(
                [
                    (left_partition, (task, rows, tiles, exchange, False)),
                    (right_partition, (task, rows, tiles, exchange)),
                    (load_partition, (task, cache, kv_c_desc, k_pe_desc, tiles, M)),
                ],
                [4, LOADERS],
                [RIGHT_REGISTERS, LOADER_REGISTERS],
            )
        else:
            weights = allocate_weights(dtype, M)
            gl.warp_specialize(
                [
                    (narrow_partition, (task, rows, tiles, weights)),
                    (load_partition, (task, cache, kv_c_desc, k_pe_desc, tiles, M)),
                ],
                [LOADERS],
                [LOADER_REGISTERS],
            )
