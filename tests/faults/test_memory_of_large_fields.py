"""What layers of large fields take to build is known before anything is built, and no more than their bases need."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from escnn import gspaces
from escnn.group import directsum

from implicit_steer import plan
from implicit_steer.lowering.linear import polished_blocks
from implicit_steer.nn import ImplicitConv, ImplicitKernel, ImplicitPointConv
from implicit_steer.nn._escnn_changes import normalize_basis
from implicit_steer.nn.mlp import Linear, fiber_space

LIMIT = "IMPLICIT_STEER_BUILD_GB"
MEASURE = """
import time
from pathlib import Path
import torch
from escnn import gspaces
from implicit_steer import knn_graph
from implicit_steer.nn import ImplicitPointConv

def peak():  # not getrusage's: a process inherits that of the one that started it
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
REGULAR = """
space = gspaces.rot2dOnR2(24)
fields = space.type(space.regular_repr)
before = peak()
ImplicitPointConv(fields, fields, None, 3, 8)
print(peak() - before)
"""
WIDE = """
space = gspaces.flipRot3dOnR3()
fields = space.type(*[space.trivial_repr] * 128, *[space.irrep(1, 1)] * 128)
pos = torch.randn(10, 3)
x = fields(torch.randn(10, fields.size), pos)
graph = knn_graph(pos, k=3)
before, start = peak(), time.process_time()
conv = ImplicitPointConv(fields, fields, None, 3, 8, backend="cpu").eval()
seconds = time.process_time() - start
with torch.no_grad():
    out = conv(x, graph, pos[graph[1]] - pos[graph[0]]).tensor
    conv.load_state_dict(conv.state_dict())
    print(seconds, peak() - before)
    conv.backend = "eager"
    expected = conv(x, graph, pos[graph[1]] - pos[graph[0]]).tensor
print(float((out - expected).norm() / expected.norm()))
"""


