"""Without a GPU, kernels run in Triton's interpreter; it must be on before Triton is imported."""

from __future__ import annotations

import torch
from mla_core.testing import interpreter

if not torch.cuda.is_available():
    interpreter.enable()
