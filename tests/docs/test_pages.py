"""README and the site's pages: their code runs, and the table of what is supported is what the code answers."""

import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import griffe
import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "developers").glob("*.md")),
]
BLOCK = re.compile(r"(?P<fragment><!-- fragment[^\n]*-->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def code_of(page):
    """The page's blocks of Python but for fragments, on the lines where they stand."""
    text, lines = page.read_text(), []
    for block in BLOCK.finditer(text):
        if not block["fragment"]:
            lines += [""] * (text.count("\n", 0, block.start("code")) - len(lines))
            lines += block["code"].splitlines()
    return "\n".join(lines)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch, one_thread, registrations):
    script = tmp_path / f"{page.stem.replace('-', '_')}.py"
    script.write_text(code_of(page))
    monkeypatch.chdir(tmp_path)
    # Traced as by default, but no C++ is written and compiled, which takes a minute: test_packaging.py does so.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    runpy.run_path(str(script), run_name="__main__")


def test_what_is_supported_is_what_the_code_answers():
    """With an interpreter of Triton's kernels that takes less time."""
    script = (
        "import os, runpy; os.environ['TRITON_INTERPRET'] = '1'; import fast_interpreter; fast_interpreter.install();"
        "runpy.run_path('docs/support.py', run_name='__main__')"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = done.stdout[done.stdout.index("| group |") :]
    for page in (ROOT / "README.md", ROOT / "docs" / "support.md"):
        assert tables in page.read_text(), "run: python docs/support.py --write"


def test_docstrings_become_markdown(tmp_path):
    links = ":class:`Thing`, :func:`~package.other.function`"
    example = "    Example:\n        >>> 1\n        1\n    "
    (tmp_path / "module.py").write_text(
        f'"""Of {links} and g[u](q) or ``g[u](q)``::\n\n    x = 1\n\nText."""\n\n'
        f'class Thing:\n    """One.\n\n{example}"""\n'
    )
    extensions = griffe.load_extensions(ROOT / "docs" / "docstrings.py")
    module = griffe.load("module", search_paths=[tmp_path], extensions=extensions)
    thing = '<autoref identifier="module.Thing" optional><code>Thing</code></autoref>'
    function = '<autoref identifier="package.other.function" optional><code>function</code></autoref>'
    assert module.docstring.value == f"Of {thing}, {function} and g[u\\](q) or ``g[u](q)``:\n\n    x = 1\n\nText."
    assert module["Thing"].docstring.value == "One.\n\nExamples:\n    >>> 1\n    1"
