"""Triton kernels of the core; imported only when one is launched."""
