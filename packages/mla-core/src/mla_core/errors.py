"""The exceptions callers see: one tree, so that ``except MLAError`` catches everything of ours.

Messages follow one form: ``op: name must be X, got Y; what to do``. They print names, shapes and
dtypes, never the contents of a tensor.
"""

from __future__ import annotations


class MLAError(Exception):
    """Base of every error this library raises on purpose."""


class LayoutError(MLAError, ValueError):
    """An argument's shape, dtype, device, stride or index range is not what the op accepts."""


class BackendUnavailableError(MLAError, RuntimeError):
    """A backend is missing, broken, or cannot run on this machine; the message says why."""


class UnsupportedProblemError(MLAError, NotImplementedError):
    """No selected backend has a kernel for the problem; the message lists one reason for each."""
