"""The modules of ``nn`` as escnn's: their checks of equivariance, their shapes, sequences of them, ``export``."""

import copy
import pickle
import warnings

import escnn.nn as enn
import pytest
import torch

from implicit_steer.nn import (
    FourierActivation,
    Gate,
    IIDBatchNorm1d,
    ImplicitConv,
    ImplicitPointConvWithDownsampling,
    KernelMLP,
    Linear,
)
from implicit_steer.testing.cases import SMALL, SPACES, fields

O3 = SPACES["O(3)"]()
KIND = fields(O3, "2 scalar+vector, 2 vector, 1 scalar")
PIXELS = fields(SPACES["C4 on R2"](), "1 regular")


def grid(space="D4 on R2", **options):
    kind = fields(SPACES[space](), "1 scalar, 1 vector")
    torch.manual_seed(0)
    return ImplicitConv(kind, kind, fields(SPACES[space](), "1 scalar"), 3, 2, 2, **{"axes": "escnn"} | options)


def downsampling():
    conv = SMALL["o3"].layer()
    return ImplicitPointConvWithDownsampling(conv.in_type, conv.out_type, conv.edge_attr_type, 2, 3)


MODULES = {
    "ImplicitPointConv": lambda: SMALL["o3"].layer(),
    "with a cutoff": lambda: SMALL["o3-no-attr"].layer(cutoff=0.1, aggr="mean"),
    "vector attributes": lambda: SMALL["so2"].layer(),
    "ImplicitPointConvWithDownsampling": downsampling,
    "ImplicitKernel": lambda: SMALL["o3"].layer().implicit_kernel,
    "ImplicitConv": grid,
    "Linear": lambda: Linear(KIND, KIND),
    "IIDBatchNorm1d": lambda: IIDBatchNorm1d(KIND),
    "FourierActivation": lambda: FourierActivation(O3, 2, 1),
    "KernelMLP": lambda: KernelMLP(*[fields(SPACES["D4 on R2"](), "1 vector")] * 2, norm=None),
    "Gate": lambda: Gate(KIND),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_checks_itself(name, dtype):
    """With random elements, in every mode, and nothing changes."""
    module = MODULES[name]().to(dtype)
    for training in (True, False):
        before = copy.deepcopy(module.train(training).state_dict())
        errors = module.check_equivariance(*(1e-5, 1e-5) if dtype == torch.float32 else (1e-12, 1e-12))
        assert 1 < len(errors) <= 10
        assert all(error <= (1e-6 if dtype == torch.float32 else 1e-13) for _, error in errors)
        assert module.training == training
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    group = errors[0][0].group
    known = [] if name in ("ImplicitConv", "KernelMLP") else group.testing_elements()
    assert not any(element == other for element, _ in errors for other in known if other != group.identity)


def test_names_what_is_not_equivariant():
    """escnn's own elements for O(3) are those under which this grid is closed."""
    activation = FourierActivation(O3, 2, 3, sampling="escnn")
    with pytest.raises(AssertionError, match="not equivariant for the element"):
        activation.check_equivariance()
    assert max(error for _, error in activation.check_equivariance(atol=10, rtol=0)) > 1e-3
    for module in (SMALL["o3"].layer(sampling="escnn"), SMALL["o3"].layer(sampling="escnn").implicit_kernel):
        with pytest.raises(AssertionError, match="not equivariant for the element"):
            module.check_equivariance(atol=1e-7, rtol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        even = ImplicitConv(PIXELS, PIXELS, None, 2, 2, 2, norm=None)
    with pytest.raises(AssertionError, match="not equivariant for the element"):
        even.check_equivariance()


@pytest.mark.parametrize("space", ["SO(2) on R2", "O(2) on R2", "SO(2) on R3", "mirror on R3", "SO(3)"])
@pytest.mark.parametrize("axes", ["authors", "escnn"])
def test_checks_of_grids(space, axes):
    for options in (
        {"padding": 1},
        {"stride": 2, "padding": 1, "padding_mode": "reflect"},
        {"stride": 3, "dilation": 2},
    ):
        conv = grid(space, axes=axes, **options).double()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it takes a size whose samples are centred
            errors = conv.check_equivariance(1e-12, 1e-12)
        actions = [conv.in_type.gspace.basespace_action(g) for g, _ in errors]
        assert all(((abs(a) < 1e-9) | (abs(abs(a) - 1) < 1e-9)).all() for a in actions)
        assert len(errors) > 1


def test_sequences_of_modules():
    """What maps points to the same points, and grids; types have to fit."""
    gate = Gate(KIND)
    network = enn.SequentialModule(Linear(KIND, gate.in_type), gate, IIDBatchNorm1d(KIND))
    x = KIND(torch.randn(5, KIND.size), torch.zeros(5, 3))
    assert network(x).type == KIND
    assert network.evaluate_output_shape((5, KIND.size)) == (5, KIND.size)
    with pytest.raises(AssertionError):
        enn.SequentialModule(gate, gate)
    plain = ImplicitConv(PIXELS, PIXELS, None, 3, 2, 2, padding=1, stride=2)
    images = enn.SequentialModule(plain, IIDBatchNorm1d(PIXELS), enn.ReLU(PIXELS), plain)
    assert images(PIXELS(torch.randn(2, 4, 9, 9))).shape == images.evaluate_output_shape((2, 4, 9, 9)) == (2, 4, 3, 3)
    assert pickle.loads(pickle.dumps(images)).evaluate_output_shape((1, 4, 5, 5)) == (1, 4, 2, 2)


def test_a_point_convolution_in_a_sequence_says_what_it_lacks():
    conv = SMALL["o3-no-attr"].layer()
    network = enn.SequentialModule(IIDBatchNorm1d(conv.in_type), conv)
    with pytest.raises(TypeError, match=r"edge_index: expected .*SequentialModule passes features alone"):
        network(conv.in_type(torch.randn(5, conv.in_type.size), torch.zeros(5, 3)))


def test_shapes():
    conv = SMALL["o3"].layer()
    assert conv.evaluate_output_shape((7, conv.in_type.size)) == (7, conv.out_type.size)
    assert conv.evaluate_output_shape((7, conv.in_type.size), n_target=3) == (3, conv.out_type.size)
    assert FourierActivation(O3, 2, 1).evaluate_output_shape((7, 8)) == (7, 8)
    assert Gate(KIND).evaluate_output_shape((7, Gate(KIND).in_type.size, 4)) == (7, KIND.size, 4)
    for options in ({}, {"padding": 1}, {"stride": 2}, {"dilation": 2, "padding": 2, "stride": 3}):
        layer = grid(**options).eval()
        x = torch.randn(1, 3, 11, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert layer(layer.in_type(x), torch.zeros(1, 1)).shape == layer.evaluate_output_shape(x.shape)
    with pytest.raises(ValueError, match="input_shape: expected"):
        conv.evaluate_output_shape((7, 1))
    with pytest.raises(ValueError, match="input_shape: expected 2 sizes"):
        grid().evaluate_output_shape((7, 3, 4))


@pytest.mark.parametrize("name", MODULES)
def test_export_says_what_to_do(name):
    module = MODULES[name]()
    if name in ("Linear", "IIDBatchNorm1d"):
        if name == "IIDBatchNorm1d":
            module(KIND(torch.randn(5, KIND.size), torch.zeros(5, 3)))
        module = module.eval().double()
        x = torch.randn(6, KIND.size, dtype=torch.float64)
        expected = module(KIND(x, torch.zeros(6, 3))).tensor
        torch.testing.assert_close(module.export()(x), expected, rtol=1e-12, atol=1e-12)
    elif name != "ImplicitKernel":
        with pytest.raises(RuntimeError, match=r"implicit_steer\.save.*torch\.export"):
            module.export()


def test_export_of_a_norm_needs_statistics():
    with pytest.raises(RuntimeError, match="export: expected a norm with track_running_stats"):
        IIDBatchNorm1d(KIND, track_running_stats=False).export()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_hooks_of_linear_maps_fire():
    linear = Linear(KIND, KIND)
    x = KIND(torch.randn(5, KIND.size), torch.zeros(5, 3))
    before = linear(x).tensor
    torch.nn.utils.weight_norm(linear, "weights", dim=None)
    with torch.no_grad():
        linear.weights_g.mul_(2)
    torch.testing.assert_close(linear(x).tensor, 2 * before)
