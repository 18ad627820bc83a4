"""QM9: 130,831 small organic molecules (H, C, N, O, F) with twelve computed properties.

Two sources of the same molecules in the same order:

- the package ``qm9pack`` (its CSV files hold positions and properties; bonds are perceived from the positions),
- PyG's raw files ``gdb9.sdf``, ``gdb9.sdf.csv``, ``uncharacterized.txt`` (the SDF's own, Kekulé bonds).

Source: Ramakrishnan, Dral, Rupp, von Lilienfeld, *Quantum chemistry structures and properties of 134 kilo molecules*,
Scientific Data 1, 140022 (2014). Split, normalisation and features: Zhdanov, Hoffmann, Cesa, NeurIPS 2023.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..._check import fail, load_extra, require
from ..._files import cache_folder
from ...graph import EdgeTypes
from ...training import chunks
from . import _qm9_files as files
from ._qm9_files import ELEMENTS
from ._qm9_files import TARGETS as NUMBERS

log = logging.getLogger(__name__)

TENSOR = "polarizability"
TARGETS = (*NUMBERS, TENSOR)
ATOMIC_NUMBERS = np.array([1, 6, 7, 8, 9])  # of ELEMENTS
EDGE_ATTRIBUTES = {"none": 0, "bonds": 4, "bonds+atoms": 14}  # columns of edge_attr
POSITION_MEAN, POSITION_STD = -0.02, 1.7415  # angstrom
SPLITS = ("train", "val", "test")
FULL_SIZE, FULL_TRAIN = 130_831, 100_000
CHUNK = 1000  # molecules per cache file: about 0.15 s of work
CACHE_VERSION = 1  # part of the cache's name: raise it when the content of a chunk changes
MIN_EVALUATION = 100  # molecules in a limited validation or test set


@dataclass(frozen=True)
class Batch:
    """Molecules of one batch, as one graph of N atoms and E directed bonds.

    x (N, 5) one-hot of H, C, N, O, F; pos (N, 3) normalised; edge_index (2, E) source, target, sorted by target;
    edge_attr the types of the bonds, with A attributes, or None; batch (N,) molecule of each atom, ascending;
    y (num_graphs,) float64, the target's unit, or (num_graphs, 3, 3).
    """

    x: torch.Tensor
    pos: torch.Tensor
    edge_index: torch.Tensor
    edge_attr: EdgeTypes | None
    batch: torch.Tensor
    y: torch.Tensor
    num_graphs: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        attr = None if self.edge_attr is None else self.edge_attr.to(device)
        return Batch(
            self.x.to(device),
            self.pos.to(device),
            self.edge_index.to(device),
            attr,
            self.batch.to(device),
            self.y.to(device),
            self.num_graphs,
        )


class MoleculeSet(torch.utils.data.Dataset):
    """M molecules in flat arrays; a list of indices gives one :class:`Batch`, gathered without a loop.

    element (A,) index into H, C, N, O, F; pos (A, 3); ptr (M + 1,) first atom of each molecule;
    edge (2, E) directed bonds as atom numbers within the molecule; bond (E,) 0 single, 1 double, 2 triple, 3 aromatic;
    edge_ptr (M + 1,); y (M,) or (M, 3, 3). ``edge_attr`` is "none", "bonds" (one-hot of the bond, 4 columns) or
    "bonds+atoms" (followed by the one-hots of the source's and the target's element, 14 columns).
    Use with ``DataLoader(dataset, batch_size, collate_fn=lambda batch: batch)``.
    """

    def __init__(self, element, pos, ptr, edge, bond, edge_ptr, y, edge_attr: str = "bonds+atoms"):
        require(edge_attr in EDGE_ATTRIBUTES, "edge_attr", f"one of {list(EDGE_ATTRIBUTES)}", repr(edge_attr))
        self.element, self.pos, self.ptr = element, pos, ptr
        self.edge, self.bond, self.edge_ptr, self.y = edge, bond, edge_ptr, y
        self.edge_attr = edge_attr
        atoms = len(ELEMENTS)
        source, target = (edge + np.repeat(ptr[:-1], np.diff(edge_ptr))).astype(np.int64)
        # One code for each edge; its types are the codes that occur.
        ends = element[source].astype(np.int64) * atoms + element[target] if edge_attr == "bonds+atoms" else 0
        code, types = np.unique((bond.astype(np.int64) * atoms**2 + ends).astype(np.uint8), return_inverse=True)
        one_hots = (np.eye(4)[code // atoms**2], np.eye(atoms)[code // atoms % atoms], np.eye(atoms)[code % atoms])
        rows = np.concatenate(one_hots, 1).astype(np.float32)[:, : EDGE_ATTRIBUTES[edge_attr]]
        self._type, self._rows = types.astype(np.uint8), torch.from_numpy(rows)
        self._one_hot = np.eye(atoms, dtype=np.float32)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices) -> Batch:
        """The molecules ``indices``, in that order, as one batch."""
        ids = np.asarray(indices, dtype=np.int64)
        atom, start, atoms = _segments(self.ptr, ids)
        edge, _, edges = _segments(self.edge_ptr, ids)
        edge_index = self.edge[:, edge] + np.repeat(start, edges)
        types = EdgeTypes(torch.from_numpy(self._type[edge]), self._rows) if self._rows.shape[1] else None
        return Batch(
            x=torch.from_numpy(self._one_hot[self.element[atom]]),
            pos=torch.from_numpy(self.pos[atom]),
            edge_index=torch.from_numpy(edge_index),
            edge_attr=types,
            batch=torch.from_numpy(np.repeat(np.arange(len(ids)), atoms)),
            y=torch.from_numpy(self.y[ids]),
            num_graphs=len(ids),
        )


def _segments(ptr: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the entries of segments ``ids``; start of each segment in the result; their lengths."""
    first = ptr[ids]
    lengths = ptr[ids + 1] - first
    start = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(first - start, lengths), start, lengths


