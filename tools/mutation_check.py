"""Mutation spot check: break one line at a time and see that a test notices.

Each mutant is one replaced piece of source text. The package is copied to a scratch directory that
comes first on the path, the piece is replaced there, and the named tests must fail. Run it with
``nox -s mutants``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    name: ROOT / "packages" / name / "src" for name in ("mla-core", "mla-triton", "mla-fusions")
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong version of one file, and the tests that must notice."""

    path: str
    before: str
    after: str
    tests: str
    package: str = "mla-core"


ATTENTION = "mla_core/reference/attention.py"
ATTEND = "mla_core/reference_backend/attend.py"
REFERENCE_DECODE = "mla_core/reference_backend/decode.py"
REDUCE = "mla_core/reduce.py"
V1_2 = "mla_core/metadata/v1_2.py"
QUANTISE = "mla_fusions/kernels/_quantise.py"
WRITE_ROWS = "mla_fusions/kernels/write_rows.py"
WRITE_BLOCKS = "mla_fusions/kernels/write_blocks.py"
ROPE_ROWS = "mla_fusions/kernels/rope_rows.py"
NORM = "mla_fusions/kernels/_norm.py"
NORMS = "mla_fusions/kernels/norms.py"
INDEXER_ROWS = "mla_fusions/kernels/indexer_rows.py"
ABSORBED = "mla_fusions/kernels/absorbed.py"
ABSORBED_ROPE = "mla_fusions/kernels/absorbed_rope.py"
LAYER = "mla_fusions/layer.py"

