"""The certificate of a potential: sound ones pass, and each way to spoil one is caught by the check meant for it."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from ase.build import bulk, molecule

from implicit_steer.__main__ import main
from implicit_steer.layers import PotentialNet
from implicit_steer.potentials import Potential
from implicit_steer.potentials.certificate import BOUNDS, MEANING, Bound, certify

CUTOFF = 3.0


def make(**options):
    """A potential of H, O and Cu with forces of some eV/Å."""
    torch.manual_seed(0)
    potential = Potential([1, 8, 29], CUTOFF, channels=4, **options).double()
    potential.scale.fill_(30.0)
    potential.degree.fill_(0.5)
    return potential


@pytest.fixture(scope="module")
def structures():
    """A molecule off its equilibrium, and a crystal in a skewed box."""
    water, crystal = molecule("H2O"), bulk("Cu", "fcc", a=3.0, cubic=True)
    water.rattle(0.05, seed=0)
    crystal.set_cell([[3.1, 0.1, 0], [0, 2.9, 0.4], [0.3, 0, 3.0]], scale_atoms=True)
    crystal.rattle(0.1, seed=1)
    return [water, crystal]


def test_every_check_has_a_bound_and_a_meaning():
    assert list(BOUNDS) == list(MEANING)


def test_sound_potentials(structures):
    """In both dtypes, with and without tables."""
    found = certify(make(), structures, backends=["cpu"], steps=20)
    assert found.ok, str(found)
    assert len({(f.dtype, f.kernel) for f in found.findings}) == 4
    assert len(found.findings) == 4 * len(BOUNDS) - 2  # the MLPs are not compared with tables
    exact = {f.check: f.value for f in found.findings if (f.dtype, f.kernel) == ("float64", "mlp")}
    assert exact["forces"] < 1e-9
    assert exact["rotation"] < 1e-12
    assert "All bounds hold." in str(found)


def test_all_backends_that_run_here(structures):
    found = certify(make(), structures, dtypes=["float64"], kernels=["mlp"], checks=["forces", "hessian"])
    assert found.ok, str(found)
    assert {"cpu", "eager"} <= {f.backend for f in found.findings}


def test_frozen_potentials(structures):
    found = certify(make().freeze_table(), structures, backends=["cpu"], dtypes=["float64"], steps=20)
    assert found.ok, str(found)
    assert {f.kernel for f in found.findings} == {"table"}


# ---- spoilt ones


class _Leaky(torch.autograd.Function):
    """The identity whose derivative lacks a thousandth of one component."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * g.new_tensor([1, 1, 0.999])


class Backward(PotentialNet):
    """A backward pass that is wrong in one component."""

    def atomic_energies(self, species, graph, edge_delta):
        return super().atomic_energies(species, graph, _Leaky.apply(edge_delta))


class Axis(PotentialNet):
    """An energy that knows a direction in space."""

    def atomic_energies(self, species, graph, edge_delta):
        lengths = edge_delta.norm(dim=1) / self.cutoff
        term = 1e-4 * edge_delta[:, 2].square() * (1 - lengths).clamp(min=0) ** 3
        return super().atomic_energies(species, graph, edge_delta).index_add(0, graph.dst, term.double())


class Changed(PotentialNet):
    """What a subclass's ``change`` makes of a prediction."""

    def predict(self, structures, **options):
        return self.change(structures, super().predict(structures, **options))


class Source(Changed):
    """Forces on one atom of a pair alone."""

    def change(self, structures, found):
        first = torch.zeros_like(found.forces)
        first[0] = 1e-3
        return found._replace(forces=found.forces + first)


class Curl(Changed):
    """Forces that are no gradient, in the order of the atoms."""

    def change(self, structures, found):
        center = structures.pos - structures.pos.mean(0)
        turned = torch.linalg.cross(center, center.new_tensor([0.0, 0.0, 1e-3]).expand_as(center))
        return found._replace(forces=found.forces + turned.to(found.forces))


class Stress(Changed):
    """The stress with the sign of a pressure."""

    def change(self, structures, found):
        return found if found.stress is None else found._replace(stress=-found.stress)


class Order(Changed):
    """A force that depends on an atom's number in the file."""

    def change(self, structures, found):
        factor = 1 + 1e-3 * torch.arange(len(found.forces), dtype=found.forces.dtype)[:, None]
        return found._replace(forces=found.forces * factor)


class Noise(Changed):
    """Sums in another order in every run."""

    def change(self, structures, found):
        return found._replace(forces=found.forces * (1 + 1e-15 * torch.randn(1, dtype=found.forces.dtype)))


