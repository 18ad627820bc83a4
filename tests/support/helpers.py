"""What several test files share: a layer's output with all its gradients, how results are compared, an oracle."""

import copy
from contextlib import contextmanager

import torch
from escnn.nn import GeometricTensor

from implicit_steer import Graph, _native
from implicit_steer.ops.native.instruction_set import INSTRUCTION_SETS
from implicit_steer.testing.cases import SMALL

BACKENDS = ["reference", "eager", "cpu"]
CONFIGURATIONS = ["train", "eval", "no norm"]
# Where "auto" is the authors' grid, or the whole group as theirs is.
_ONE_SAMPLING = [
    "o3-vector-attr",
    "o3-linear",
    "mirror-r3",
    "inversion-r3",
    "trivial-r3",
    "c4",
    "d4",
    "d3-r3",
    "octa-r3",
]
SAMPLED = [(name, "auto") for name in SMALL] + [(name, "escnn") for name in SMALL if name not in _ONE_SAMPLING]


def layer(case, configuration="eval", dtype=torch.float64, **options):
    """The case's layer in one of CONFIGURATIONS, its running statistics moved off their initial values."""
    conv = case.layer(norm=None if configuration == "no norm" else "batch", **options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for norm in conv.implicit_kernel.mlp.norms:
        for name, buffer in norm.named_buffers():
            if name.endswith("_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            if name.endswith("_mean"):
                trivial = [n for n, row in enumerate(getattr(norm, name.replace("running_mean", "avg"))) if row.any()]
                buffer[:, trivial] = 0.3 * torch.randn(len(buffer), len(trivial), generator=generator).to(buffer)
    return conv.train(configuration == "train")


def machine_sets():
    """The instruction sets that this build and this machine have."""
    info = _native.build_info()
    if info is None:
        return []
    built = info.build_facts()["instruction_sets"].split()
    widest = {"baseline": 1, "AVX2": 2, "AVX-512": 3}[info.cpu_instruction_set()]
    return [name for name in built if INSTRUCTION_SETS[name] <= widest]


@contextmanager
def unchanged(conv):
    """Whatever happens to the layer's parameters, buffers and backend is undone."""
    backend, tensors = conv.backend, [*conv.parameters(), *conv.buffers()]
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        conv.backend = backend
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def spread(out):
    """-1 to 1."""
    return torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)


def outcome(conv, problem, backend=None, run=lambda problem, conv: problem.run(conv), weight=spread):
    """Name → output, gradients with respect to every input and parameter, and buffers after the call. The gradients are
    those of Σ weight(out) out, the weight being a constant.

    Neither ``conv`` nor ``problem`` is changed.
    """
    problem = copy.copy(problem)
    inputs = problem.requires_grad()
    leaves = dict(zip(("x", "delta", "attributes"), inputs, strict=False)) | dict(conv.named_parameters())
    with unchanged(conv):
        conv.backend = backend or conv.backend
        out = run(problem, conv)
        loss = (out * weight(out.detach())).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        result = {"out": out.detach()}
        result |= {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
        return result | {f"buffer {name}": b.clone() for name, b in conv.named_buffers()}


def deviations(actual, expected):
    """Name → ‖actual − expected‖ / ‖expected‖.

    The scale of a gradient is at least 1e-2 of the largest one's, since some vanish by construction (a bias just before
    batch statistics) or by chance (the one number of the shell's width).
    """
    assert actual.keys() == expected.keys()
    floor = 1e-2 * max((float(v.norm()) for k, v in expected.items() if k.startswith("grad")), default=0.0)
    result = {}
    for name, e in expected.items():
        assert actual[name].shape == e.shape, name
        assert actual[name].dtype == e.dtype, name
        scale = max(float(e.double().norm()), floor if name.startswith("grad") else 0.0, 1e-30)
        result[name] = float((actual[name].to(e.device).double() - e.double()).norm()) / scale
    return result


def assert_close(actual, expected, bound):
    """Every entry of two outcomes within ``bound``, relative."""
    wrong = {name: value for name, value in deviations(actual, expected).items() if not value <= bound}
    assert not wrong


def relative(actual, expected):
    """‖actual − expected‖ / ‖expected‖."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def function_of(conv):
    """The layer as a function of :func:`arguments_of` a problem, for compilers: of plain tensors and a graph."""

    def run(x, pos, graph, delta, attributes):
        return conv(GeometricTensor(x, conv.in_type, pos), graph, delta, attributes).tensor

    return run


def arguments_of(problem):
    """What :func:`function_of` takes."""
    return problem.x, problem.pos, problem.graph, problem.delta, problem.attributes


def random_edges(num_edges, num_src, num_dst, seed=0, dtype=torch.int64):
    """(2, E) random edges."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(n, (num_edges,), generator=generator) for n in (num_src, num_dst)]).to(dtype)


def with_edges(problem, chosen):
    """The problem with only (or in another order) the edges ``chosen``."""
    edges = problem.graph.edge_index[:, chosen]
    attributes = None if problem.attributes is None else problem.attributes[chosen]
    graph = Graph(edges, (problem.graph.num_src, problem.graph.num_dst))
    return type(problem)(problem.x, problem.pos, graph, problem.delta[chosen], attributes)


def escnn_kernel(conv, delta, attributes):
    """K (E, C_out, C_in) as the authors compute it: escnn's modules one after the other, then shell and scale.

    Updates the running statistics in training mode, as they do.
    """
    kernel = conv.implicit_kernel
    points = delta if attributes is None else torch.cat([delta, attributes], 1)
    values = kernel.mlp.mlp(GeometricTensor(points, kernel.mlp.in_type)).tensor
    rows, start = [], 0
    for out in conv.out_type.representations:
        row = []
        for into in conv.in_type.representations:
            size = out.size * into.size
            row.append(values[:, start : start + size].view(-1, out.size, into.size))
            start += size
        rows.append(torch.cat(row, 2))
    shell = torch.exp(-0.5 * (delta.norm(dim=1) / kernel.shell_width.reshape(())) ** 2)
    return torch.cat(rows, 1) * (shell / len(conv.out_type) ** 0.5)[:, None, None]


def escnn_forward(conv, problem):
    """The layer's output from :func:`escnn_kernel`, edge by edge."""
    k = escnn_kernel(conv, problem.delta, problem.attributes)
    messages = torch.einsum("eoi,ei->eo", k, problem.x[problem.graph.src.long()])
    out = torch.zeros(problem.graph.num_dst, k.shape[1], dtype=k.dtype)
    for edge, node in enumerate(problem.graph.dst.tolist()):
        out[node] += messages[edge]
    return out if conv.bias is None else out + conv.bias_expansion @ conv.bias
