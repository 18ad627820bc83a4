"""The modules between irreps: equivariance, backends against the reference, derivatives, first weights, files."""

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from e3nn import o3
from helpers import machine_sets
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import implicit_steer as ist
from implicit_steer.irreps import Gate, ImplicitPointConv, InteractionBlock, Irreps, Linear, Norm
from implicit_steer.ops.kernel_mlp import NEAR
from implicit_steer.plan.packing import dense_kernel, pack

O3, SO3 = "3x0e+1x0o+2x1o+1x1e+2x2e+1x3o", "3x0+2x1+1x2+1x3"
FORMS = [False, True]  # depthwise


def cloud(nodes=24, attributes=0, dtype=torch.float64, seed=0):
    """Positions (N, 3), edges with self-loops and an isolated node, and attributes."""
    generator = torch.Generator().manual_seed(seed)
    pos = torch.randn(nodes, 3, dtype=dtype, generator=generator)
    edges = ist.knn_graph(pos[1:], k=5, loop=True) + 1
    return pos, edges, torch.randn(edges.shape[1], attributes, dtype=dtype, generator=generator)


def conv_of(irreps_in, irreps_out, attributes=1, dtype=torch.float64, **options):
    """A layer whose biases are not 0."""
    conv = ImplicitPointConv(irreps_in, irreps_out, attributes, width=1.0, **options).to(dtype)
    for name, parameter in conv.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return conv


def evaluate(conv, x, pos, edges, attributes, **more):
    """The layer on the edge vectors, target − source."""
    return conv(x, edges, pos[edges[1]] - pos[edges[0]], attributes if attributes.shape[1] else None, **more)


class Network(torch.nn.Module):
    """Four blocks."""

    def __init__(self, hidden, depthwise):
        super().__init__()
        scalar = "4x0e" if "e" in hidden else "4x0"
        irreps = [scalar, hidden, hidden, hidden, hidden]
        settings = {"node_attr": 2, "degree": 6, "width": 1.0, "cutoff": 4.0, "n_channels": 4, "depthwise": depthwise}
        self.blocks = torch.nn.ModuleList(InteractionBlock(a, b, 1, **settings) for a, b in pairwise(irreps))

    def forward(self, x, edges, vectors, attributes, node_attr):
        """Node features."""
        for block in self.blocks:
            x = block(x, edges, vectors, attributes, node_attr)
        return x


def representation(irreps, matrix):
    """D(g) of a rotation or rotoreflection: from how the harmonics, which e3nn's are, transform."""
    rotation, blocks = matrix * matrix.det().sign(), []
    points = torch.nn.functional.normalize(torch.randn(60, 3, dtype=torch.float64), dim=1)
    for multiplicity, irrep in irreps:
        before, after = (
            o3.spherical_harmonics(irrep.degree, p, normalize=True, normalization="norm")
            for p in (points, points @ rotation.T)
        )
        block = torch.linalg.lstsq(before, after).solution.T
        blocks += [block * (irrep.parity if matrix.det() < 0 else 1)] * multiplicity
    return torch.block_diag(*blocks)


def random_elements(irreps, count=20):
    """Rotations, and where irreps have parities every other one times the inversion."""
    torch.manual_seed(1)
    signs = [-1 if irreps.has_parity and n % 2 else 1 for n in range(count)]
    return [sign * torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] for sign in signs]


def proper(matrix, irreps):
    """The matrix, or for SO(3) the rotation that ± it is."""
    return matrix if irreps.has_parity else matrix * matrix.det().sign()


