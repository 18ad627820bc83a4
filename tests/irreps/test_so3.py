"""Spherical harmonics and Clebsch-Gordan coefficients against e3nn's, and by their own laws."""

from itertools import product

import numpy as np
import pytest
import torch
from e3nn import o3

from implicit_steer.lowering import so3

HIGHEST = 6


def harmonics(points: np.ndarray, highest: int) -> np.ndarray:
    """(P, (L + 1)²) values of the polynomials."""
    powers, coefficients = so3.solid_harmonics(highest)
    return np.prod(points[:, None] ** powers[None], axis=-1) @ coefficients.T


def test_harmonics_are_e3nns():
    points = torch.nn.functional.normalize(torch.randn(40, 3, dtype=torch.float64), dim=1)
    expected = o3.spherical_harmonics(list(range(12)), points, normalize=True, normalization="norm")
    np.testing.assert_allclose(harmonics(points.numpy(), 11), expected.numpy(), atol=1e-13)  # measured: 1e-14


def test_harmonics_are_solid():
    """Homogeneous of their degree, with a sum of squares of r^2l."""
    points = np.random.default_rng(0).standard_normal((20, 3))
    values, degree = harmonics(points, HIGHEST), so3.degrees(HIGHEST)
    np.testing.assert_allclose(harmonics(2 * points, HIGHEST), 2.0**degree * values, rtol=1e-12, atol=1e-12)
    radius = np.linalg.norm(points, axis=1)
    for n in range(HIGHEST + 1):
        np.testing.assert_allclose((values[:, degree == n] ** 2).sum(1), radius ** (2 * n), rtol=1e-11)


@pytest.mark.parametrize(("first", "second"), list(product(range(5), range(5))))
def test_coefficients_are_e3nns(first, second):
    for third in range(abs(first - second), first + second + 1):
        expected = o3.wigner_3j(first, second, third, dtype=torch.float64).numpy()
        np.testing.assert_allclose(so3.clebsch_gordan(first, second, third), expected, atol=1e-14)


def test_coefficients_couple_harmonics():
    """C turns Y_l₁ ⊗ Y_l₂ into a multiple of Y_l₃: invariance, in the basis of the harmonics."""
    points = np.random.default_rng(1).standard_normal((30, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    values, degree = harmonics(points, HIGHEST), so3.degrees(HIGHEST)
    for first, second in product(range(4), range(4)):
        for third in range(abs(first - second), min(first + second, HIGHEST) + 1, 1):
            tensor = so3.clebsch_gordan(first, second, third)
            made = np.einsum("pi,pj,ijk->pk", values[:, degree == first], values[:, degree == second], tensor)
            multiple = (made * values[:, degree == third]).sum(1)
            np.testing.assert_allclose(made, multiple[:, None] * values[:, degree == third], atol=1e-13)
            np.testing.assert_allclose(multiple, multiple[0], atol=1e-13)
            assert ((first + second + third) % 2 == 0) == (abs(multiple[0]) > 1e-3)


def test_no_tensor_beyond_the_triangle():
    with pytest.raises(ValueError, match="degrees 1, 1 and 3"):
        so3.clebsch_gordan(1, 1, 3)