MUTANTS: tuple[Mutant, ...] = (
    # The truth: masks, sign, logarithm, sink.
    Mutant(
        ATTENTION,
        "(positions <= query_positions)",
        "(positions < query_positions)",
        "test_reference_attention",
    ),
    Mutant(
        ATTENTION,
        "positions > query_positions - window",
        "positions >= query_positions - window",
        "test_reference_attention",
    ),
    Mutant(
        ATTENTION,
        "torch.arange(kv_len, device=device) * cp_world_size + cp_rank",
        "torch.arange(kv_len, device=device) * cp_world_size - cp_rank",
        "test_reference_attention",
    ),
    Mutant(ATTENTION, "* sm_scale, softcap)", "* -sm_scale, softcap)", "test_reference_attention"),
    Mutant(
        ATTENTION,
        "return probs, torch.log(total) + shift",
        "return probs, torch.log2(total) + shift",
        "test_reference_attention",
    ),
    Mutant(
        ATTENTION,
        "torch.exp(sink.to(scores) - shift)",
        "torch.exp(-sink.to(scores) - shift)",
        "test_reference_attention",
    ),
    # The reference backend.
    Mutant(
        ATTEND,
        "decay = torch.exp(running_max - shift)",
        "decay = torch.exp(shift - running_max)",
        "test_reference_backend_decode",
    ),
    Mutant(
        ATTEND,
        "running_max + log_denom)",
        "running_max - log_denom)",
        "test_reference_backend_decode",
    ),
    Mutant(
        ATTEND,
        "softcap * torch.tanh(scores / softcap)",
        "torch.tanh(scores / softcap)",
        "test_reference_backend_decode",
    ),
    Mutant(
        REFERENCE_DECODE,
        "keys <= query_position",
        "keys < query_position",
        "test_reference_backend_decode",
    ),
    Mutant(
        REFERENCE_DECODE,
        "query_position[:, None] - options.window",
        "query_position[:, None] - options.window - 1",
        "test_reference_backend_decode",
    ),
    Mutant(
        REFERENCE_DECODE,
        "position * options.cp_world_size + options.cp_rank",
        "position * options.cp_world_size",
        "test_reference_backend_decode",
    ),
    Mutant(
        "mla_core/reference_backend/prefill.py",
        "(k_end - k_begin) - (q_end - token)",
        "(k_end - k_begin) - (q_end - token) - 1",
        "test_reference_backend_prefill",
    ),
    Mutant(
        "mla_core/reference_backend/prefill.py",
        "grad_scores * sm_scale",
        "grad_scores",
        "test_reference_backend_prefill",
    ),
    # Batches.
    Mutant(
        "mla_core/batch.py",
        "(num_pages - 1).clamp(min=0) * self.page_size",
        "num_pages * self.page_size",
        "test_batch",
    ),
    # Planners.
    Mutant(
        V1_2,
        "left = first, 0, limit - cost[first]",
        "left = first, 0, limit - cost[first] + 1",
        "test_metadata_v1_2",
    ),
    Mutant(
        V1_2,
        "pages[tile] - page < q_len[tile]",
        "pages[tile] - page <= q_len[tile]",
        "test_metadata_v1_2",
    ),
    Mutant(
        "mla_core/metadata/tiles.py",
        "later = batch.q_len[request] - 1 - nth",
        "later = batch.q_len[request] - nth",
        "test_metadata_v1_2",
    ),
    Mutant(
        "mla_core/metadata/splits.py",
        "SPLIT_COST = 84.1",
        "SPLIT_COST = 48.1",
        "test_metadata_splits",
    ),
    Mutant(
        "mla_core/kernels/plan.py",
        "if left > overhead:",
        "if left >= overhead:",
        "test_metadata_device",
    ),
    # Reduce.
    Mutant(REDUCE, "weight = exp(lse - m_safe)", "weight = exp(m_safe - lse)", "test_reduce"),
    Mutant(REDUCE, "lse = m_safe + log(denom)", "lse = m_safe - log(denom)", "test_reduce"),
    Mutant(
        REDUCE,
        "exp, log = (torch.exp2, torch.log2) if is_two else (torch.exp, torch.log)",
        "exp, log = (torch.exp2, torch.log2)",
        "test_reduce",
    ),
    Mutant(
        "mla_core/kernels/reduce.py",
        "lse = m + tl.log2(denom) / to_log2",
        "lse = m + tl.log2(denom)",
        "test_reduce",
    ),
    Mutant(
        "mla_core/kernels/reduce.py",
        "denom += tl.exp2((sink - m_safe) * to_log2)",
        "denom += tl.exp2((m_safe - sink) * to_log2)",
        "test_reduce",
    ),
    # The Triton kernels, through the interpreter.
    Mutant(
        "mla_triton/kernels/_math.py",
        "high = global_len - (q_len - 1 - q_idx)",
        "high = global_len - (q_len - q_idx)",
        "test_decode",
        "mla-triton",
    ),
    Mutant(
        "mla_triton/kernels/_math.py",
        "tl.cdiv(kv_len, BLOCK_N)",
        "kv_len // BLOCK_N",
        "test_decode",
        "mla-triton",
    ),
    # Cache writes: ties, scales, the first slot, copies, old tokens of a block.
    Mutant(QUANTISE, "((magnitude >> 20) & 1)", "1", "test_write_kv_cache", "mla-fusions"),
    Mutant(QUANTISE, "(a >= 0.75)", "(a > 0.75)", "test_write_kv_cache", "mla-fusions"),
    Mutant(QUANTISE, "(254 - exponent)", "(253 - exponent)", "test_write_kv_cache", "mla-fusions"),
    Mutant(QUANTISE, "tl.fma(tl.fma(q, m, x), y, q)", "q", "test_quantise", "mla-fusions"),
    Mutant(
        QUANTISE,
        "tl.where(magnitude == 0, 0x7F800000, odd)",
        "odd",
        "test_quantise",
        "mla-fusions",
    ),
    Mutant(
        QUANTISE,
        "tl.maximum(254 - (magnitude >> 23), 1)",
        "(254 - (magnitude >> 23))",
        "test_quantise",
        "mla-fusions",
    ),
    Mutant(QUANTISE, "& 0x80) << 24", "& 0x80) << 23", "test_head_writers", "mla-fusions"),
    Mutant(WRITE_ROWS, "(slots >= 0)", "(slots > 0)", "test_write_kv_cache", "mla-fusions"),
    Mutant(WRITE_ROWS, "copy * PLACE[9]", "0 * PLACE[9]", "test_write_kv_cache", "mla-fusions"),
    Mutant(WRITE_BLOCKS, "x * old_scale", "x", "test_head_writers", "mla-fusions"),
    Mutant(WRITE_BLOCKS, "if old_scale < scale:", "if True:", "test_head_writers", "mla-fusions"),
    Mutant(ROPE_ROWS, "a - b, a + b", "a + b, a - b", "test_rope_writers", "mla-fusions"),
    Mutant(ROPE_ROWS, "positions += ", "positions -= ", "test_rope_writers", "mla-fusions"),
    Mutant(
        ROPE_ROWS,
        "maximum(positions, 0)",
        "maximum(positions, 1)",
        "test_rope_writers",
        "mla-fusions",
    ),
    Mutant(ROPE_ROWS, "b * cos_b + a", "b * cos_a + a", "test_rope_writers", "mla-fusions"),
    Mutant(ROPE_ROWS, "column = j >> 1", "column = j >> 2", "test_rope_writers", "mla-fusions"),
    Mutant(
        ROPE_ROWS, "tokens < num_turned", "tokens <= num_turned", "test_rope_writers", "mla-fusions"
    ),
    Mutant(
        ROPE_ROWS,
        "b = tl.div_rn(b.to(tl.float32), tl.load(b_factor_ptr))",
        "b = tl.div_rn(b.to(tl.float32), 1.0)",
        "test_rope_writers",
        "mla-fusions",
    ),
    Mutant(
        ROPE_ROWS,
        "tl.where(tokens < num_written, tokens, -1)",
        "tl.where(tokens < num_written, 0, -1)",
        "test_joined",
        "mla-fusions",
    ),
    Mutant(
        ROPE_ROWS,
        "tl.store(out[:, None] + Q_SHAPE[5] + r",
        "tl.store(out[:, None] + Q_SHAPE[4] + r",
        "test_joined",
        "mla-fusions",
    ),
    Mutant(ROPE_ROWS, "(r < ROPE[1])", "(r <= ROPE[1])", "test_rope_writers", "mla-fusions"),
    Mutant(ROPE_ROWS, "if SKIPS_QUERIES:", "if False:", "test_rope_writers", "mla-fusions"),
    # Norms, alone and in front of what turns and is written.
    Mutant(NORMS, "x += old.to(tl.float32)", "x += 0.0", "test_norms", "mla-fusions"),
    Mutant(
        NORM,
        "sqrt_rn(squares / WIDTH + eps)",
        "sqrt_rn(squares / WIDTH)",
        "test_norm_writers",
        "mla-fusions",
    ),
    Mutant(NORM, "weight += 1.0", "weight += 0.0", "test_norm_writers", "mla-fusions"),
    Mutant(NORM, "x = x - mean[:, None, None]", "x = x", "test_indexer_writers", "mla-fusions"),
    Mutant(
        ROPE_ROWS,
        "squares += row_sums(raw * raw)",
        "squares += 0.0",
        "test_norm_writers",
        "mla-fusions",
    ),
    Mutant(
        ROPE_ROWS,
        "weight_ptr + A_SHAPE[0]",
        "weight_ptr",
        "test_norm_writers",
        "mla-fusions",
    ),
    Mutant(ROPE_ROWS, "other, is_pair", "e, is_pair", "test_norm_writers", "mla-fusions"),
    Mutant(INDEXER_ROWS, "(centred * centred)", "(k * k)", "test_indexer_writers", "mla-fusions"),
    Mutant(INDEXER_ROWS, "* weights_scale", "* 1.0", "test_indexer_writers", "mla-fusions"),
    Mutant(
        QUANTISE, "(bits + 0x7FFFFF)", "(bits + 0x800000)", "test_indexer_writers", "mla-fusions"
    ),
    Mutant(
        "mla_fusions/rows.py", "(_GROUP_POWER,", "(kind,", "test_indexer_writers", "mla-fusions"
    ),
    # Absorbed products, alone and joined with what rotates and writes; a layer.
    Mutant(ABSORBED, "* tl.load(w_factor_ptr)", "* 1.0", "test_absorbed", "mla-fusions"),
    Mutant(ABSORBED, "tl.minimum(first + SPLIT_K, K)", "K", "test_absorbed", "mla-fusions"),
    Mutant(ABSORBED_ROPE, "program % tiles,", "0,", "test_absorbed_rope", "mla-fusions"),
    Mutant(
        ABSORBED_ROPE,
        "program - num_products,",
        "program,",
        "test_absorbed_rope",
        "mla-fusions",
    ),
    Mutant(
        LAYER,
        "num_tokens <= self.max_joined_tokens",
        "num_tokens < self.max_joined_tokens",
        "test_layer",
        "mla-fusions",
    ),
    Mutant(
        LAYER,
        "stored[..., :rank], queries.factor",
        "stored[..., :rank], None",
        "test_layer",
        "mla-fusions",
    ),
    Mutant(LAYER, "k_out=kv_c", "k_out=kv_c.clone()", "test_layer", "mla-fusions"),
)


