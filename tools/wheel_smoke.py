"""Use an installed wheel as a user would, and fail when it is not what it claims.

``python -I tools/wheel_smoke.py mla-core`` runs inside an environment that holds that wheel and its
declared dependencies. Nothing may come from the checkout, so nothing of it is imported here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib.metadata import distributions, entry_points
from importlib.util import find_spec
from pathlib import Path

#: Backend names each requirement must make discoverable.
EXPECTED = {
    "cdna-emulator": set[str](),
    "mla-core": {"reference"},
    "mla-triton": {"reference", "triton"},
    "mla-asm": {"reference", "asm"},
    "mla-fusions": {"reference", "fusions"},
    "mla-kernels[all]": {"reference", "triton", "asm", "fusions"},
}


def main(requirement: str) -> None:
    """Run every check for one requirement and print what was seen."""
    names = EXPECTED[requirement]
    if requirement == "cdna-emulator":
        check_emulator()
        return
    check_origin(names)
    check_import_is_light()
    check_discovery(names)
    check_decode()
    check_command_line()
    if "asm" in names:
        check_catalogs()
    print(f"{requirement}: found {', '.join(sorted(names))}; decoded, and equal to the formula")


def check(holds: bool, claim: str) -> None:
    """Stop with the claim when it does not hold; ``assert`` would vanish under ``-O``."""
    if not holds:
        sys.exit(f"wheel_smoke: this does not hold: {claim}")


def check_origin(names: set[str]) -> None:
    """Every module comes from this environment, and carries its marker of inline types."""
    for backend in names:
        module = "mla_core" if backend == "reference" else f"mla_{backend}"
        spec = find_spec(module)
        check(spec is not None and spec.origin is not None, f"{module} is installed")
        folder = Path(spec.origin).parent  # type: ignore[union-attr, arg-type]
        check(folder.is_relative_to(sys.prefix), f"{module} comes from {sys.prefix}, not {folder}")
        check((folder / "py.typed").is_file(), f"{module} carries py.typed")
    versions = {d.name: d.version for d in distributions() if d.name.startswith("mla-")}
    check(len(set(versions.values())) == 1, f"the packages have one version, got {versions}")


def check_import_is_light() -> None:
    """Import the core alone: no compiler and no backend comes with it, whatever is installed."""
    script = (
        "import sys, mla_core\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}"
        " & {'triton', 'mla_triton', 'mla_asm', 'mla_fusions', 'rich', 'transformers'}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()
    check(not loaded, f"import mla_core loads none of these, got {loaded}")


def check_discovery(names: set[str]) -> None:
    """Backends are found through entry points, all of them usable."""
    import mla_core

    registered = {point.name for point in entry_points(group="mla_core.backends")}
    check(registered == names, f"entry points are {sorted(names)}, got {sorted(registered)}")
    for record in mla_core.backends():
        check(record.backend is not None, f"{record.name} loads, got {record.error!r}")


def check_decode() -> None:
    """One ragged decode over pages equals the formula, in the automatic choice of backend."""
    import torch

    import mla_core

    torch.manual_seed(0)
    dims = mla_core.MLADims(num_heads=4)
    cache = mla_core.LatentCache.allocate("fp32", dims, 5, 16)
    kv_c, k_pe = torch.randn(80, dims.kv_lora_rank), torch.randn(80, dims.qk_rope_head_dim)
    mla_core.write_kv_cache(kv_c, k_pe, cache, torch.arange(80))
    pages = torch.tensor([[3, 1], [4, 0]], dtype=torch.int32)
    kv_lens = torch.tensor([21, 9], dtype=torch.int32)
    kv = mla_core.PagedKV.from_block_table(cache, pages, kv_lens)
    qo_indptr = torch.tensor([0, 1, 2], dtype=torch.int32)
    ql_nope, q_pe = torch.randn(2, 4, dims.kv_lora_rank), torch.randn(2, 4, dims.qk_rope_head_dim)
    plan = mla_core.plan_decode(dims, qo_indptr, kv, q_dtype=torch.float32)
    out = mla_core.decode(ql_nope, q_pe, kv, plan, sm_scale=dims.sm_scale)
    for request, kv_len in enumerate(kv_lens.tolist()):
        page = pages[request].long().repeat_interleave(16)[:kv_len]
        rows = page * 16 + torch.arange(kv_len) % 16
        scores = ql_nope[request] @ kv_c[rows].T + q_pe[request] @ k_pe[rows].T
        want = torch.softmax(dims.sm_scale * scores, -1) @ kv_c[rows]
        worst = (out[request] - want).abs().max().item()
        check(worst < 1e-4, f"decode equals the formula, worst difference {worst}")


def check_command_line() -> None:
    """``mla`` is installed, and answers in words where its extra is missing."""
    mla = Path(sys.executable).with_name("mla")
    done = subprocess.run([mla, "backends"], capture_output=True, text=True)
    text = done.stdout + done.stderr
    check("Traceback" not in text, f"`mla backends` answers in words, got\n{text}")
    if find_spec("rich") is None:
        check(done.returncode == 2, f"`mla backends` without rich exits with 2, got {done}")
        check('pip install "mla-core[cli]"' in text, f"it names the extra, got\n{text}")
    else:
        check(done.returncode == 0 and "reference" in text, f"it lists reference, got\n{text}")


def check_emulator() -> None:
    """Load the native core from the wheel, and read an instruction."""
    import cdna_emulator
    from cdna_emulator.native_core import has_handler

    folder = Path(cdna_emulator.__file__).parent
    check(folder.is_relative_to(sys.prefix), f"it comes from {sys.prefix}, not {folder}")
    check(has_handler("v_mfma_f32_16x16x16_bf16"), "the native core has matrix instructions")
    text = cdna_emulator.disassemble(bytes.fromhex("000081bf"), "gfx942")[0].text
    check(text == "s_endpgm", f"the disassembler reads s_endpgm, got {text}")
    print("cdna-emulator: the native core loads, the disassembler reads")


def check_catalogs() -> None:
    """Find the catalogs in the wheel, and every code object they name, with its hash."""
    from mla_asm import hsa_root, read_catalogs

    root = hsa_root()
    check(root.is_relative_to(sys.prefix), f"catalogs come from {sys.prefix}, not {root}")
    catalogs = read_catalogs()
    check(set(catalogs) == {"gfx942", "gfx950", "sm90a"}, f"three catalogs, got {set(catalogs)}")
    for row in (row for rows in catalogs.values() for row in rows):
        found = hashlib.sha256(row.code_object.read_bytes()).hexdigest()
        check(found == row.sha256, f"{row.where}: hash {row.sha256}, got {found}")


if __name__ == "__main__":
    main(sys.argv[1])