# Measured: float64 layer 3e-15, network 4e-15; float32 layer 1e-6, network 2e-6.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("depthwise", FORMS)
@pytest.mark.parametrize("text", [O3, SO3])
def test_layer_and_network_are_equivariant(text, depthwise, dtype, tolerance):
    torch.manual_seed(0)
    irreps, (pos, edges, attributes) = Irreps.of(text), cloud(attributes=1, dtype=dtype)
    conv, network = conv_of(text, text, dtype=dtype, depthwise=depthwise), Network(text, depthwise).to(dtype)
    x, scalars = torch.randn(len(pos), irreps.size, dtype=dtype), torch.randn(len(pos), 4, dtype=dtype)
    kinds = torch.rand(len(pos), 2, dtype=dtype)
    with torch.no_grad():
        vectors = pos[edges[1]] - pos[edges[0]]
        before, deep = conv(x, edges, vectors, attributes), network(scalars, edges, vectors, attributes, kinds)
        order = torch.randperm(edges.shape[1])
        for matrix in (proper(m, irreps) for m in random_elements(irreps)):
            on_features = representation(irreps, matrix)

            def turned(tensor, by):  # rounded once
                return (tensor.double() @ by.T).to(dtype)

            geometry = edges[:, order], turned(vectors, matrix)[order], attributes[order]
            after = conv(turned(x, on_features), *geometry)
            assert (after - turned(before, on_features)).norm() <= tolerance * before.norm()
            after = network(scalars, *geometry, kinds)
            assert (after - turned(deep, on_features)).norm() <= tolerance * deep.norm()


@pytest.mark.parametrize("text", [O3, SO3])
def test_linear_gate_and_norm_are_equivariant(text):
    torch.manual_seed(0)
    irreps, gate = Irreps.of(text), Gate(text)
    linear, norm = Linear(irreps, gate.irreps_in).double(), Norm(irreps).double()
    x = torch.randn(10, irreps.size, dtype=torch.float64)
    with torch.no_grad():
        before = norm(gate(linear(x)))
        for matrix in (proper(m, irreps) for m in random_elements(irreps)):
            on_features = representation(irreps, matrix)
            after = norm(gate(linear(x @ on_features.T)))
            torch.testing.assert_close(after, before @ on_features.T, rtol=0, atol=1e-12)


