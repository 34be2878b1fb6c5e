"""Instructions and bytes of the hand-written CDNA decode kernels, counted in the emulator.

    python benchmarks/decode_cdna.py

Prints the table "Measured profile" of docs/kernels/decode_cdna.md: one request of 4,096 keys in
pages of 64, one split, 16 heads for tiles of 16 rows and 64 for tiles of 64. Instructions are those
of all waves per cached token, prologue and epilogue included; marginal instructions, and bytes, are
what 4,096 further keys add. It says nothing of time. Only moves of the softmax reference depend on
the values.
"""

from __future__ import annotations

from cdna_emulator import Result
from mla_asm import CatalogRow, emulation, read_catalogs
from mla_asm.decode import with_kernel
from mla_core import MLADims, decode
from mla_core.plan import plan_decode
from mla_core.testing.cases import DecodeCase

KEYS = 4096
COLUMNS = (
    *("kernel", "arch", "instructions", "marginal", "matrix share"),
    *("from memory", "LDS written", "LDS read"),
)


def main() -> None:
    """Print the table."""
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for arch in ("gfx942", "gfx950"):
        for row in read_catalogs()[arch]:
            print(line(row, run(row, KEYS), run(row, 2 * KEYS)))


def run(row: CatalogRow, keys: int) -> Result:
    """Decode one request and return what the emulator counted."""
    case = DecodeCase("profile", (keys,), dims=MLADims(row.tile_rows), page_size=64)
    inputs = case.build()
    with emulation(row.arch) as seen:
        plan = plan_decode(
            case.dims, inputs.qo_indptr, inputs.kv, backend="asm", fixed_lengths=True
        )
        plan = with_kernel(plan, row.symbol, num_kv_splits=1)
        decode(inputs.ql_nope, inputs.q_pe, inputs.kv, plan, sm_scale=inputs.sm_scale)
    (result,) = seen.results
    return result


def line(row: CatalogRow, once: Result, twice: Result) -> str:
    """Return the table's line for one kernel."""
    before, after = once.profile.bytes_moved, twice.profile.bytes_moved
    kinds = ("global load", "lds store", "lds load")
    cells = (
        row.symbol.removeprefix("mla_decode_bf16_"),
        row.arch,
        f"{once.instructions / KEYS:.1f}",
        f"{(twice.instructions - once.instructions) / KEYS:.1f}",
        f"{once.profile.mfma_share:.1%}",
        *(f"{(after[kind] - before[kind]) / KEYS:,.0f}" for kind in kinds),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
