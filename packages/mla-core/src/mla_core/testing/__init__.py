"""Installed test tools: tolerances, poison, cases and the conformance suite of a backend.

For tests and benchmarks only; nothing in the library imports it.
"""