def test_nodes_in_another_order():
    pos, edges, attributes = cloud(attributes=1)
    conv = conv_of(O3, O3)
    x, order = torch.randn(len(pos), conv.irreps_in.size, dtype=pos.dtype), torch.randperm(len(pos))
    place = torch.argsort(order)  # where each node goes
    expected = evaluate(conv, x, pos, edges, attributes)[order]
    found = evaluate(conv, x[order], pos[order], place[edges], attributes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def gradients(conv, backend, inputs, edges):
    """Output, first and second derivatives in features, edge vectors, attributes and every parameter."""
    conv.backend = backend
    leaves = [t.clone().requires_grad_() for t in inputs]
    tensors, generator = [*leaves, *conv.parameters()], torch.Generator().manual_seed(2)
    out = conv(leaves[0], edges, leaves[1], leaves[2] if leaves[2].shape[1] else None)
    seed = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    zeros = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad((out * seed).sum(), tensors, create_graph=True, **zeros)
    mixed = sum((g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in first)
    return [out, *first, *torch.autograd.grad(mixed, tensors, **zeros)]


def reaches(irreps_in, irreps_out, layers):
    """Whether a kernel can connect them: of one layer by degrees 0 and 1, of more by all."""
    terms = [(a.irrep, b.irrep) for a in Irreps.of(irreps_in) for b in Irreps.of(irreps_out)]
    degrees = [0, 1] if layers == 1 else range(7)
    return any(
        abs(a.degree - b.degree) <= n <= a.degree + b.degree and b.parity == a.parity * (-1) ** n
        for a, b in terms
        for n in degrees
    )


def irreps_strategy(parities):
    term = st.builds("{}x{}{}".format, st.integers(1, 9), st.integers(0, 3), st.sampled_from(parities))
    return st.lists(term, min_size=1, max_size=4).map("+".join)


@pytest.mark.parametrize("depthwise", FORMS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_backends_agree(depthwise, data):
    """On random irreps: values and all derivatives; and what was saved is what is loaded."""
    parities = data.draw(st.sampled_from([["e", "o"], [""]]))
    irreps_in, irreps_out = (data.draw(irreps_strategy(parities)) for _ in range(2))
    attributes, layers = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3))
    options = {"n_layers": layers, "n_channels": data.draw(st.integers(1, 5)), "depthwise": depthwise}
    options |= {"cutoff": data.draw(st.sampled_from([None, 3.0])), "aggr": data.draw(st.sampled_from(["sum", "mean"]))}
    options |= {"norm": data.draw(st.sampled_from([None, "batch"])), "bias": data.draw(st.booleans())}
    assume(reaches(irreps_in, irreps_out, layers))
    conv = conv_of(irreps_in, irreps_out, attributes, **options)
    pos, edges, given_attributes = cloud(12, attributes)
    vectors = pos[edges[1]] - pos[edges[0]]
    vectors = torch.where(vectors.norm(dim=1, keepdim=True) > 0, vectors, 1e-3)  # exact second derivatives
    inputs = torch.randn(len(pos), conv.irreps_in.size, dtype=pos.dtype), vectors, given_attributes
    expected = gradients(conv, "reference", inputs, edges)
    for backend in ("eager", "cpu"):
        for ours, theirs in zip(gradients(conv, backend, inputs, edges), expected, strict=True):
            assert (ours - theirs).norm() <= 1e-9 * (1 + theirs.norm())  # measured: 5e-12
    assert_same_after_loading(conv.eval(), inputs, edges)


def assert_same_after_loading(conv, inputs, edges):
    with tempfile.TemporaryDirectory() as folder:
        ist.save(conv, Path(folder) / "conv.safetensors")
        loaded = ist.load(Path(folder) / "conv.safetensors")
    assert type(loaded) is ImplicitPointConv
    x, vectors, attributes = inputs
    attributes = attributes if attributes.shape[1] else None
    assert torch.equal(loaded(x, edges, vectors, attributes), conv(x, edges, vectors, attributes))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("depthwise", FORMS)
def test_gradcheck_and_gradgradcheck(depthwise, backend):
    conv = conv_of("2x0e+1x1o", "1x0e+1x1o+1x2e", n_channels=2, depthwise=depthwise, backend=backend, cutoff=4.0)
    pos, edges, attributes = cloud(4, 1)
    keep = edges[0] != edges[1]  # at radius 0 derivatives are those of a softened length, right to 1e-9
    edges, attributes = edges[:, keep], attributes[keep]
    names, parameters = zip(*conv.named_parameters(), strict=True)
    inputs = torch.randn(len(pos), 5, dtype=pos.dtype), pos[edges[1]] - pos[edges[0]], attributes, *parameters
    inputs = [t.detach().clone().requires_grad_() for t in inputs]

    def run(x, vectors, attributes, *parameters):
        given_ = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(conv, given_, (x, edges, vectors, attributes))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("isa", machine_sets())
@pytest.mark.parametrize("depthwise", FORMS)
def test_wide_layers(depthwise, isa, use_isa):
    """More nodes wait for θ together on cpu, where θ is large: 77 nodes are whole and partial rounds of them.
    Some nodes have edges near the origin, which are gone through last."""
    use_isa(isa)
    conv = conv_of("64x0e+65x1o", "66x0e+64x1o", n_layers=2, depthwise=depthwise)
    pos, edges, attributes = cloud(77, 1)
    keep = edges[0] != edges[1]
    edges, attributes = edges[:, keep], attributes[keep]
    vectors = pos[edges[1]] - pos[edges[0]]
    vectors[(edges[1] % 2 == 0) & (edges[0] % 7 == 0)] *= 1e-3
    assert (vectors.norm(dim=1) < NEAR[vectors.dtype]).sum() > 20
    inputs = torch.randn(77, conv.irreps_in.size, dtype=pos.dtype), vectors, attributes
    found, expected = (gradients(conv, backend, inputs, edges) for backend in ("cpu", "eager"))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-10 * (1 + theirs.norm())  # measured: 2e-13


def test_a_depthwise_kernel_does_not_mix_channels():
    """Copy u of every path's output reads copy u of one irrep of the input."""
    torch.manual_seed(0)
    irreps, middle = "5x0e+5x1o", "5x0e+5x1o+5x0e+5x1o+5x1o"
    narrow = conv_of(irreps, "5x0e+5x1o", depthwise=True, bias=False)
    assert sorted(str(narrow.linear.irreps_in).split("+")) == sorted(middle.split("+"))
    kernel = narrow.implicit_kernel
    weights = pack(kernel.plan, kernel.parameters_for_op(), fold=False)
    dense = dense_kernel(kernel.plan, weights).abs().sum(2)  # (C_out, C_in): which channels meet
    fields_in = torch.arange(20).clamp(max=4) + (torch.arange(20) >= 5) * ((torch.arange(20) - 5) // 3 + 1)
    for start, (multiplicity, irrep) in zip(narrow.linear.irreps_in.starts, narrow.linear.irreps_in, strict=True):
        for u in range(multiplicity):
            rows = dense[start + u * irrep.size : start + (u + 1) * irrep.size]
            meets = set(fields_in[(rows.sum(0) > 0)].tolist())
            assert meets
            assert meets <= {u, 5 + u}


@pytest.mark.parametrize("depthwise", FORMS)
@pytest.mark.parametrize("attributes", [0, 3])
@pytest.mark.parametrize(("n_layers", "n_channels"), [(1, 8), (2, 32), (3, 32), (4, 48)])
@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_messages_have_unit_variance_at_first(activation, n_layers, n_channels, attributes, depthwise):
    """Component by component over 8 draws of the weights, on edges of length ``width``, leaving out the shell."""
    squares, width = [], 2.0
    irreps_out = Irreps.of("16x0e+8x1o+8x2e")
    for seed in range(8):
        torch.manual_seed(seed)
        options = {"n_layers": n_layers, "n_channels": n_channels, "activation": activation, "depthwise": depthwise}
        conv = ImplicitPointConv("8x0e+16x1o", irreps_out, attributes, width=width, **options)
        vectors = width * torch.nn.functional.normalize(torch.randn(200, 3), dim=1)
        edges, x = torch.arange(200).expand(2, -1), torch.randn(200, conv.irreps_in.size)
        given_ = torch.randn(200, attributes) if attributes else None
        with torch.no_grad():
            squares.append((conv(x, edges, vectors, given_) / torch.exp(torch.tensor(-0.5))).square().mean(0))
    mean = torch.stack(squares).mean(0)
    for (multiplicity, irrep), start in zip(irreps_out, irreps_out.starts, strict=True):
        # 8 draws of finite networks: measured 0.7 … 1.4; a variance off by a factor of 2 is out
        assert 0.55 < float(mean[start : start + multiplicity * irrep.size].mean()) < 1.75


@pytest.mark.parametrize("depthwise", FORMS)
@pytest.mark.parametrize("width", [8, 32])
def test_features_keep_their_size_from_block_to_block(width, depthwise):
    """Four blocks, edges about as long as the shell is wide: features neither vanish nor explode."""
    torch.manual_seed(0)
    hidden, sizes = f"{width}x0e+{width}x1o+{width}x2e", []
    pos = 2 * torch.rand(200, 3)
    edges = ist.knn_graph(pos, k=16)
    vectors = pos[edges[1]] - pos[edges[0]]
    options = {"width": float(vectors.norm(dim=1).mean()), "degree": 16, "n_channels": 16, "depthwise": depthwise}
    x = torch.randn(200, Irreps.of(hidden).size)
    with torch.no_grad():
        for _ in range(4):
            x = InteractionBlock(hidden, hidden, **options)(x, edges, vectors)
            sizes.append(float(x.square().mean()))
    assert 0.02 < min(sizes) < max(sizes) < 5  # measured: 0.08 … 1.2; the shell takes a third of each message


def test_linear_gate_and_norm_keep_variance_and_zero():
    torch.manual_seed(0)
    x = torch.randn(2000, 16 + 24, dtype=torch.float64)
    y = Linear("16x0e+8x1o", "64x1o+64x0e").double()(x)
    assert 0.8 < float(y.detach().square().mean()) < 1.2
    z = Norm("16x0e+8x1o").double()(3 * x + 1)
    assert abs(float(z[:, :16].detach().mean())) < 1e-12
    torch.testing.assert_close(z[:, :16].square().mean(1), torch.ones(2000).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(z[:, 16:].square().mean(1), torch.ones(2000).double(), rtol=1e-4, atol=0)
    gated = Gate("40x0e+40x1o")(torch.randn(2000, 200))
    assert 0.9 < float(gated[:, :40].square().mean()) < 1.1
    assert 0.9 < float(gated[:, 40:].square().mean()) < 1.1
    assert torch.equal(Gate("2x0e+2x1o")(torch.zeros(3, 10)), torch.zeros(3, 8))
    assert torch.isfinite(Norm("2x0e+2x1o")(torch.zeros(3, 8))).all()


def test_a_linear_kernel_is_e3nns_product_with_the_edge_vector():
    """out[u] = s(r) Σ_v θ[u, v] √(2 l_out + 1) w3j(l_in, 1, l_out) f[v] x, from e3nn's own coefficients."""
    torch.manual_seed(0)
    conv = ImplicitPointConv("2x1o+3x2e", "2x1o+1x2e", n_layers=1, bias=False, width=1.0).double()
    x, vector = torch.randn(1, 21, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64) / 3
    torch.nn.init.zeros_(conv.implicit_kernel.linears[-1].bias)
    found = conv(x, torch.zeros(2, 1, dtype=torch.int64), vector)[0]
    weights, at, shell = conv.implicit_kernel.linears[-1].weights, 0, torch.exp(-0.5 * vector.square().sum())
    fields = {1: x[0, :6].view(2, 3), 2: x[0, 6:].view(3, 5)}
    for out, l_out, others in (
        (found[:6].view(2, 3), 1, 2),
        (found[6:].view(1, 5), 2, 1),
    ):  # parity asks for l_in ≠ l_out
        theta = weights[at : at + len(out) * len(fields[others])].view(len(out), -1)
        at += theta.numel()
        tensor = (2 * l_out + 1) ** 0.5 * o3.wigner_3j(others, 1, l_out, dtype=torch.float64)
        expected = shell * torch.einsum("uv,imo,vi,m->uo", theta, tensor, fields[others], vector[0])
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert at == len(weights)


def test_errors_at_the_call():
    block = InteractionBlock("2x0e", "2x0e+2x1o", node_attr=3)
    pos, edges, _ = cloud(6, dtype=torch.float32)
    vectors = pos[edges[1]] - pos[edges[0]]
    with pytest.raises(ValueError, match=r"node_attr: expected a tensor \(N, 3\)"):
        block(torch.randn(6, 2), edges, vectors)
    with pytest.raises(ValueError, match="node_attr"):
        block(torch.randn(6, 2), edges, vectors, node_attr=torch.randn(6, 2))
    with pytest.raises(ValueError, match="node_attr: expected None"):
        InteractionBlock("2x0e", "2x0e")(torch.randn(6, 2), edges, vectors, node_attr=torch.randn(6, 2))
    conv = ImplicitPointConv("2x0e", "2x1o")
    with pytest.raises(ValueError, match="x: expected shape"):
        conv(torch.randn(6, 3), edges, vectors)
    with pytest.raises(ValueError, match="edge_attr"):
        conv(torch.randn(6, 2), edges, vectors, torch.randn(len(vectors), 1))
    for module in (Linear("2x0e", "3x0e"), Gate("2x0e"), Norm("2x0e")):
        with pytest.raises(ValueError, match="x: expected a floating point tensor"):
            module(torch.randn(6, 3))


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
@pytest.mark.parametrize("depthwise", FORMS)
def test_empty_graphs_pairs_and_half_precision(depthwise, backend):
    conv = ImplicitPointConv("2x0e+1x1o", "3x0e+1x1o", depthwise=depthwise, backend=backend)
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert conv(torch.randn(4, 5), none, torch.zeros(0, 3)).shape == (4, 6)
    assert conv(torch.randn(0, 5), none, torch.zeros(0, 3)).shape == (0, 6)
    edges, vectors = torch.tensor([[0, 1, 2], [1, 1, 0]]), torch.randn(3, 3) / 2
    assert conv((torch.randn(3, 5), 2), edges, vectors).shape == (2, 6)
    assert conv((torch.randn(3, 5), None), ist.Graph(edges, (3, 2)), vectors).shape == (2, 6)
    half = conv(torch.randn(3, 5).bfloat16(), edges, vectors)
    assert half.dtype == torch.bfloat16


def test_explain_says_what_runs():
    conv = ImplicitPointConv("2x0e+1x1o", "2x0e", depthwise=True)
    assert "channel by channel" in conv.explain()
    assert "then       Linear, 2x0e+1x0e -> 2x0e" in conv.explain()
