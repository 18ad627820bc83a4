"""The operators of the Triton kernels as citizens of torch."""

import fake_cuda
import pytest
import torch
from problems import DEVICE, INTERPRETED, triton_arguments
from torch.library import opcheck

from implicit_steer.ops.triton import operators
from implicit_steer.testing.cases import Case

TINY = Case("", "SO(2) on R2", "1 vector", "1 scalar", "1 scalar", 2, 2, nodes=2, degree=2)
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", operators.KERNELS)
def test_opcheck(name):
    """torch.compile has no derivatives of gradients: of gradient operators those are not traced."""
    known = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    differentiated = "backward" not in name or "contract" in name
    operator, arguments = getattr(torch.ops.implicit_steer, name).default, triton_arguments(TINY)[name]
    opcheck(operator, arguments, test_utils=known if differentiated else known[:3])
    if INTERPRETED:
        fake_cuda.check(operator, arguments, differentiated)


def test_unknown_plan():
    delta, attributes, order, width = torch.ones(4, 1, 1, device=DEVICE).unbind()
    with pytest.raises(ValueError, match="plan: expected the digest"):
        torch.ops.implicit_steer.triton_moments("?", delta, attributes, [width], [], False, order, 0)
