"""Points on meshes with classes: ModelNet-10 and ModelNet-40, and Sweet Home 3D's furniture in the same form.

Source: Wu, Song, Khosla, Yu, Zhang, Tang, Xiao, *3D ShapeNets: A deep representation for volumetric shapes*, CVPR 2015.
Split: Zhdanov, Hoffmann, Cesa, NeurIPS 2023.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..._check import load_extra, require
from ..._files import cache_folder
from ...training import chunks
from ._mesh_formats import Mesh, sample_surface
from ._mesh_sources import FurnitureFiles, OffFiles, digest

log = logging.getLogger(__name__)

ROTATIONS = ("z", "so3", "none")
SCALES, JITTER, JITTER_LIMIT = (0.8, 1.25), 0.01, 0.05  # factor of a cloud; noise of a point, its largest coordinate
FURNITURE = "/usr/share/sweethome3d/furniture"  # where Debian's sweethome3d-furniture puts it
SPLITS = ("train", "val", "test")
VALIDATION = 0.1  # of the meshes for training
SPLIT_SEED = 42
CACHE_VERSION = 2  # part of the cache's name: raise it when the content of a mesh's file changes


@dataclass(frozen=True)
class Clouds:
    """A batch of B clouds of P points in random order: pos (B, P, 3); y (B,) class; mesh (B,) which mesh of its set."""

    pos: torch.Tensor
    y: torch.Tensor
    mesh: torch.Tensor

    def to(self, device: torch.device | str) -> Clouds:
        """The same batch on ``device``."""
        return Clouds(self.pos.to(device), self.y.to(device), self.mesh.to(device))


class CloudSet(torch.utils.data.Dataset):
    """Samples of M meshes without end: number n is sample n // M of mesh n % M, drawn from ``stream`` and n alone.

    Every sample is ``points`` points uniform on the surface, then augmented: turned (``rotate``: "z", by a random angle
    about the vertical; "so3"; "none"), scaled by a factor log-uniform in :data:`SCALES`, every point moved by normal
    noise. The length is M · ``copies``. A list of indices gives one :class:`Clouds`: use with
    ``DataLoader(dataset, batch_size, collate_fn=lambda batch: batch)``.

    - ``folder``, ``rows``: of the processed meshes, and their indices (M,) there.
    - ``labels``: (M,) int64.
    - ``stream``: whole numbers that seed the samples.
    """

    endless = True

    def __init__(
        self,
        folder: Path,
        rows: np.ndarray,
        labels: np.ndarray,
        points: int,
        rotate: str,
        copies: int,
        stream: tuple[int, ...],
    ):
        self.folder, self.rows, self.labels = folder, rows, labels
        self.points, self.rotate, self.copies, self.stream = points, rotate, copies, stream

    def __len__(self) -> int:
        return len(self.rows) * self.copies

    def __getitem__(self, index: int) -> Clouds:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Clouds:
        """The samples ``indices``, in that order, as one batch."""
        mesh = np.asarray(indices, dtype=np.int64) % len(self.rows)
        pos = np.stack([self._sample(index) for index in indices])
        return Clouds(torch.from_numpy(pos), torch.from_numpy(self.labels[mesh]), torch.from_numpy(mesh))

    def _sample(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((*self.stream, index))
        pos = sample_surface(_load(self.folder, int(self.rows[index % len(self.rows)])), self.points, rng)
        noise = np.clip(JITTER * rng.standard_normal(pos.shape), -JITTER_LIMIT, JITTER_LIMIT)
        scale = np.exp(rng.uniform(*np.log(SCALES)))
        return (scale * pos @ random_rotation(self.rotate, rng).T + noise).astype(np.float32)


def random_rotation(kind: str, rng: np.random.Generator) -> np.ndarray:
    """(3, 3): "z", by a uniform angle about the third axis; "so3", uniform among rotations; "none", the identity."""
    if kind == "z":
        c, s = np.cos(angle := 2 * np.pi * rng.random()), np.sin(angle)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    if kind == "so3":
        from scipy.spatial.transform import Rotation  # 0.1 s, which other commands need not wait for

        return Rotation.random(rng=rng).as_matrix()
    return np.eye(3)


class ModelNet:
    """Clouds of points on the meshes of ``root``; ``train``, ``val``, ``test`` are :class:`CloudSet`.

    - ``root``: ``ModelNet10.zip``, ``ModelNet40.zip``, the folder that one of them unpacks to; a folder of Sweet Home
      3D's ``.sh3f`` catalogues, or "furniture" for the one that Debian's sweethome3d-furniture installs.
    - ``points``, ``rotate``: see :class:`CloudSet`.
    - ``copies``: samples of every test mesh, over which predictions are averaged.
    - ``seed``: of the training samples; validation and test samples are the same for every seed.
    - ``cache``: folder for processed meshes; None: ``$IMPLICIT_STEER_CACHE``, else ``implicit_steer`` in
      ``$XDG_CACHE_HOME`` or ``~/.cache``. A file per mesh: an interrupted preparation continues where it stopped.
    - ``progress``: show a bar while meshes are processed.

    ``classes`` are the names in alphabetical order; ``split`` holds the indices of the meshes of each part: those
    published for testing, and of the others a tenth, chosen with seed 42, for validation.

    Raises ``ValueError`` for a wrong argument or a damaged file, which it names.

    Example:
        >>> data = ModelNet("ModelNet10.zip", points=512)
        >>> data.train.__getitems__([0, 1]).pos.shape
        torch.Size([2, 512, 3])
    """

    def __init__(
        self,
        root: str | Path,
        *,
        points: int = 1024,
        rotate: str = "z",
        copies: int = 40,
        seed: int = 0,
        cache: str | Path | None = None,
        progress: bool = True,
    ):
        require(rotate in ROTATIONS, "rotate", f"one of {list(ROTATIONS)}", repr(rotate))
        for name, value in {"points": points, "copies": copies}.items():
            require(value >= 1, name, "a positive number", value)
        source = find_source(root)
        self.name, self.classes = source.name, sorted({entry.label for entry in source.entries})
        self.split = split(source)
        folder = cache_folder(cache) / f"{source.name}-v{CACHE_VERSION}-{digest(source)}"
        _process(source, folder, progress)
        labels = np.array([self.classes.index(entry.label) for entry in source.entries], dtype=np.int64)
        self.train, self.val, self.test = (
            CloudSet(folder, rows, labels[rows], points, rotate, number_of_copies, stream)
            for rows, number_of_copies, stream in zip(
                (self.split[name] for name in SPLITS), (1, 1, copies), ((0, seed), (1,), (2,)), strict=True
            )
        )
        counts = {name: Counter(self.classes[label] for label in labels[rows]) for name, rows in self.split.items()}
        log.info("%s: %s", source.name, {name: f"{sum(c.values())} in {len(c)} classes" for name, c in counts.items()})


def find_source(root: str | Path) -> OffFiles | FurnitureFiles:
    """What ``root`` names: see :class:`ModelNet`."""
    remedy = ""
    if str(root) == "furniture":
        root, remedy = FURNITURE, "Run: apt-get install --no-install-recommends sweethome3d-furniture"
    root = Path(root)
    require(root.exists(), "root", "a zip or a folder of meshes", f"no file {root}", remedy)
    catalogues = root.is_dir() and any(root.glob("*.sh3f"))
    return FurnitureFiles(root) if catalogues else OffFiles(root)


def split(source: OffFiles | FurnitureFiles) -> dict[str, np.ndarray]:
    """Numbers of the entries of "train", "val", "test"; a tenth of those for training (rounded) becomes "val"."""
    parts = np.array([entry.part for entry in source.entries])
    training = np.random.RandomState(SPLIT_SEED).permutation(np.flatnonzero(parts == "train"))
    count = round(VALIDATION * len(training))
    return {"train": training[count:], "val": training[:count], "test": np.flatnonzero(parts == "test")}


def _process(source: OffFiles | FurnitureFiles, folder: Path, progress: bool) -> None:
    """Make sure that every mesh has its file."""
    missing = [number for number in range(len(source.entries)) if not _file(folder, number).exists()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    bar = load_extra("tqdm").tqdm(missing, desc=source.name, unit="mesh", disable=not progress)
    for number in bar:
        mesh = source.read(source.entries[number])
        chunks.save_chunk(_file(folder, number), {"row": np.array([number]), **mesh._asdict()})


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def _load(folder: Path, number: int) -> Mesh:
    chunk = chunks.load_chunk(_file(folder, number), np.array([number]), "meshes")
    return Mesh(**{name: chunk[name] for name in Mesh._fields})
