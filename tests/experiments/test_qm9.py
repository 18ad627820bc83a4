"""QM9: files, bonds, units, split, cache and batches."""

import ast
import csv
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import AllChem

from implicit_steer.experiments.data import QM9
from implicit_steer.experiments.data import _qm9_files as files
from implicit_steer.experiments.data.qm9 import EDGE_ATTRIBUTES, find_source, split
from implicit_steer.training import chunks

LIMIT = 150
PACKED = Path(importlib.util.find_spec("qm9pack").origin).parent / "data"
KCAL_PER_MEV = 1 / 43.364104  # kcal/mol


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that holds the chunks of ``limit=LIMIT``."""
    folder = tmp_path_factory.mktemp("cache")
    QM9(limit=LIMIT, cache=folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def first_rows():
    """Molecules of the first part's first 300 rows, by row, and their SMILES."""
    source = find_source(None)
    records = source.read(np.arange(300))
    with (PACKED / "qm9_part1.csv").open(newline="") as file:
        smiles = [row["SMILES"] for row, _ in zip(csv.DictReader(file), range(300), strict=False)]
    return source, records, smiles


def bond_names(element, edge, bond):
    """Sorted (elements, bond type) of the bonds, each once."""
    symbols = [files.ELEMENTS[e] for e in element]
    return sorted((*sorted((symbols[i], symbols[j])), int(b)) for (i, j), b in zip(edge, bond, strict=True) if i < j)


def test_split_is_numpys():
    state = np.random.get_state()
    np.random.seed(0)
    order = np.random.permutation(130_831)
    np.random.set_state(state)
    parts = split(130_831)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [100_000, 17_748, 13_083]
    assert np.array_equal(np.concatenate([parts[name] for name in ("train", "val", "test")]), order)
    limited = split(130_831, 20_000)
    assert [len(limited[name]) for name in ("train", "val", "test")] == [20_000, 3_550, 2_617]
    assert all(np.array_equal(limited[name], parts[name][: len(limited[name])]) for name in parts)
    assert [len(rows) for rows in split(130_831, 10).values()] == [10, 100, 100]


def test_units_of_methane(first_rows):
    source, records, _ = first_rows
    value = dict(zip(files.TARGETS, files.make_chunk(source, records, np.array([0]))["target"][0], strict=True))
    # The columns of the first row of gdb9.sdf.csv: hartree, and atomisation energies in kcal/mol.
    assert value["homo"] == pytest.approx(-0.3877 * 27211.386246)
    assert value["zpve"] == pytest.approx(0.044749 * 27211.386246)
    assert value["mu"] == 0
    assert value["alpha"] == 13.21
    assert value["r2"] == 35.3641
    assert value["Cv"] == 6.469
    atomisation = {"U0": -395.999594594, "U": -398.643290011, "H": -401.014646522, "G": -372.471772148}
    for name, kcal in atomisation.items():
        # 1e-3: the free atoms are given to 1e-6 hartree = 6e-4 kcal/mol
        assert value[name] * KCAL_PER_MEV == pytest.approx(kcal, abs=1e-3)


def test_targets(cache):
    mev = {name: QM9(limit=LIMIT, target=name, cache=cache) for name in ("homo", "lumo", "gap")}
    assert {data.unit for data in mev.values()} == {"meV"}
    difference = mev["lumo"].train.y - mev["homo"].train.y
    # each of the three is given to 1e-4 hartree
    np.testing.assert_allclose(mev["gap"].train.y, difference, atol=1.01e-4 * 27211.386246)
    assert mev["homo"].mean == mev["homo"].train.y.mean()
    assert mev["homo"].std == mev["homo"].train.y.std()
    assert len(mev["homo"].train) == LIMIT


def test_polarizability_is_a_tensor_along_the_molecules_axes(cache):
    tensor, mean = (QM9(limit=LIMIT, target=name, cache=cache) for name in ("polarizability", "alpha"))
    assert tensor.unit == "bohr^3"
    y = tensor.train.y
    assert y.shape == (LIMIT, 3, 3)
    assert np.array_equal(y, y.swapaxes(1, 2))
    np.testing.assert_allclose(np.trace(y, axis1=1, axis2=2) / 3, mean.train.y, atol=0.02)
    np.testing.assert_allclose(tensor.mean, mean.mean * np.eye(3), rtol=1e-3)
    assert tensor.std == pytest.approx(np.sqrt(np.square(y - tensor.mean).mean()))
    charge = np.array([1, 6, 7, 8, 9])
    along = np.zeros(3)
    for n in range(LIMIT):
        atoms = slice(tensor.train.ptr[n], tensor.train.ptr[n + 1])
        z, pos, before = charge[tensor.train.element[atoms]], tensor.train.pos[atoms], mean.train.pos[atoms]
        moments = np.einsum("a,ai,aj->ij", z, pos, pos)
        assert np.abs(z @ pos).max() < 1e-4
        assert np.abs(moments - np.diag(np.diag(moments))).max() < 1e-4 * np.trace(moments)
        assert np.all(np.diff(np.diag(moments)) <= 1e-4 * np.trace(moments))
        # A rotation: distances are what they were, and so are orientations.
        frame = pos - pos.mean(0), before - before.mean(0)
        np.testing.assert_allclose(frame[0] @ frame[0].T, frame[1] @ frame[1].T, atol=1e-4)
        if len(pos) > 3:
            volumes = [np.linalg.det(f[1:4] - f[0]) for f in frame]
            assert volumes[0] == pytest.approx(volumes[1], abs=1e-4)
        along += np.diag(y[n])
    assert along[0] > along[1] > along[2]  # large where the molecule is long


