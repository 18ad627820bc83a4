"""Layers block by block: the same edges and, to rounding, the same results as on the whole cloud."""

import numpy as np
import pytest
import torch
from helpers import relative

from bench import blocks as benchmark
from implicit_steer import Graph, radius_graph
from implicit_steer.layers import values
from implicit_steer.layers.blocks import convolve_in_blocks, node_regions
from implicit_steer.testing.cases import SMALL

RADIUS = 0.35


def cloud(n, dim=3, seed=0):
    """Points in a cube, a third of them in a corner: blocks of unequal extent."""
    generator = torch.Generator().manual_seed(seed)
    pos = torch.rand(n, dim, generator=generator, dtype=torch.float64)
    pos[: n // 3] *= 0.3
    return pos


@pytest.mark.parametrize(("n", "size"), [(1, 1), (2, 1), (97, 10), (300, 37), (300, 300), (301, 1000)])
def test_every_edge_once(n, size):
    pos = cloud(n)
    owned, edges = [], []
    for region in node_regions(pos, RADIUS, size):
        assert len(region.own) <= size
        assert torch.equal(region.own, region.own.sort().values)
        assert torch.equal(region.nodes[: len(region.own)], region.own)
        assert torch.equal(region.pos, pos[region.nodes])
        source, target = region.graph.edge_index
        ends = torch.stack([region.nodes[source], region.own[target]])
        assert torch.equal(region.edge_delta, pos[ends[1]] - pos[ends[0]])
        owned.append(region.own)
        edges.append(ends)
    assert torch.equal(torch.cat(owned).sort().values, torch.arange(n))
    found, expected = torch.cat(edges, 1), radius_graph(pos, RADIUS)
    assert found.shape == expected.shape
    assert {*map(tuple, found.T.tolist())} == {*map(tuple, expected.T.tolist())}


def test_edges_across_a_cut_of_exactly_the_radius():
    line = torch.arange(64, dtype=torch.float32)[:, None]
    edges = sum(region.graph.num_edges for region in node_regions(line, 1.0, 8))
    assert edges == 2 * 63


def test_points_on_top_of_each_other():
    regions = list(node_regions(torch.zeros(10, 3), 0.1, 3))
    assert sum(len(region.own) for region in regions) == 10
    assert sum(region.graph.num_edges for region in regions) == 90


def test_no_points():
    assert list(node_regions(torch.zeros(0, 3), 0.1, 3)) == []


@pytest.mark.parametrize("name", ["o3", "o3-no-attr"])
def test_blockwise_is_the_whole(name, tmp_path):
    conv = SMALL[name].layer().double().eval()
    pos = cloud(200)
    x = torch.randn(200, conv.in_type.size, dtype=torch.float64)
    edges = radius_graph(pos, RADIUS)
    has_attributes = conv.edge_attr_type is not None

    def attributes(delta):
        return delta.norm(dim=1, keepdim=True).expand(-1, conv.edge_attr_type.size) if has_attributes else None

    delta = pos[edges[1]] - pos[edges[0]]
    with torch.no_grad():
        whole = values(conv(conv.in_type(x, pos), Graph(edges, 200), delta, attributes(delta)))
    of_region = (lambda region: attributes(region.edge_delta)) if has_attributes else None
    found = convolve_in_blocks(conv, x, pos, RADIUS, 23, edge_attr=of_region)
    assert relative(found, whole) < 1e-14  # measured: 2e-16
    files = [
        np.lib.format.open_memmap(tmp_path / f"{k}.npy", "w+", "float64", t.shape) for k, t in enumerate((x, whole))
    ]
    files[0][:] = x
    assert convolve_in_blocks(conv, files[0], pos, RADIUS, 50, edge_attr=of_region, out=files[1]) is files[1]
    assert relative(torch.from_numpy(files[1]), whole) < 1e-14


def test_benchmark_measures_what_it_has_checked(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "GATE_POINTS", 400)
    monkeypatch.setattr(benchmark, "GATE_BLOCK", 50)
    arguments = ["--points", "1000", "--size", "300", "--threads", str(torch.get_num_threads())]
    assert benchmark.main(arguments) == 0
    printed = capsys.readouterr().out
    pos, radius = benchmark.cloud(1000)
    assert f"1,000 points, {radius_graph(pos, radius).shape[1]:,} edges, blocks of 300" in printed
    assert "features on disk 0 MB" in printed
    monkeypatch.setattr(benchmark, "difference", lambda conv: 1e-3)
    assert benchmark.main(arguments) == 1
    assert "edges" not in capsys.readouterr().out


def test_messages():
    pos = cloud(5)
    conv = SMALL["o3-no-attr"].layer().double()
    x = torch.zeros(5, conv.in_type.size, dtype=torch.float64)
    wrong = {
        r"conv: expected a layer in evaluation mode": lambda: convolve_in_blocks(conv.train(), x, pos, 1.0, 2),
        r"x: expected 5 rows": lambda: convolve_in_blocks(conv.eval(), x[:4], pos, 1.0, 2),
        r"out: expected another array than x": lambda: convolve_in_blocks(conv.eval(), x, pos, 1.0, 2, out=x),
        r"out: expected 5 rows": lambda: convolve_in_blocks(conv.eval(), x, pos, 1.0, 2, out=x[:3]),
        r"radius: expected a number > 0": lambda: list(node_regions(pos, 0.0, 2)),
        r"size: expected an integer >= 1": lambda: list(node_regions(pos, 1.0, 0)),
        r"pos: expected finite positions": lambda: list(node_regions(pos / 0, 1.0, 2)),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"pos: expected a floating point tensor"):
        list(node_regions(pos.long(), 1.0, 2))
