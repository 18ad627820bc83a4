"""Benchmarks: ``python -m bench`` (correctness, time, memory) and ``python -m bench accuracy`` (equivariance)."""
