"""The truth: every op's mathematics over plain dense tensors, in fp64 unless told otherwise.

Nothing here knows pages, plans or backends, and nothing here is meant to be fast: a reader should
be able to check each function against its formula by eye. Kernels, the ``reference`` backend and
the benchmarks are compared with these functions.

One file per family: `attention` (absorbed decode), `prefill` (expanded heads, forward and
backward), `sparse`, `reduce` (merging partial results), `rope`, `norm`, `quant`, `gemm`,
`cache_ops`, `rope_quant` (DeepSeek-V4 rows) and `indexer`.
"""
