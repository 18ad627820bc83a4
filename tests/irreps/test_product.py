"""The product of a feature with itself: against e3nn's coefficients, equivariance, derivatives, variance, files."""

import pytest
import torch
from e3nn import o3
from test_layers import random_elements, representation

import implicit_steer as ist
from implicit_steer.irreps import Irreps, TensorSquare

O3, SO3 = "3x0e+3x1o+3x2e+3x1e", "2x0+2x1+2x2"


def test_products_are_e3nns():
    """y_l[u] = Σ_v W[u, v] c √(2 l + 1) w3j(l₁, l₂, l) x_l₁[v] x_l₂[v]."""
    torch.manual_seed(0)
    square = TensorSquare("2x0e+2x1o", "2x1o+1x0e").double()
    x = torch.randn(5, 8, dtype=torch.float64)
    s, v = x[:, :2], x[:, 2:].view(5, 2, 3)
    vector = 3**0.5 * torch.einsum("nu,nui,ik->nuk", s, v, o3.wigner_3j(0, 1, 1, dtype=torch.float64)[0])
    scalar = torch.einsum("nui,nuj,ij->nu", v, v, o3.wigner_3j(1, 1, 0, dtype=torch.float64)[..., 0])
    # E[s⁴] = 3; the scalar is |v|² / √3, and E[|v|⁴] = 15
    scalars = torch.stack([s.square() / 3**0.5, scalar / 5**0.5], 2)  # [N, channels, products]
    of_vectors, of_scalars = square.linear.weights.split([4, 4])
    expected = torch.einsum("uv,nvk->nuk", of_vectors.view(2, 2), vector).flatten(1)
    rest = torch.einsum("vp,nvp->n", of_scalars.view(2, 2), scalars)[:, None]
    torch.testing.assert_close(square(x), torch.cat([expected, rest], 1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("text", [O3, SO3])
def test_it_is_equivariant(text):
    torch.manual_seed(0)
    irreps = Irreps.of(text)
    square = TensorSquare(irreps, irreps).double()
    x = torch.randn(10, irreps.size, dtype=torch.float64)
    with torch.no_grad():
        before = square(x)
        for matrix in random_elements(irreps):
            matrix = matrix if irreps.has_parity else matrix * matrix.det().sign()
            turn = representation(irreps, matrix)
            torch.testing.assert_close(square(x @ turn.T), before @ turn.T, rtol=0, atol=1e-12)


def test_gradcheck_and_gradgradcheck():
    square = TensorSquare("2x0e+2x1o+2x2e", "1x0e+2x1o+1x2e").double()
    inputs = [torch.randn(3, 18, dtype=torch.float64, requires_grad=True), square.linear.weights.detach().clone()]
    inputs[1].requires_grad_()

    def run(x, weights):
        return torch.func.functional_call(square, {"linear.weights": weights}, (x,))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_unit_variance_and_size():
    torch.manual_seed(0)
    square = TensorSquare("32x0e+32x1o+32x2e", "64x0e+64x1o+64x2e")
    y = square(torch.randn(4000, 32 * 9)).detach().square().mean(0)
    for start, term in zip(square.irreps_out.starts, square.irreps_out, strict=True):
        assert 0.8 < float(y[start : start + term.size].mean()) < 1.2
    assert square(torch.zeros(2, 32 * 9)).abs().max() == 0
    assert square(torch.randn(2, 32 * 9).bfloat16()).dtype == torch.bfloat16


def test_copies_may_lie_in_any_order():
    """Copies side by side, or channel by channel: the same products."""
    torch.manual_seed(0)
    apart, mixed = TensorSquare("2x0e+2x1o", "3x1o"), TensorSquare("0e+1o+0e+1o", "3x1o")
    mixed.load_state_dict(apart.state_dict())
    x = torch.randn(4, 8)
    order = [0, 2, 3, 4, 1, 5, 6, 7]
    torch.testing.assert_close(mixed(x[:, order]), apart(x))


def test_it_is_saved_and_compiled(tmp_path):
    square, x = TensorSquare(O3, "4x0e+2x2e"), torch.randn(5, 36)
    ist.save(square, tmp_path / "square.safetensors")
    loaded = ist.load(tmp_path / "square.safetensors")
    assert type(loaded) is TensorSquare
    assert torch.equal(loaded(x), square(x))
    exported = torch.export.export(square, (x,)).module()
    torch.testing.assert_close(exported(x), square(x))
    with torch.device("meta"):
        empty = TensorSquare(O3, "4x0e+2x2e")
    empty.load_state_dict(square.state_dict(), assign=True)
    assert torch.equal(empty(x), square(x))


@pytest.mark.parametrize(
    ("irreps", "message"),
    [
        (("2x0e+1x1o", "1x0e"), "irreps_in: expected as many copies of each irrep"),
        (("2x0e", "1x0"), "irreps_out: expected irreps of O"),
        (("2x0e", "1x1o"), "irreps_out: expected an irrep that products of irreps_in reach"),
        (("1x6e+1x7e+1x8e+1x10e", "1x0e"), "irreps_in: expected at most 64 components in a channel, got 66"),
        (("", "1x0e"), "irreps_in: expected as many copies"),
    ],
)
def test_wrong_irreps(irreps, message):
    with pytest.raises(ValueError, match=message):
        TensorSquare(*irreps)


def test_wrong_features():
    with pytest.raises(ValueError, match="x: expected a floating point tensor"):
        TensorSquare("2x0e", "2x0e")(torch.randn(3, 3))