def measured(code):
    """The numbers that a process of its own prints."""
    command = [sys.executable, "-c", MEASURE + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    return map(float, done.stdout.split())


needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


def regular(space, fields=1):
    return space.type(*[space.regular_repr] * fields)


@pytest.fixture
def limit(monkeypatch):
    """Sets the limit, in GB."""
    return lambda gigabytes: monkeypatch.setenv(LIMIT, str(gigabytes))


@pytest.mark.parametrize("space", [lambda: gspaces.rot2dOnR2(64), lambda: gspaces.flipRot2dOnR2(32), gspaces.icoOnR3])
def test_regular_fields_of_large_groups_are_refused(space, limit):
    """Which asked the allocator for up to 275 GB, after minutes."""
    limit(12)
    fields = regular(space())
    expected = rf"at most 12 GB to build, got about 3\d(\.\d)? GB, .* regular -> regular of {fields.fibergroup}\."
    with pytest.raises(ValueError, match=expected + r" Take irreps in place of regular fields"):
        ImplicitPointConv(fields, fields, None, 3, 8)


@pytest.mark.parametrize("build", [ImplicitPointConv, ImplicitConv, ImplicitKernel])
def test_every_layer_asks(build, limit):
    fields = regular(gspaces.rot2dOnR2(8))
    options = {ImplicitPointConv: (None, 3, 8), ImplicitConv: (None, 3, 3, 8), ImplicitKernel: (None, 3, 8)}[build]
    build(fields, fields, *options)
    limit(0.001)
    with pytest.raises(ValueError, match=rf"at most 0\.001 GB .* regular -> regular of C8\..*\${LIMIT} sets another"):
        build(fields, fields, *options)


def test_linear_layers_ask(limit):
    group = gspaces.rot2dOnR2(16).fibergroup
    kind = fiber_space(group, "point").type(directsum([group.regular_representation] * 2, name="two"))
    Linear(kind, kind)
    limit(0.001)
    with pytest.raises(ValueError, match=r"in_type, out_type: expected .* two -> two of C16"):
        Linear(kind, kind)


def many(fields):
    """As many scalars and vectors of O(3)."""
    space = gspaces.flipRot3dOnR3()
    return space.type(*[space.trivial_repr] * fields, *[space.irrep(1, 1)] * fields)


def test_the_weights_of_many_fields_count(limit):
    """The matrix of the biases, of 34 GB for 128 + 128 fields, is never made: the weights alone are left."""
    limit(0.1)
    ImplicitPointConv(many(128), many(128), None, 3, 8)
    with pytest.raises(ValueError, match=r"got about 0\.2\d+ GB, most of it for irrep_1,1 -> irrep_1,1 of O\(3\)"):
        ImplicitPointConv(many(256), many(256), None, 3, 8)


def test_orthonormal_matrices_of_many_fields_count(limit):
    """Of as many rows as the kernel has invariants: 32,768."""
    limit(10)
    expected = r"init_scheme: .* got about 42\.9 GB, most of it for an orthonormal matrix between the copies of"
    with pytest.raises(ValueError, match=expected):
        ImplicitPointConv(many(128), many(128), None, 3, 8, "deltaorthonormal")


@pytest.mark.parametrize("value", ["much", "nan", "0"])
def test_a_limit_that_is_no_number(value, limit):
    limit(value)
    fields = regular(gspaces.rot2dOnR2(2))
    with pytest.raises(ValueError, match=rf"\${LIMIT}: expected a number of GB > 0, got '{value}'"):
        ImplicitPointConv(fields, fields, None, 3, 8)


def test_long_builds_are_announced(monkeypatch):
    monkeypatch.setattr("implicit_steer.nn.size._LONG", 1e5)
    fields = regular(gspaces.rot2dOnR2(8))
    with pytest.warns(UserWarning, match=r"this layer takes about 0\.\d+ GB to build, and may take minutes"):
        ImplicitKernel(fields, fields)


@needs_linux
def test_128_scalars_and_vectors():
    """A dense matrix that expands its biases would take 34 GB."""
    seconds, peak, error = measured(WIDE)
    assert seconds < 10  # measured: 0.5
    assert peak < 500e6  # measured: 100 MB
    assert error < 1e-5


@needs_linux
def test_peak_and_estimate(limit):
    """The peak is below the products of all basis elements with themselves alone, and the estimate is true."""
    (peak,) = (number / 1e9 for number in measured(REGULAR))
    assert peak < 0.5  # 24^6 float32 numbers: 0.76 GB
    fields = regular(gspaces.rot2dOnR2(24))
    limit(0.8 * peak)
    with pytest.raises(ValueError, match="regular -> regular of C24"):
        ImplicitPointConv(fields, fields, None, 3, 8)
    limit(2.5 * peak)
    ImplicitPointConv(fields, fields, None, 3, 8)


def test_normalised_without_products():
    """As escnn does with them: up to rounding, and with every bit where they are few."""
    sizes = torch.tensor([1.0, 2.0, 3.0])
    basis = torch.randn(3, 5000, 4, 1)
    basis[2] = 0
    expected = basis / torch.tensor([basis[0].norm(), basis[1].norm() / 2**0.5, 1.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(normalize_basis(basis.clone(), sizes), expected)
    small = basis[:, :5].clone()
    products = torch.einsum("bop...,bpq...->boq...", small, small.transpose(1, 2))
    norms = (torch.einsum("bii...->b", products) / sizes).sqrt()
    norms[2] = 1
    torch.testing.assert_close(normalize_basis(small.clone(), sizes), small / norms.view(3, 1, 1, 1), rtol=0, atol=0)


def test_the_exact_basis_is_kept_once():
    """Finite groups read hidden fields as they are: the plan holds the basis that was made exact, no copy of it."""
    fields = regular(gspaces.rot2dOnR2(6))
    kernel = ImplicitKernel(fields, fields)
    exact = polished_blocks(kernel.mlp.linears[-1].basisexpansion)
    bases = [c.basis for c in kernel.plan.couplings if c.parameter == "weights"]
    assert any(np.shares_memory(basis, block) for basis in bases for block in exact.values())


def test_plans_copy_what_can_be_written():
    frozen, other = np.eye(3), np.eye(3)
    frozen.flags.writeable = False
    view = other[:]
    view.flags.writeable = False  # through ``other`` it can still be written
    frames = [plan.Frame("none", 3, attribute=a, order=np.zeros(0, dtype=int)) for a in (frozen, view)]
    assert np.shares_memory(frames[0].attribute, frozen)
    assert not np.shares_memory(frames[1].attribute, view)
