"""Kernels with the data they run on and what torch says of it, one entry per test case."""
