"""Sphinx configuration: offline, warnings are errors, tables come from the code."""

from __future__ import annotations

import sys
from pathlib import Path

import mla_core

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "MLA kernels"
copyright = "The MLA kernels authors"
author = "The MLA kernels authors"
release = version = mla_core.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "generated_tables",
]
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = "MLA kernels"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

nitpicky = True
nitpick_ignore_regex = [
    # The shape line stands where NumPy docstrings put the type.
    (r"py:.*", r"\[.*|.*\]|.*\d.*|.* .*"),
    # No inventory of torch is fetched: the build is offline.
    (r"py:.*", r"torch\..*|Tensor|tensors?|callable|optional|Ellipsis|mapping|iterable"),
    (r"py:.*", r"(bf16|fp16|fp32|int32|int64|fp8_e4m3|natural log|name|names|like|dtype|range)"),
    (r"py:.*", r"(collections\.abc|pathlib|importlib|argparse|hypothesis|types|np|numpy)\..*"),
    (r"py:.*", r"(int|float|str|bool|tuple|list|dict|frozenset|None|Path|Sequence|Mapping)"),
]
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False
napoleon_use_param = False
