"""Fourier activations of node features: the native operators against plain PyTorch."""

import pytest
import torch
from escnn.nn import GeometricTensor
from helpers import machine_sets, relative

from implicit_steer.nn import FourierActivation
from implicit_steer.ops import fourier as module
from implicit_steer.ops.fourier import fourier
from implicit_steer.plan import FUNCTIONS
from implicit_steer.testing.cases import SPACES

ops = torch.ops.implicit_steer
BOUND = {torch.float32: 2e-6, torch.float64: 1e-14}  # relative; sums of up to 30 terms


def matrices(samples, d, dtype=torch.float64):
    """A and the transposed A⁻ (samples, d), not each other's inverse."""
    return tuple(torch.randn(samples, d, dtype=dtype) for _ in range(2))


def plain(function, x, *matrices):
    return module._plain(function, x, *matrices)


def gradient(run, x, weight):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(run(x), x, weight)[0]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("shape", "samples"),
    [
        ((0, 8), 3),
        ((1, 4), 30),
        ((37, 12), 30),
        ((5, 4, 0), 6),
        ((3, 8, 7), 6),
        ((2, 4, 3, 5), 11),
        ((2, 4, 2, 3, 3), 1),
    ],
)
@pytest.mark.parametrize("isa", machine_sets())
def test_native_is_plain(function, shape, samples, dtype, isa, use_isa):
    use_isa(isa)
    constants = matrices(samples, 4, dtype)
    x, weight = torch.randn(2, *shape, dtype=dtype)
    runs = [lambda x, f=f: f(function, x, *constants) for f in (fourier, plain)]
    out, expected = (run(x) for run in runs)
    assert out.shape == shape
    assert relative(out, expected) <= BOUND[dtype] or not out.numel()
    grad, expected = (gradient(run, x, weight) for run in runs)
    assert grad.shape == shape
    assert relative(grad, expected) <= 2 * BOUND[dtype] or not out.numel()


@pytest.mark.parametrize("d", [1, 9, 16, 120])
def test_field_sizes(d):
    constants = matrices(2 * d, d)
    x, weight = torch.randn(2, 5, 3 * d, dtype=torch.float64)
    runs = [lambda x, f=f: f("elu", x, *constants) for f in (fourier, plain)]
    assert relative(runs[0](x), runs[1](x)) <= 1e-14
    assert relative(*(gradient(run, x, weight) for run in runs)) <= 1e-14


def test_memory_layouts():
    constants = matrices(6, 4)
    x = torch.randn(7, 5, 8, dtype=torch.float64).movedim(1, 2)  # (7, 8, 5)
    weight = torch.randn(5, 7, 8, dtype=torch.float64).permute(1, 2, 0)
    out, expected = (f("silu", x, *constants) for f in (fourier, plain))
    assert not x.is_contiguous()
    assert relative(out, expected) <= 1e-14
    grad, expected = (gradient(lambda x, f=f: f("silu", x, *constants), x, weight) for f in (fourier, plain))
    assert relative(grad, expected) <= 1e-14


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 3)])
def test_derivatives(function, shape):
    """First ones in reverse and forward mode, second and third ones, of the function and of the bare operators."""
    constants = matrices(6, 4)
    x, weight = torch.randn(2, *shape, dtype=torch.float64).requires_grad_().unbind()
    run = lambda x: fourier(function, x, *constants)  # noqa: E731
    assert torch.autograd.gradcheck(run, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, x)
    numbers = FUNCTIONS.index(function), 0
    forward = lambda x: ops.fourier_forward(x, *constants, *numbers)  # noqa: E731
    backward = lambda grad, x: ops.fourier_backward(grad, x, *constants, *numbers)  # noqa: E731
    assert torch.autograd.gradcheck(forward, x)
    assert torch.autograd.gradcheck(backward, (weight, x))
    assert torch.autograd.gradgradcheck(backward, (weight, x), atol=1e-4)


