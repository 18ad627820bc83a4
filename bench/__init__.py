"""Benchmarks: ``python -m bench SECTION``.

``speed`` (the default): correctness, then time, memory and the share of the arithmetic bound. ``scaling``: time and
memory against the number of edges. ``small``: what a call costs on 10 nodes. ``accuracy``: equivariance. ``forces``: a
training step on energies and forces. ``related``: e3nn's operators. ``table``: kernels from tables.
"""
