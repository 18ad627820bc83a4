"""Random field types, groups, graphs and samplings: backends agree, the layer is equivariant, edges have no order."""

import copy

import numpy as np
import torch
from helpers import assert_close, layer, outcome, with_edges
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from implicit_steer import Graph
from implicit_steer.testing.cases import Case, Problem

bounded = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# Fields each space can have; a few of each, so that escnn's bases are computed once for many examples.
FIELDS = {space: ["scalar", "vector", "scalar+vector"] for space in ("O(3)", "SO(3)", "SO(2) on R3", "SO(2) on R2")}
FIELDS |= {"O(2) on R2": ["scalar", "scalar+vector"], "trivial on R3": ["scalar", "vector"]}
FIELDS |= {space: ["scalar", "vector", "regular"] for space in ("C4 on R2", "mirror on R3")}
FIELDS |= {"D4 on R2": ["scalar", "vector"]}
SPHERE = ("O(3)", "SO(3)")


@st.composite
def types(draw, space, most=3):
    """A field type by its text: one to ``most`` entries of one to three fields."""
    entries = draw(st.lists(st.sampled_from(FIELDS[space]), min_size=1, max_size=most))
    return ", ".join(f"{draw(st.integers(1, 3))} {name}" for name in entries)


@st.composite
def layers(draw, exact=False):
    """A float64 layer; ``exact``: equivariant under the whole group."""
    space = draw(st.sampled_from(sorted(FIELDS)))
    attributes = draw(st.none() | types(space, 2))
    samplings = ["auto"] if exact else ["auto", "escnn"]
    if space in SPHERE:
        if exact and attributes is not None:
            attributes = "2 scalar"
        if attributes is None or "vector" not in attributes:
            samplings.append("exact-9")
        if not exact:
            samplings.append("lebedev-50")
    case = Case("random", space, draw(types(space)), draw(types(space)), attributes, draw(st.integers(1, 3)), 2)
    options = {
        "sampling": draw(st.sampled_from(samplings)),
        "aggr": draw(st.sampled_from(["sum", "mean"])),
        "cutoff": draw(st.sampled_from([None, 2.0])),
        "activation": draw(st.sampled_from(["elu", "silu"])),
    }
    if case.n_layers == 1:
        options["sampling"] = "auto"
    configuration = draw(st.sampled_from(["train", "eval", "no norm"]))
    return layer(case, configuration, seed=draw(st.integers(0, 5)), **options)


@st.composite
def graphs(draw, bipartite=False):
    """Empty, with isolated nodes, repeated edges, self-loops, in any order."""
    num_src = draw(st.integers(1, 9))
    num_dst = draw(st.integers(1, 9)) if bipartite else num_src
    num_edges = draw(st.sampled_from([0, 2, 3, 17, 40]))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    rows = [generator.integers(draw(st.integers(1, n)), size=num_edges) for n in (num_src, num_dst)]
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return Graph(torch.tensor(np.stack(rows)).to(dtype), (num_src, num_dst))


def problem_on(conv, graph, seed):
    """Random inputs; every fourth edge has length 0 where it leads a node to itself."""
    generator = torch.Generator().manual_seed(seed)
    frame = conv.implicit_kernel.plan.frame

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    delta = normal(graph.num_edges, frame.dim)
    if frame.regular or frame.kind == "none":
        delta[::4][graph.src[::4] == graph.dst[::4]] = 0
    attributes = normal(graph.num_edges, frame.n_attributes) if frame.n_attributes else None
    x, pos = normal(graph.num_src, conv.in_type.size), normal(graph.num_src, frame.dim)
    return Problem(x, pos, graph, delta, attributes)


def run(problem, conv):
    x = (conv.in_type(problem.x, problem.pos), problem.graph.num_dst)
    return conv(x, problem.graph, problem.delta, problem.attributes).tensor


@bounded
@given(layers(), graphs(bipartite=True), st.integers(0, 100))
def test_backends_agree(conv, graph, seed):
    problem = problem_on(conv, graph, seed)
    expected = outcome(conv, problem, "reference", run)
    for backend in ("eager", "cpu"):
        assert_close(outcome(conv, problem, backend, run), expected, 1e-10)


@bounded
@given(layers(exact=True), graphs(), st.integers(0, 100))
def test_equivariant_under_any_element(conv, graph, seed):
    problem = problem_on(conv, graph, seed)
    np.random.seed(seed)
    element = conv.in_type.fibergroup.sample()
    kinds = (conv.in_type, conv.out_type, conv.edge_attr_type)
    into, out, attr = (None if t is None else torch.tensor(t.representation(element)).double() for t in kinds)
    space = torch.tensor(conv.in_type.gspace.basespace_action(element)).double()
    turned = copy.copy(problem)
    turned.x, turned.delta, turned.pos = problem.x @ into.T, problem.delta @ space.T, problem.pos @ space.T
    if attr is not None:
        turned.attributes = problem.attributes @ attr.T
    expected = run(problem, conv) @ out.T
    assert (run(turned, conv) - expected).norm() <= 1e-10 * max(1.0, float(expected.detach().norm()))


@bounded
@given(layers(), graphs(), st.integers(0, 100), st.randoms(use_true_random=False))
def test_edges_have_no_order(conv, graph, seed, random):
    problem, permutation = problem_on(conv, graph, seed), list(range(graph.num_edges))
    random.shuffle(permutation)
    permutation = torch.tensor(permutation, dtype=torch.long)
    expected, permuted = outcome(conv, problem), outcome(conv, with_edges(problem, permutation))
    for key in ("grad delta", "grad attributes"):
        if key in expected:
            expected[key] = expected[key][permutation]
    assert_close(permuted, expected, 1e-10)


@bounded
@given(layers(), graphs(), graphs(), st.integers(0, 100))
def test_a_batch_of_two_graphs_is_each_alone(conv, first, second, seed):
    conv.eval()
    alone = [problem_on(conv, graph, seed + n) for n, graph in enumerate((first, second))]
    edges = [g.edge_index.long() + shift for g, shift in ((first, 0), (second, first.num_src))]
    joined = {
        name: torch.cat([getattr(p, name) for p in alone])
        for name in ("x", "pos", "delta", "attributes")
        if getattr(alone[0], name) is not None
    }
    graph = Graph(torch.cat(edges, 1), first.num_src + second.num_src)
    together = Problem(graph=graph, **{"attributes": None} | joined)
    expected = torch.cat([run(p, conv) for p in alone])
    assert (run(together, conv) - expected).norm() <= 1e-10 * max(1.0, float(expected.detach().norm()))