def test_tensors_need_qm9pack(tmp_path):
    for name in ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "gdb9.sdf.csv").write_text(",".join(target.raw for target in files.TARGETS.values()) + "\n")
    with pytest.raises(ValueError, match=r"target: expected one that the raw files have, got 'polarizability'"):
        QM9(tmp_path, target="polarizability", progress=False)


def test_damaged_tensors(tmp_path):
    for name in (*files.PackedCsv.ROWS, files.POLARIZABILITY):
        (tmp_path / name).symlink_to(PACKED / name)
    source = files.PackedCsv(tmp_path)
    (tmp_path / files.POLARIZABILITY).unlink()
    with pytest.raises(ValueError, match=r"qm9_polarizability.csv: expected a file of qm9pack"):
        source.polarizability()
    (tmp_path / files.POLARIZABILITY).write_text("XYZ_file,A_xx,A_xy,A_yy,A_xz,A_yz,A_zz\n" + "a,1,2,3,4,5,6\n")
    with pytest.raises(ValueError, match=r"qm9_polarizability.csv: expected 130831 molecules, got 1"):
        source.polarizability()


def test_bonds_agree_with_smiles(first_rows):
    source, records, smiles = first_rows
    chunk = files.make_chunk(source, records, np.arange(300))
    atoms, edges = np.cumsum([0, *chunk["atoms"]]), np.cumsum([0, *chunk["edges"]])
    different = []
    for row, text in enumerate(smiles):
        element = chunk["element"][atoms[row] : atoms[row + 1]]
        part = slice(edges[row], edges[row + 1])
        molecule = Chem.AddHs(Chem.MolFromSmiles(text))
        expected = sorted(
            (
                *sorted((bond.GetBeginAtom().GetSymbol(), bond.GetEndAtom().GetSymbol())),
                {1.0: 0, 2.0: 1, 3.0: 2, 1.5: 3}[bond.GetBondTypeAsDouble()],
            )
            for bond in molecule.GetBonds()
        )
        if bond_names(element, chunk["edge"][part], chunk["bond"][part]) != expected:
            different.append(text)
    # Of all molecules 1 in 1,000 has two sets of valid bond orders.
    assert len(different) <= 1, different
    assert {0, 1, 2, 3} == set(chunk["bond"].tolist())
    assert chunk["single_bonded"].sum() == 0


def test_bonds_of_a_molecule_without_valid_bond_orders():
    molecule, single_bonded = files.perceive_bonds(["O", "H"], np.array([[0.0, 0, 0], [0.97, 0, 0]]))
    assert single_bonded
    assert [bond.GetBondType() for bond in molecule.GetBonds()] == [Chem.BondType.SINGLE]


@pytest.mark.parametrize("edge_attr", EDGE_ATTRIBUTES)
def test_batch_is_the_collation_of_its_molecules(cache, edge_attr):
    data = QM9(limit=LIMIT, edge_attr=edge_attr, cache=cache).train
    ids = [17, 3, 3, 149, 0]
    batch, parts = data.__getitems__(ids), [data[i] for i in ids]
    offsets = np.cumsum([0, *(len(part.pos) for part in parts)])[:-1].tolist()
    assert batch.num_graphs == 5
    assert torch.equal(batch.x, torch.cat([part.x for part in parts]))
    assert torch.equal(batch.pos, torch.cat([part.pos for part in parts]))
    assert torch.equal(batch.y, torch.cat([part.y for part in parts]))
    edges = torch.cat([part.edge_index + offset for part, offset in zip(parts, offsets, strict=True)], 1)
    assert torch.equal(batch.edge_index, edges)
    assert torch.equal(batch.batch, torch.cat([torch.full((len(p.pos),), i) for i, p in enumerate(parts)]))
    if edge_attr == "none":
        assert batch.edge_attr is None
    else:
        assert torch.equal(batch.edge_attr.attributes(), torch.cat([part.edge_attr.attributes() for part in parts]))
        assert batch.edge_attr.rows.shape[1] == EDGE_ATTRIBUTES[edge_attr]
        rows = batch.edge_attr.rows.tolist()
        assert len(rows) == len(set(map(tuple, rows))) <= {"bonds": 4, "bonds+atoms": 100}[edge_attr]
    moved = batch.to("meta")
    assert moved.pos.device.type == moved.edge_index.device.type == "meta"


