"""Layers of every group are built in seconds where nothing is cached, with products of irreps that are right and the
same everywhere."""

import itertools
import json
import subprocess
import sys

import escnn.group._clebsh_gordan
import escnn.nn
import numpy as np
import pytest
import torch
from escnn import gspaces
from escnn.group import cyclic_group, dihedral_group, direct_product, ico_group, octa_group

from implicit_steer.lowering import clebsch_gordan
from implicit_steer.nn import ImplicitPointConv, mlp
from implicit_steer.testing.cases import SMALL

GROUPS = {
    **{f"D{n}": lambda n=n: dihedral_group(n) for n in (1, 2, 3, 4, 5, 8, 12)},
    "octahedral": octa_group,
    "icosahedral": ico_group,
    "C2 x D3": lambda: direct_product(cyclic_group(2), dihedral_group(3)),
    "C2 x C5": lambda: direct_product(cyclic_group(2), cyclic_group(5)),
    "C3 x C4": lambda: direct_product(cyclic_group(3), cyclic_group(4)),
    "C3 x D3": lambda: direct_product(cyclic_group(3), dihedral_group(3)),
}
# Spaces whose layers took half a minute to many minutes.
SLOW = ["flipRot2dOnR2(12)", "flipRot2dOnR2(32)", "fullOctaOnR3()", "fullCylindricalOnR3(12)"]
BUILD = """
import json, time
import joblib
joblib.Memory = lambda *_, memory=joblib.Memory, **__: memory(None)  # escnn keeps nothing, and finds nothing kept
import escnn
from escnn import gspaces
from implicit_steer.nn import ImplicitPointConv

seconds = {}
for name in %r:
    start = time.process_time()
    space = eval("gspaces." + name)
    fields = space.type(*[space.trivial_repr] * 8, *[space.basespace_action] * 8)
    ImplicitPointConv(fields, fields, None, 3, 8)
    seconds[name] = time.process_time() - start
print(json.dumps(seconds))
"""


@pytest.fixture
def no_search(monkeypatch):
    """escnn's numerical search for Clebsch-Gordan coefficients fails."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"searched numerically: {args}, {kwargs}")

    monkeypatch.setattr(escnn.group._clebsh_gordan, "_clebsh_gordan_tensor", refuse)
    monkeypatch.setattr(escnn.group._clebsh_gordan, "_find_tensor_decomposition", refuse)


def test_first_builds_take_seconds():
    done = subprocess.run([sys.executable, "-c", BUILD % SLOW], capture_output=True, text=True, timeout=120, check=True)
    seconds = json.loads(done.stdout.splitlines()[-1])
    assert max(seconds.values()) < 10, seconds  # measured: at most 2


@pytest.mark.parametrize("name", GROUPS)
def test_products_of_irreps(name, no_search):
    """Of all irreps: complete, orthonormal, and intertwining for every element."""
    group = GROUPS[name]()
    clebsch_gordan.install(group)
    matrices = {irrep.id: np.stack([irrep(g) for g in group.elements]) for irrep in group.irreps()}
    for m, n in itertools.product(matrices, repeat=2):
        both = np.stack([np.kron(a, b) for a, b in zip(matrices[m], matrices[n], strict=True)])
        found = dict(group._tensor_product_irreps(m, n))
        columns = []
        for j, of_j in matrices.items():
            c = group._clebsh_gordan_coeff(m, n, j)
            assert c.shape == (group.irrep(*m).size, group.irrep(*n).size, found.get(j, 0), group.irrep(*j).size)
            for copy in c.transpose(2, 0, 1, 3).reshape(c.shape[2], both.shape[1], c.shape[3]):
                np.testing.assert_allclose(both @ copy, copy @ of_j, atol=1e-12)
                columns.append(copy)
        columns = np.hstack(columns)
        assert columns.shape == both.shape[1:]
        np.testing.assert_allclose(columns.T @ columns, np.eye(len(columns)), atol=1e-12)


@pytest.mark.parametrize("name", ["D4", "C2 x C5"])
def test_multiplicities_are_counted_as_escnn_does(name, no_search, monkeypatch):
    """Irreps of complex type, of which escnn counts one copy per orbit under endomorphisms."""
    group = GROUPS[name]()
    clebsch_gordan.install(group)
    monkeypatch.undo()
    ids = [irrep.id for irrep in group.irreps()]
    for m, n, j in [(ids[-1], ids[-1], ids[0]), (ids[-1], ids[-1], ids[-1]), (ids[1], ids[-1], ids[-1])]:
        ours, theirs = group._clebsh_gordan_coeff(m, n, j), type(group)._clebsh_gordan_coeff(group, m, n, j)
        assert ours.shape == theirs.shape
        ours, theirs = (c.reshape(c.shape[0] * c.shape[1], -1) for c in (ours, theirs))
        np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-12)


def test_dihedral_coefficients_have_a_closed_form(no_search):
    """Whose numbers are 0, 1 and √½, so that no rounding decides about a sign."""
    group = dihedral_group(9)
    clebsch_gordan.install(group)
    product = group._clebsh_gordan_coeff((1, 3), (1, 4), (1, 2))[:, :, 0]  # 3 + 4 = 9 − 2: conjugated
    np.testing.assert_array_equal(np.sign(product), [[[1, 0], [0, -1]], [[0, -1], [-1, 0]]])
    np.testing.assert_allclose(np.abs(product[product != 0]), np.sqrt(0.5), rtol=1e-15)
    np.testing.assert_array_equal(group._clebsh_gordan_coeff((1, 0), (1, 0), (0, 0)), [[[[1]]]])


@pytest.mark.parametrize("space", [lambda: gspaces.flipRot2dOnR2(7), lambda: gspaces.dihedralOnR3(5), gspaces.octaOnR3])
def test_layers_build_without_a_search(space, no_search):
    space = space()
    fields = space.type(space.trivial_repr, space.basespace_action, space.regular_repr)
    conv = ImplicitPointConv(fields, fields, None, 2, 2).double()
    x, edges = torch.randn(4, fields.size).double(), torch.tensor([[0, 1, 2, 3], [1, 0, 1, 2]])
    delta = torch.randn(4, space.dimensionality).double()
    element = list(space.fibergroup.elements)[-1]
    turn = torch.tensor(space.basespace_action(element))
    rho = torch.tensor(fields.representation(element))
    out = conv(fields(x, torch.zeros(4, space.dimensionality)), edges, delta).tensor
    turned = conv(fields(x @ rho.T, torch.zeros(4, space.dimensionality)), edges, delta @ turn.T).tensor
    torch.testing.assert_close(turned, out @ rho.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["o3-mixed", "so2-mixed", "d4", "octa-r3"])
def test_initial_deviations_are_those_of_escnn(name):
    """Which describes every single weight for it, seconds for wide layers."""
    for linear in SMALL[name].layer().implicit_kernel.mlp.linears:
        theirs = escnn.nn.init._generalized_he_init_variances(linear.basisexpansion)
        torch.testing.assert_close(mlp.he_deviation(linear.basisexpansion), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("make", [octa_group, ico_group])
def test_irreps_of_polyhedral_groups(make):
    """escnn makes them from generators, which takes it many seconds: as it checks every product of two elements."""
    group = make()
    elements = group.elements
    for irrep in group.irreps():
        for g, h in zip(elements, reversed(elements), strict=True):
            np.testing.assert_allclose(irrep(g) @ irrep(h), irrep(g @ h), atol=1e-12)
