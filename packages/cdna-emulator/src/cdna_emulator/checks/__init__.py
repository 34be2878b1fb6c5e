"""Checkers: mistakes that hardware hides, found while a kernel runs or by reading its code."""