def test_molecule_matches_its_record(cache):
    data = QM9(limit=LIMIT, cache=cache)
    source = find_source(None)
    row = int(data.split["train"][7])
    record = source.read(np.array([row]))[row]
    symbols, positions = record[0][2:-2].split("','"), np.array(ast.literal_eval(record[1]))
    molecule = data.train[7]
    assert [files.ELEMENTS[i] for i in molecule.x.argmax(1)] == symbols
    # float32 of coordinates below 10: half a unit in the last place is 5e-7
    np.testing.assert_allclose(molecule.pos * 1.7415 - 0.02, positions, atol=1e-6)
    source, target = molecule.edge_index
    assert bool((target.diff() >= 0).all())
    pairs = set(zip(source.tolist(), target.tolist(), strict=True))
    assert len(pairs) == len(source)
    assert pairs == {(j, i) for i, j in pairs}
    attributes = molecule.edge_attr.attributes()
    assert torch.equal(attributes[:, :4].sum(1), torch.ones(len(source)))
    assert torch.equal(attributes[:, 4:9], molecule.x[source])
    assert torch.equal(attributes[:, 9:], molecule.x[target])


def test_cache_is_used_and_continued(tmp_path, cache, monkeypatch):
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    paths = sorted(tmp_path.glob("qm9-v*/*.npz"))
    assert [path.name for path in paths] == [f"{name}-000000.npz" for name in ("test", "train", "val")]
    paths[0].unlink()
    paths[2].unlink()
    before, reads = paths[1].stat().st_mtime_ns, []
    save, read = chunks.save_chunk, files.PackedCsv.read

    def interrupted(path, chunk):
        save(path, chunk)
        raise KeyboardInterrupt

    monkeypatch.setattr(chunks, "save_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        QM9(limit=LIMIT, cache=tmp_path, progress=False)
    assert len(list(tmp_path.glob("qm9-v*/*"))) == 2
    monkeypatch.setattr(chunks, "save_chunk", save)
    monkeypatch.setattr(files.PackedCsv, "read", lambda self, rows: reads.append(len(rows)) or read(self, rows))
    data = QM9(limit=LIMIT, cache=tmp_path, progress=False)
    assert reads == [1000]
    assert paths[1].stat().st_mtime_ns == before
    again = QM9(limit=LIMIT, cache=tmp_path, progress=False)
    assert reads == [1000]
    assert np.array_equal(data.test.pos, again.test.pos)


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="disk full"):
        chunks.save_chunk(tmp_path / "train-000000.npz", {})
    assert not list(tmp_path.iterdir())


def _truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _empty(path):
    path.write_bytes(b"")


def _exchange(path):
    shutil.copy(path.with_name("val-000000.npz"), path)


@pytest.mark.parametrize("spoil", [_truncate, _flip, _empty, _exchange])
def test_damaged_cache(tmp_path, cache, spoil):
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob("qm9-v*/train-000000.npz")
    spoil(path)
    with pytest.raises(ValueError, match=r"train-000000.npz: expected the processed molecules .*Delete the file"):
        QM9(limit=LIMIT, cache=tmp_path)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda text: text[:200_000], r"qm9_part1.csv, line \d+: expected 25 columns, got \d+.*qm9pack==1.0.3"),
        (lambda text: text[: text.index(b"\n", 200_000) + 1], r"expected 43610 molecules, got \d+\. .*qm9pack==1.0.3"),
        (lambda text: text[:-1], r"qm9_part1.csv: expected a last line that is complete"),
        (lambda text: b"XYZ_file,Index\n", r"qm9_part1.csv: expected a column Elements"),
        (lambda text: b"", r"qm9_part1.csv: expected a column Elements"),
    ],
    ids=["in a row", "between rows", "last byte", "columns", "empty"],
)
def test_damaged_csv(tmp_path, cut, message):
    for name in ("qm9_part2.csv", "qm9_part3.csv"):
        (tmp_path / name).symlink_to(PACKED / name)
    (tmp_path / "qm9_part1.csv").write_bytes(cut((PACKED / "qm9_part1.csv").read_bytes()))
    with pytest.raises(ValueError, match=message):
        QM9(tmp_path, limit=2, cache=tmp_path / "cache", progress=False)


def test_missing_csv(tmp_path):
    (tmp_path / "qm9_part1.csv").symlink_to(PACKED / "qm9_part1.csv")
    with pytest.raises(ValueError, match=r"qm9_part2.csv: expected a file of qm9pack 1.0.3, got no such file"):
        QM9(tmp_path)


