"""Every pooling of escnn, saved and loaded: the same numbers and gradients, in both dtypes."""

import escnn.nn as enn
import pytest
import torch
from escnn import gspaces
from helpers import deviations

import implicit_steer as ist

PLANE, SPACE = gspaces.rot2dOnR2(4), gspaces.rot3dOnR3()
REGULAR = {2: PLANE.type(*[PLANE.regular_repr] * 2, PLANE.trivial_repr, PLANE.regular_repr)}
REGULAR[3] = SPACE.type(SPACE.trivial_repr, SPACE.irrep(1), SPACE.trivial_repr)
SCALARS = {2: PLANE.type(*[PLANE.trivial_repr] * 3), 3: SPACE.type(*[SPACE.trivial_repr] * 3)}
MIXED = PLANE.type(PLANE.irrep(1), PLANE.regular_repr, PLANE.irrep(1), PLANE.trivial_repr)
ROTATIONS = gspaces.rot2dOnR2(8)
INDUCED = ROTATIONS.type(*[ROTATIONS.induced_repr(4, ROTATIONS.fibergroup.subgroup(4)[0].irrep(1))] * 2)

POOLINGS = {
    "PointwiseAdaptiveAvgPool2D": lambda cls: cls(REGULAR[2], (2, 3)),
    "PointwiseAdaptiveAvgPool3D": lambda cls: cls(SCALARS[3], 2),
    "PointwiseAdaptiveMaxPool2D": lambda cls: cls(REGULAR[2], 2),
    "PointwiseAdaptiveMaxPool3D": lambda cls: cls(SCALARS[3], (1, 2, 3)),
    "PointwiseAvgPool2D": lambda cls: cls(MIXED, 3, stride=2, padding=1, ceil_mode=True),
    "PointwiseAvgPool3D": lambda cls: cls(REGULAR[3], (2, 3, 2), padding=(0, 1, 0)),
    "PointwiseAvgPoolAntialiased2D": lambda cls: cls(MIXED, 0.6, 2),
    "PointwiseAvgPoolAntialiased3D": lambda cls: cls(SCALARS[3], 0.4, (1, 2, 2), padding=0),
    "PointwiseMaxPool2D": lambda cls: cls(REGULAR[2], 3, stride=(2, 1), padding=1, dilation=2),
    "PointwiseMaxPool3D": lambda cls: cls(SCALARS[3], 2, ceil_mode=True),
    "PointwiseMaxPoolAntialiased2D": lambda cls: cls(REGULAR[2], 3, stride=2, padding=1),
    "PointwiseMaxPoolAntialiased3D": lambda cls: cls(SCALARS[3], 2, stride=1, sigma=0.4),
    "NormMaxPool": lambda cls: cls(MIXED, 3, stride=2, padding=1),
    "GroupPooling": lambda cls: cls(REGULAR[2]),
    "NormPool": lambda cls: cls(MIXED),
    "InducedNormPool": lambda cls: cls(INDUCED),
}


def outcome(pool, x):
    """Output, and the gradient of a sum with weights."""
    x = x.clone().requires_grad_()
    out = pool(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return {"out": out.detach(), "grad x": torch.autograd.grad((out * weight).sum(), x)[0]}


def names():
    """escnn's poolings, an alias left out."""
    found = {cls: name for name, cls in vars(enn).items() if isinstance(cls, type) and "Pool" in name}
    return sorted({cls.__name__ for cls in found})


def test_every_pooling_is_here():
    assert set(names()) == {*POOLINGS, "MaxPoolChannels"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling(name, dtype, tmp_path):
    original = POOLINGS[name](getattr(enn, name)).to(dtype)
    ist.save(original, tmp_path / "pool.safetensors")
    loaded = ist.load(tmp_path / "pool.safetensors")
    x = torch.randn(2, original.in_type.size, *[7] * original.in_type.gspace.dimensionality).to(dtype)
    # These of escnn know float32 alone; the loaded ones keep the features' dtype.
    narrow = name in ("GroupPooling", "InducedNormPool", "NormMaxPool", "NormPool")
    expected = outcome(lambda x: original(original.in_type(x)).tensor, x.float() if narrow else x)
    actual = outcome(loaded, x)
    assert actual["out"].dtype == dtype
    deviation = deviations(actual, {key: value.to(dtype) for key, value in expected.items()})
    assert max(deviation.values()) <= (1e-6 if narrow and dtype == torch.float64 else 0)
    assert type(loaded).__module__.startswith(("implicit_steer.layers", "torch.nn"))
    ist.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "pool.safetensors").read_bytes()


def test_what_group_pooling_exports_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"Replace this part.* 0: expected .*GroupPooling.*MaxPoolChannels"):
        ist.save(torch.nn.Sequential(enn.MaxPoolChannels(4)), tmp_path / "pool.safetensors")


def test_a_network_of_convolution_and_poolings(tmp_path):
    conv = ist.nn.ImplicitConv(SCALARS[2], REGULAR[2], None, 3, 2, 3, padding=1)
    pools = enn.SequentialModule(enn.PointwiseAvgPoolAntialiased2D(REGULAR[2], 0.5, 2), enn.GroupPooling(REGULAR[2]))
    original = torch.nn.Sequential(conv, pools)
    ist.save(original.eval(), tmp_path / "net.safetensors")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(ist.load(tmp_path / "net.safetensors")(x), original(SCALARS[2](x)).tensor)
