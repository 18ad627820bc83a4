"""Meshes: OFF and OBJ text, ModelNet's archives, furniture catalogues, cache, samples, split; damaged files."""

import zipfile

import numpy as np
import pytest
from meshes import CORNERS, QUADS, TRIANGLES, box, off
from scipy.spatial import ConvexHull

from implicit_steer.experiments.data import ModelNet
from implicit_steer.experiments.data._mesh_formats import make_mesh, parse_obj, parse_off, sample_surface
from implicit_steer.experiments.data._mesh_sources import FurnitureFiles, head_word
from implicit_steer.experiments.data.modelnet import SCALES, find_source, random_rotation, split


def load(path, cache, **options):
    return ModelNet(path, cache=cache, progress=False, **{"points": 32, "copies": 2, **options})


# ---- formats


@pytest.mark.parametrize("head", ["OFF\n", "OFF", "OFF # a comment\n# another\n\n"])
@pytest.mark.parametrize("faces", [TRIANGLES, QUADS])
def test_off(head, faces):
    mesh = parse_off("box", box((2, 4, 4), faces, head))
    assert mesh.triangle.shape == (12, 3)
    np.testing.assert_allclose(np.linalg.norm(mesh.vertex, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.ptp(mesh.vertex, axis=0), np.array([2, 4, 4]) / 3, atol=1e-5)
    assert np.abs(mesh.vertex).max() < 1
    assert mesh.cumulative[-1] == 1


def test_off_with_colours():
    plain, coloured = box((1, 2, 3)), box((1, 2, 3)).replace(b"3 0 1 3\n", b"3 0 1 3 255 0 0\n")
    assert coloured != plain
    for a, b in zip(parse_off("a", plain), parse_off("b", coloured), strict=True):
        assert np.array_equal(a, b)


def test_obj():
    corners = "".join(f"v {x} {y} {z}\n" for x, y, z in CORNERS)
    absolute = (
        corners + "vt 0 0\nvn 0 0 1\n" + "".join(f"f {a + 1}/1/1 {b + 1}/1/1 {c + 1} {d + 1}\n" for a, b, c, d in QUADS)
    )
    relative = corners + "".join(f"f {a - 8} {b - 8} {c - 8} {d - 8}\n" for a, b, c, d in QUADS)
    expected = parse_off("box", box((1, 1, 1), QUADS))
    for text in (absolute, relative):
        for a, b in zip(parse_obj("box", text.encode()), expected, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PLY\n", "a file that starts with OFF"),
        (b"OFF\n", "numbers of vertices, faces and edges"),
        (b"OFF\n8 x 0\n", "numbers of vertices, faces and edges"),
        (box((1, 1, 1))[:-30], "8 vertices and 12 faces, got"),
        (box((1, 1, 1)).replace(b"3 0 1 3\n", b"3 0 1 9\n"), r"indices of vertices in 0 .. 7, got 0 .. 9"),
        (box((1, 1, 1)).replace(b"0.0 0.0 1.0\n", b"0.0 0.0\n"), "3 coordinates per vertex"),
        (box((1, 1, 1)).replace(b"0.0 0.0 1.0\n", b"0.0 O.0 1.0\n"), "numbers, got other text"),
        (box((1, 1, 1)).replace(b"0.0 0.0 1.0\n", b"0.0 nan 1.0\n"), "finite positions"),
        (box((1, 1, 1), QUADS).replace(b"4 0 1 3 2\n", b"5 0 1 3 2\n"), "faces 'n i1 ... in'"),
        (box((1, 0, 0)), "a mesh with a surface"),
        (off(CORNERS, []), "a mesh with a surface"),
    ],
)
def test_damaged_off_is_named(content, message):
    with pytest.raises(ValueError, match=rf"^chair_0001\.off: expected .*{message}"):
        parse_off("chair_0001.off", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 0\n", "faces of whole numbers from 1"),
        (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 4\n", "indices of vertices in 0 .. 2"),
        (b"v 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "3 coordinates per vertex"),
        (b"", "a mesh with a surface"),
    ],
)
def test_damaged_obj_is_named(content, message):
    with pytest.raises(ValueError, match=rf"^sofa\.obj: expected .*{message}"):
        parse_obj("sofa.obj", content)


# ---- samples


def test_samples_are_uniform_by_area():
    # One triangle is 100 times as large as the other: 0.99 of 20,000 points, ± 5 standard deviations.
    vertex = np.array([[0, 0, 0], [10, 0, 0], [0, 10, 0], [0, 0, 5], [1, 0, 5], [0, 1, 5]])
    mesh = make_mesh("two", vertex, np.array([[0, 1, 2], [3, 4, 5]]))
    points = sample_surface(mesh, 20_000, np.random.default_rng(0))
    large = points[:, 2] < 0
    assert abs(large.mean() - 100 / 101) < 5 * np.sqrt(0.01 / 20_000)
    # The mean of uniform points of a triangle is its centre; ± 5 standard deviations of at most 0.5.
    centre = mesh.vertex[:3].mean(0)
    np.testing.assert_allclose(points[large].mean(0), centre, atol=5 * 0.5 / np.sqrt(20_000))
    # barycentric coordinates in 0 .. 1
    a, b, c = mesh.vertex[:3]
    weights = np.linalg.lstsq(np.stack([b - a, c - a], 1), (points[large] - a).T, rcond=None)[0]
    assert weights.min() > -1e-5
    assert weights.sum(0).max() < 1 + 1e-5


def test_rotations():
    rng = np.random.default_rng(0)
    for kind in ("z", "so3", "none"):
        matrices = np.stack([random_rotation(kind, rng) for _ in range(2000)])
        np.testing.assert_allclose(
            matrices @ matrices.transpose(0, 2, 1), np.broadcast_to(np.eye(3), matrices.shape), atol=1e-12
        )
        np.testing.assert_allclose(np.linalg.det(matrices), 1)
        mean = {"z": np.diag([0, 0, 1.0]), "so3": np.zeros((3, 3)), "none": np.eye(3)}[kind]
        np.testing.assert_allclose(matrices.mean(0), mean, atol=5 / np.sqrt(2000))  # entries vary by at most 1


def test_data_set(archive, tmp_path):
    data = load(archive, tmp_path / "cache")
    assert data.classes == ["flat", "tall"]
    assert {name: len(rows) for name, rows in data.split.items()} == {"train": 22, "val": 2, "test": 6}
    assert sorted(np.concatenate(list(data.split.values()))) == list(range(30))
    assert (len(data.train), len(data.val), len(data.test)) == (22, 2, 12)
    batch = data.test.__getitems__([0, 7, 3])
    assert batch.pos.shape == (3, 32, 3)
    assert batch.mesh.tolist() == [0, 1, 3]
    assert batch.y.tolist() == [data.test.labels[i] for i in (0, 1, 3)]
    # Shapes belong to their labels: flat boxes are wider than high, whatever the sample.
    everything = data.train.__getitems__(range(44))
    spread = everything.pos.std(1)
    assert ((spread[:, 2] > spread[:, 0]) == (everything.y == 1)).all()
    assert everything.pos.norm(dim=2).max() < SCALES[1] + 3**0.5 * 0.05


def test_samples_are_fresh_and_reproducible(archive, tmp_path):
    data, again = load(archive, tmp_path, seed=3), load(archive, tmp_path, seed=3)
    first, later = data.train[4].pos, data.train[4 + len(data.train)].pos
    assert not np.allclose(first, later)
    assert np.array_equal(first, again.train[4].pos)
    other = load(archive, tmp_path, seed=4)
    assert not np.allclose(first, other.train[4].pos)
    assert np.array_equal(data.test[5].pos, other.test[5].pos)


def test_a_folder_is_like_the_archive(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "unpacked")
    packed, unpacked = load(archive, tmp_path / "a"), load(tmp_path / "unpacked" / "ModelNet10", tmp_path / "b")
    assert unpacked.classes == packed.classes
    assert np.array_equal(packed.train[0].pos, unpacked.train[0].pos)


def test_split_keeps_what_is_published_for_testing(archive):
    source = find_source(archive)
    parts = split(source)
    assert {source.entries[n].part for n in parts["test"]} == {"test"}
    assert {source.entries[n].part for name in ("train", "val") for n in parts[name]} == {"train"}


def test_cache(archive, tmp_path, monkeypatch):
    data = load(archive, tmp_path / "cache")
    files = sorted(data.train.folder.glob("*.npz"))
    assert len(files) == 30
    files[3].unlink()
    read = []
    monkeypatch.setattr(
        "implicit_steer.experiments.data._mesh_sources.parse_off",
        lambda name, text: read.append(name) or parse_off(name, text),
    )
    load(archive, tmp_path / "cache")
    assert len(read) == 1
    assert files[3].exists()
    damaged = data.train.folder / f"{data.split['train'][0]:06d}.npz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"{damaged}: expected the processed meshes .* Delete the file"):
        data.train[0]


def test_damaged_files_are_named(archive, tmp_path):
    content = archive.read_bytes()
    truncated = tmp_path / "truncated.zip"
    truncated.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"truncated\.zip: expected an intact zip archive"):
        load(truncated, tmp_path)
    flipped = tmp_path / "flipped.zip"
    at = content.index(b"ModelNet10/tall/test/tall_0013.off") + 60
    flipped.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(ValueError, match=r"flipped\.zip: expected an intact zip archive.*tall_0013"):
        load(flipped, tmp_path)
    bad = tmp_path / "ModelNet" / "chair"
    for part in ("train", "test"):
        (bad / part).mkdir(parents=True)
        (bad / part / "chair_0001.off").write_bytes(box((1, 1, 1)))
    (bad / "test" / "chair_0001.off").write_bytes(b"OFF\n1 1 0\n")
    with pytest.raises(ValueError, match=r"chair/test/chair_0001\.off: expected 1 vertices and 1 faces"):
        load(tmp_path / "ModelNet", tmp_path)


