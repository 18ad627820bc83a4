"""The matrix and the bias of linear layers, made of one basis per pair of representations, are escnn's."""

import escnn.nn
import pytest
import torch
from escnn import gspaces

from implicit_steer.nn import ImplicitPointConv, mlp
from implicit_steer.nn.expansion import own_basis
from implicit_steer.nn.mlp import KernelLinear, fiber_space

SPACES = {
    "O(3)": gspaces.flipRot3dOnR3,
    "SO(3)": gspaces.rot3dOnR3,
    "D4": lambda: gspaces.flipRot2dOnR2(4),
    "SO(2)": gspaces.rot2dOnR2,
}


def fields(space, mixed):
    """Two fields of each of some representations, side by side or mixed, and one more."""
    group = space.fibergroup
    kinds = [space.trivial_repr, space.basespace_action]
    kinds.append(space.basespace_action.tensor(space.basespace_action) if group.continuous else space.regular_repr)
    once = [r for r in kinds for _ in range(2)]
    return fiber_space(group, space.name).type(*(kinds * 2 if mixed else once), kinds[1])


def escnn_linear(in_type, out_type):
    """In training mode and float32, in which escnn builds it, also where another test cast the buffers that escnn's
    layers share."""
    linear = escnn.nn.Linear(in_type, out_type).train()
    own_basis(linear.basisexpansion)
    return linear


@pytest.fixture
def small_limit(monkeypatch):
    """Layers of a few fields count as large."""
    monkeypatch.setattr(mlp, "_MOST_DERIVED", 10)


@pytest.mark.parametrize("mixed", [False, True], ids=["side-by-side", "mixed"])
@pytest.mark.parametrize("name", SPACES)
def test_against_escnn(name, mixed):
    kind, other = (fields(SPACES[name](), m) for m in (mixed, False))
    ours, theirs = KernelLinear(other, kind), escnn_linear(other, kind)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    with torch.no_grad():
        theirs.bias.normal_()
    x = other(torch.randn(5, other.size))
    expected = theirs(x).tensor
    state = theirs.state_dict()
    ours.load_state_dict(state, strict=True)
    torch.testing.assert_close(ours(x).tensor, expected, rtol=1e-5, atol=1e-5)
    for found, dense in zip(ours.expand_parameters(), theirs.expand_parameters(), strict=True):
        torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.bias_expansion, theirs.bias_expansion, rtol=0, atol=0)

    fresh = escnn_linear(other, kind)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x).tensor, expected, rtol=0, atol=0)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    assert ours.state_dict().keys() == state.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_gradients_and_dtypes(dtype):
    kind = fields(SPACES["O(3)"](), True)
    linear = KernelLinear(kind, kind).to(dtype)
    assert {v.dtype for v in linear.state_dict().values()} == {dtype, torch.int64}
    linear(kind(torch.randn(3, kind.size, dtype=dtype))).tensor.sum().backward()
    assert linear.weights.grad.any()
    assert linear.bias.grad.all()


def test_large_layers_leave_out_what_follows_from_their_fields(small_limit):
    kind = fields(SPACES["D4"](), True)
    theirs, ours = escnn_linear(kind, kind), KernelLinear(kind, kind)
    state = ours.state_dict()
    assert not [key for key in state if "bias_expansion" in key or "_indices_" in key]
    for checkpoint in (state, theirs.state_dict()):
        ours.load_state_dict(checkpoint, strict=True)
    with torch.device("meta"):
        meta = KernelLinear(kind, kind)
    meta.load_state_dict(theirs.state_dict(), assign=True)
    for found, expected in zip(meta.expand_parameters(), theirs.expand_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_state_dict_on_meta():
    kind = fields(SPACES["D4"](), True)
    with torch.device("meta"):
        state = KernelLinear(kind, kind).state_dict()
    expected = KernelLinear(kind, kind).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}


SPOILED = {
    "shape": (lambda b: b[:, 1:], "shape"),
    "elsewhere": (lambda b: b + 1, "block"),
    "one-field": (lambda b: torch.cat([2 * b[:1], b[1:]]), "one block for all fields"),
    "nan": (lambda b: b * float("nan"), "block"),
}


@pytest.mark.parametrize(("change", "message"), SPOILED.values(), ids=SPOILED)
def test_a_bias_expansion_that_is_none(change, message):
    kind = fields(SPACES["O(3)"](), True)
    linear = KernelLinear(kind, kind)
    before, state = linear.state_dict(), linear.state_dict()
    state["bias_expansion"] = change(state["bias_expansion"])
    with pytest.raises(RuntimeError, match=rf"bias_expansion: expected .*{message}"):
        linear.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in linear.state_dict().items())


def layer(space):
    kind = space.type(*[space.trivial_repr] * 2, *[space.basespace_action] * 2)
    return ImplicitPointConv(kind, kind, None, 2, 2)


def flipped(state):
    """A state of the same function on a basis with other signs of all invariants: of the last layer the bias and
    weights."""
    last = "implicit_kernel.mlp.mlp.3."
    state = {key: value.clone() for key, value in state.items()}
    for key in state:
        if key.startswith(last) and key.endswith(("weights", "bias", "sampled_basis", "bias_expansion")):
            state[key] *= -1
    return state


@pytest.mark.parametrize("large", [False, True])
def test_another_basis_of_a_group_without_closed_forms(large, monkeypatch):
    """It is taken over with its invariants; weights of a checkpoint that lacks these have no meaning."""
    conv, other = layer(SPACES["D4"]()), layer(SPACES["D4"]())
    with torch.no_grad():
        for p in conv.parameters():
            p.add_(0.1)
    state = flipped(conv.state_dict())
    if large:
        monkeypatch.setattr(mlp, "_MOST_DERIVED", 10)
    other.load_state_dict(state)
    points = torch.randn(4, 2)
    for made in (conv, other):
        made.eval()
    torch.testing.assert_close(other.implicit_kernel(points), conv.implicit_kernel(points))
    del state["implicit_kernel.mlp.mlp.3.bias_expansion"]
    with pytest.raises(RuntimeError, match=r"mlp\.3\.bias_expansion: .*another basis"):
        layer(SPACES["D4"]()).load_state_dict(state)


def test_two_representations_of_one_name():
    space = SPACES["O(3)"]()
    group = space.fibergroup
    vector, scalar = group.irrep(1, 1), group.irrep(0, 0)
    pair = [escnn.group.directsum([r, scalar], name="same") for r in (vector, group.irrep(0, 1))]
    expected = "in_type: expected representations of different names, got 2 of the name same"
    with pytest.raises(ValueError, match=expected):
        ImplicitPointConv(space.type(*pair), space.type(scalar))
