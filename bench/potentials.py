"""``python -m bench potentials``: this package, MACE and NequIP, trained on the same files for the same time.

Every training is one run with a schedule that ends with it: errors against training time are those of several runs. All
stages leave their results in files, and an interrupted measurement continues after the last complete one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from implicit_steer._check import load_extra
from implicit_steer._files import replacing
from implicit_steer.graph.structures import Structures
from implicit_steer.potentials import Potential
from implicit_steer.potentials.data import SYSTEMS, ForceData
from implicit_steer.training import viz

from .report import table
from .trainers import CHANNELS, CUTOFF, DEGREE, LAYERS, ROOT, Files, Trainer

if TYPE_CHECKING:
    from ase import Atoms

STRUCTURES, MINUTES = (500, 2000), (10.0,)
CELLS = (2, 3, 5, 7, 10)  # cubic cells of 4 atoms along each edge of the metal: 32 … 4,000 atoms
TESTED = 200  # structures
VALID_SHARE = 10  # training structures for each one that chooses the epoch
PILOT = 40  # structures of the short runs that tell the time of an epoch,
PILOT_GROWTH = 5  # and by how much one has more epochs than the one before
DYNAMICS_SYSTEM = "metals"
DYNAMICS_SECONDS = 5.0  # of steps, for each number of atoms
_EVALUATE = ROOT / "bench" / "standalone" / "evaluate.py"


class Plan(NamedTuple):
    """What is measured: ``structures``, sizes of the training sets; ``minutes`` of training; ``cells``, see CELLS."""

    systems: Sequence[str] = tuple(SYSTEMS)
    structures: Sequence[int] = STRUCTURES
    minutes: Sequence[float] = MINUTES
    cells: Sequence[int] = CELLS
    tested: int = TESTED


QUICK = Plan(systems=(DYNAMICS_SYSTEM,), structures=(40,), minutes=(0.2,), cells=(2, 3), tested=10)


def measure(plan: Plan, everyone: Sequence[Trainer], out: Path) -> dict[str, Any]:
    """``versions`` of the packages; ``errors``: a record per system, number of structures, minutes and package;
    ``dynamics``: one per package and number of atoms. A record of what failed has ``failed`` in place of results."""
    out = out.resolve()
    there = {t: t.version() for t in everyone}
    results: dict[str, Any] = {"versions": {t.kind: version for t, version in there.items()}}
    results |= {"errors": [], "dynamics": []}
    cases = [(s, n, m) for s in plan.systems for n in plan.structures for m in plan.minutes]
    installed = [t for t, version in there.items() if version is not None]
    with tqdm(total=len(cases) * len(installed), desc="potentials", unit="training") as progress:
        for system, count, minutes in cases:
            files = _files(system, count, plan.tested, out)
            for trainer in installed:
                progress.set_postfix_str(f"{trainer.kind}, {count} {system}, {minutes:g} min")
                place = {"kind": trainer.kind, "system": system, "structures": count, "minutes": minutes}
                folder = out / f"{system}-{count}-{minutes:g}min-{trainer.kind}"
                pilot = out / f"{system}-pilot-{trainer.kind}"
                found = _attempt(_train, trainer, files, count, minutes, folder, pilot)
                results["errors"].append(place | found)
                progress.update()
    trained = [r for r in results["errors"] if r["system"] == DYNAMICS_SYSTEM and "failed" not in r]
    last = {r["kind"]: r for r in trained}  # weights do not change the time of a step
    for trainer in tqdm([t for t in installed if t.kind in last], desc="dynamics", unit="package"):
        for cells in plan.cells:
            found = _attempt(_dynamics, trainer, Path(last[trainer.kind]["folder"]), cells, out)
            results["dynamics"].append({"kind": trainer.kind, "atoms": 4 * cells**3} | found)
    return results


def _attempt(make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What ``make`` gives, or why the package failed, which leaves the others' rows as they are."""
    try:
        return make(*arguments)
    except RuntimeError as error:
        tqdm.write(str(error))
        return {"failed": str(error)}


