"""Whether a potential's forces are right: ``python -m implicit_steer certify POTENTIAL``, or :func:`certify`.

Every check is a number that is 0 for an exact potential, and a bound on it. Each is made for every backend that runs
here, in both dtypes, with the kernels' MLPs and with tables in their place, on the user's own structures.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._check import load_extra, require
from ..layers import PotentialNet
from ..ops import select
from .checks import BOUNDS, CHECKS, MEANING, Bound, Variant
from .md import MDOptions, read_potential, start_structure

if TYPE_CHECKING:
    from ase import Atoms

DTYPES = {"float64": torch.float64, "float32": torch.float32}
KERNELS = ("mlp", "table")
_RATTLE = 0.05  # Å, of the structure that is taken where none is given


@dataclass(frozen=True)
class Finding:
    """One check of one variant: the worst number over the structures, and in which of them (from 0)."""

    check: str
    backend: str
    dtype: str
    kernel: str
    value: float
    bound: float
    structure: int

    @property
    def ok(self) -> bool:
        """Whether the bound holds; NaN breaks it."""
        return self.value <= self.bound


@dataclass(frozen=True)
class Certificate:
    """All findings about a potential, on how many structures."""

    findings: tuple[Finding, ...]
    structures: int

    @property
    def ok(self) -> bool:
        """Whether every bound holds."""
        return all(finding.ok for finding in self.findings)

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The findings that break their bounds."""
        return tuple(finding for finding in self.findings if not finding.ok)

    def __str__(self) -> str:
        lines = [f"Certificate on {self.structures} structure{'s' * (self.structures > 1)}"]
        for variant, found in itertools.groupby(self.findings, lambda f: (f.backend, f.dtype, f.kernel)):
            lines += ["", ", ".join(variant)]
            for f in found:
                verdict = "" if f.ok else f"  BROKEN, structure {f.structure}"
                lines.append(f"  {f.check:<12} {f.value:8.1e} <= {f.bound:.0e}{verdict}")
        checks = dict.fromkeys(f.check for f in self.findings)
        lines += ["", *(f"{check}: {MEANING[check]}" for check in checks), ""]
        n = len(self.broken)
        lines.append("All bounds hold." if self.ok else f"{n} of {len(self.findings)} bounds are broken.")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The findings, each with its verdict, as JSON."""
        found = [asdict(finding) | {"ok": finding.ok} for finding in self.findings]
        return json.dumps({"ok": self.ok, "structures": self.structures, "findings": found}, indent=1)


def certify(
    potential: PotentialNet,
    structures: Sequence[Atoms],
    *,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    kernels: Sequence[str] = KERNELS,
    checks: Sequence[str] = tuple(BOUNDS),
    bounds: Mapping[str, Bound] = BOUNDS,
    steps: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> Certificate:
    """Check a potential on ASE's structures.

    Args:
        potential: a :class:`Potential`, or what :func:`implicit_steer.load` gives; it is copied.
        structures: at least one, with forces: an ideal crystal, where all are 0, shows nothing.
        backends: names; by default all that run here and compute second derivatives.
        dtypes, kernels: of "float64" and "float32"; of "mlp" and "table". A frozen potential has tables alone.
        checks: some of :data:`BOUNDS`; :data:`MEANING` says what each number is.
        bounds: of the checks, by dtype.
        steps: of the dynamics at constant energy, 0.5 fs each, from 300 K.
        seed: of displacements, rotations, orders and velocities.
        progress: whether to show a progress bar.

    Raises:
        TypeError: ``potential`` is none.
        ValueError: no structure; a name that is unknown; an atom of an unknown species.
        RuntimeError: ASE is missing, or a backend does not run here.

    Example:
        >>> atoms = ase.build.bulk("Cu", cubic=True)
        >>> atoms.rattle(0.05)
        >>> certify(Potential([29], cutoff=4.0), [atoms], backends=["cpu"], steps=20).ok
        True
    """
    tqdm = load_extra("tqdm")
    require(isinstance(potential, PotentialNet), "potential", "a Potential", type(potential).__name__, kind=TypeError)
    require(len(structures) > 0, "structures", "at least one", "none")
    _known("dtypes", dtypes, DTYPES), _known("kernels", kernels, KERNELS), _known("checks", checks, BOUNDS)
    names = _usable(potential) if backends is None else list(backends)
    _known("backends", names, select.BACKENDS)
    options = MDOptions("", steps=steps, dt=0.5, seed=seed, progress=False)
    variants = list(_variants(potential, names, dtypes, kernels, options))
    findings = []
    total = len(variants) * len(checks)
    with tqdm.tqdm(total=total, desc="certify", unit="check", disable=not progress) as bar:
        for variant in variants:
            for check in checks:
                found = [CHECKS[check](variant, atoms, np.random.default_rng(seed)) for atoms in structures]
                numbers = {n: value for n, value in enumerate(found) if value is not None}
                if numbers:
                    structure = max(numbers, key=lambda n, of=numbers: (of[n] != of[n], of[n]))  # NaN is the worst
                    value = numbers[structure]
                    bound = getattr(bounds[check], variant.dtype)
                    names_of = variant.backend, variant.dtype, variant.kernel
                    findings.append(Finding(check, *names_of, value, bound, structure))
                bar.update()
    return Certificate(tuple(findings), len(structures))


def _known(name: str, given: Sequence[str], among: Any) -> None:
    wrong = [value for value in given if value not in among]
    require(len(given) > 0 and not wrong, name, f"some of {list(among)}", wrong or "none")


def _usable(potential: PotentialNet) -> list[str]:
    """The backends, but for the oracle, that run here on the device of the potential."""
    device, kernels = next(iter(potential.parameters())).device, [c.implicit_kernel for c in _convolutions(potential)]
    return [
        name
        for name, backend in select.BACKENDS.items()
        if name != "reference"
        and all(backend.supports(k.plan, device, dtype)[0] for k in kernels for dtype in DTYPES.values())
    ]


def _convolutions(potential: PotentialNet) -> list[Any]:
    return [module for module in potential.modules() if hasattr(module, "implicit_kernel")]


def _variants(
    potential: PotentialNet, backends: Sequence[str], dtypes: Sequence[str], kernels: Sequence[str], options: MDOptions
) -> Iterator[Variant]:
    frozen = any(c.implicit_kernel.plan.is_frozen for c in _convolutions(potential))
    of_kernel = {"table" if frozen else "mlp": potential}
    if "table" in kernels and not frozen:
        of_kernel["table"] = potential.freeze_table()
    for backend, dtype, kernel in itertools.product(backends, dtypes, (k for k in kernels if k in of_kernel)):
        own = _copy(of_kernel[kernel], backend, dtype)
        exact = _copy(of_kernel[kernel], backend, "float64")
        of_mlp = _copy(of_kernel["mlp"], backend, dtype) if kernel == "table" and not frozen else None
        yield Variant(own, backend, dtype, kernel, exact, of_mlp, options)


def _copy(potential: PotentialNet, backend: str, dtype: str) -> PotentialNet:
    made = copy.deepcopy(potential).to(DTYPES[dtype]).eval().requires_grad_(False)
    for conv in _convolutions(made):
        conv.backend = backend
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m implicit_steer certify``."""
    parser.add_argument("potential", help="a file of `train forces`, implicit_steer.save or Potential.save")
    parser.add_argument("--structures", nargs="+", metavar="FILE", help="that ASE reads (a built-in one, rattled)")
    parser.add_argument("--limit", type=int, metavar="N", default=3, help="structures of each file (%(default)s)")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="(all that run here)")
    for name, known in (("dtypes", DTYPES), ("kernels", KERNELS), ("checks", BOUNDS)):
        parser.add_argument(f"--{name}", nargs="+", metavar="NAME", default=list(known), help="(%(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", default=200, help="of the dynamics (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the findings to this file")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")


def main(args: argparse.Namespace) -> int:
    """``python -m implicit_steer certify``: print the certificate; 1 where a bound is broken."""
    potential = read_potential(args.potential)
    structures = _read(potential, args.structures, args.limit)
    options = {name: getattr(args, name) for name in ("backends", "dtypes", "kernels", "checks", "steps", "progress")}
    found = certify(potential, structures, **options)
    print(found)
    if args.json:
        Path(args.json).write_text(found.to_json())
    return int(not found.ok)


def _read(potential: PotentialNet, files: Sequence[str] | None, limit: int) -> list[Atoms]:
    if not files:
        atoms = start_structure(potential, None)
        atoms.rattle(_RATTLE, seed=0)
        return [atoms]
    require(limit >= 1, "limit", "at least 1", limit)
    read = load_extra("ase.io", "ase").read
    found = []
    for file in files:
        require(Path(file).is_file(), "structures", "a file that ASE reads", repr(file))
        found += read(file, f":{limit}")
    return found
