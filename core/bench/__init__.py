"""Benchmarks: each module is one command of `python -m core bench`."""
