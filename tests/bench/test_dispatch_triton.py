"""What a call of backend `triton` costs the host."""

import warnings

import pytest

from bench import dispatch_triton

# Sampling "auto" runs edge by edge; the authors' grid has kernels for every layer.
LIMITS = {("auto", False): (3, 5), ("auto", True): (10, 12), ("escnn", False): (4, 5), ("escnn", True): (16, 18)}


@pytest.mark.parametrize(
    ("sampling", "norm", "training"),
    [(sampling, *how) for sampling in ("auto", "escnn") for how in dispatch_triton.MEASURES.values()],
)
def test_launches_and_operators(sampling, norm, training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the graph's few edges are longer than the kernel is wide
        cost = dispatch_triton.measure(dispatch_triton.CASE, sampling, norm, training, 0.01)
    launches, operators = LIMITS[sampling, training]
    assert len(cost.launches) <= launches, cost.launches
    assert cost.operators.total() <= operators, cost.operators
