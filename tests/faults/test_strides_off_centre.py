"""A strided grid convolution whose samples are not centred in the input lost equivariance without a word."""

import itertools
import warnings

import pytest
import torch
from escnn import gspaces

import implicit_steer as ist
from implicit_steer.nn import ImplicitConv
from implicit_steer.testing.cases import SPACES, fields

OFF = "off its centre"


def layer(space="C4 on R2", **options):
    gspace = SPACES[space]()
    torch.manual_seed(0)
    arguments = {"kernel_size": 3, "padding": 1, "stride": 2, "axes": "escnn"} | options
    conv = ImplicitConv(
        fields(gspace, "1 vector"), fields(gspace, "1 vector"), None, n_layers=2, n_channels=2, **arguments
    )
    with torch.no_grad():  # also the biases, so that the kernel is not 0 at its centre
        for parameter in conv.implicit_kernel.mlp.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return conv


def warned(run):
    """What ``run`` says about samples off the centre."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if OFF in str(w.message)]


def quarter_turn_error(conv, size):
    """Relative, of rotating the image by 90°."""
    g = conv.in_type.fibergroup.element(1)
    rho = torch.tensor(conv.in_type.representation(g))
    turn = lambda x: torch.einsum("oi,bi...->bo...", rho, torch.rot90(x, 1, (2, 3)))  # noqa: E731
    x = torch.randn(1, 2, size, size, dtype=torch.float64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        actual, expected = conv(conv.in_type(turn(x))).tensor, turn(conv(conv.in_type(x)).tensor)
    assert expected.norm() > 1e-3
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_warns_exactly_where_equivariance_is_lost(mode):
    """Every kernel size, even ones too, stride, padding and dilation, against actual rotations."""
    for kernel_size, stride, padding, dilation in itertools.product((1, 2, 3, 4), (1, 2, 3), (0, 1), (1, 2)):
        options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode, "norm": None}
        conv = layer(kernel_size=kernel_size, **options).double()
        for size in (9, 10, 11):
            lost = quarter_turn_error(conv, size) > 1e-6
            again = layer(kernel_size=kernel_size, **options).double()
            x = again.in_type(torch.randn(1, 2, size, size, dtype=torch.float64))
            assert bool(warned(lambda again=again, x=x: again(x))) == lost, (kernel_size, options, size)


def test_names_sizes_that_keep_it_and_warns_once():
    conv = layer()
    x = conv.in_type(torch.randn(1, 2, 30, 30))
    (message,) = warned(lambda: conv(x))
    assert "30 points" in message
    assert "29, 31" in message
    assert not warned(lambda: conv(x))
    assert len(warned(lambda: conv(conv.in_type(torch.randn(1, 2, 28, 28))))) == 1


def test_loaded_layers_warn_too(tmp_path):
    conv = layer()
    ist.save(conv, tmp_path / "grid.safetensors")
    loaded = ist.load(tmp_path / "grid.safetensors")
    assert warned(lambda: loaded(torch.randn(1, 2, 30, 30)))
    assert not warned(lambda: loaded(torch.randn(1, 2, 31, 31)))


@pytest.mark.parametrize("axes", ["authors", "escnn"])
def test_axes_that_the_group_leaves_alone_may_be_off_centre(axes, tmp_path):
    """Rotations about z: z is the last axis of the tensor in the authors' order, the first one in escnn's."""
    conv = layer("SO(2) on R3", axes=axes)
    sizes = {"authors": (7, 7, 8), "escnn": (8, 7, 7)}[axes]
    ist.save(conv, tmp_path / "grid.safetensors")
    loaded = ist.load(tmp_path / "grid.safetensors")
    assert not warned(lambda: loaded(torch.randn(1, 3, *sizes)))
    assert warned(lambda: loaded(torch.randn(1, 3, *sizes[::-1])))
    assert not warned(lambda: conv(conv.in_type(torch.randn(1, 3, *sizes))))
    assert warned(lambda: conv(conv.in_type(torch.randn(1, 3, *sizes[::-1]))))


@pytest.mark.parametrize(("gspace", "moves"), [(gspaces.trivialOnR2(), False), (gspaces.flip2dOnR2(), True)])
def test_trivial_groups_have_nothing_to_lose(gspace, moves):
    kind = gspace.type(gspace.trivial_repr)
    conv = ImplicitConv(kind, kind, None, 3, 2, 2, stride=2)
    assert bool(warned(lambda: conv(kind(torch.randn(1, 1, 8, 8))))) == moves
