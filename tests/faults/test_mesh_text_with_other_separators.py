"""Meshes whose text has tabs, indentation, comments, other line ends: every face counts, and errors name the line."""

import zipfile

import numpy as np
import pytest

from implicit_steer.experiments.data._mesh_formats import parse_obj, parse_off
from implicit_steer.experiments.data._mesh_sources import FurnitureFiles, OffFiles

CORNERS = [(x, y, z) for x in (0.0, 1.0) for y in (0.0, 2.0) for z in (0.0, 3.0)]
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
OBJ = "".join(f"v {x} {y} {z}\n" for x, y, z in CORNERS) + "".join(
    f"f {' '.join(str(i + 1) for i in quad)}\n" for quad in QUADS
)
OFF = "OFF\n8 6 12\n" + "".join(f"{x} {y} {z}\n" for x, y, z in CORNERS)
OFF += "".join(f"4 {' '.join(map(str, quad))}\n" for quad in QUADS)
TRIANGLES = "OFF\n8 12 18\n" + OFF.split("\n", 2)[2].split("4 0 1")[0]
TRIANGLES += "".join(f"3 {a} {b} {c}\n3 {a} {c} {d}\n" for a, b, c, d in QUADS)


def half(text, change):
    """Every second line changed."""
    return "".join(change(line) if n % 2 else line for n, line in enumerate(text.splitlines(keepends=True)))


def faces(change):
    """The OBJ text with its faces changed."""
    head, *rest = OBJ.split("f ")
    return head + "".join(change("f " + face) for face in rest)


ANY = {
    "tabs": lambda text: text.replace(" ", "\t"),
    "tabs in half": lambda text: half(text, lambda line: line.replace(" ", "\t")),
    "indented": lambda text: half(text, lambda line: "  \t" + line),
    "many spaces": lambda text: text.replace(" ", "   "),
    "trailing space": lambda text: text.replace("\n", " \t\n"),
    "form feeds": lambda text: text.replace(" ", "\f"),
    "carriage returns": lambda text: text.replace("\n", "\r\n"),
    "old Macintosh": lambda text: text.replace("\n", "\r"),
    "no last line end": lambda text: text.removesuffix("\n"),
    "blank lines": lambda text: text.replace("\n", "\n\n  \n"),
    "byte order mark": lambda text: "\ufeff" + text,
    "comments": lambda text: "# a box\n" + text.replace("\n", " # é\n# more\n"),
}
OBJ_ONLY = {
    "upper case": lambda text: text.upper(),
    "textures": lambda text: faces(lambda f: " ".join(w if w == "f" else f"{w}/1" for w in f.split()) + "\n"),
    "normals": lambda text: faces(lambda f: " ".join(w if w == "f" else f"{w}//1" for w in f.split()) + "\n"),
    "both": lambda text: faces(lambda f: "f\t" + "\t".join(f"{w}/7/9" for w in f.split()[1:]) + "\n"),
    "backwards": lambda text: faces(lambda f: "f " + " ".join(str(int(w) - 9) for w in f.split()[1:]) + "\n"),
    "continued": lambda text: faces(lambda f: "f \\\n" + " \\\r\n ".join(f.split()[1:]) + "\n"),
    "continued at the end": lambda text: text.removesuffix("\n") + " \\",
    "continued vertices": lambda text: text.replace("v ", "v\\\n"),
    "weights": lambda text: "".join(
        f"{line} 1.0\n" if line.startswith("v") else f"{line}\n" for line in text.splitlines()
    ),
    "fo": lambda text: text.replace("f ", "fo "),
    "faces first": lambda text: "f" + text.partition("f")[2] + text.partition("f")[0],
}
OFF_ONLY = {
    "lower case": lambda text: text.replace("OFF", "off"),
    "one line": lambda text: text.replace("OFF\n", "OFF "),
    "no line": lambda text: text.replace("OFF\n", "OFF"),
    "space before": lambda text: "\n\t " + text,
    "colours": lambda text: "".join(
        f"{line} 255\t0 0\n" if line[0] in "34" else f"{line}\n" for line in text.split("\n")[:-1]
    ),
}


