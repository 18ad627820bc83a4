"""Modules on irreps as citizens of PyTorch: compiled, exported, on "meta", copied, transformed."""

import copy
import pickle

import pytest
import torch

import implicit_steer as ist
from implicit_steer.irreps import Gate, ImplicitPointConv, InteractionBlock, Linear, Norm, TensorSquare

EDGES = torch.tensor([[0, 1, 2, 3], [1, 2, 0, 0]])


def block(depthwise=True):
    torch.manual_seed(0)
    return InteractionBlock("2x0e+2x1o", "3x0e+2x1o", depthwise=depthwise)


def inputs(nodes=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(nodes, 8, generator=generator), EDGES, torch.randn(4, 3, generator=generator) / 2


@pytest.mark.parametrize("depthwise", [False, True])
def test_compiled_without_a_break(depthwise):
    module, (x, edges, vectors) = block(depthwise), inputs()
    compiled, graph = torch.compile(module, fullgraph=True, backend="aot_eager"), ist.Graph(edges, 4)
    leaves = [t.requires_grad_() for t in (x, vectors)]
    found, expected = compiled(x, graph, vectors), module(x, graph, vectors)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_exported():
    module, given = block(), inputs()
    program = torch.export.export(module, given)
    torch.testing.assert_close(program.module()(*given), module(*given), rtol=1e-6, atol=1e-6)


def test_exported_for_every_size():
    module = torch.nn.Sequential(Linear("2x0e+2x1o", "3x0e+2x1o"), Norm("3x0e+2x1o"))
    sizes = ({0: torch.export.Dim("nodes", min=2)},)
    program = torch.export.export(module, (inputs()[0],), dynamic_shapes=sizes)
    x = inputs(nodes=7)[0]
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-6, atol=1e-6)


def test_built_on_meta():
    with torch.device("meta"):
        empty = [block(), Linear("2x0e", "2x0e"), Gate("2x0e"), Norm("2x0e"), ImplicitPointConv("2x0e", "2x0e")]
    assert all(p.is_meta for module in empty for p in module.parameters())
    real = block()
    empty[0].load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(empty[0](*inputs()), real(*inputs()))


def test_a_plan_that_was_first_built_on_meta():
    """What is kept for all layers of a plan holds numbers."""
    options = {"n_channels": 3, "n_layers": 2, "norm": "batch"}  # of no other test
    with torch.device("meta"):
        ImplicitPointConv("2x0e+2x1o", "2x0e+2x1o", **options)
    real = ImplicitPointConv("2x0e+2x1o", "2x0e+2x1o", **options).eval()
    eager = ImplicitPointConv("2x0e+2x1o", "2x0e+2x1o", **options, backend="eager").eval()
    eager.load_state_dict(real.state_dict())
    torch.testing.assert_close(real(*inputs()), eager(*inputs()), rtol=1e-5, atol=1e-6)


def test_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        module = block()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float64}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(copied):
    module = block()
    assert torch.equal(copied(module)(*inputs()), module(*inputs()))


def test_loading_draws_no_random_numbers(tmp_path):
    ist.save(block(), tmp_path / "block.safetensors")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    ist.load(tmp_path / "block.safetensors")
    assert torch.equal(torch.rand(1), expected)


def test_functional_derivatives():
    module, (x, edges, vectors) = ImplicitPointConv("2x0e+2x1o", "1x1o", depthwise=True, backend="eager"), inputs()
    forward, backward = (of(lambda x: module(x, edges, vectors))(x) for of in (torch.func.jacfwd, torch.func.jacrev))
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-6)
    assert forward.shape == (4, 3, 4, 8)


@pytest.mark.parametrize(
    "module",
    [Linear("2x0e", "2x0e"), Gate("2x0e"), Norm("2x0e"), TensorSquare("2x0e", "2x0e"), block()],
    ids=lambda m: type(m).__name__,
)
def test_torchscript_is_refused(module):
    with pytest.raises(RuntimeError, match="another way than TorchScript"):
        torch.jit.script(module)
