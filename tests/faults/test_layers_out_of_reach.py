"""A layer whose shell reaches none of its edges, as with positions in Å, says so once, and what to do."""

import re
import warnings

import pytest
import torch
from escnn import gspaces

import implicit_steer as ist
from implicit_steer.nn import ImplicitConv, ImplicitKernel, ImplicitPointConv

GSPACE = gspaces.flipRot3dOnR3()
KIND = GSPACE.type(GSPACE.trivial_repr, GSPACE.irrep(1, 1))


def copper():
    """(N, 3) Å and edges to the nearest neighbours, 2.55 Å away, and to the node itself."""
    corner = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
    face = torch.tensor([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    pos = 3.61 * (corner[:, None] + face).reshape(-1, 3)
    return pos, ist.radius_graph(pos, 2.6, loop=True)


def warned(conv, pos, edges, calls=3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            x = conv.in_type(torch.ones(len(pos), KIND.size), pos)
            conv(x, edges, pos[edges[1]] - pos[edges[0]])
    return [str(w.message) for w in caught]


def test_a_layer_in_angstrom(tmp_path):
    pos, edges = copper()
    conv = ImplicitPointConv(KIND, KIND, None, 2, 4, norm=None)
    ist.save(conv, tmp_path / "conv.safetensors")
    for layer in (conv, ist.load(tmp_path / "conv.safetensors")):
        (message,) = warned(layer, pos, edges)
        assert re.search(r"σ = 0\.5, is at most 2e-06 on all edges, which are 2\.55 to 2\.55 long", message)
    width = float(re.search(r"width=([\d.]+)", message)[1])
    remedied = ImplicitPointConv(KIND, KIND, None, 2, 4, norm=None, width=width)
    assert remedied.implicit_kernel.shell_width.item() == pytest.approx(width)
    assert not warned(remedied, pos, edges)


def test_positions_far_too_small():
    pos, edges = copper()
    (message,) = warned(ImplicitPointConv(KIND, KIND, None, 2, 4, norm=None), 1e-3 * pos, edges)
    assert "is 1 on all edges" in message


def test_a_call_without_edges_says_nothing_yet():
    pos, edges = copper()
    conv = ImplicitPointConv(KIND, KIND, None, 2, 4, norm=None)
    assert not warned(conv, pos, edges[:, :0])
    assert not warned(conv, pos, edges[:, edges[0] == edges[1]])  # nor does one with self-loops alone
    assert len(warned(conv, pos, edges)) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: ImplicitKernel(KIND, KIND, **options),
        lambda **options: ImplicitPointConv(KIND, KIND, **options),
        lambda **options: ImplicitConv(KIND, KIND, **options),
    ],
)
def test_width(make):
    made = make(width=2.5)
    kernel = made if isinstance(made, ImplicitKernel) else made.implicit_kernel
    assert kernel.shell_width.item() == 2.5
    for wrong, kind in ((0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(kind, match="width: expected a positive length"):
            make(width=wrong)


@pytest.mark.parametrize("layer", [ImplicitPointConv, ImplicitConv])
def test_bias_and_defaults(layer):
    conv = layer(KIND, KIND, bias=False)
    assert conv.bias is None
    assert "bias_expansion" not in conv.state_dict()
    assert layer(KIND, KIND).bias.shape == (1,)
    with pytest.raises(TypeError, match="bias: expected True or False"):
        layer(KIND, KIND, bias=None)


def test_pyg_s_word_for_a_sum():
    assert ImplicitPointConv(KIND, KIND, aggr="add").aggr == "sum"
    with pytest.raises(ValueError, match="aggr: expected 'sum' or 'mean', got 'max'"):
        ImplicitPointConv(KIND, KIND, aggr="max")