@pytest.mark.parametrize("change", [*ANY, *OBJ_ONLY])
def test_obj(change):
    """``f<TAB>`` and indented lines were skipped: half of a box, or a third of it, without a word."""
    text = {**ANY, **OBJ_ONLY}[change](OBJ)
    assert text != OBJ
    for found, expected in zip(parse_obj("box", text.encode()), parse_obj("box", OBJ.encode()), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("change", [*ANY, *OFF_ONLY])
@pytest.mark.parametrize("given", [OFF, TRIANGLES], ids=["quads", "triangles"])
def test_off(given, change):
    text = {**ANY, **OFF_ONLY}[change](given)
    assert text != given
    for found, expected in zip(parse_off("box", text.encode()), parse_off("box", given.encode()), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OBJ.replace("v 1.0 0.0 0.0", "v\t1.0 0.0"), r"3 coordinates per vertex, got b'v 1.0 0.0' in line 5\."),
        # one too few and one too many: the sum was right
        (OBJ.replace("v 0.0 0.0 0.0\nv 0.0", "v 0.0 0.0\nv 0.0 0.0"), "3 coordinates per vertex, got .* in line 1"),
        (OBJ.replace("v 1.0 0.0 0.0", "v 1.0 O.0 0.0"), r"numbers, got other text: b'1.0 O.0 0.0' in line 5\."),
        (OBJ.replace("v 1.0 0.0 0.0", "v 1,0 0,0 0,0"), "numbers, got other text: b'1,0 0,0 0,0' in line 5"),
        (OBJ.replace("v 1.0 0.0 0.0", "v 1-1 0 0"), "numbers, got other text: b'1-1 0 0' in line 5"),
        (OBJ.replace("f 1 2 4 3", " f\t1 2 x 3"), "faces of whole numbers from 1, got b'f 1 2 x 3' in line 9"),
        (OBJ.replace("f 1 2 4 3", "f 1 2 00 3"), "faces of whole numbers from 1, got .* in line 9"),
        (OBJ.replace("f 1 2 4 3", "f 1 2 -9 3"), r"indices of vertices in 0 .. 7, got -1 .. 7"),
    ],
)
def test_lines_of_obj_are_named(text, message):
    with pytest.raises(ValueError, match=rf"^sofa\.obj: expected {message}"):
        parse_obj("sofa.obj", text.encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OFF.replace("\n1.0 0.0 0.0", "\n1.0\t0.0"), r"3 coordinates per vertex, got b'1.0 0.0' in line 7\."),
        (OFF.replace("0.0 0.0 0.0\n0.0", "0.0 0.0\n0.0 0.0"), "3 coordinates per vertex, got .* in line 3"),
        (OFF.replace("\n1.0 0.0 0.0", "\n1.0 O.0 0.0"), "numbers, got other text: b'1.0 O.0 0.0' in line 7"),
        (OFF.replace("4 0 1 3 2", "5 0 1 3 2"), "faces 'n i1 ... in', got b'5 0 1 3 2' in line 11"),
        # a fraction was cut off
        (TRIANGLES.replace("3 0 1 3\n", "3 0 1.9 3\n"), "faces 'n i1 ... in', got b'3 0 1.9 3' in line 11"),
        (OFF.replace("8 6 12", "8 x"), "numbers of vertices, faces and edges, got b'8 x' in line 2"),
    ],
)
def test_lines_of_off_are_named(text, message):
    with pytest.raises(ValueError, match=rf"^chair\.off: expected {message}"):
        parse_off("chair.off", text.encode())


@pytest.mark.parametrize("packed", [False, True])
def test_files_named_in_capitals_count(tmp_path, packed):
    """They were left out."""
    names = ["chair/train/chair_0001.off", "chair/train/chair_0002.OFF", "chair/test/chair_0003.Off"]
    root = tmp_path / "meshes"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(OFF)
    if packed:
        with zipfile.ZipFile(tmp_path / "meshes.zip", "w") as file:
            for name in names:
                file.write(root / name, name)
        root = tmp_path / "meshes.zip"
    source = OffFiles(root)
    assert len(source.entries) == 3
    assert all(len(source.read(entry).triangle) == 12 for entry in source.entries)


def catalogue(folder, text):
    with zipfile.ZipFile(folder / "things.sh3f", "w") as file:
        file.writestr("PluginFurnitureCatalog.properties", text)
        file.writestr("box.obj", OBJ)
    return folder


def test_catalogues_with_other_separators(tmp_path):
    """Records with white space or a colon were left out; one that goes on in the next line lost its end."""
    text = "name#1=Chair\nmodel#1=box.obj\n  name#2 = Chair\n\tmodel#2:box.obj\r\nname#3=Arm\\\n   chair\n"
    text += (
        "model#3\t=\tbox.obj\nmodelRotation#3=\nname#4=Sofa\nmodel#4=box.obj\nmodelRotation#4= 1 0 0\t0 0 1  0 -1 0\n"
    )
    entries = FurnitureFiles(catalogue(tmp_path, text)).entries
    assert [entry.label for entry in entries] == ["chair", "chair", "armchair", "sofa"]
    assert entries[2].rotation == ()
    assert entries[3].rotation == (1, 0, 0, 0, 0, 1, 0, -1, 0)


@pytest.mark.parametrize("rotation", ["1 0 0", "1 0 0 0 1 0 0 0 x", "1 0 0 0 1 0 0 0 nan"])
def test_damaged_rotations_are_named(tmp_path, rotation):
    text = f"name#1=Chair\nmodel#1=box.obj\nmodelRotation#1={rotation}\n"
    message = rf"things\.sh3f: Chair: modelRotation: expected nine numbers, or none, got '{rotation}'"
    with pytest.raises(ValueError, match=message):
        FurnitureFiles(catalogue(tmp_path, text))
