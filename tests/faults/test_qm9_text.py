"""QM9's files: what is no finite number and no known element is named with file, line and column; titles are free."""

import numpy as np
import pytest

from implicit_steer.experiments.data import QM9
from implicit_steer.experiments.data import _qm9_files as files
from implicit_steer.experiments.data._qm9_files import PackedCsv, RawSdf
from implicit_steer.training import chunks

COUNT = 12
NAMES = [
    "mol_id",
    "A",
    "B",
    "C",
    "mu",
    "alpha",
    "homo",
    "lumo",
    "gap",
    "r2",
    "zpve",
    "u0",
    "u298",
    "h298",
    "g298",
    "cv",
]
WATER = """
     RDKit          3D

  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.1000 O   0  0  0  0  0  0  0  0  0  0  0  0
    0.0000    0.7600   -0.4700 H   0  0  0  0  0  0  0  0  0  0  0  0
    0.0000   -0.7600   -0.4700 H   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  1  0
  1  3  1  0
M  END
"""
FIFTH = 4 * (WATER.count("\n") + 1) + 1  # line on which the fifth record begins


@pytest.fixture
def raw(tmp_path):
    """PyG's three raw files with twelve molecules of water, of which the third is left out."""
    (tmp_path / "gdb9.sdf").write_text("".join(f"gdb {n}{WATER}$$$$\n" for n in range(COUNT)))
    rows = [",".join([f"gdb_{n}", *(str(n + 0.01 * k) for k in range(len(NAMES) - 1))]) for n in range(COUNT)]
    (tmp_path / "gdb9.sdf.csv").write_text("\n".join([",".join(NAMES), *rows, ""]))
    (tmp_path / "uncharacterized.txt").write_text("header\n" * 9 + "    3   O\nfooter\n")
    return tmp_path


def change(path, old, new, count=1):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, count))


def load(folder):
    return QM9(folder, target="alpha", cache=folder / "cache", progress=False)


def everything(data):
    parts = (data.train, data.val, data.test)
    return np.sort(np.concatenate([part.y for part in parts])), sum(len(part.pos) for part in parts)


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-Infinity", "1e999", "", " ", "x", "1,0", "0x1"])
def test_csv_fields_that_are_no_finite_numbers(raw, text):
    """``nan`` became a target; others an error without file and line."""
    change(raw / "gdb9.sdf.csv", b",4.06,", f',"{text}",'.encode())
    place = rf"gdb9\.sdf\.csv, line 6, column lumo: expected a finite number, got '{text}'\. .*fetch the raw files"
    with pytest.raises(ValueError, match=place):
        load(raw)


def test_rows_left_out_may_be_anything(raw):
    change(raw / "gdb9.sdf.csv", b",2.06,", b",nan,")
    assert np.isfinite(load(raw).train.y).all()


def spoil_the_fifth(folder, old, new):
    path = folder / "gdb9.sdf"
    head, mark, tail = path.read_text().partition("gdb 4\n")
    assert old in tail
    path.write_text(head + mark + tail.replace(old, new, 1))


@pytest.mark.parametrize("element", ["Si", "Cl", "Xx", ""])
def test_unknown_elements_of_the_sdf(raw, element):
    """The error was that of ``tuple.index``."""
    spoil_the_fifth(raw, " O  ", f" {element:<3}")
    message = rf"gdb9\.sdf, line {FIFTH + 4}: expected elements among H, C, N, O, F, got \['{element}'\]\. .*fetch"
    with pytest.raises(ValueError, match=message):
        load(raw)


@pytest.mark.parametrize("text", ["nan", "inf", "", "x"])
def test_positions_of_the_sdf_that_are_no_finite_numbers(raw, text):
    """An empty one was 0."""
    spoil_the_fifth(raw, "   -0.4700 ", f"{text:>10} ")
    message = rf"gdb9\.sdf, line {FIFTH + 5}, column z: expected a finite number, got '{text:>10}'"
    with pytest.raises(ValueError, match=message):
        load(raw)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  1  2  1  0", "  1  9  1  0", "a readable record, got 'gdb 4'"),
        ("  3  2  0", "  x  2  0", "a readable record, got 'gdb 4'"),
        ("  1  2  1  0", "  1  2  9  0", r"bonds among \['SINGLE', 'DOUBLE', 'TRIPLE', 'AROMATIC'\], got \['DATIVE'\]"),
    ],
)
def test_damaged_records_of_the_sdf(raw, old, new, message):
    spoil_the_fifth(raw, old, new)
    with pytest.raises(ValueError, match=rf"gdb9\.sdf, line {FIFTH}: expected {message}"):
        load(raw)


