"""``kernel.sampling = "escnn"`` on a built layer, and the like, was accepted and ignored."""

import pytest

import implicit_steer as ist
from implicit_steer.nn import FourierActivation, ImplicitConv
from implicit_steer.testing.cases import SMALL, SPACES, fields

SETTINGS = {"sampling": "escnn", "norm": None, "activation": "relu", "cutoff": 2.0, "aggr": "mean"}


@pytest.mark.parametrize("name", SETTINGS)
def test_of_kernels_and_convolutions(name, tmp_path):
    conv, flat = SMALL["o3"].layer(), fields(SPACES["C4 on R2"](), "1 regular")
    ist.save(conv, tmp_path / "conv.safetensors")
    loaded = ist.load(tmp_path / "conv.safetensors")
    grid = ImplicitConv(flat, flat, None, 3, 2, 2)
    expected = {"sampling": conv.implicit_kernel.plan.sampling, "norm": "batch", "activation": "elu"}
    for layer in (conv, loaded, grid):
        for module in (layer, layer.implicit_kernel):
            with pytest.raises(
                AttributeError, match=rf"{name}: expected .* got .*build another {type(module).__name__}"
            ):
                setattr(module, name, SETTINGS[name])
    for module in (conv, conv.implicit_kernel, loaded, loaded.implicit_kernel):
        assert getattr(module, name) == (expected | {"cutoff": None, "aggr": "sum"})[name]


@pytest.mark.parametrize(("name", "value"), [("sampling", "lebedev-50"), ("max_frequency", 3)])
def test_of_activations(name, value):
    activation = FourierActivation(SPACES["O(3)"](), 2, 1)
    with pytest.raises(AttributeError, match=f"{name}: expected .* build another FourierActivation"):
        setattr(activation, name, value)
