"""The tables of frame.py and layers.py: a plan's frame and activations as the kernels read them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...plan import Plan
from .columns import Columns
from .sizes import FRAME_KINDS

_Arrays = dict[str, NDArray[Any]]


def kind_of(plan: Plan) -> int:
    """The frame's place in FRAME_KINDS."""
    frame = plan.frame
    return FRAME_KINDS["regular planar" if frame.kind == "planar" and frame.regular else frame.kind]


def _azimuth_pairs(plan: Plan) -> NDArray[Any]:
    """(pairs, 2): column and partner of the attributes of order 1, of which the first nonzero one gives the azimuth of
    an edge on the axis. The kernel goes through all and keeps the last, so the first comes last."""
    frame = plan.frame
    if kind_of(plan) != FRAME_KINDS["planar"]:
        return np.zeros((0, 2), int)
    first = np.flatnonzero((frame.attribute_order == 1) & (frame.attribute_sign < 0))[::-1]
    return np.stack([first, frame.attribute_partner[first]], 1)


def frame_tables(plan: Plan, columns: Columns) -> tuple[_Arrays, _Arrays, NDArray[Any]]:
    """Numbers and indices of frame.py, and the coordinates of ``ops/kernel_mlp.py``'s harmonics that q holds."""
    frame = plan.frame
    scalars, indices = [plan.gamma, 1 / plan.cutoff if plan.cutoff else 0.0], {"pairs": _azimuth_pairs(plan)}
    if (table := plan.table) is not None:
        scalars += [1 / table.length, 1 / table.spacing]
        indices["rows"] = np.arange(table.types * table.n_coefficients + 1)
    numbers = {"scalars": np.array(scalars)}
    pick = np.array(columns.harmonics, int)
    if frame.kind == "zonal":
        chosen = frame.harmonics[pick]  # (n_harmonics, n_monomials)
        monomials = np.flatnonzero(np.abs(chosen).sum(0) > 1e-14)
        numbers["harmonics"] = chosen[:, monomials].T
        indices["powers"] = frame.powers[monomials].T  # (3, n_monomials)
    elif frame.kind == "planar":
        orders = range(1, columns.most + 1)
        pick = np.array([int(np.flatnonzero(frame.order == k)[0]) for k in orders], int)
        numbers["plane"], numbers["axis"] = frame.plane, frame.axis
        numbers["attribute_sign"] = frame.attribute_sign
        indices["attribute_order"], indices["attribute_partner"] = frame.attribute_order, frame.attribute_partner
    return numbers, indices, pick


def layer_tables(plan: Plan, columns: Columns) -> tuple[_Arrays, _Arrays]:
    """Numbers and indices for the hidden layers: samples (layers, S, c), inverse (layers, c, S) and, sample by sample,
    both, sample_rows (layers, S, 2 c); with batch norms the ways back of all hidden coordinates, for the statistics."""
    activations = plan.activations
    numbers, indices = {"samples": np.zeros((0, 1, 1)), "inverse": np.zeros((0, 1, 1))}, {}
    if activations:
        numbers["samples"] = np.stack([a.samples for a in activations])
        numbers["inverse"] = np.stack([a.inverse for a in activations])
        numbers["sample_rows"] = np.concatenate([numbers["samples"], numbers["inverse"].swapaxes(1, 2)], 2)
    if plan.norms:
        indices["way_back"], numbers["way_back_value"] = columns.all_ways_back()
    return numbers, indices
