"""Where meshes with classes come from: ModelNet's archives or folders, and Sweet Home 3D's furniture."""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..._check import require
from ._mesh_formats import DAMAGED, Mesh, make_mesh, parse_obj, parse_off


class Entry(NamedTuple):
    """A mesh of a source: its class, whether it is for "train" or "test", and its place in a file."""

    label: str
    part: str
    file: Path
    member: str = ""  # in an archive
    rotation: tuple[float, ...] = ()  # row by row, (9,), before anything else

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.file}: {self.member}" if self.member else str(self.file)

    def content(self) -> bytes:
        """The file's bytes. ``ValueError`` where an archive is damaged."""
        if not self.member:
            return self.file.read_bytes()
        return _read(self.file, lambda archive: archive.read(self.member))


@lru_cache(maxsize=1)
def _archive(path: Path, size: int, changed: int) -> zipfile.ZipFile:
    # Stays open from one mesh to the next: to read the names of 12,000 takes as long as a mesh.
    return zipfile.ZipFile(path)


def _read(path: Path, what: Callable[[zipfile.ZipFile], bytes | list[str]]):
    try:
        status = path.stat()
        return what(_archive(path, status.st_size, status.st_mtime_ns))
    except (zipfile.BadZipFile, EOFError, KeyError, OSError) as error:
        require(False, str(path), "an intact zip archive", f"a damaged one ({error})", DAMAGED)


class OffFiles:
    """ModelNet-10 or -40: ``CLASS/train/NAME.off`` and ``CLASS/test/NAME.off`` in the zip as published or in a folder.

    The vertical axis is z.
    """

    PATTERN = re.compile(r"(?:.*/)?(?P<label>[^/]+)/(?P<part>train|test)/(?P<name>[^/]+)\.(?i:off)")

    def __init__(self, root: Path):
        self.name = "modelnet"
        if root.is_dir():
            found = [(path.relative_to(root).as_posix(), path, "") for path in root.rglob("*.*") if path.is_file()]
        else:
            members = _read(root, lambda archive: archive.namelist())
            found = [(member, root, member) for member in members]
        entries = []
        for place, path, member in sorted(found):
            match = self.PATTERN.fullmatch(place)
            if match and not place.startswith("__MACOSX/") and not match["name"].startswith("._"):
                entries.append(Entry(match["label"], match["part"], path, member))
        self.entries = entries
        expected = "meshes CLASS/train/NAME.off and CLASS/test/NAME.off"
        for part in ("train", "test"):
            require(any(entry.part == part for entry in entries), str(root), expected, f"none for {part}")

    def read(self, entry: Entry) -> Mesh:
        """The mesh."""
        return parse_off(entry.name, entry.content())


class FurnitureFiles:
    """The OBJ meshes of the catalogues ``*.sh3f`` of Sweet Home 3D (Debian: sweethome3d-furniture), by class.

    The class is the last word of the catalogue's name, before "with", "on", a comma or a number: a "Glass door cabinet"
    is a cabinet, a "Desk lamp" a lamp, a "Table fan" is left out. Of every class, in the catalogues' order, two meshes
    of seven are for testing. Turned so that the vertical axis is z.
    """

    CLASSES = {  # noqa: RUF012 - constant
        "armchair": ("armchair",),
        "bed": ("bed",),
        "bottle": ("bottle", "vase", "jar", "pottery"),
        "cabinet": ("cabinet", "wardrobe", "cupboard"),
        "chair": ("chair", "seat", "stool"),
        "door": ("door",),
        "lamp": ("lamp", "light", "lantern", "lamppost"),
        "person": ("female", "male", "girl", "boy"),
        "plant": ("plant", "tree", "cactus", "bamboo", "lily", "tulips", "orchids", "ficus", "yucca"),
        "shelf": ("shelves", "bookcase"),
        "sofa": ("sofa", "couch"),
        "table": ("table", "desk"),
        "window": ("window",),
    }
    TEST = (2, 5)  # of every seven

    def __init__(self, root: Path):
        self.name = "furniture"
        label_of = {word: label for label, words in self.CLASSES.items() for word in words}
        labelled = [
            (label_of[word], path, record)
            for path in sorted(root.glob("*.sh3f"))
            for record in _catalogue(path)
            if (word := head_word(record["name"])) in label_of
        ]
        seen, self.entries = dict.fromkeys(self.CLASSES, 0), []
        for label, path, record in labelled:
            part = "test" if seen[label] % 7 in self.TEST else "train"
            seen[label] += 1
            rotation = _rotation(f"{path}: {record['name']}", record.get("modelRotation", ""))
            self.entries.append(Entry(label, part, path, record["model"].lstrip("/"), rotation))
        require(bool(labelled), str(root), "catalogues *.sh3f with furniture", "none")

    def read(self, entry: Entry) -> Mesh:
        """The mesh, upright: (x, y, z) of the file, y up, becomes (x, −z, y)."""
        mesh = parse_obj(entry.name, entry.content())
        turn = np.array(entry.rotation or np.eye(3)).reshape(3, 3)
        upright = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]) @ turn
        return make_mesh(entry.name, mesh.vertex @ upright.T, mesh.triangle)


def head_word(name: str) -> str:
    """The noun that an English name ends with, in lower case: "Glass door cabinet" → "cabinet"."""
    noun = re.split(r",| with | on | of |\d", name.lower())[0].split()
    return noun[-1] if noun else ""


def _rotation(name: str, text: str) -> tuple[float, ...]:
    """The nine numbers of a matrix, or none."""
    try:
        numbers = tuple(map(float, text.split()))
    except ValueError:
        numbers = (math.nan,)
    ok = len(numbers) in (0, 9) and all(map(math.isfinite, numbers))
    require(ok, f"{name}: modelRotation", "nine numbers, or none", repr(text), DAMAGED)
    return numbers


def _catalogue(path: Path) -> list[dict[str, str]]:
    """The records of a catalogue in the order of their numbers: its lines ``key#number=value``, as Java reads them:
    also indented, with ``:`` or white space about the ``=``, and going on after a backslash."""
    text = _read(path, lambda archive: archive.read("PluginFurnitureCatalog.properties")).decode("latin-1")
    text = re.sub(r"\\\r?\n[ \t]*", "", text)
    records: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^[ \t]*(\w+)#(\d+)[ \t]*[=:][ \t]*(.*?)\s*$", text, flags=re.MULTILINE):
        records.setdefault(int(number), {})[key] = value
    complete = {number: record for number, record in records.items() if {"name", "model"} <= record.keys()}
    require(bool(complete), str(path), "records with name and model", "none", DAMAGED)
    return [complete[number] for number in sorted(complete)]


def digest(source: OffFiles | FurnitureFiles) -> str:
    """Of names, parts and sizes of what a source has: another or a truncated file never meets an old cache."""
    sizes = {file: file.stat().st_size for file in {entry.file for entry in source.entries}}
    content = [
        (entry.label, entry.part, entry.member or entry.file.name, sizes[entry.file]) for entry in source.entries
    ]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]