class Units(Changed):
    """Forces in other units than the energy."""

    def change(self, structures, found):
        return found._replace(forces=1.001 * found.forces)


def hard_cutoff(potential):
    """Kernels that do not end where the neighbours do."""
    for conv in potential.convolutions:
        kernel = conv.implicit_kernel
        kernel._set_plan(replace(kernel.plan, cutoff=1.5))


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (Backward, "forces"),
        (Units, "forces"),
        (Source, "net force"),
        (Curl, "hessian"),
        (Stress, "stress"),
        (Axis, "rotation"),
        (Axis, "net torque"),
        (Order, "permutation"),
        (Noise, "determinism"),
        (hard_cutoff, "cutoff"),
    ],
)
@pytest.mark.parametrize("kernel", ["mlp", "table"])
def test_spoilt_potentials_are_caught(structures, spoil, check, kernel):
    potential = copy.deepcopy(make() if kernel == "mlp" else make().freeze_table())
    options = {"backends": ["cpu"], "dtypes": ["float64"], "kernels": [kernel], "checks": [check]}
    assert certify(potential, structures, **options).ok
    if isinstance(spoil, type):
        potential.__class__ = type(spoil.__name__, (spoil, type(potential)), {})
    else:
        spoil(potential)
    found = certify(potential, structures, **options)
    assert [f.check for f in found.broken] == [check], str(found)
    assert "BROKEN" in str(found)


class Tenth(Changed):
    """Forces that are too large by a tenth."""

    def change(self, structures, found):
        return found._replace(forces=1.1 * found.forces)


def test_dynamics_of_forces_that_are_no_gradient(structures):
    options = {"backends": ["cpu"], "checks": ["dynamics"], "dtypes": ["float64"], "kernels": ["mlp"], "steps": 40}
    potential = make()
    assert certify(potential, structures[:1], **options).ok
    potential.__class__ = type("Tenth", (Tenth, Potential), {})
    assert not certify(potential, structures[:1], **options).ok


def test_a_bound_that_is_nan_is_broken(structures):
    potential = make()
    potential.scale.fill_(float("nan"))
    found = certify(potential, structures[:1], backends=["cpu"], checks=["forces"], dtypes=["float64"])
    assert not found.ok


def test_own_bounds(structures):
    bounds = BOUNDS | {"forces": Bound(0.0, 0.0)}
    options = {"backends": ["cpu"], "dtypes": ["float64"], "checks": ["forces"]}
    assert not certify(make(), structures, bounds=bounds, **options).ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ["gpu"]}, "backends: expected some of .*, got .'gpu'"),
        ({"dtypes": ["float16"]}, "dtypes: expected some of"),
        ({"kernels": []}, "kernels: expected some of .* got none"),
        ({"checks": ["energy"]}, "checks: expected some of"),
        ({"structures": []}, "structures: expected at least one"),
    ],
)
def test_wrong_arguments(structures, options, message):
    with pytest.raises(ValueError, match=message):
        certify(make(), **{"structures": structures} | options)


def test_other_modules():
    with pytest.raises(TypeError, match="potential: expected a Potential, got Linear"):
        certify(torch.nn.Linear(1, 1), [])


# ---- the command


def test_command_line(structures, tmp_path, capsys):
    make().save(tmp_path / "potential.pt")
    for n, atoms in enumerate(structures):
        atoms.write(tmp_path / f"{n}.xyz")
    files = [str(tmp_path / f"{n}.xyz") for n in range(2)]
    quick = ["--backends", "cpu", "--dtypes", "float64", "--kernels", "mlp", "--steps", "10", "--no-progress"]
    main(
        ["certify", str(tmp_path / "potential.pt"), "--structures", *files, "--json", str(tmp_path / "c.json"), *quick]
    )
    printed = capsys.readouterr().out
    assert "Certificate on 2 structures" in printed
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["ok"]
    assert {found["check"] for found in written["findings"]} == set(BOUNDS) - {"table"}


def test_exit_code(structures, tmp_path, capsys):
    potential = make()
    hard_cutoff(potential)
    import implicit_steer as ist

    ist.save(potential, tmp_path / "spoilt.safetensors")
    structures[0].write(tmp_path / "water.xyz")
    quick = ["--backends", "cpu", "--dtypes", "float64", "--kernels", "mlp", "--checks", "cutoff", "--no-progress"]
    with pytest.raises(SystemExit) as status:
        main(["certify", str(tmp_path / "spoilt.safetensors"), "--structures", str(tmp_path / "water.xyz"), *quick])
    assert status.value.code == 1
    assert "1 of 1 bounds are broken" in capsys.readouterr().out