def test_first_derivatives_are_native(monkeypatch):
    constants = matrices(6, 4)
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = gradient(lambda x: fourier("elu", x, *constants), x, torch.ones_like(x))
    monkeypatch.setattr(module, "_through", None)
    assert torch.equal(gradient(lambda x: fourier("elu", x, *constants), x, torch.ones_like(x)), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_function_transforms(compiled):
    constants = matrices(6, 4)
    x = torch.randn(2, 8, dtype=torch.float64)
    losses = [lambda x, f=f: f("tanh", x, *constants).square().sum() for f in (fourier, plain)]
    compiler = {True: torch.compile(fullgraph=True, backend="aot_eager"), False: lambda f: f}[compiled]
    for transform in (
        torch.func.grad,
        torch.func.hessian,
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
        lambda f: lambda x: torch.func.vmap(f)(x[None]),
    ):
        found, expected = compiler(transform(losses[0]))(x), transform(losses[1])(x)
        torch.testing.assert_close(found, expected)


def test_without_the_extension(monkeypatch):
    constants = matrices(6, 4)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = fourier("elu", x, *constants)
    monkeypatch.setattr(module._native, "found", lambda: False)
    monkeypatch.setattr(module, "_recorded", None)
    assert relative(fourier("elu", x, *constants), expected) <= 1e-14


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_stays_in_its_field(function):
    constants = matrices(30, 4, torch.float32)
    x = torch.randn(20, 8)
    run = lambda x: fourier(function, x, *constants)  # noqa: E731
    results = lambda x: torch.stack([run(x), gradient(run, x, torch.ones_like(x))])  # noqa: E731
    expected = results(x)
    x[3, 5] = float("nan")
    out = results(x)
    assert bool(out[0, 3, 4:].isnan().all())
    out[:, 3, 4:] = expected[:, 3, 4:]
    assert torch.equal(out, expected)


def test_threads_give_the_same_bits(threads):
    constants = matrices(30, 4, torch.float32)
    x, weight = torch.randn(2, 6001, 8 * 4)
    run = lambda x: fourier("elu", x, *constants)  # noqa: E731
    results = []
    for number in (1, 2, 3, 5):
        threads(number)
        results.append((run(x), gradient(run, x, weight)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_plain(dtype):
    act = FourierActivation(SPACES["O(3)"](), 2, 1, sampling="escnn")
    x, coords = torch.randn(5, 8, dtype=dtype), torch.zeros(5, 3)
    out = act(GeometricTensor(x, act.in_type, coords)).tensor
    assert out.dtype == dtype
    assert torch.equal(out, plain("elu", x, *(m.to(dtype) for m in act._merged.exact)))


# ---- the operators


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 3)])
def test_operators_pass_opcheck(shape, dtype):
    constants = matrices(6, 4, dtype)
    x, grad = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    torch.library.opcheck(ops.fourier_forward.default, (x, *constants, 0, 0))
    torch.library.opcheck(ops.fourier_backward.default, (grad, x, *constants, 0, 0))


def test_compiles_whole():
    constants = matrices(6, 4)
    x, weight = torch.randn(2, 3, 8, dtype=torch.float64)
    run = lambda x: fourier("tanh", x.sin(), *constants) * 2  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    torch.testing.assert_close(gradient(compiled, x, weight), gradient(run, x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 7)}, "x: expected fields of 4, got 7 channels"),
        ({"x": torch.randn(8)}, r"expected \(N, C d, ...\)"),
        ({"x": torch.randn(3, 8, dtype=torch.float64)}, "samples: expected"),
        ({"x": torch.randint(3, (3, 8))}, "x: expected a float32 or float64"),
        ({"x": torch.randn(8, 3).T}, "x: expected a contiguous"),
        ({"samples": torch.randn(6, 0)}, "x: expected fields of 0"),
        ({"inverse_t": torch.randn(5, 4)}, "inverse_t: expected 24 numbers, got 20"),
        ({"grad": torch.randn(3, 4)}, "grad: expected 24 numbers, got 12"),
        ({"isa": 9}, "isa: expected 0"),
    ],
)
def test_wrong_arguments(change, message):
    good = {"grad": torch.randn(3, 8), "x": torch.randn(3, 8), "samples": torch.randn(6, 4)}
    good |= {"inverse_t": torch.randn(6, 4), "function": 0, "isa": 0}
    ops.fourier_backward(**good)
    with pytest.raises(RuntimeError, match=message):
        ops.fourier_backward(**good | change)


def test_samples_on_the_circle():
    space = SPACES["O(2) on R2"]()
    fine, coarse = (FourierActivation(space, 2, 1, sampling=name) for name in ("escnn", "circle-16"))
    x = fine.in_type(torch.randn(7, fine.in_type.size, 2, 1))
    deviation = relative(coarse(x).tensor, fine(x).tensor)
    assert 0 < deviation < 5e-2  # ELU at L = 1: the integral over 16 samples has not converged, that over 125 has
    assert relative(FourierActivation(space, 2, 1, sampling="circle-125")(x).tensor, fine(x).tensor) < 1e-5
    assert "32 samples" in repr(coarse)
    for name, message in {"circle-2": "enough samples for 6 coefficients", "circle-": "'circle-N'"}.items():
        with pytest.raises(ValueError, match=message):
            FourierActivation(space, 2, 1, sampling=name)
    with pytest.raises(ValueError, match="a group with rotations in one plane"):
        FourierActivation(SPACES["O(3)"](), 2, 1, sampling="circle-16")
