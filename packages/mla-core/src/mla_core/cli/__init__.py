"""The command line, ``mla``: backends, doctor, explain, demo and bench.

`mla_core.cli.main` parses and dispatches; each command is one module with ``add_arguments`` and
``run``. ``doctor`` and ``bench`` need nothing but torch, so that they work on a broken or bare
machine; the others print tables with rich, the extra ``mla-core[cli]``.
"""