def _stage(path: Path, made_of: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``make()``, or what an earlier run with the same ``made_of`` left at ``path``."""
    made_of = json.loads(json.dumps(made_of))
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["made_of"] == made_of:
            return kept["found"]
    found = make()
    with replacing(path) as file:
        file.write(json.dumps({"made_of": made_of, "found": found}, indent=1).encode())
    return found


# ---- the files that everyone reads


class _Sets(NamedTuple):
    """``full`` and ``pilot`` are read by trainings; ``test``: a path."""

    full: Files
    pilot: Files
    test: str
    tested: int  # structures


def _files(system: str, count: int, tested: int, out: Path) -> _Sets:
    held = max(1, count // VALID_SHARE)
    data = ForceData(system, cutoff=CUTOFF, train=max(count, PILOT), val=max(held, PILOT), test=tested)
    training = data.train.structures[:count]
    folder = out / f"{system}-{count}-files"
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"train": training, "valid": data.val.structures[:held], "test": data.test.structures}
    sets |= {"pilot": data.train.structures[:PILOT], "pilot-valid": data.val.structures[: PILOT // VALID_SHARE]}
    paths = {name: str(folder / f"{name}.extxyz") for name in sets}
    for name, structures in sets.items():
        load_extra("ase.io", "ase").write(paths[name], [_labelled(single) for single in structures], format="extxyz")
    e0 = _atom_energies(training)
    full, pilot = Files(paths["train"], paths["valid"], e0), Files(paths["pilot"], paths["pilot-valid"], e0)
    return _Sets(full, pilot, paths["test"], tested)


def _labelled(single: Structures) -> Atoms:
    cell = single.cell[0].double().numpy()
    numbers, positions = single.numbers.numpy(), single.pos.double().numpy()
    atoms = load_extra("ase").Atoms(numbers, positions, cell=cell, pbc=bool(cell.any()))
    atoms.info["REF_energy"] = single.energy.item()
    atoms.arrays["REF_forces"] = single.forces.double().numpy()
    return atoms


def _atom_energies(structures: Sequence[Structures]) -> dict[str, float]:
    """Energies of single atoms, eV, that :meth:`Potential.fit` finds."""
    joined = Structures.join(structures)
    potential = Potential(joined.numbers.unique().tolist(), CUTOFF, channels=1, blocks=1)
    potential.fit(joined)
    symbols = load_extra("ase.data", "ase").chemical_symbols
    return {symbols[number]: float(energy) for number, energy in zip(potential.species, potential.shift, strict=True)}


# ---- one package


def _train(trainer: Trainer, sets: _Sets, count: int, minutes: float, folder: Path, pilot: Path) -> dict[str, Any]:
    """``epochs`` and ``seconds`` of the training, ``folder``, and what ``evaluate.py errors`` says."""
    made_of = [trainer.version(), CUTOFF, CHANNELS, DEGREE, LAYERS]
    rates = _stage(_beside(pilot), made_of, lambda: _rates(trainer, sets, pilot))
    epoch = rates["epoch"] * count / PILOT
    epochs = max(1, int((60 * minutes - rates["start"]) / epoch))

    def made() -> dict[str, Any]:
        seconds = _timed(trainer, sets.full, epochs, folder)
        command = [trainer.python, str(_EVALUATE), "errors", trainer.kind, str(trainer.model(folder)), sets.test]
        return {"epochs": epochs, "seconds": seconds, "folder": str(folder)} | _answer(trainer, command, folder)

    return _stage(_beside(folder), [*made_of, count, sets.tested], made)


def _beside(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.json"


def _rates(trainer: Trainer, sets: _Sets, folder: Path) -> dict[str, float]:
    """Seconds of an ``epoch`` of PILOT structures, and of everything else, ``start``: from a run of one epoch, and one
    of so many that it takes twice as long."""
    first, epochs, seconds = _timed(trainer, sets.pilot, 1, folder), 1, 0.0
    while seconds < 2 * first:
        epochs *= PILOT_GROWTH
        seconds = _timed(trainer, sets.pilot, epochs, folder)
    epoch = (seconds - first) / (epochs - 1)
    return {"epoch": epoch, "start": max(first - epoch, 0.0)}


def _timed(trainer: Trainer, files: Files, epochs: int, folder: Path) -> float:
    """Seconds of a training in a new ``folder``, with everything that its process does."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = trainer.training(files, epochs, folder)
    started = time.perf_counter()
    trainer.run(command, folder)
    return time.perf_counter() - started


def _dynamics(trainer: Trainer, folder: Path, cells: int, out: Path) -> dict[str, Any]:
    frame = out / f"{DYNAMICS_SYSTEM}-{4 * cells**3}.extxyz"
    start = SYSTEMS[DYNAMICS_SYSTEM].start()[:4]
    start.set_cell(SYSTEMS[DYNAMICS_SYSTEM].start().cell / 2)
    load_extra("ase.io", "ase").write(frame, start.repeat(cells), format="extxyz")
    model, seconds = str(trainer.model(folder)), str(DYNAMICS_SECONDS)
    command = [trainer.python, str(_EVALUATE), "dynamics", trainer.kind, model, str(frame), seconds]
    path = out / f"dynamics-{trainer.kind}-{4 * cells**3}.json"
    made_of = [trainer.version(), CUTOFF, CHANNELS, DEGREE, LAYERS, seconds]
    return _stage(path, made_of, lambda: _answer(trainer, command, folder))


def _answer(trainer: Trainer, command: list[str], folder: Path) -> dict[str, Any]:
    return json.loads(trainer.run(command, folder).splitlines()[-1])


# ---- what is told


def text(results: dict[str, Any]) -> str:
    """Tables of errors, of times per step and of memory, and where this package is behind."""
    sizes = f"cutoff {CUTOFF:g} Å, {CHANNELS} channels, l ≤ {DEGREE}, {LAYERS} layers"
    parts = [f"### Potentials trained on the same files: {sizes}\n"]
    for kind, version in results["versions"].items():
        counts = [r["parameters"] for r in results["errors"] if r["kind"] == kind and "failed" not in r]
        size = f", {counts[-1]:,} parameters" if counts else ""
        parts.append(f"- {kind}: {'not installed, or no such interpreter' if version is None else version + size}")
    parts += ["", _errors_table(results["errors"]), "", _dynamics_table(results["dynamics"])]
    failed = [f"{r['kind']}: {r['failed']}" for r in results["errors"] + results["dynamics"] if "failed" in r]
    parts += [f"\nnot measured: {reason}" for reason in dict.fromkeys(failed)]
    return "\n".join([*parts, "\nBehind the best of the others:", *(behind(results) or ["- nowhere"])])


def _errors_table(records: list[dict[str, Any]]) -> str:
    rows = []
    for r in records:
        case = [f"{r['structures']} {r['system']}, {r['minutes']:g} min, {r['kind']}"]
        if "failed" in r:
            rows.append([*case, "failed", "", "", ""])
        else:
            errors = [f"{1000 * r[name]:.2f}" for name in ("energy_mae", "forces_mae")]
            rows.append([*case, f"{r['seconds']:.0f}", f"{r['epochs']:,}", *errors])
    return table(["", "seconds", "epochs", "energy / meV per atom", "forces / meV/Å"], rows)


def _dynamics_table(records: list[dict[str, Any]]) -> str:
    rows = []
    for r in records:
        cells = ["failed", ""] if "failed" in r else [f"{1000 * r['seconds']:,.1f}", f"{r['peak_mb']:,.0f}"]
        rows.append([f"{r['atoms']:,} atoms, {r['kind']}", *cells])
    return table(["", "step of dynamics / ms", "peak memory / MB"], rows)


def behind(results: dict[str, Any]) -> list[str]:
    """A line for each value in which another package is better."""
    found, ours = [], "implicit_steer"
    keys = {"errors": ("system", "structures", "minutes"), "dynamics": ("atoms",)}
    measures = {"errors": ("energy_mae", "forces_mae"), "dynamics": ("seconds", "peak_mb")}
    for part, names in keys.items():
        done = [r for r in results[part] if "failed" not in r]
        for mine in (r for r in done if r["kind"] == ours):
            others = [r for r in done if r["kind"] != ours and all(r[name] == mine[name] for name in names)]
            for measured in measures[part]:
                best = min(others, key=lambda r: r[measured], default=mine)
                if best[measured] < mine[measured]:
                    place = ", ".join(f"{name} {mine[name]}" for name in names)
                    ratio = mine[measured] / best[measured]
                    found.append(f"- {place}: {measured} {ratio:.2f} times that of {best['kind']}")
    return found


def plots(results: dict[str, Any], out: Path) -> None:
    """``potentials-SYSTEM.png``, errors of the forces against training time; ``potentials-step.png``."""
    done = [r for r in results["errors"] if "failed" not in r]
    for system in dict.fromkeys(r["system"] for r in done):
        lines: dict[str, dict[float, float]] = {}
        for r in (r for r in done if r["system"] == system):
            lines.setdefault(f"{r['kind']}, {r['structures']}", {})[r["seconds"] / 60] = 1000 * r["forces_mae"]
        axes = {"xlabel": "training / minutes", "ylabel": "mean error of the forces / meV/Å"}
        viz.log_lines(lines, **axes, title=system).savefig(out / f"potentials-{system}.png")
    lines = {}
    for r in (r for r in results["dynamics"] if "failed" not in r):
        lines.setdefault(r["kind"], {})[r["atoms"]] = 1000 * r["seconds"]
    if lines:
        title = f"dynamics of {DYNAMICS_SYSTEM}, {os.cpu_count()} logical CPUs"
        figure = viz.log_lines(lines, xlabel="atoms", ylabel="step / ms", title=title)
        figure.savefig(out / "potentials-step.png")