def test_wrong_arguments(archive, tmp_path):
    with pytest.raises(ValueError, match=r"root: expected a zip or a folder of meshes, got no file nowhere"):
        ModelNet("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected meshes CLASS/train/NAME.off .* got none for train"):
        ModelNet(tmp_path / "empty")
    for option, value in {"rotate": "x", "points": 0, "copies": 0}.items():
        with pytest.raises(ValueError, match=rf"^{option}: expected"):
            load(archive, tmp_path, **{option: value})


# ---- furniture


CATALOGUE = """id=Catalogue
name=All of it
name#2=Desk lamp, small
model#2=/things/lamp.obj
modelRotation#2=1 0 0 0 0 -1 0 1 0
name#1=Glass door cabinet
model#1=/things/cabinet.obj
name#3=Table fan
model#3=/things/fan.obj
name#10=Table with tablecloth
model#10=/things/table.obj
"""


@pytest.fixture
def catalogue(tmp_path):
    """One catalogue: a cabinet (tall along y, up), a lamp (tall along z, turned upright), a fan, a table; 7 chairs."""
    corners, faces = CORNERS, "".join(f"f {a + 1} {b + 1} {c + 1} {d + 1}\n" for a, b, c, d in QUADS)

    def obj(sides):
        return "".join(f"v {x} {y} {z}\n" for x, y, z in corners * sides) + faces

    chairs = "".join(f"name#{n}=Chair\nmodel#{n}=/things/chair{n}.obj\n" for n in range(20, 27))
    with zipfile.ZipFile(tmp_path / "things.sh3f", "w") as file:
        file.writestr("PluginFurnitureCatalog.properties", CATALOGUE + chairs)
        for name, sides in {"cabinet": (1, 3, 1), "lamp": (1, 1, 3), "table": (1, 1, 1)}.items():
            file.writestr(f"things/{name}.obj", obj(sides))
        for n in range(20, 27):
            file.writestr(f"things/chair{n}.obj", obj((1, 2, 1)))
    return tmp_path


