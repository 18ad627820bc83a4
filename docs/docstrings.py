"""Docstrings → Markdown, for mkdocstrings: roles of reStructuredText become links where the site has the object, else
code; ``text::`` becomes ``text:``; a section ``Example:`` holds examples."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`(?P<short>~?)(?P<name>[\w.]+)`")

_CODE_OR_BRACKET = re.compile(r"(`+[^`]*`+)|\]\(")  # g[u](q) in a formula is no link


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """One object's docstring."""
        if obj.docstring is None:
            return
        text = _ROLE.sub(lambda match: _link(obj, match["name"], bool(match["short"])), obj.docstring.value)
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        text = _CODE_OR_BRACKET.sub(lambda match: match[1] or r"\](", text)
        obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)


def _link(obj: griffe.Object, name: str, short: bool) -> str:
    """An optional reference: plain code where the site has no such object."""
    path = name
    if "." not in name:
        try:
            path = obj.resolve(name)
        except griffe.NameResolutionError:
            path = f"{obj.path}.{name}"
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
