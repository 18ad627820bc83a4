"""Irreps of O(3) and SO(3): the content of a feature, written as e3nn writes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .._check import fail, require

MAX_DEGREE = 11  # e3nn's spherical harmonics end there, too
_TERM = re.compile(r"^(?:(?P<multiplicity>\d+)x)?(?P<degree>\d+)(?P<parity>[eo]?)$")
_LETTER = {1: "e", -1: "o", 0: ""}
_EXPECTED = "irreps such as '16x0e + 8x1o' (16 scalars and 8 vectors)"
_REMEDY = (
    "A term is MULTIPLICITYxDEGREEPARITY: '8x1o' is 8 vectors, e even and o odd under inversion; without a letter, in "
    "all terms, the group is SO(3)."
)


class Irrep(NamedTuple):
    """One irrep: its degree l, of 2 l + 1 components, and its parity under inversion, 1 (even) or −1 (odd); 0 is an
    irrep of SO(3), which knows no inversion."""

    degree: int
    parity: int

    @property
    def size(self) -> int:
        """2 l + 1."""
        return 2 * self.degree + 1

    @property
    def is_trivial(self) -> bool:
        """Whether it is a scalar, 0e (or 0 of SO(3)): what rotations and inversion leave as it is."""
        return self.degree == 0 and self.parity >= 0

    def __str__(self) -> str:
        return f"{self.degree}{_LETTER[self.parity]}"


class Term(NamedTuple):
    """``multiplicity`` copies of one irrep, side by side."""

    multiplicity: int
    irrep: Irrep

    @property
    def size(self) -> int:
        """How many components all copies have together."""
        return self.multiplicity * self.irrep.size


@dataclass(frozen=True)
class Irreps:
    """What a feature consists of: ``16x0e + 8x1o`` is 16 scalars and 8 vectors, 40 components.

    The components of the first term come first, copy by copy, then those of the second, and so on. The components of a
    copy are e3nn's: (x, y, z) for a vector, and for degree l one for each of the 2 l + 1 spherical harmonics, with
    polar axis y.

    Example:
        >>> Irreps.of("16x0e + 8x1o").size
        40
    """

    terms: tuple[Term, ...]

    @classmethod
    def of(cls, given: Any, name: str = "irreps") -> Irreps:
        """Irreps of a string, of another object (e3nn's, too) whose ``str`` is one, or of (multiplicity, irrep) pairs.

        Raises:
            ValueError: a term cannot be read; the message names ``name`` and the term.
            TypeError: ``given`` is neither a string nor irreps.
        """
        if isinstance(given, Irreps):
            return given
        if isinstance(given, str):
            texts = [text.strip() for text in given.split("+")] if given.strip() else []
        elif type(given).__name__ in ("Irreps", "Irrep"):
            return cls.of(str(given), name)
        elif isinstance(given, Iterable):
            texts = [_text(item, name) for item in given]
        else:
            fail(name, _EXPECTED, repr(given), _REMEDY, TypeError)
        terms = tuple(term for term in (_term(text, given, name) for text in texts) if term.multiplicity)
        with_parity = {term.irrep.parity != 0 for term in terms}
        require(len(with_parity) < 2, name, f"{_EXPECTED}, a parity in every term or in none", repr(given), _REMEDY)
        return cls(terms)

    @cached_property
    def size(self) -> int:
        """How many components the feature has."""
        return sum(term.size for term in self.terms)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each term begins."""
        starts, at = [], 0
        for term in self.terms:
            starts.append(at)
            at += term.size
        return tuple(starts)

    @property
    def highest_degree(self) -> int:
        """The largest l; 0 where there is none."""
        return max((term.irrep.degree for term in self.terms), default=0)

    @cached_property
    def fields(self) -> dict[Irrep, list[int]]:
        """Irrep → where each copy of it begins, in the order in which irreps occur first."""
        found: dict[Irrep, list[int]] = {}
        for start, (multiplicity, irrep) in zip(self.starts, self.terms, strict=True):
            found.setdefault(irrep, []).extend(range(start, start + multiplicity * irrep.size, irrep.size))
        return found

    @property
    def scalars(self) -> list[int]:
        """Where each scalar is."""
        return [start for irrep, starts in self.fields.items() if irrep.is_trivial for start in starts]

    def count(self, irrep: Irrep) -> int:
        """How many copies of this irrep there are."""
        return len(self.fields.get(irrep, ()))

    @property
    def has_parity(self) -> bool | None:
        """True for irreps of O(3), False for those of SO(3); None where there are none."""
        return self.terms[0].irrep.parity != 0 if self.terms else None

    def __iter__(self) -> Iterator[Term]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    def __str__(self) -> str:
        return "+".join(f"{multiplicity}x{irrep}" for multiplicity, irrep in self.terms)


def _text(item: Any, name: str) -> str:
    """The string of one pair (multiplicity, irrep), where the irrep is a string, an :class:`Irrep` or (l, parity)."""
    pair = isinstance(item, tuple | list) and len(item) == 2
    require(pair, name, f"{_EXPECTED}, or pairs (multiplicity, irrep)", repr(item), _REMEDY, TypeError)
    multiplicity, irrep = item
    if type(irrep) is tuple and len(irrep) == 2 and irrep[1] in _LETTER:
        irrep = Irrep(*irrep)
    return f"{multiplicity}x{irrep}"


def _term(text: str, given: Any, name: str) -> Term:
    match = _TERM.match(text)
    if match is None:
        fail(name, _EXPECTED, f"{text!r} in {str(given)!r}", _REMEDY)
    degree = int(match["degree"])
    require(degree <= MAX_DEGREE, name, f"degrees up to {MAX_DEGREE}", f"{text!r} in {str(given)!r}")
    parity = {"e": 1, "o": -1, "": 0}[match["parity"]]
    return Term(int(match["multiplicity"] or 1), Irrep(degree, parity))


def check_same_group(**given: Irreps) -> None:
    """Raise unless all of these irreps have a parity, or none of them; the names are those of the arguments."""
    first = ""
    for name, irreps in given.items():
        if not first and irreps.terms:
            first = name
        elif irreps.terms:
            which = "of O(3), with parities" if given[first].has_parity else "of SO(3), without parities"
            expected = f"irreps {which}, as {first} = {str(given[first])!r}"
            require(irreps.has_parity == given[first].has_parity, name, expected, repr(str(irreps)))
