"""``torch.jit.trace`` and ``torch.jit.script`` ended in errors of torch's own, far from what to do."""

import pytest
import torch

import implicit_steer as ist
from implicit_steer.nn import FourierActivation, IIDBatchNorm1d, ImplicitConv
from implicit_steer.nn.mlp import Linear
from implicit_steer.testing.cases import SMALL, SPACES, fields

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def modules():
    kind, flat = fields(SPACES["O(3)"](), "2 scalar, 2 vector"), fields(SPACES["C4 on R2"](), "1 regular")
    conv = SMALL["o3"].layer()
    p = SMALL["o3"].inputs(conv)
    x = torch.randn(5, kind.size)
    return {
        "ImplicitPointConv": (conv, (p.x, p.graph.edge_index, p.delta, p.attributes)),
        "ImplicitKernel": (conv.implicit_kernel, (p.delta, p.attributes)),
        "ImplicitConv": (ImplicitConv(flat, flat, None, 3, 2, 2), (torch.randn(1, 4, 5, 5),)),
        "Linear": (Linear(kind, kind), (x,)),
        "IIDBatchNorm1d": (IIDBatchNorm1d(kind), (x,)),
        "FourierActivation": (FourierActivation(SPACES["O(3)"](), 2, 1), (torch.randn(5, 8),)),
    }


@pytest.mark.parametrize("plain", [False, True], ids=["nn", "plain"])
@pytest.mark.parametrize("name", modules())
def test_names_what_to_use(name, plain, tmp_path):
    module, arguments = modules()[name]
    if plain:
        ist.save(module, tmp_path / "module.safetensors")
        module = ist.load(tmp_path / "module.safetensors")
    network = torch.nn.Sequential(module)  # as a part of another module
    with pytest.raises(RuntimeError, match=r"torch\.export\.export.*implicit_steer\.save"):
        torch.jit.script(network)
    with pytest.raises(RuntimeError, match=r"torch\.export\.export.*implicit_steer\.save"):
        torch.jit.trace(module, arguments)