@pytest.mark.parametrize(
    "title", ["Säure".encode("latin-1"), "Säure".encode(), "水".encode("utf-16"), b"\xff\xfe", b'"a, b'], ids=str
)
def test_titles_are_free(raw, title):
    """One in Latin-1 ended in an error of decoding; nobody reads them."""
    expected = everything(load(raw))
    change(raw / "gdb9.sdf", b"gdb 4\n", title.replace(b"\n", b"") + b"\n")
    if b'"' not in title:
        change(raw / "gdb9.sdf.csv", b"gdb_4,", title.replace(b"\n", b"") + b",")
    change(raw / "uncharacterized.txt", b"header", title)
    change(raw / "uncharacterized.txt", b"footer", title)
    found = everything(load(raw))
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: content.replace(b"$$$$\n", b"$$$$ \n"),
    ],
    ids=["carriage returns", "byte order mark", "space after the end"],
)
def test_files_written_elsewhere(raw, rewrite):
    expected = everything(load(raw))
    for name in ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"):
        (raw / name).write_bytes(rewrite((raw / name).read_bytes()))
    change(raw / "gdb9.sdf", b"gdb 4", b"another title")  # another size: not what is in the cache
    np.testing.assert_array_equal(everything(load(raw))[0], expected[0])


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("gdb9.sdf.csv", b"lumo", b"LUMO", r"gdb9\.sdf\.csv: expected a column lumo"),
        ("gdb9.sdf.csv", b",4.06,", b",4.06,4.06,", r"gdb9\.sdf\.csv, line 6: expected 16 columns, got 17"),
        ("gdb9.sdf.csv", b"gdb_4,", b"\n", r"gdb9\.sdf\.csv, line 6: expected 16 columns, got 0"),
        (
            "gdb9.sdf.csv",
            b"4.06",
            b'"' + 140_000 * b"4" + b'"',
            r"line 6: expected fields separated by commas, got field",
        ),
        ("gdb9.sdf", b"$$$$\n", b"", r"gdb9\.sdf: expected 12 molecules.*got 11"),
        (
            "uncharacterized.txt",
            b"    3   O\n",
            b"    3   O\n\n   13   O\n",
            r"txt: expected a number from 1 to 12 .*'' in line 11",
        ),
        ("uncharacterized.txt", b"    3 ", b"   13 ", r"txt: expected a number .*got '   13   O' in line 10"),
        ("uncharacterized.txt", b"    3 ", "    ² ".encode(), r"txt: expected a number .*in line 10"),
    ],
)
def test_other_damage_is_named(raw, name, old, new, message):
    change(raw / name, old, new)
    with pytest.raises(ValueError, match=message):
        load(raw)


def test_lines_after_the_footer_do_not_count(raw):
    (raw / "uncharacterized.txt").write_text((raw / "uncharacterized.txt").read_text() + "\n \n")
    assert RawSdf(raw).count() == COUNT - 1


def test_a_cache_with_nan_is_refused(raw, monkeypatch):
    """As an earlier version made it of ``nan``."""
    save = chunks.save_chunk
    spoilt = lambda path, chunk: save(path, {**chunk, "target": chunk["target"] * np.nan})  # noqa: E731
    monkeypatch.setattr(chunks, "save_chunk", spoilt)
    with pytest.raises(
        ValueError, match=r"train-000000\.npz: expected finite targets, got NaN or Inf.*Delete the file"
    ):
        load(raw)


# ---- qm9pack's files


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Three files of two molecules each, and their tensors."""
    names = ["XYZ_file", "Elements", "XYZ_Ang", *(target.packed for target in files.TARGETS.values())]
    row = [
        "a",
        "\"['O','H','H']\"",
        '"[[0.0,0.0,0.1],[0.0,0.76,-0.47],[0.0,-0.76,-0.47]]"',
        *["1.5"] * len(files.TARGETS),
    ]
    text = "\n".join([",".join(names), ",".join(row), ",".join(row), ""])
    monkeypatch.setattr(PackedCsv, "ROWS", dict.fromkeys(PackedCsv.ROWS, 2))
    for name in PackedCsv.ROWS:
        (tmp_path / name).write_text(text)
    columns = ",".join(files.TENSOR_COLUMNS)
    (tmp_path / files.POLARIZABILITY).write_text("\n".join([columns, *["1,2,3,4,5,6"] * 6, ""]))
    return tmp_path


def chunk(folder):
    source, rows = PackedCsv(folder), np.arange(6)
    return files.make_chunk(source, source.read(rows), rows)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.5\n", "nan\n", "column Heatcapacity_Cv_cal_mol_K: expected a finite number, got 'nan'"),
        ("1.5\n", "\n", "column Heatcapacity_Cv_cal_mol_K: expected a finite number, got ''"),
        ("0.1]", "inf]", "column XYZ_Ang: expected a finite number, got 'inf'"),
        ("0.1]", "]", "column XYZ_Ang: expected a finite number, got ''"),
        (",0.1]", "]", "column XYZ_Ang: expected 3 positions, got 8 coordinates"),
        ("'O'", "'Si'", r"column Elements: expected elements among H, C, N, O, F, got \['Si'\]"),
        ("['O','H','H']", "", r"column Elements: expected elements among H, C, N, O, F, got \[''\]"),
    ],
)
def test_damaged_packed_files(packed, old, new, message):
    assert np.isfinite(chunk(packed)["target"]).all()
    path = packed / "qm9_part2.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"qm9_part2\.csv, line 2, {message}.*pip install"):
        chunk(packed)


def test_damaged_tensors_are_named(packed):
    path = packed / files.POLARIZABILITY
    assert PackedCsv(packed).polarizability().shape == (6, 3, 3)
    for text in ("nan", "", "x"):
        path.write_text(path.read_text().rsplit("\n", 2)[0] + f"\n1,2,3,4,{text},6\n")
        with pytest.raises(ValueError, match=rf"line 7, column A_yz: expected a finite number, got '{text}'"):
            PackedCsv(packed).polarizability()
