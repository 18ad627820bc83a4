"""Neighbours in periodic boxes against all images, one by one."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit_steer import periodic_radius_graph, radius_graph
from implicit_steer.graph.structures import Structures


def brute_force(pos, r, cell, pbc):
    """{(j, i, shift): distance} over a range of images that is certainly wide enough, up to r + 1e-6."""
    basis = cell.copy()
    basis[~pbc] = np.linalg.svd(cell[pbc])[2][pbc.sum() :]
    fraction = pos @ np.linalg.inv(basis)
    reach = r * np.linalg.norm(np.linalg.inv(basis), axis=0) + np.ptp(fraction, axis=0) + 1
    pairs = {}
    for shift in itertools.product(
        *(range(-int(n), int(n) + 1) if p else [0] for n, p in zip(reach, pbc, strict=True))
    ):
        distance = np.linalg.norm(pos[None] - pos[:, None] + np.array(shift) @ cell, axis=-1)  # [j, i]
        for j, i in np.argwhere(distance <= r + 1e-6):
            if i != j or any(shift):
                pairs[j, i, shift] = distance[j, i]
    return pairs


@st.composite
def boxes(draw):
    """Points in and out of a box of any shape, from a fraction of the radius to several times as wide."""
    dim = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    pbc = np.array([draw(st.booleans()) for _ in range(dim)])
    size = draw(st.floats(0.5, 4))
    cell = size * (np.eye(dim) + draw(st.floats(0, 0.5)) * rng.uniform(-1, 1, (dim, dim)))
    pos = rng.uniform(-1, 2, (draw(st.integers(1, 5)), dim)) @ cell
    return pos, draw(st.floats(0.3, 2.5)), cell, pbc


@settings(deadline=None, max_examples=150)
@given(boxes())
def test_all_images_and_no_others(case):
    pos, r, cell, pbc = case
    edge_index, shift = periodic_radius_graph(torch.tensor(pos), r, torch.tensor(cell), pbc)
    found = [(*edge, tuple(s)) for edge, s in zip(edge_index.t().tolist(), shift.int().tolist(), strict=True)]
    assert len(found) == len(set(found))
    assert found == sorted(found, key=lambda e: (e[1], e[0], e[2]))
    expected = brute_force(pos, r, cell, pbc)
    assert set(found) <= set(expected)
    missing = set(expected) - set(found)
    assert all(expected[edge] > r - 1e-6 for edge in missing)  # rounding decides
    source, target = edge_index
    delta = torch.tensor(pos)[target] - torch.tensor(pos)[source] + shift @ torch.tensor(cell)
    torch.testing.assert_close(delta.norm(dim=1), torch.tensor([expected[e] for e in found], dtype=torch.float64))


def test_every_edge_has_its_reverse():
    pos, cell = torch.rand(6, 3) * 5, torch.tensor([[2.0, 0, 0], [0.7, 2.1, 0], [0, 0.3, 2.4]])
    edge_index, shift = periodic_radius_graph(pos, 3.0, cell)
    edges = {(j, i, tuple(s)) for (j, i), s in zip(edge_index.t().tolist(), shift.int().tolist(), strict=True)}
    assert edges == {(i, j, tuple(-n for n in s)) for j, i, s in edges}
    assert any(i == j for j, i, _ in edges)  # a point sees its own images
    looped, _ = periodic_radius_graph(pos, 3.0, cell, loop=True)
    assert looped.shape[1] == edge_index.shape[1] + len(pos)


def test_without_periodic_directions_it_is_the_open_graph():
    pos = torch.randn(20, 3)
    edge_index, shift = periodic_radius_graph(pos, 1.5, torch.zeros(3, 3), pbc=False)
    assert torch.equal(edge_index, radius_graph(pos, 1.5))
    assert not shift.any()


def test_one_cell_for_each_structure():
    pos, batch = torch.rand(8, 3), torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    cells = torch.stack([torch.eye(3), 1.3 * torch.eye(3)])
    edge_index, shift = periodic_radius_graph(pos, 0.9, cells, batch=batch)
    for label in (0, 1):
        rows = (batch == label).nonzero().squeeze(1)
        alone, alone_shift = periodic_radius_graph(pos[rows], 0.9, cells[label])
        chosen = batch[edge_index[1]] == label
        assert torch.equal(edge_index[:, chosen], rows[alone])
        assert torch.equal(shift[chosen], alone_shift)
    same, _ = periodic_radius_graph(pos, 0.9, cells[0], batch=batch)
    assert torch.equal(same[:, batch[same[1]] == 0], edge_index[:, batch[edge_index[1]] == 0])


def test_no_points():
    edge_index, shift = periodic_radius_graph(torch.empty(0, 3), 1.0, torch.eye(3))
    assert (edge_index.shape, shift.shape) == ((2, 0), (0, 3))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"cell": [[1.0]]}, TypeError, r"cell: expected a floating point tensor of shape \(3, 3\) or \(B, 3, 3\)"),
        ({"cell": torch.eye(2)}, ValueError, r"cell: .* got \(2, 2\)"),
        ({"cell": torch.eye(3).int()}, TypeError, r"cell: .* got torch.int32"),
        ({"cell": torch.eye(3) / 0}, ValueError, "cell: expected finite lattice vectors"),
        ({"cell": torch.zeros(3, 3)}, ValueError, "cell: expected linearly independent .* as False in pbc"),
        ({"cell": torch.ones(3, 3)}, ValueError, "cell: expected linearly independent"),
        ({"cell": torch.eye(3), "pbc": [True, False]}, ValueError, "pbc: expected True, False, or one of them for"),
        ({"cell": torch.eye(3), "pbc": [1, 0, 1]}, ValueError, "pbc: expected"),
        ({"cell": torch.eye(3), "pbc": "xyz"}, TypeError, "pbc: expected"),
        ({"cell": None}, TypeError, "cell: expected a floating point tensor .* got NoneType"),
        ({"cell": torch.eye(3), "loop": 1}, TypeError, "loop: expected True or False, got 1"),
        ({"cell": torch.eye(3), "r": "1"}, TypeError, "r: expected a number > 0, got '1'"),
        ({"cell": torch.eye(3), "r": float("inf")}, ValueError, "r: expected a radius with fewer than"),
        ({"cell": torch.eye(3).expand(2, 3, 3)}, ValueError, "batch: expected the cell of each point"),
        ({"cell": torch.eye(3).expand(1, 3, 3), "batch": torch.tensor([0, 1])}, ValueError, "batch: .* got .0, 1"),
    ],
)
def test_wrong_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        periodic_radius_graph(torch.rand(2, 3), **{"r": 1.0, **options})


@pytest.mark.parametrize("options", [{"cell": torch.eye(3)}, {"pbc": True}, {"cell": None, "pbc": None}])
def test_the_graph_without_a_box_names_the_one_with(options):
    name = next(iter(options))
    with pytest.raises(TypeError, match=rf"{name}: expected no argument .* periodic_radius_graph\(pos, r, cell, pbc\)"):
        radius_graph(torch.rand(2, 3), 1.0, **options)


@pytest.mark.parametrize("pbc", [True, [False, True, False], torch.tensor([True, False, False])])
def test_a_structure_that_repeats_needs_a_cell(pbc):
    numbers, pos = torch.ones(2).long(), torch.rand(2, 3)
    with pytest.raises(ValueError, match="cell: expected the lattice vectors of a periodic box, got None"):
        Structures.single(numbers, pos, 1.0, pbc=pbc)
    assert not Structures.single(numbers, pos, 9.0, pbc=[False] * 3).shift.any()
