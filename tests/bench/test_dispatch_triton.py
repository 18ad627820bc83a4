"""What a call of backend `triton` costs the host."""

import warnings

import pytest

from bench import dispatch_triton


@pytest.mark.parametrize(
    ("sampling", "norm", "training"),
    [(sampling, *how) for sampling in ("auto", "escnn") for how in dispatch_triton.MEASURES.values()],
)
def test_launches_and_operators(sampling, norm, training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the graph's few edges are longer than the kernel is wide
        cost = dispatch_triton.measure(dispatch_triton.CASE, sampling, norm, training, 0.01)
    bounds = dispatch_triton.BOUNDS[sampling, training]
    assert len(cost.launches) <= bounds["launches"], cost.launches
    assert cost.operators.total() <= bounds["operators"], cost.operators


def test_broken_bounds_are_named():
    record = {"sampling": "auto", "call": "forward", "training": False, "allocations": 3, "views": 1, "us": 90.0}
    record |= {"launches": 3, "operators": 5, "adds": 40.0}
    assert dispatch_triton.broken([record]) == []
    above = [record | {"launches": 4, "adds": 61.0}]
    expected = ["triton, auto, forward: 4 launches, at most 3", "triton, auto, forward: 61 adds, at most 60"]
    assert dispatch_triton.broken(above) == expected
    assert "61 adds" in dispatch_triton.text(above)
