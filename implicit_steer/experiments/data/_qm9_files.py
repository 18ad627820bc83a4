"""QM9's source files and cache chunks: reading, bond perception, atomic writing, and checks of damaged files."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..._check import fail, load_extra, require

ELEMENTS = ("H", "C", "N", "O", "F")
BONDS = {"SINGLE": 0, "DOUBLE": 1, "TRIPLE": 2, "AROMATIC": 3}  # RDKit's names → numbers in a chunk
HARTREE_MEV = 27211.386246
# Of files whose numbers are ASCII: a title in another encoding, which nobody reads, is no error.
TEXT = {"encoding": "utf-8-sig", "errors": "replace"}


class Target(NamedTuple):
    """A property: its column in qm9pack's and in PyG's CSV files, its unit here, and the factor to that unit."""

    packed: str
    raw: str
    unit: str
    scale: float


TARGETS = {
    "mu": Target("Dipole_debye", "mu", "D", 1.0),
    "alpha": Target("Polarizability_bohr3", "alpha", "bohr^3", 1.0),
    "homo": Target("HOMO_au", "homo", "meV", HARTREE_MEV),
    "lumo": Target("LUMO_au", "lumo", "meV", HARTREE_MEV),
    "gap": Target("HOMO_LUMO_gap_au", "gap", "meV", HARTREE_MEV),
    "r2": Target("R2_bohr2", "r2", "bohr^2", 1.0),
    "zpve": Target("ZPVE_au", "zpve", "meV", HARTREE_MEV),
    "U0": Target("InternalEnergy_0K_au", "u0", "meV", HARTREE_MEV),
    "U": Target("InternalEnergy_298K_au", "u298", "meV", HARTREE_MEV),
    "H": Target("Enthalphy_298K_au", "h298", "meV", HARTREE_MEV),
    "G": Target("GibbsFreeEnergy_298K_au", "g298", "meV", HARTREE_MEV),
    "Cv": Target("Heatcapacity_Cv_cal_mol_K", "cv", "cal/(mol K)", 1.0),
}

POLARIZABILITY = "qm9_polarizability.csv"  # of qm9pack: a row per molecule, in the order of the other files
TENSOR_COLUMNS = ("A_xx", "A_xy", "A_yy", "A_xz", "A_yz", "A_zz")

# Energies of the free atoms H, C, N, O, F in hartree (the data set's atomref.txt).
FREE_ATOMS = {
    "U0": (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730),
    "U": (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314),
    "H": (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370),
    "G": (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544),
}


class Molecule(NamedTuple):
    """element (n,) uint8; position (n, 3) Å; edge (2·bonds, 2) uint8, both directions, by target; bond (2·bonds,)."""

    element: np.ndarray
    position: np.ndarray
    edge: np.ndarray
    bond: np.ndarray
    single_bonded: bool


class Row(NamedTuple):
    """Of a CSV file: its place there, for messages, and the columns asked for, as text."""

    place: str
    fields: tuple[str, ...]


class PackedCsv:
    """``qm9_part1.csv``, ``qm9_part2.csv``, ``qm9_part3.csv`` of the package ``qm9pack`` 1.0.3."""

    ROWS = {"qm9_part1.csv": 43_610, "qm9_part2.csv": 43_611, "qm9_part3.csv": 43_610}  # noqa: RUF012 - constant
    REMEDY = "The file is damaged or of another version. Run: pip install --force-reinstall --no-deps qm9pack==1.0.3"

    def __init__(self, folder: Path):
        self.folder = folder
        for path in self.files():
            require(path.exists(), str(path), "a file of qm9pack 1.0.3", "no such file", self.REMEDY)

    def files(self) -> list[Path]:
        """The files that determine the data."""
        return [self.folder / name for name in self.ROWS]

    def count(self) -> int:
        """Number of molecules."""
        return sum(self.ROWS.values())

    def read(self, rows: np.ndarray) -> dict[int, tuple]:
        """row → (elements, positions, properties), as text, and its place."""
        wanted, records, first = set(rows.tolist()), {}, 0
        columns = ["Elements", "XYZ_Ang", *(target.packed for target in TARGETS.values())]
        for path in self.files():
            last = first
            for place, fields in _csv_rows(path, columns, self.REMEDY):
                if last in wanted:
                    records[last] = (fields[0], fields[1], fields[2:], place)
                last += 1
            expected = self.ROWS[path.name]
            require(last - first == expected, str(path), f"{expected} molecules", last - first, self.REMEDY)
            first = last
        return records

    def polarizability(self) -> np.ndarray:
        """(M, 3, 3) of all molecules in bohr³, each along axes of its own (see
        :class:`~implicit_steer.experiments.data.QM9`)."""
        path = self.folder / POLARIZABILITY
        require(path.exists(), str(path), "a file of qm9pack 1.0.3", "no such file", self.REMEDY)
        found = _csv_rows(path, list(TENSOR_COLUMNS), self.REMEDY)
        rows = np.array([_numbers(place, TENSOR_COLUMNS, fields, self.REMEDY) for place, fields in found])
        require(len(rows) == self.count(), str(path), f"{self.count()} molecules", len(rows), self.REMEDY)
        return rows[:, [0, 1, 3, 1, 2, 4, 3, 4, 5]].reshape(-1, 3, 3)

    def parse(self, record: tuple) -> Molecule:
        """Atoms from the text, bonds from the positions."""
        elements, text, _, place = record
        symbols, coordinates = elements[2:-2].split("','"), text[2:-2].replace("],[", ",").split(",")
        _check_elements(f"{place}, column Elements", symbols, self.REMEDY)
        name, expected = f"{place}, column XYZ_Ang", f"{len(symbols)} positions"
        require(len(coordinates) == 3 * len(symbols), name, expected, f"{len(coordinates)} coordinates", self.REMEDY)
        numbers = _numbers(place, ["XYZ_Ang"] * len(coordinates), coordinates, self.REMEDY)
        position = np.array(numbers).reshape(-1, 3)
        molecule, single_bonded = perceive_bonds(symbols, position)
        return _molecule(molecule, position, single_bonded)

    def properties(self, record: tuple) -> list[float]:
        """The twelve properties of a record."""
        return _numbers(record[3], [target.packed for target in TARGETS.values()], record[2], self.REMEDY)


class RawSdf:
    """PyG's raw files: ``gdb9.sdf``, ``gdb9.sdf.csv``, and the rows left out, ``uncharacterized.txt``."""

    REMEDY = "The file is damaged or of another version: fetch the raw files of QM9 again."

    def __init__(self, folder: Path):
        self.folder = folder
        for path in self.files():
            require(path.exists(), str(path), "one of QM9's three raw files", "no such file", self.REMEDY)
        columns = [target.raw for target in TARGETS.values()]
        self._properties = list(_csv_rows(folder / "gdb9.sdf.csv", columns, self.REMEDY))
        self._kept = np.setdiff1d(np.arange(len(self._properties)), self._left_out())

    def files(self) -> list[Path]:
        """The files that determine the data."""
        return [self.folder / name for name in ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt")]

    def count(self) -> int:
        """Number of molecules."""
        return len(self._kept)

    def read(self, rows: np.ndarray) -> dict[int, tuple]:
        """row → (record of the SDF, the line on which it begins, row of the CSV file), as text."""
        path = self.folder / "gdb9.sdf"
        *blocks, rest = re.split(r"^\$\$\$\$.*(?:\n|\Z)", path.read_text(**TEXT), flags=re.MULTILINE)
        expected = f"{len(self._properties)} molecules, each closed by $$$$, as in gdb9.sdf.csv"
        got = f"{len(blocks)}" + (" and an unfinished one" if rest.strip() else "")
        require(got == str(len(self._properties)), str(path), expected, got, self.REMEDY)
        first = np.cumsum([1, *(block.count("\n") + 1 for block in blocks)]).tolist()  # lines on which they begin
        places = zip(rows.tolist(), self._kept[rows].tolist(), strict=True)
        return {row: (blocks[n], first[n], self._properties[n]) for row, n in places}

    def parse(self, record: tuple) -> Molecule:
        """Atoms and bonds of the record."""
        block, first, _ = record
        path = self.folder / "gdb9.sdf"
        title, *lines = block.split("\n")
        count = lines[2][:3].strip() if len(lines) > 2 else ""
        atoms = lines[3 : 3 + int(count)] if count.isdecimal() else []
        for line, text in enumerate(atoms, start=first + 4):
            # Columns of fixed width; RDKit takes an empty one for 0.
            _numbers(f"{path}, line {line}", "xyz", (text[:10], text[10:20], text[20:30]), self.REMEDY)
            _check_elements(f"{path}, line {line}", [text[31:34].strip()], self.REMEDY)
        chem, place = load_extra("rdkit.Chem"), f"{path}, line {first}"
        molecule = chem.MolFromMolBlock("\n".join(["", *lines]), sanitize=False, removeHs=False)
        require(molecule is not None, place, "a readable record", repr(title), self.REMEDY)
        strange = {str(bond.GetBondType()) for bond in molecule.GetBonds()} - BONDS.keys()
        require(not strange, place, f"bonds among {list(BONDS)}", sorted(strange), self.REMEDY)
        return _molecule(molecule, molecule.GetConformer().GetPositions(), single_bonded=False)

    def properties(self, record: tuple) -> list[float]:
        """The twelve properties of a record."""
        place, fields = record[2]
        return _numbers(place, [target.raw for target in TARGETS.values()], fields, self.REMEDY)

    def _left_out(self) -> np.ndarray:
        # Nine header lines, one molecule per line that starts with its number (from 1), one footer line.
        path, numbers = self.folder / "uncharacterized.txt", []
        last = len(self._properties)
        for line, text in list(enumerate(path.read_text(**TEXT).rstrip().splitlines(), start=1))[9:-1]:
            number, expected = (text.split() or [""])[0], f"a number from 1 to {last} at the start of each line"
            ok = number.isascii() and number.isdigit() and 1 <= int(number) <= last
            require(ok, str(path), expected, f"{text!r} in line {line}", self.REMEDY)
            numbers.append(int(number))
        return np.array(numbers, dtype=np.int64) - 1


def _csv_rows(path: Path, columns: list[str], remedy: str) -> Iterator[Row]:
    """The named columns of each row. ``ValueError`` on a missing column or a row that is not complete."""
    with path.open(newline="", **TEXT) as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            for column in columns:
                require(column in header, str(path), f"a column {column}", header, remedy)
            picked = [header.index(column) for column in columns]
            for row in reader:
                if len(row) != len(header):
                    fail(f"{path}, line {reader.line_num}", f"{len(header)} columns", len(row), remedy)
                yield Row(f"{path}, line {reader.line_num}", tuple(row[column] for column in picked))
        except csv.Error as error:
            fail(f"{path}, line {reader.line_num}", "fields separated by commas", error, remedy)
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        require(file.read() == b"\n", str(path), "a last line that is complete", "one without its end", remedy)


def _numbers(place: str, columns: Sequence[str], fields: Sequence[str], remedy: str) -> list[float]:
    """The fields, one for each of ``columns``, as numbers. ``ValueError`` names the one that is none, or not finite."""
    numbers = []
    for column, text in zip(columns, fields, strict=True):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            fail(f"{place}, column {column}", "a finite number", repr(text), remedy)
        numbers.append(number)
    return numbers


def _check_elements(name: str, symbols: Sequence[str], remedy: str) -> None:
    unknown = sorted(set(symbols) - set(ELEMENTS))
    require(not unknown, name, f"elements among {', '.join(ELEMENTS)}", unknown, remedy)


def perceive_bonds(symbols: list[str], position: np.ndarray):
    """An RDKit molecule with bond orders for a neutral molecule, and whether they had to be left single.

    Connectivity by connect-the-dots; where that finds no valid bond orders (1 molecule in 20: short contacts in cages
    count as bonds), by covalent radii × 1.15; where that fails too, all bonds are single.
    """
    chem, perception = load_extra("rdkit.Chem"), load_extra("rdkit.Chem.rdDetermineBonds")
    atoms = zip(symbols, position.tolist(), strict=True)
    lines = (f"{symbol} {x:.10f} {y:.10f} {z:.10f}" for symbol, (x, y, z) in atoms)
    block = "\n".join([str(len(symbols)), "", *lines, ""])
    radii = {"useVdw": True, "covFactor": 1.15}
    for connectivity in ({}, radii):
        molecule = chem.MolFromXYZBlock(block)
        try:
            perception.DetermineBonds(molecule, charge=0, **connectivity)
            return molecule, False
        except ValueError:  # RDKit's word for "no valid bond orders"
            continue
    molecule = chem.MolFromXYZBlock(block)
    perception.DetermineConnectivity(molecule, **radii)
    return molecule, True


def _molecule(molecule, position: np.ndarray, single_bonded: bool) -> Molecule:
    element = np.array([ELEMENTS.index(atom.GetSymbol()) for atom in molecule.GetAtoms()], dtype=np.uint8)
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), BONDS[str(b.GetBondType())]) for b in molecule.GetBonds()]
    directed = sorted((target, source, kind) for i, j, kind in bonds for source, target in ((i, j), (j, i)))
    table = np.array(directed, dtype=np.uint8).reshape(-1, 3)
    return Molecule(element, position, table[:, [1, 0]], table[:, 2], single_bonded)


