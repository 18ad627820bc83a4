"""Triangle meshes from OFF and OBJ text, and points on their surfaces."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .._check import fail, require

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


def parse_off(name: str, content: bytes) -> Mesh:
    """An OFF file: ``OFF``, with or without a new line behind it, ``V F E``, V positions, F faces ``n i₁ … iₙ``.

    Polygons are split into fans; what follows a face's indices (colours) is left out.
    """
    require(content[:3] == b"OFF", name, "a file that starts with OFF", repr(content[:12]), DAMAGED)
    lines = (line.partition(b"#")[0].strip() for line in content[3:].splitlines())
    lines = [line for line in lines if line]
    head = lines[0].split() if lines else []
    ok = len(head) in (2, 3) and all(word.isdigit() for word in head)  # some writers leave out the edges
    require(ok, name, "numbers of vertices, faces and edges", repr(b" ".join(head)), DAMAGED)
    n_vertices, n_faces = int(head[0]), int(head[1])
    body, expected = lines[1:], f"{n_vertices} vertices and {n_faces} faces"
    require(len(body) >= n_vertices + n_faces, name, expected, f"{len(body)} lines", DAMAGED)
    vertex = _numbers(name, body[:n_vertices])
    require(vertex.size == 3 * n_vertices, name, "3 coordinates per vertex", f"{vertex.size} in all", DAMAGED)
    faces = body[n_vertices : n_vertices + n_faces]
    table = _numbers(name, faces)
    if table.size == 4 * n_faces and (table[::4] == 3).all():  # triangles alone
        triangle = table.reshape(-1, 4)[:, 1:].astype(np.int64)
    else:
        triangle = _fans(_corners(name, line) for line in faces)
    return make_mesh(name, vertex.reshape(-1, 3), triangle)


def _corners(name: str, line: bytes) -> list[int]:
    words = line.split()
    count = int(words[0]) if words[0].isdigit() else 0
    ok = count > 0 and len(words) > count and all(word.isdigit() for word in words[1 : count + 1])
    require(ok, name, "faces 'n i1 ... in'", repr(line), DAMAGED)
    return [int(word) for word in words[1 : count + 1]]


def parse_obj(name: str, content: bytes) -> Mesh:
    """An OBJ file's vertices (``v x y z``) and faces (``f i/…/… j k …``, from 1, or from −1 backwards), as fans."""
    positions, faces = [], []
    for line in content.splitlines():
        if line.startswith(b"v "):
            positions.append(b" ".join(line.split()[1:4]))
        elif line.startswith(b"f "):
            words = [word.partition(b"/")[0] for word in line.split()[1:]]
            ok = all(word.removeprefix(b"-").isdigit() and word != b"0" for word in words)
            require(ok, name, "faces of whole numbers from 1", repr(line), DAMAGED)
            faces.append([i - 1 if i > 0 else len(positions) + i for i in map(int, words)])
    vertex = _numbers(name, positions)
    require(vertex.size == 3 * len(positions), name, "3 coordinates per vertex", f"{vertex.size} in all", DAMAGED)
    return make_mesh(name, vertex.reshape(-1, 3), _fans(faces))


def _numbers(name: str, lines: Iterable[bytes]) -> np.ndarray:
    """All numbers of the lines, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # numpy's word for text that is no number
        try:
            return np.fromstring(b"\n".join(lines), sep=" ")
        except (DeprecationWarning, ValueError):
            fail(name, "numbers", "other text among them", DAMAGED)


def _fans(faces: Iterable[list[int]]) -> np.ndarray:
    """(T, 3): polygon i₁ … iₙ as the n − 2 triangles i₁ iₖ iₖ₊₁."""

    def triangles() -> Iterator[tuple[int, int, int]]:
        for first, *rest in faces:
            yield from ((first, *pair) for pair in pairwise(rest))

    return np.array(list(triangles()), dtype=np.int64).reshape(-1, 3)
