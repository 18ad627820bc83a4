"""Triton kernels of the fused operator, and what a plan is for them.

Three operators in a row, each with its gradient, edges sorted by target all along:

====================  ==============================================================================================
frame.py              edge_delta, edge_attr → the MLP's inputs, the radius, γ s(|x|), the harmonics q of the direction
layers.py             all hidden layers of a block of edges in one kernel → the reduced hidden coefficients r (E, n_r)
contract.py           T_i = Σ_e (C · q_e · f_j) ⊗ r_e on chip, per node and block of T, then out_i = T_i Θ, a GEMM for a
                      batch of nodes from a bounded workspace
====================  ==============================================================================================

``tables.py`` turns a plan into tables, which are plain tensors: one binary serves all plans of the same padded sizes.
``launch.py`` chooses sizes of blocks and launches; ``operators.py`` makes the three known to torch. Modules other than
``tables.py`` import triton.
"""
