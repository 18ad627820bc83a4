"""Packages of AOTInductor, loaded in Python and by a C++ program without Python, against the models themselves."""

import subprocess
from pathlib import Path

import pytest
import torch
from ase.build import bulk, molecule

from implicit_steer import deploy
from implicit_steer.graph.structures import Structures
from implicit_steer.irreps import ImplicitPointConv
from implicit_steer.potentials import Potential
from implicit_steer.potentials.ase import from_atoms

PROGRAM = Path(__file__).parent.parent / "aoti"
CUTOFF = 3.0
STRUCTURES = {"benzene": lambda: molecule("C6H6"), "water": lambda: molecule("H2O"), "crystal": lambda: bulk("C")}


def potential(dtype=torch.float64, **options):
    torch.manual_seed(0)
    potential = Potential([1, 6, 8], CUTOFF, channels=2, radial=2, kernel_channels=4, **options).to(dtype)
    potential.scale.fill_(100.0)
    potential.shift.copy_(torch.tensor([-13.0, -1030.0, -2040.0]))
    return potential


def structure(name, dtype=torch.float64):
    atoms = STRUCTURES[name]()
    atoms.rattle(0.05, seed=1)
    if atoms.cell.rank == 0:
        atoms.set_cell([10, 10, 10])  # so that the potential gives a stress
    return from_atoms(atoms, CUTOFF, dtype)


def expected(potential, structures):
    """What the package gives."""
    energy, energies, forces, stress = potential.predict(structures, stress=True)
    return energy, energies, forces, -stress[0] * torch.linalg.det(structures.cell[0]).abs()


def assert_close(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        scale = b.abs().max().item()
        assert scale > 0.01
        torch.testing.assert_close(a.view(b.shape), b, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "potential.pt2"
    deploy.package(potential(), path)
    return path


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_package_is_the_potential(packaged, name):
    """Also at other sizes than those it was made with."""
    structures = structure(name)
    found = torch._inductor.aoti_load_package(str(packaged))(*inputs(structures))
    assert_close(found, expected(potential(), structures), 1e-12)


def inputs(structures: Structures):
    return structures.numbers, structures.pos, structures.cell[0], structures.edge_index, structures.shift


def test_a_program_without_python(packaged, tmp_path):
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["-S", PROGRAM, "-B", tmp_path, "-G", "Ninja", prefix], ["--build", tmp_path]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    program = tmp_path / "predict"
    printed = subprocess.run(["ldd", program, deploy.OPERATORS], capture_output=True, text=True, check=True).stdout
    libraries = {line.split()[0] for line in printed.splitlines() if "=>" in line}
    assert "libtorch_cpu.so" in libraries
    assert not any("python" in name for name in libraries)

    def run(structures):
        sizes = [len(structures.numbers), structures.edge_index.shape[1]]
        text = " ".join(map(repr, sizes + [v for tensor in inputs(structures) for v in tensor.flatten().tolist()]))
        command = [program, packaged, deploy.OPERATORS]
        return subprocess.run(command, input=text, capture_output=True, text=True)

    for name in STRUCTURES:
        structures = structure(name)
        done = run(structures)
        assert done.returncode == 0, done.stderr
        found = [
            torch.tensor([float(v) for v in line.split()], dtype=torch.float64) for line in done.stdout.splitlines()
        ]
        assert_close(found, expected(potential(), structures), 1e-12)
    done = run(from_atoms(molecule("NH3"), CUTOFF))
    assert done.returncode != 0
    assert "numbers: expected atomic numbers among [1, 6, 8], got others." in done.stderr


def test_every_option_frozen_in_float32(tmp_path):
    whole = potential(torch.float32, depthwise=True, correlation=2, zbl=True)
    frozen, structures = whole.freeze_table(knots=64), structure("crystal", torch.float32)
    deploy.package(frozen, tmp_path / "frozen.pt2")
    found = torch._inductor.aoti_load_package(str(tmp_path / "frozen.pt2"))(*inputs(structures))
    assert [t.dtype for t in found] == [torch.float64, torch.float64, torch.float32, torch.float32]
    assert_close(found, expected(frozen, structures), 1e-5)


def test_a_layer(tmp_path):
    torch.manual_seed(0)
    conv = ImplicitPointConv("2x0e+2x1o", "3x0e+2x1o").double()

    def given(nodes, edges):
        generator = torch.Generator().manual_seed(nodes)
        x, vectors = (torch.randn(n, d, generator=generator).double() for n, d in ((nodes, 8), (edges, 3)))
        return x, torch.randint(0, nodes, (2, edges), generator=generator), vectors

    nodes, edges = torch.export.Dim("nodes", min=2), torch.export.Dim("edges", min=2)
    deploy.package(conv, tmp_path / "conv.pt2", given(5, 20), ({0: nodes}, {1: edges}, {0: edges}))
    other = given(9, 31)
    found = torch._inductor.aoti_load_package(str(tmp_path / "conv.pt2"))(*other)
    torch.testing.assert_close(found, conv(*other), rtol=1e-12, atol=1e-12)


def test_messages(tmp_path):
    small = potential()
    with pytest.raises(ValueError, match=r"path: expected a file that ends in \.pt2, got model\.so"):
        deploy.package(small, "model.so")
    with pytest.raises(ValueError, match="inputs: expected none for a potential, got some"):
        deploy.package(small, tmp_path / "a.pt2", inputs(structure("water")))
    with pytest.raises(ValueError, match="inputs: expected an example of what forward takes, got none"):
        deploy.package(small.convolutions[0], tmp_path / "a.pt2")
    with pytest.raises(TypeError, match="Bilinear: expected one of"):
        deploy.package(torch.nn.Bilinear(2, 2, 2), tmp_path / "a.pt2", ())
