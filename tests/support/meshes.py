"""Meshes of boxes, and a tiny ModelNet of them."""

import zipfile

import numpy as np

CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
TRIANGLES = [t for a, b, c, d in QUADS for t in ((a, b, c), (a, c, d))]


def off(vertices, faces, head="OFF\n"):
    lines = [f"{len(vertices)} {len(faces)} 0", *(" ".join(map(str, v)) for v in vertices)]
    return (head + "\n".join([*lines, *(" ".join(map(str, (len(f), *f))) for f in faces)]) + "\n").encode()


def box(size, faces=TRIANGLES, head="OFF\n"):
    """A box of these sides."""
    return off(CORNERS * size, faces, head)


def write_archive(path):
    """A tiny ModelNet: boxes by shape, 12 for training and 3 for testing per class, with clutter as published."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("ModelNet10/README.txt", "read me")
        file.writestr("__MACOSX/ModelNet10/flat/train/._flat_0001.off", b"\x00\x05")
        for label, sides in {"flat": (1, 1, 0.1), "tall": (0.2, 0.2, 1)}.items():
            for n in range(15):
                part, head = "test" if n >= 12 else "train", "OFF" if n % 2 else "OFF\n"
                content = box(sides * rng.uniform(0.5, 2, 3), QUADS if n % 3 else TRIANGLES, head)
                file.writestr(f"ModelNet10/{label}/{part}/{label}_{n:04d}.off", content)
    return path