def make_chunk(source: PackedCsv | RawSdf, records: dict[int, tuple], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Molecules ``rows`` as flat arrays; the targets, in the order of :data:`TARGETS`, in their units."""
    with _quiet():
        molecules = [source.parse(records[row]) for row in rows.tolist()]
    values = np.array([source.properties(records[row]) for row in rows.tolist()], dtype=np.float64)
    counts = np.array([np.bincount(molecule.element, minlength=len(ELEMENTS)) for molecule in molecules])
    for column, (name, target) in enumerate(TARGETS.items()):
        free = counts @ np.array(FREE_ATOMS.get(name, np.zeros(len(ELEMENTS))))
        values[:, column] = (values[:, column] - free) * target.scale
    return {
        "row": rows,
        "atoms": np.array([len(molecule.element) for molecule in molecules], dtype=np.int32),
        "edges": np.array([len(molecule.bond) for molecule in molecules], dtype=np.int32),
        "element": np.concatenate([molecule.element for molecule in molecules]),
        "position": np.concatenate([molecule.position for molecule in molecules]),
        "edge": np.concatenate([molecule.edge for molecule in molecules]),
        "bond": np.concatenate([molecule.bond for molecule in molecules]),
        "single_bonded": np.array([molecule.single_bonded for molecule in molecules]),
        "target": values,
    }


def _quiet() -> AbstractContextManager:
    # RDKit prints a line for every molecule without valid bond orders.
    return load_extra("rdkit.rdBase").BlockLogs()
