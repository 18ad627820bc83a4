"""Layers with tables on GPUs, against `eager`, which evaluates the same splines, in float64."""

import pytest
import torch
from helpers import relative
from problems import DEVICE, INTERPRETED

from implicit_steer import EdgeTypes, Graph, irreps, nn
from implicit_steer.ops.triton import launch_spline
from implicit_steer.testing.cases import SPACES

pytestmark = pytest.mark.gpu

N, E = (3, 8) if INTERPRETED else (70, 900)


def problem(size, dim, dtype=torch.float64, types=2):
    """Features, edges with a self-loop, and edges' vectors and types; some edges are beyond every knot."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, N, (2, E), generator=generator)
    x, delta = (torch.randn(n, k, dtype=dtype, generator=generator) for n, k in ((N, size), (E, dim)))
    delta[0], delta[1] = 0, 30 * delta[1]
    index = torch.randint(types, (E,), generator=generator)
    rows = torch.randn(types, 1, dtype=dtype, generator=generator)
    return *(t.to(DEVICE) for t in (x, delta, rows)), Graph(edges.to(DEVICE), N), index.to(DEVICE)


def zonal(**options):
    torch.manual_seed(0)
    options = {"n_layers": 2, "n_channels": 2, "width": 1.0, "edge_attr": 1, "table": 5} | options
    return irreps.ImplicitPointConv("1x0e + 1x1o", "1x0e + 1x1o", **options)


def planar(**options):
    torch.manual_seed(0)
    space = SPACES["SO(2) on R2"]()
    kind, scalar = space.type(space.trivial_repr, space.irrep(1)), space.type(space.trivial_repr)
    options = {"norm": None, "activation": "silu", "table": 5} | options
    return nn.ImplicitPointConv(kind, kind, scalar, 2, 2, **options)


def call(conv, backend, x, delta, rows, graph, index):
    conv.backend = backend
    if isinstance(conv, nn.ImplicitPointConv):
        x = conv.in_type(x, x.new_zeros(len(x), delta.shape[1]))
    out = conv(x, graph, delta, EdgeTypes(index, rows))
    return out if isinstance(out, torch.Tensor) else out.tensor


def derivatives(conv, backend, given, second):
    """The output, the gradients of everything there is (but the rows of a frozen table) and, if wanted, of those."""
    inputs, frozen = [t.clone() for t in given[:3]], conv.implicit_kernel.plan.is_frozen
    learned = [*(t.requires_grad_() for t in inputs[: 3 - frozen]), *conv.parameters()]
    out = call(conv, backend, *inputs, *given[3:])
    first = torch.autograd.grad(out.sin().sum(), learned, create_graph=second, materialize_grads=True)
    found = [out, *first, *(b.clone() for name, b in conv.named_buffers() if "running" in name)]
    if second:
        total = sum(t.square().sum() for t in first)
        found += torch.autograd.grad(total, learned, materialize_grads=True)
    return [t.detach() for t in found]


def assert_same(found, known, bound):
    scale = max(float(t.norm()) for t in known)
    for ours, theirs in zip(found, known, strict=True):
        assert relative(ours, theirs) < bound or float((ours - theirs).norm()) < 1e-2 * bound * scale


CASES = {
    "zonal, bounded": (zonal, {"cutoff": 2.0, "aggr": "mean"}, True),
    "zonal, batch norms": (zonal, {"norm": "batch"}, False),
    "zonal, depthwise": (zonal, {"depthwise": True, "radial": irreps.Distance()}, False),
    "planar": (planar, {}, True),
    "planar, batch norms": (planar, {"norm": "batch", "cutoff": 2.0}, False),
}


@pytest.mark.parametrize(("make", "options", "second"), CASES.values(), ids=CASES)
def test_eager_has_the_same_splines(make, options, second, backend):
    conv = make(**options).double().to(DEVICE)
    given = problem(conv.in_type.size if make is planar else 4, 2 if make is planar else 3)
    known, found = (derivatives(make(**options).double().to(DEVICE), b, given, second) for b in ("eager", backend))
    assert_same(found, known, 1e-11)


def test_splines_come_close_to_the_mlp(backend):
    """`reference` evaluates it for every edge."""
    conv = zonal(table=128, cutoff=2.0, activation="silu").double().to(DEVICE)
    given = problem(4, 3)
    known, found = (derivatives(conv, name, given, False) for name in ("reference", backend))
    assert_same(found, known, 1e-4)


def test_the_same_bits_twice(monkeypatch, backend):
    """In `triton` from sums in three parts, and with r two columns at a time."""
    monkeypatch.setattr(launch_spline, "_EDGES", E // 2)
    monkeypatch.setattr(launch_spline, "_COLUMNS", 2)
    known, found, again = (
        derivatives(zonal(table=6).double().to(DEVICE), name, problem(4, 3), False)
        for name in ("eager", backend, backend)
    )
    assert_same(found, known, 1e-11)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_frozen_table_in_float32(backend):
    """An edge that is NaN stays with its target, and without edges there is the bias."""
    conv, given = zonal(table=8).to(DEVICE), problem(4, 3, torch.float32)
    call(conv, "eager", *given)  # which rows there are
    conv = conv.freeze_table()
    known, found = (derivatives(conv, name, given, False) for name in ("eager", backend))
    assert_same(found, known, 1e-5)
    x, delta, rows, graph, index = given
    delta[3] = torch.nan
    hit = call(conv, backend, x, delta, rows, graph, index).isnan().any(1)
    assert hit.tolist() == [i == int(graph.dst[3]) for i in range(N)]
    empty = Graph(torch.zeros(2, 0, dtype=torch.int64, device=DEVICE), N)
    nothing = derivatives(conv, backend, (x, delta[:0], rows, empty, index[:0]), False)
    assert not nothing[0].isnan().any()
    assert all(not t.any() for t in nothing[1:3])


def test_compiled(backend):
    """Frozen: in `triton` the MLP at the knots of a table is plain PyTorch, which cannot be traced."""
    torch._dynamo.reset()
    conv, given = zonal(edge_attr=0, table=4, backend=backend).double().to(DEVICE), problem(4, 3)
    x, delta, _, graph, _ = given
    conv = conv.freeze_table()
    results = []
    for module in (conv, torch.compile(conv, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), delta.clone().requires_grad_(), *conv.parameters()]
        out = module(leaves[0], graph, leaves[1])
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True)])
    assert_same(*([t.detach() for t in found] for found in results), 1e-12)