def main() -> int:
    """Check every mutant; return the number that survived."""
    survivors = 0
    for number, mutant in enumerate(MUTANTS, start=1):
        is_caught = _is_caught(mutant)
        survivors += not is_caught
        verdict = "caught  " if is_caught else "SURVIVED"
        print(f"{number:3} {verdict} {mutant.path}: {mutant.before!r} -> {mutant.after!r}")
    print(f"{len(MUTANTS) - survivors} caught, {survivors} survived")
    return survivors


def _is_caught(mutant: Mutant) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        copied = Path(scratch) / "src"
        shutil.copytree(SOURCES[mutant.package], copied)
        target = copied / mutant.path
        source = target.read_text(encoding="utf-8")
        if source.count(mutant.before) != 1:
            raise SystemExit(
                f"{mutant.path}: {mutant.before!r} must occur once, "
                f"found {source.count(mutant.before)}; update tools/mutation_check.py"
            )
        target.write_text(source.replace(mutant.before, mutant.after), encoding="utf-8")
        tests = ROOT / "packages" / mutant.package / "tests" / f"{mutant.tests}.py"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(tests)]
        path = os.pathsep.join(filter(None, [str(copied), os.environ.get("PYTHONPATH", "")]))
        finished = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    # 1: tests failed. Anything else (0 passed, 2 collection error, 4 usage) is not a catch.
    if finished.returncode not in (0, 1):
        raise SystemExit(f"pytest exited with {finished.returncode}:\n{finished.stdout[-2000:]}")
    return finished.returncode == 1


if __name__ == "__main__":
    raise SystemExit(main())
