"""Samples of the Fourier activations that differ only in the sign of odd coefficients, which are evaluated together.

``LayerView`` of ``csrc/plan.h`` says what the native code makes of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...plan import Plan

_LARGEST_SEARCH = 400  # samples that are searched for pairs: all are compared with all


def _match_pairs(samples: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """A sign per coefficient (c,) and a permutation (S,) with ``samples[permutation] = samples · sign``, if the samples
    have such a symmetry (an inversion, a half turn); the first one that leaves fewest samples fixed."""
    if len(samples) > _LARGEST_SEARCH:
        return None
    tolerance, best = 1e-9 * np.abs(samples).max(initial=0), None
    magnitude = np.abs(samples)
    equal = np.abs(magnitude[:, None] - magnitude).max(2) < tolerance  # (S, S)
    for partner in np.flatnonzero(equal[0])[1:]:
        found = _complete(samples, equal, tolerance, np.zeros(samples.shape[1]), {0: partner})
        if found is None or not (found[0] < 0).any():
            continue
        if best is None or (found[1] == np.arange(len(samples))).sum() < (best[1] == np.arange(len(samples))).sum():
            best = found
        if not (best[1] == np.arange(len(samples))).any():
            break
    return best


def _complete(
    samples: NDArray[Any], equal: NDArray[Any], tolerance: float, sign: NDArray[Any], image: dict[int, int]
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """The signs (0: not known) and images of samples completed, or None. Depth first over a sample's possible images,
    the sample with fewest first, itself last."""
    for row, other in image.items():
        present = np.abs(samples[row]) > 1e3 * tolerance
        sign = np.where(sign != 0, sign, np.sign(samples[row] * samples[other]) * present)
    if (sign != 0).all():
        permutation = [np.flatnonzero(np.abs(samples - row * sign).max(1) < tolerance) for row in samples]
        return (sign, np.array([p[0] for p in permutation])) if all(len(p) for p in permutation) else None
    left = [row for row in range(len(samples)) if row not in image]
    if not left:  # coefficients that are 0 in all samples
        return _complete(samples, equal, tolerance, np.where(sign == 0, 1.0, sign), image)
    known = sign != 0
    distance = np.abs(samples[left][:, None, known] * sign[known] - samples[:, known]).max(2, initial=0)
    possible = equal[left] & (distance < tolerance)
    at = int(possible.sum(1).argmin())
    for other in sorted(np.flatnonzero(possible[at]), key=lambda other: other == left[at]):
        found = _complete(samples, equal, tolerance, sign, {**image, left[at]: other})
        if found is not None:
            return found
    return None


class SamplePairs(NamedTuple):
    """Samples in pairs that differ by the sign of the odd coefficients; then those without a partner. The native code
    keeps the even coefficients of a channel in front of the odd ones."""

    first: list[int]  # of every pair
    single: list[int]
    odd: NDArray[Any]  # (c,) bool

    @property
    def order(self) -> NDArray[Any]:
        """(c,) the coefficients of a channel as the native code keeps them."""
        return np.argsort(self.odd, kind="stable")

    @property
    def position(self) -> NDArray[Any]:
        """(c,) where the native code keeps each coefficient of a channel."""
        return np.argsort(self.order)

    def parity_counts(self, n: int) -> tuple[int, int]:
        """How many of the first n coefficients are even, and how many are odd."""
        n_odd = int(self.odd[:n].sum())
        return n - n_odd, n_odd


@lru_cache(maxsize=256)
def sample_pairs(plan: Plan) -> SamplePairs:
    """Of the samples of a plan, which are the same in every layer; none where they are not, or where an odd coefficient
    of order 0 would not come first."""
    if not plan.activations:
        return SamplePairs([], [], np.zeros(max(len(plan.frame.order), 1), dtype=bool))
    act = plan.activations[0]
    none = SamplePairs([], list(range(len(act.samples))), np.zeros(act.samples.shape[1], dtype=bool))
    equal = all(np.array_equal(act.samples, other.samples) for other in plan.activations)
    found = _match_pairs(act.samples) if equal else None
    if found is None:
        return none
    sign, permutation = found
    size = np.abs(act.inverse).max(initial=0)
    if not np.allclose(act.inverse.T[permutation], act.inverse.T * sign, rtol=0, atol=1e-9 * size):
        return none
    if plan.frame.regular and (sign[plan.frame.order == 0] < 0).any():
        return none
    rows = range(len(permutation))
    return SamplePairs([s for s in rows if s < permutation[s]], [s for s in rows if s == permutation[s]], sign < 0)
