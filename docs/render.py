"""Tutorials → pages: ``python docs/render.py [NAME ...]`` runs ``docs/tutorials/NAME.py``, all of them without a name,
and writes ``NAME.md`` with what the code prints and the pictures that it makes.

A tutorial is a Python script whose cells start with ``# %%``, or ``# %% [markdown]`` where they hold text in comments.
Of a code cell, what it prints is shown, and the value of a last expression: a matplotlib figure as a picture.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

TUTORIALS = Path(__file__).parent / "tutorials"
PICTURES = "pictures"  # folder beside the pages


class Cell(NamedTuple):
    """``source`` from line ``line`` of the script; ``text``: Markdown, not code."""

    source: str
    line: int
    text: bool


def cells(script: str) -> list[Cell]:
    """The cells of a percent-script."""
    marks = list(re.finditer(r"^# %%( \[markdown\])?\s*$\n", script, flags=re.MULTILINE))
    ends = [mark.start() for mark in marks[1:]] + [len(script)]
    found = []
    for mark, end in zip(marks, ends, strict=True):
        source, text = script[mark.end() : end].strip("\n"), mark[1] is not None
        if text:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        found.append(Cell(source, script.count("\n", 0, mark.end()), text))
    return found


def run(cell: Cell, path: Path, names: dict[str, Any]) -> tuple[str, Any]:
    """What a code cell prints, and the value of its last expression, or None."""
    tree = ast.parse("\n" * cell.line + cell.source, str(path))  # line numbers are the script's
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, str(path), "exec"), names)
        value = eval(compile(ast.Expression(last.value), str(path), "eval"), names) if last else None
    return printed.getvalue(), value


def page(path: Path, pictures: Path | None = None) -> str:
    """The page of a script: as it is when run, its pictures written to ``pictures``; where that is None, without what
    running gives."""
    parts, names, count = [], {"__name__": "__main__", "__file__": str(path)}, 0
    for cell in cells(path.read_text()):
        if cell.text:
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        if pictures is None:
            continue
        printed, value = run(cell, path, names)
        if value is not None and not hasattr(value, "savefig"):
            printed += f"{value!r}\n"
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
        if hasattr(value, "savefig"):
            count += 1
            name = f"{path.stem}-{count}.png"
            value.savefig(pictures / name, dpi=110)
            parts.append(f"![{name}]({PICTURES}/{name})")
    return "\n\n".join(parts) + "\n"


def without_outputs(text: str) -> str:
    """A page without what running its script gave."""
    return re.sub(r"\n```text\n.*?\n```\n|\n!\[[\w-]+\.png\]\(.*?\)\n", "", text, flags=re.DOTALL)


def main() -> None:
    """Render the tutorials that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in TUTORIALS.glob("*.py"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    pictures = TUTORIALS / PICTURES
    pictures.mkdir(exist_ok=True)
    for name in parser.parse_args().names or names:
        started, path = time.perf_counter(), TUTORIALS / f"{name}.py"
        for old in pictures.glob(f"{name}-*.png"):
            old.unlink()
        path.with_suffix(".md").write_text(page(path, pictures))
        print(f"{path.with_suffix('.md')}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
