"""The plan's scalars as the native code reads them: the fields of each tuple are those of its counterpart in
``csrc/plan.h``, in the same order."""

from __future__ import annotations

from typing import NamedTuple


class PlanHeader(NamedTuple):
    """``IST_PLAN_HEADER``."""

    kind: int
    dim: int
    n_attr: int
    regular: bool
    n_inputs: int
    in_size: int
    out_size: int
    n_layers: int
    d: int
    c: int
    channels: int
    order_zero: int
    function: int
    n_couplings: int
    n_rows: int
    n_g: int
    n_weights: int
    n_grad: int
    shell_at: int
    has_cutoff: bool
    hidden_flat: int
    has_norms: bool
    n_trivial: int
    n_parameters: int
    n_even: int
    n_gathered: int
    n_mixed: int
    n_sums: int
    n_slot_sums: int
    n_read: int
    n_knots: int
    n_types: int
    table_at: int
    bounded: bool
    even: bool
    attribute_identity: bool
    n_harmonics: int
    n_monomials: int
    used_harmonics: int
    used_monomials: int
    max_power: int
    n_products: int
    product_size: int
    n_adjoint: int
    n_harmonic_terms: int


class LayerHeader(NamedTuple):
    """``IST_LAYER_HEADER``, of one hidden layer."""

    in_size: int
    out_size: int
    n_samples: int
    weight: int
    bias: int
    affine: int
    norm_weight: int
    norm_bias: int
    n_values: int
    n_pairs: int
    in_even: int
    in_odd: int
    out_even: int
    out_odd: int
    n_groups: int


class CouplingHeader(NamedTuple):
    """``IST_COUPLING_HEADER``, of one coupling."""

    n_out: int
    n_in: int
    n_hidden: int
    n_basis: int
    constant: bool
    depthwise: bool
    n_slots: int
    n_groups: int
    n_blocks: int
    theta: int
    theta_forward: int
    out_at: int
