"""The bounds of the host's side of a call, on made-up measurements: the real ones build the emulated kernels."""

from bench import dispatch

WITHIN = {"call": "forward", "of": "operator", "backend": "cuda", "training": False, "us": 9.0, "adds": 8.0}
WITHIN |= {"launches": 2, "operators": 0, "allocations": 3, "kernels": ["pack_weights", "exact_forward"]}


def test_bounds_that_hold():
    assert (
        dispatch.broken([WITHIN, WITHIN | {"of": "module", "adds": 30.0}, WITHIN | {"backend": "cpu", "us": 900}]) == []
    )
    assert "nothing" in dispatch.text([WITHIN])


def test_broken_bounds_are_named():
    assert dispatch.broken([WITHIN | {"launches": 3, "adds": 13.0}]) == [
        "forward, operator: 3 launches, at most 2",
        "forward, operator: 13 adds, at most 12",
    ]
    training = WITHIN | {"training": True, "launches": 7}
    assert dispatch.broken([training]) == ["forward, operator: 7 launches, at most 6"]
    assert "7 launches" in dispatch.text([training])