def test_head_words():
    names = [
        "Glass door cabinet",
        "Desk lamp",
        "Table fan",
        "Table with tablecloth",
        "Sofa 2 seats",
        "Cup of tea",
        "2",
        "",
    ]
    assert [head_word(name) for name in names] == ["cabinet", "lamp", "fan", "table", "sofa", "cup", "", ""]


def test_furniture(catalogue):
    source = FurnitureFiles(catalogue)
    assert [entry.label for entry in source.entries[:3]] == ["cabinet", "lamp", "table"]
    assert [entry.part for entry in source.entries[3:]] == ["train", "train", "test", "train", "train", "test", "train"]
    for entry in source.entries[:2]:
        sides = np.ptp(source.read(entry).vertex, axis=0)
        np.testing.assert_allclose(sides[2] / sides[:2], 3, rtol=1e-5)
    data = load(catalogue, catalogue / "cache")
    assert data.classes == ["cabinet", "chair", "lamp", "table"]
    with pytest.raises(ValueError, match=r"catalogues \*\.sh3f with furniture, got none"):
        FurnitureFiles(catalogue / "cache")


def test_furniture_convex_volume(catalogue):
    # The fans cover the surface: the hull of a sampled box has the box's volume but for its corners.
    mesh = FurnitureFiles(catalogue).read(FurnitureFiles(catalogue).entries[0])
    points = sample_surface(mesh, 5000, np.random.default_rng(0))
    assert ConvexHull(points).volume == pytest.approx(np.prod(np.ptp(mesh.vertex, axis=0)), rel=0.05)
