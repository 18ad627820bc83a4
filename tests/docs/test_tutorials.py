"""Tutorials run, and their pages hold their text and code; the renderer."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("render", DOCS / "render.py")
render = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(render)
ALL = sorted(render.TUTORIALS.glob("*.py"))
PYG = importlib.util.find_spec("torch_geometric") is not None
TUTORIALS = [path for path in ALL if PYG or path.stem != "irreps"]  # `make test-slow` runs that one beside PyG


def test_the_tutorials_are_there():
    names = {path.stem for path in ALL}
    of_layers = {"kernels", "point_convolution", "grid_convolution", "model", "irreps", "moving"}
    assert names == {*of_layers, "forces", "own_structures"}


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tmp_path, one_thread, registrations):
    text = render.page(path, tmp_path)
    assert render.without_outputs(text) == render.page(path)
    pictures = re.findall(r"!\[.*?\]\(pictures/(.*?)\)", text)
    assert pictures
    assert all((tmp_path / name).stat().st_size > 5000 for name in pictures)
    committed = path.with_suffix(".md").read_text()
    assert render.without_outputs(committed) == render.page(path), f"run: python docs/render.py {path.stem}"
    assert re.findall(r"!\[.*?\]\(pictures/(.*?)\)", committed) == pictures
    assert all((path.parent / "pictures" / name).exists() for name in pictures)


def test_cells_and_outputs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\nprint(x)\nx + 1\n\n# %%\n"
        "from matplotlib.figure import Figure\n\nFigure()\n\n# %%\nx = 3\n"
    )
    assert [cell.line for cell in render.cells(script.read_text())] == [1, 6, 11, 16]
    text = render.page(script, tmp_path)
    assert text == (
        "# Title\n\nText.\n\n```python\nx = 1\nprint(x)\nx + 1\n```\n\n```text\n1\n2\n```\n\n"
        "```python\nfrom matplotlib.figure import Figure\n\nFigure()\n```\n\n![script-1.png](pictures/script-1.png)\n\n"
        "```python\nx = 3\n```\n"
    )
    assert (tmp_path / "script-1.png").exists()
    assert render.without_outputs(text) == render.page(script)


def test_an_error_names_script_and_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("# %%\nx = 1\n\n# %%\n\nx / 0\n")
    with pytest.raises(ZeroDivisionError) as raised:
        render.page(script, tmp_path)
    last = raised.traceback[-1]
    assert (Path(last.path), last.lineno + 1) == (script, 6)
