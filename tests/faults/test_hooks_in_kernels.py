"""Hook-based weight_norm, spectral_norm and prune on layers inside a kernel were ignored; other hooks never fired."""

import copy
import warnings

import pytest
import torch
from helpers import BACKENDS
from torch.nn.utils import prune, remove_weight_norm, spectral_norm, weight_norm

import implicit_steer as ist
from implicit_steer.nn import ImplicitConv
from implicit_steer.testing.cases import SMALL, SPACES, fields

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


class Layer:
    """A point convolution with or without escnn, and one linear layer of its kernel."""

    def __init__(self, plain, folder, backend="auto", **options):
        conv = SMALL["o3"].layer(backend=backend, **options).double()
        self.problem = SMALL["o3"].inputs(conv)
        if plain:
            ist.save(conv, folder / "conv.safetensors")
            conv = ist.load(folder / "conv.safetensors")
        self.conv, self.kernel, self.plain = conv.eval(), conv.implicit_kernel, plain
        self.linear = self.kernel.linears[1] if plain else self.kernel.mlp.linears[1]

    def __call__(self):
        p, conv = self.problem, self.conv
        out = conv(p.x if self.plain else conv.in_type(p.x, p.pos), p.graph, p.delta, p.attributes)
        return out if self.plain else out.tensor


@pytest.fixture(params=[False, True], ids=["nn", "plain"])
def plain(request):
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_norm(plain, backend, tmp_path):
    layer = Layer(plain, tmp_path, backend)
    before = layer()
    weight_norm(layer.linear, "weights", dim=None)
    torch.testing.assert_close(layer(), before)
    with torch.no_grad():
        layer.linear.weights_g.mul_(2)
    doubled = layer()
    assert not torch.allclose(doubled, before)
    for _ in range(2):  # a graph of its own at every call
        layer().sum().backward()
    assert layer.linear.weights_g.grad.abs() > 0
    assert layer.linear.weights_v.grad.abs().max() > 0
    remove_weight_norm(layer.linear, "weights")
    torch.testing.assert_close(layer(), doubled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prune(plain, backend, tmp_path):
    layer = Layer(plain, tmp_path, backend)
    with torch.no_grad():
        reference = copy.deepcopy(layer)
        weights = reference.linear.weights
        weights[weights.abs() < weights.abs().sort().values[len(weights) // 2]] = 0
    prune.l1_unstructured(layer.linear, "weights", len(weights) // 2)
    torch.testing.assert_close(layer(), reference())
    with torch.no_grad():  # as an optimizer does: pruned ones stay 0
        layer.linear.weights_orig.mul_(1.5)
        reference.linear.weights.mul_(1.5)
    torch.testing.assert_close(layer(), reference())
    layer().sum().backward()
    assert layer.linear.weights_orig.grad.count_nonzero() <= (layer.linear.weights_mask != 0).sum()
    prune.remove(layer.linear, "weights")
    torch.testing.assert_close(layer(), reference())


def test_spectral_norm(plain, tmp_path):
    layer = Layer(plain, tmp_path)
    before = layer()
    spectral_norm(layer.linear, "weights")
    after = layer()
    assert not torch.allclose(after, before)
    with torch.no_grad():
        layer.linear.weights_orig.mul_(3)  # has no effect on its direction
    torch.testing.assert_close(layer(), after)


@pytest.mark.parametrize("name", ["shell_width", "bias"])
def test_prune_of_the_other_parameters(plain, name, tmp_path):
    layer = Layer(plain, tmp_path)
    owner = layer.kernel if name == "shell_width" else layer.linear
    before = layer()
    prune.identity(owner, name)
    with torch.no_grad():
        getattr(owner, f"{name}_orig").add_(0.3)
    changed = layer()
    assert not torch.allclose(changed, before)
    prune.remove(owner, name)
    torch.testing.assert_close(layer(), changed)


def test_in_grid_convolutions():
    kind = fields(SPACES["C4 on R2"](), "1 regular")
    conv = ImplicitConv(kind, kind, None, 3, 2, 2, norm=None)
    x = kind(torch.randn(1, 4, 5, 5))
    before = conv(x).tensor
    weight_norm(conv.implicit_kernel.mlp.linears[-1], "weights", dim=None)
    with torch.no_grad():
        conv.implicit_kernel.mlp.linears[-1].weights_g.mul_(2)
    bias = conv.implicit_kernel.mlp.linears[-1].bias
    assert bias is None or not bias.any()
    torch.testing.assert_close(conv(x).tensor, 2 * before)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("part", ["linear", "kernel"])
def test_hooks_that_never_fire_are_named(part, kind, plain, tmp_path):
    """Before the first call as well as after it; once."""
    layer, calls = Layer(plain, tmp_path), []
    for _ in range(2):
        handle = getattr(getattr(layer, part), f"register_{kind}_hook")(lambda *_: calls.append(1))
        with pytest.warns(UserWarning, match="do not fire"):
            layer().sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer()
        handle.remove()
        layer()
    assert not calls


def test_hooks_that_fire_are_no_matter(tmp_path):
    layer, calls = Layer(False, tmp_path), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.conv.register_forward_hook(lambda *_: calls.append(1))
        layer.linear.weights.register_hook(lambda grad: calls.append(2))
        layer().sum().backward()
    assert calls == [1, 2]
