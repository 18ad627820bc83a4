"""Triangle meshes from OFF and OBJ text, and points on their surfaces."""

from __future__ import annotations

import codecs
import warnings
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..._check import fail, require

DAMAGED = "The file is damaged or of another format: fetch it again."


class Mesh(NamedTuple):
    """vertex (V, 3) float32 in the unit ball around the centre of the bounding box; triangle (T, 3) int32;
    cumulative (T,) float32 share of the surface in the triangles up to this one, ends with 1."""

    vertex: np.ndarray
    triangle: np.ndarray
    cumulative: np.ndarray


def make_mesh(name: str, vertex: np.ndarray, triangle: np.ndarray) -> Mesh:
    """Checked, centred and scaled; vertices that no triangle uses are left out.

    Args:
        name: of the file, for messages.
        vertex: (V, 3).
        triangle: (T, 3) indices of vertices.

    Raises:
        ValueError: an index outside the vertices, a position that is not finite, or a mesh without surface.
    """
    inside = triangle.size == 0 or (triangle.min() >= 0 and triangle.max() < len(vertex))
    got = "" if inside else f"{triangle.min()} .. {triangle.max()}"
    require(inside, name, f"indices of vertices in 0 .. {len(vertex) - 1}", got, DAMAGED)
    used, triangle = np.unique(triangle, return_inverse=True)
    vertex, triangle = vertex[used], triangle.reshape(-1, 3)
    require(bool(np.isfinite(vertex).all()), name, "finite positions", "NaN or Inf", DAMAGED)
    a, b, c = vertex[triangle].transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    require(area.sum() > 0, name, "a mesh with a surface", f"{len(triangle)} triangles of area 0", DAMAGED)
    vertex = vertex - (vertex.min(0) + vertex.max(0)) / 2
    vertex = vertex / (np.linalg.norm(vertex, axis=1).max() * (1 + 1e-6))
    return Mesh(vertex.astype(np.float32), triangle.astype(np.int32), (area.cumsum() / area.sum()).astype(np.float32))


def sample_surface(mesh: Mesh, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3) float32 independent points, uniform by area: a triangle by its share of the surface, then
    a + (1 − √u) (b − a) + √u v (c − a) with u, v uniform in [0, 1)."""
    chosen = np.searchsorted(mesh.cumulative, rng.random(count), side="right")
    a, b, c = mesh.vertex[mesh.triangle[np.minimum(chosen, len(mesh.triangle) - 1)]].transpose(1, 0, 2)
    u, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    return (a + (1 - u) * (b - a) + u * v * (c - a)).astype(np.float32)


_Line = tuple[int, bytes]  # number in the file, from 1; text: words that white space of any kind separates


def _lines(content: bytes) -> list[_Line]:
    """The lines that have words. What follows a ``#`` is a comment; a line that ends with a backslash goes on in the
    next (and has its number)."""
    lines = content.removeprefix(codecs.BOM_UTF8).splitlines()
    texts = [*(line.partition(b"#")[0].strip() for line in lines), b""]
    for n in range(len(lines)):
        if texts[n].endswith(b"\\"):
            texts[n], texts[n + 1] = b"", (texts[n][:-1] + b" " + texts[n + 1]).strip()
    return [(number, text) for number, text in enumerate(texts, start=1) if text]


def _shown(line: _Line) -> str:
    number, text = line
    return f"{b' '.join(text.split())!r} in line {number}"


def parse_off(name: str, content: bytes) -> Mesh:
    """An OFF file: ``OFF``, with or without a new line behind it, ``V F E``, V positions, F faces ``n i₁ … iₙ``.

    Polygons are split into fans; what follows a face's indices (colours) is left out.
    """
    lines = _lines(content)
    number, first = lines[0] if lines else (0, b"")
    require(first[:3].upper() == b"OFF", name, "a file that starts with OFF", repr(content[:12]), DAMAGED)
    rest = first[3:].strip()
    lines = [(number, rest), *lines[1:]] if rest else lines[1:]
    head = lines[0][1].split() if lines else []
    ok = len(head) in (2, 3) and all(word.isdigit() for word in head)  # some writers leave out the edges
    require(ok, name, "numbers of vertices, faces and edges", _shown(lines[0]) if lines else "none", DAMAGED)
    n_vertices, n_faces = int(head[0]), int(head[1])
    body, expected = lines[1:], f"{n_vertices} vertices and {n_faces} faces"
    require(len(body) >= n_vertices + n_faces, name, expected, f"{len(body)} lines", DAMAGED)
    vertices, faces = body[:n_vertices], body[n_vertices : n_vertices + n_faces]
    for line in vertices:
        if len(line[1].split()) != 3:
            fail(name, "3 coordinates per vertex", _shown(line), DAMAGED)
    return make_mesh(name, _numbers(name, vertices, 3), _triangles(name, faces))


def _triangles(name: str, faces: list[_Line]) -> np.ndarray:
    """(T, 3) of the faces ``n i₁ … iₙ`` of an OFF file."""
    if all(len(text.split()) == 4 for _, text in faces):  # nearly every file: all at once
        table = _numbers(name, faces, 4)
        if (table[:, 0] == 3).all() and not (table % 1).any():
            return table[:, 1:].astype(np.int64)
    return _fans(_corners(name, line) for line in faces)


def _corners(name: str, line: _Line) -> list[int]:
    first, *words = line[1].split()
    count = int(first) if first.isdigit() else 0
    if not (0 < count <= len(words) and all(word.isdigit() for word in words[:count])):
        fail(name, "faces 'n i1 ... in'", _shown(line), DAMAGED)
    return [int(word) for word in words[:count]]


def parse_obj(name: str, content: bytes) -> Mesh:
    """An OBJ file's vertices (``v x y z``) and faces (``f i/…/… j k …``, from 1, or from −1 backwards), as fans."""
    positions, faces = [], []
    for line in _lines(content):
        keyword, *words = line[1].split()
        keyword = keyword.lower()
        if keyword == b"v":
            if len(words) < 3:
                fail(name, "3 coordinates per vertex", _shown(line), DAMAGED)
            positions.append((line[0], b" ".join(words[:3])))
        elif keyword in (b"f", b"fo"):  # fo: of version 2
            words = [word.partition(b"/")[0] for word in words]
            if not all(word.removeprefix(b"-").isdigit() and int(word) != 0 for word in words):
                fail(name, "faces of whole numbers from 1", _shown(line), DAMAGED)
            faces.append([i - 1 if i > 0 else len(positions) + i for i in map(int, words)])
    return make_mesh(name, _numbers(name, positions, 3), _fans(faces))


def _numbers(name: str, lines: list[_Line], columns: int) -> np.ndarray:
    """(lines, columns), of lines with as many words."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # numpy's word for text that is no number
        try:
            return np.fromstring(b"\n".join([text for _, text in lines]), sep=" ").reshape(len(lines), columns)
        except (DeprecationWarning, ValueError):
            wrong = [line for line in lines if not all(map(_is_number, line[1].split()))]
            fail(name, "numbers", f"other text: {_shown(wrong[0])}" if wrong else "other text among them", DAMAGED)


def _is_number(word: bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _fans(faces: Iterable[list[int]]) -> np.ndarray:
    """(T, 3): polygon i₁ … iₙ as the n − 2 triangles i₁ iₖ iₖ₊₁."""

    def triangles() -> Iterator[tuple[int, int, int]]:
        for first, *rest in faces:
            yield from ((first, *pair) for pair in pairwise(rest))

    return np.array(list(triangles()), dtype=np.int64).reshape(-1, 3)