class QM9:
    """The data set, split as in the paper; ``train``, ``val``, ``test`` are :class:`MoleculeSet`.

    - ``root``: folder of PyG's raw files or of qm9pack's CSV files; None: the installed package ``qm9pack``.
    - ``target``: one of :data:`TARGETS`. homo, lumo, gap, zpve and U0, U, H, G are in meV, the latter four as
      atomisation energies (the free atoms' values subtracted); mu in D, alpha in bohr³, r2 in bohr², Cv in cal/(mol K).
      Or "polarizability", the tensor in bohr³, which qm9pack has. It has it along the axes in which it was computed,
      the principal axes of the nuclear charge: there the atoms are moved. Which axis is called x, and which of its two
      directions, the file does not say: a tensor is known up to the 24 rotations of a cube.
    - ``limit``: the first ``limit`` training molecules, with validation and test sets in proportion to the whole
      (at least 100 each). Only these are processed.
    - ``edge_attr``: see :class:`MoleculeSet`.
    - ``cache``: folder for processed molecules; None: ``$IMPLICIT_STEER_CACHE``, else ``implicit_steer`` in
      ``$XDG_CACHE_HOME`` or ``~/.cache``. Written chunk by chunk: an interrupted run continues where it stopped.
    - ``progress``: show a bar while molecules are processed.

    The order of the molecules is ``numpy.random.RandomState(0).permutation(130831)``: 100,000 train, 17,748
    validation, 13,083 test. Positions are (x + 0.02 Å) / 1.7415 Å. ``mean`` and ``std`` are the target's over
    ``train`` (of a tensor the mean's invariant part (3, 3), and one number for all entries), ``unit`` is its unit,
    ``split`` holds the rows of each part in the source, and ``single_bonded`` counts the molecules whose bond orders
    could not be determined.

    Raises ``ValueError`` for a wrong argument or a damaged file, ``RuntimeError`` where a package is missing.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        target: str = "homo",
        limit: int | None = None,
        edge_attr: str = "bonds+atoms",
        cache: str | Path | None = None,
        progress: bool = True,
    ):
        require(target in TARGETS, "target", f"one of {list(TARGETS)}", repr(target))
        require(edge_attr in EDGE_ATTRIBUTES, "edge_attr", f"one of {list(EDGE_ATTRIBUTES)}", repr(edge_attr))
        require(limit is None or limit >= 1, "limit", "a positive number of molecules, or None", limit)
        source = find_source(root)
        tensor = target == TENSOR
        packed = isinstance(source, files.PackedCsv)
        require(packed or not tensor, "target", "one that the raw files have", repr(target), "Use the package qm9pack.")
        self.target, self.unit, self.limit = target, NUMBERS["alpha" if tensor else target].unit, limit
        self.split = split(source.count(), limit)
        folder = cache_folder(cache) / _cache_name(source)
        found = _load_chunks(source, folder, self.split, progress)
        joined = {
            name: {key: np.concatenate([chunk[key] for chunk in found[name]]) for key in found[name][0]}
            for name in SPLITS
        }
        self.single_bonded = sum(int(joined[name]["single_bonded"][: len(self.split[name])].sum()) for name in SPLITS)
        self.train, self.val, self.test = (
            _assemble(joined[name], len(self.split[name]), "alpha" if tensor else target, edge_attr) for name in SPLITS
        )
        if tensor:
            _add_tensors(source, self)
        y = self.train.y
        self.mean, self.std = float(y.mean()), float(y.std())
        if tensor:
            self.mean = np.trace(y.mean(0)) / 3 * np.eye(3)
            self.std = float(np.sqrt(np.square(y - self.mean).mean()))


def split(count: int, limit: int | None = None) -> dict[str, np.ndarray]:
    """Rows of "train", "val", "test": consecutive parts of ``RandomState(0).permutation(count)``.

    A tenth (rounded down) is for test, 100,000 of 130,831 (rounded) for training, the rest for validation.
    """
    order = np.random.RandomState(0).permutation(count)
    sizes = {"train": round(count * FULL_TRAIN / FULL_SIZE), "test": count // 10}
    sizes["val"] = count - sizes["train"] - sizes["test"]
    parts, start = {}, 0
    for name in SPLITS:
        parts[name] = order[start : start + sizes[name]]
        start += sizes[name]
    if limit is not None:
        share = min(1.0, limit / sizes["train"])
        keep = {name: max(MIN_EVALUATION, round(share * sizes[name])) for name in ("val", "test")}
        parts = {name: rows[: keep.get(name, limit)] for name, rows in parts.items()}
    return parts


def find_source(root: str | Path | None) -> files.PackedCsv | files.RawSdf:
    """The files in ``root`` (PyG's, also in its subfolder ``raw``, or qm9pack's), or those of the installed package."""
    if root is None:
        spec = importlib.util.find_spec("qm9pack")
        if spec is None or spec.origin is None:
            remedy = "Run: pip install implicit_steer[train], or give the folder of PyG's raw files as root."
            fail("qm9pack", "an installed package", "none", remedy, RuntimeError)
        return files.PackedCsv(Path(spec.origin).parent / "data")
    for folder in (Path(root), Path(root) / "raw"):
        if (folder / "gdb9.sdf").exists():
            return files.RawSdf(folder)
        if (folder / "qm9_part1.csv").exists():
            return files.PackedCsv(folder)
    fail("root", "a folder with gdb9.sdf, gdb9.sdf.csv, uncharacterized.txt or with qm9_part1.csv ...", str(root))


def _cache_name(source: files.PackedCsv | files.RawSdf) -> str:
    """The cache's name holds a digest of the files' names and sizes: another or a truncated file has another cache."""
    sizes = [(path.name, path.stat().st_size) for path in source.files()]
    return f"qm9-v{CACHE_VERSION}-{hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]}"


def _load_chunks(source, folder: Path, parts: dict[str, np.ndarray], progress: bool) -> dict[str, list[dict]]:
    """The chunks that cover each split, read from the cache, or processed and put there."""
    whole = split(source.count())
    wanted = {}  # path → rows
    for name in SPLITS:
        for start in range(0, len(parts[name]), CHUNK):
            wanted[folder / f"{name}-{start:06d}.npz"] = whole[name][start : start + CHUNK]
    missing = {path: rows for path, rows in wanted.items() if not path.exists()}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _process(source, missing, progress)
    found = {name: [] for name in SPLITS}
    for path, rows in wanted.items():
        chunk = chunks.load_chunk(path, rows, "molecules")
        finite, remedy = bool(np.isfinite(chunk["target"]).all()), "Delete the file: it is made anew."
        require(finite, str(path), "finite targets", "NaN or Inf, of a damaged source", remedy)
        found[path.name.partition("-")[0]].append(chunk)
    return found


def _process(source, missing: dict[Path, np.ndarray], progress: bool) -> None:
    tqdm = load_extra("tqdm")
    total = sum(len(rows) for rows in missing.values())
    log.info("QM9: reading %d molecules from %s", total, source.folder)
    records = source.read(np.concatenate(list(missing.values())))
    single_bonded = 0
    with tqdm.tqdm(total=total, desc="QM9", unit="molecule", disable=not progress) as bar:
        for path, rows in missing.items():
            chunk = files.make_chunk(source, records, rows)
            chunks.save_chunk(path, chunk)
            single_bonded += int(chunk["single_bonded"].sum())
            bar.update(len(rows))
    log.info("QM9: %d of %d molecules have undetermined bond orders: single bonds used", single_bonded, total)


def _assemble(joined: dict[str, np.ndarray], count: int, target: str, edge_attr: str) -> MoleculeSet:
    """The first ``count`` molecules of the joined chunks as a :class:`MoleculeSet`."""
    ptr = np.concatenate([[0], np.cumsum(joined["atoms"][:count], dtype=np.int64)])
    edge_ptr = np.concatenate([[0], np.cumsum(joined["edges"][:count], dtype=np.int64)])
    pos = (joined["position"][: ptr[-1]] - POSITION_MEAN) / POSITION_STD
    return MoleculeSet(
        element=joined["element"][: ptr[-1]],
        pos=pos.astype(np.float32),
        ptr=ptr,
        edge=joined["edge"][: edge_ptr[-1]].T.astype(np.int64),
        bond=joined["bond"][: edge_ptr[-1]],
        edge_ptr=edge_ptr,
        y=joined["target"][:count, list(NUMBERS).index(target)].copy(),
        edge_attr=edge_attr,
    )


def _add_tensors(source: files.PackedCsv, data: QM9) -> None:
    """Replace the mean polarizabilities of ``data`` by the tensors, and move the atoms to the tensors' axes."""
    tensors = source.polarizability()
    for name in SPLITS:
        part: MoleculeSet = getattr(data, name)
        found = tensors[data.split[name]]
        same = np.abs(np.trace(found, axis1=1, axis2=2) / 3 - part.y) < 0.02  # rounded to 0.001 and 0.01 bohr³
        remedy = files.PackedCsv.REMEDY
        require(
            same.all(), str(source.folder / files.POLARIZABILITY), "the molecules of the other files", "others", remedy
        )
        part.y, part.pos = found, on_principal_axes(part.element, part.pos, part.ptr)


def on_principal_axes(element: np.ndarray, pos: np.ndarray, ptr: np.ndarray) -> np.ndarray:
    """pos (A, 3) of each molecule, rotated (never reflected) about its centre of nuclear charge, to which it is moved,
    so that Σ z x xᵀ is diagonal, its largest entry first."""
    charge, start, sizes = ATOMIC_NUMBERS[element][:, None].astype(np.float64), ptr[:-1], np.diff(ptr)
    centre = np.add.reduceat(charge * pos, start) / np.add.reduceat(charge, start)
    moved = pos - np.repeat(centre, sizes, 0)
    moments = np.add.reduceat(charge[:, :, None] * moved[:, :, None] * moved[:, None, :], start)
    axes = np.linalg.eigh(moments).eigenvectors[:, :, ::-1].copy()
    axes[:, :, 2] *= np.linalg.det(axes)[:, None]
    return np.einsum("ak,akl->al", moved, np.repeat(axes, sizes, 0)).astype(np.float32)