@pytest.fixture
def raw(tmp_path):
    """PyG's three raw files with 40 made molecules; the third and the fourth are left out."""
    molecules = []
    for number in range(40):
        molecule = Chem.AddHs(Chem.MolFromSmiles(["C=O", "C#N", "OCC", "c1ccccc1", "FC(=O)N"][number % 5]))
        AllChem.EmbedMolecule(molecule, randomSeed=number)
        Chem.Kekulize(molecule, clearAromaticFlags=True)
        molecules.append(molecule)
    (tmp_path / "gdb9.sdf").write_text("".join(Chem.MolToMolBlock(molecule) + "$$$$\n" for molecule in molecules))
    names = "mol_id A B C mu alpha homo lumo gap r2 zpve u0 u298 h298 g298 cv u0_atom u298_atom h298_atom g298_atom"
    rows = [",".join([f"gdb_{i + 1}", *(f"{i + 0.01 * column:.2f}" for column in range(19))]) for i in range(40)]
    (tmp_path / "gdb9.sdf.csv").write_text("\n".join([names.replace(" ", ","), *rows, ""]))
    listed = ["header"] * 9 + ["    3   C#N  1.0", "    4   OCC  1.0", "footer", ""]
    (tmp_path / "uncharacterized.txt").write_text("\n".join(listed))
    return tmp_path, molecules


def test_raw_files(raw):
    folder, molecules = raw
    data = QM9(folder, target="alpha", cache=folder / "cache", progress=False)
    assert [len(data.train), len(data.val), len(data.test)] == [29, 6, 3]
    kept = [0, 1, *range(4, 40)]
    for position, row in enumerate(data.split["train"]):
        number, batch = kept[row], data.train[position]
        molecule = molecules[number]
        assert batch.y.item() == pytest.approx(number + 0.04)  # the fifth column after mol_id
        # four decimals in the file
        expected = molecule.GetConformer().GetPositions()
        np.testing.assert_allclose(batch.pos * 1.7415 - 0.02, expected, atol=6e-5)
        bonds = {
            (b.GetBeginAtomIdx(), b.GetEndAtomIdx()): int(b.GetBondTypeAsDouble()) - 1 for b in molecule.GetBonds()
        }
        bonds |= {(j, i): kind for (i, j), kind in bonds.items()}
        edges = zip(*batch.edge_index.tolist(), strict=True)
        assert dict(zip(edges, batch.edge_attr.attributes()[:, :4].argmax(1).tolist(), strict=True)) == bonds
    assert data.single_bonded == 0


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("gdb9.sdf", lambda text: text[:-300], r"gdb9.sdf: expected 40 molecules.*got 39 and an unfinished one"),
        ("gdb9.sdf.csv", lambda text: text[:-20], r"gdb9.sdf.csv, line 41: expected 20 columns, got 1[5-9]"),
        ("gdb9.sdf.csv", lambda text: text[: text.rindex("gdb_40")], r"gdb9.sdf: expected 39 molecules.*got 40"),
        (
            "uncharacterized.txt",
            lambda text: text.replace("    4 ", "   41 "),
            r"uncharacterized.txt: expected a number",
        ),
        ("uncharacterized.txt", None, r"uncharacterized.txt: expected one of QM9's three raw files, got no such file"),
    ],
)
def test_damaged_raw_files(raw, name, spoil, message):
    folder, _ = raw
    path = folder / name
    if spoil is None:
        path.unlink()
    else:
        path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match=message):
        QM9(folder, cache=folder / "cache", progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "HOMO"}, r"target: expected one of \['mu', .*got 'HOMO'"),
        ({"edge_attr": "all"}, r"edge_attr: expected one of \['none', 'bonds', 'bonds\+atoms'\], got 'all'"),
        ({"limit": 0}, r"limit: expected a positive number"),
        ({"root": "/nowhere"}, r"root: expected a folder with gdb9.sdf.*got /nowhere"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        QM9(**arguments)


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit.rdBase", None)
    with pytest.raises(RuntimeError, match=r"rdkit: .*Run: pip install implicit_steer\[train\]"):
        QM9(limit=2, cache=tmp_path, progress=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"qm9pack: .*pip install implicit_steer\[train\].*PyG's raw files"):
        QM9(cache=tmp_path)


def test_cache_folder_from_the_environment(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("IMPLICIT_STEER_CACHE", raising=False)
    shutil.copytree(cache, tmp_path / "implicit_steer")
    monkeypatch.setattr(files.PackedCsv, "read", None)  # nothing is processed
    assert len(QM9(limit=LIMIT).train) == LIMIT
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    monkeypatch.setenv("IMPLICIT_STEER_CACHE", str(tmp_path / "implicit_steer"))
    assert len(QM9(limit=LIMIT).train) == LIMIT
