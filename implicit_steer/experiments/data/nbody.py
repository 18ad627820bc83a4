"""Five particles that pull or push each other, simulated here: where are they some time later?

- ``springs``: F_i = −0.1 Σ_j e_ij (x_i − x_j), e_ij = e_ji ∈ {0, 1} with probability ½; and every particle is tied to a
  horizontal plane of its own by a spring of stiffness k, F_z −= k (z_i − ℓ_i), ℓ_i ~ U[0, 1];
- ``charged``: F_i = Σ_j q_i q_j (x_i − x_j) / |x_i − x_j|³, q_i = ±1; and a field along z, F_z += k q_i.

k is the ``strength``. With k = 0 the dynamics has the symmetry O(3) (and translations); with k > 0 only that of
rotations about z, and reflections in planes that contain it.

Every simulation depends on the system, the strength, the seed, the split and its number alone, and its initial state
does not depend on the strength. Source: Kipf et al., ICML 2018 (the systems); Zhdanov, Hoffmann, Cesa, NeurIPS 2023
(the planes).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from ..._check import load_extra, require
from ..._files import cache_folder
from ...training import chunks

log = logging.getLogger(__name__)

SYSTEMS = ("springs", "charged")
PARTICLES = 5
SPREAD, SPEED = 0.5, 0.5  # initial standard deviation of the coordinates; initial speed of every particle
SPRING, MAX_FORCE = 0.1, 100.0  # stiffness between particles; a component is cut to ± this
DT, FRAME = 1e-3, 100  # time step; steps between frames
INPUT, TARGET = 30, 40  # frames
SIZES = {"train": 10_000, "val": 2_000, "test": 2_000}
MIN_EVALUATION = 100  # simulations in a limited validation or test set
DATA_SEED = 42
CHUNK = 500  # simulations per cache file and at a time: their states stay in the cache of a core
CACHE_VERSION = 1  # part of the cache's name: raise it when the content of a chunk changes

PAIRS = np.array(np.triu_indices(PARTICLES, 1))  # (2, 10)
INCIDENCE = np.eye(PARTICLES)[:, PAIRS[0]] - np.eye(PARTICLES)[:, PAIRS[1]]  # (5, 10): 1 first, -1 second of a pair


@dataclass
class State:
    """n simulations side by side. pos, vel (5, 3, n); pair (10, n): e_ij or q_i q_j; single (5, n): ℓ_i or q_i."""

    pos: np.ndarray
    vel: np.ndarray
    pair: np.ndarray
    single: np.ndarray


def draw(system: str, rng: np.random.Generator, n: int) -> State:
    """n initial states."""
    pos = SPREAD * rng.standard_normal((PARTICLES, 3, n))
    vel = rng.standard_normal((PARTICLES, 3, n))
    vel *= SPEED / np.linalg.norm(vel, axis=1, keepdims=True)
    if system == "springs":
        return State(pos, vel, rng.integers(0, 2, (PAIRS.shape[1], n)).astype(float), rng.random((PARTICLES, n)))
    charge = rng.choice([-1.0, 1.0], (PARTICLES, n))
    return State(pos, vel, charge[PAIRS[0]] * charge[PAIRS[1]], charge)


def forces(system: str, strength: float, state: State) -> np.ndarray:
    """(5, 3, n), not cut."""
    difference = np.tensordot(INCIDENCE.T, state.pos, 1)  # (10, 3, n)
    if system == "springs":
        weight = -SPRING * state.pair
        along_z = -strength * (state.pos[:, 2] - state.single)
    else:
        weight = state.pair / np.square(difference).sum(1) ** 1.5
        along_z = strength * state.single
    total = np.tensordot(INCIDENCE, weight[:, None] * difference, 1)
    total[:, 2] += along_z
    return total


def simulate(system: str, strength: float, state: State, steps: int, dt: float = DT) -> State:
    """``state`` after ``steps`` steps of v += F dt, x += v dt (semi-implicit Euler), in float64."""
    now = State(state.pos.copy(), state.vel.copy(), state.pair, state.single)
    for _ in range(steps):
        now.vel += dt * np.clip(forces(system, strength, now), -MAX_FORCE, MAX_FORCE)
        now.pos += dt * now.vel
    return now


@dataclass(frozen=True)
class ParticleBatch:
    """Systems of one batch, as one graph of N particles and E directed pairs: all pairs of a system.

    pos (N, 3) relative to the system's centre; vel (N, 3); scalar (N, 1): height above the particle's plane, or its
    charge; edge_index (2, E) source, target, sorted by target; pair (E, 1): 1 where a spring connects the two, else 0,
    or the product of their charges; y (N, 3) the displacement to predict.
    """

    pos: torch.Tensor
    vel: torch.Tensor
    scalar: torch.Tensor
    edge_index: torch.Tensor
    pair: torch.Tensor
    y: torch.Tensor
    num_graphs: int

    def to(self, device: torch.device | str) -> ParticleBatch:
        """The same batch on ``device``."""
        tensors = (getattr(self, field.name) for field in fields(self)[:-1])
        return ParticleBatch(*(t.to(device) for t in tensors), self.num_graphs)


class ParticleSet(torch.utils.data.Dataset):
    """M systems; a list of indices gives them as one :class:`ParticleBatch`. Arrays as in the batch, (M, 5, ...) and
    (M, 20, 1).

    Use with ``DataLoader(dataset, batch_size, collate_fn=lambda batch: batch)``.
    """

    # (2, 20), sorted by target
    EDGES = np.array([(j, i) for i in range(PARTICLES) for j in range(PARTICLES) if i != j]).T

    def __init__(self, **arrays: np.ndarray):
        self.arrays = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(self.arrays["y"])

    def __getitem__(self, index: int) -> ParticleBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> ParticleBatch:
        """The systems ``indices``, in that order, as one batch."""
        ids, count = torch.as_tensor(indices), len(indices)
        rows = {name: array[ids].flatten(0, 1) for name, array in self.arrays.items()}
        start = PARTICLES * torch.arange(count).repeat_interleave(self.EDGES.shape[1])
        edges = torch.from_numpy(self.EDGES).repeat(1, count) + start
        return ParticleBatch(edge_index=edges, num_graphs=count, **rows)


class NBody:
    """``train``, ``val`` and ``test`` simulations of a system, each a :class:`ParticleSet`.

    - ``system``: ``"springs"`` or ``"charged"``.
    - ``strength``: k, the stiffness of the planes' springs, or the field.
    - ``limit``: the first ``limit`` of 10,000 training simulations, with validation and test sets in proportion to
      2,000 each (at least 100).
    - ``seed``: of the simulations.
    - ``cache``: folder for simulations; None: ``$IMPLICIT_STEER_CACHE``, else ``implicit_steer`` in
      ``$XDG_CACHE_HOME`` or ``~/.cache``. Written chunk by chunk: an interrupted run continues where it stopped.
    - ``progress``: show a bar while simulations run.

    Input is frame 30, the target is the displacement until frame 40 (0.1 units of time per frame). ``scale`` is the
    root mean square of its coordinates over ``train``.

    Raises ``ValueError`` for a wrong argument or a damaged file, ``RuntimeError`` where a package is missing.

    Example:
        >>> data = NBody("springs", strength=2.0, limit=1000)
        >>> data.train.__getitems__([0, 1]).y.shape
        torch.Size([10, 3])
    """

    def __init__(
        self,
        system: str = "springs",
        *,
        strength: float = 0.0,
        limit: int | None = None,
        seed: int = DATA_SEED,
        cache: str | Path | None = None,
        progress: bool = True,
    ):
        require(system in SYSTEMS, "system", f"one of {list(SYSTEMS)}", repr(system))
        require(strength >= 0, "strength", "a number >= 0", strength)
        most = SIZES["train"]
        require(limit is None or 1 <= limit <= most, "limit", f"1 to {most:,} simulations, or None", limit)
        share = (limit or most) / most
        sizes = {name: max(MIN_EVALUATION, round(share * size)) for name, size in SIZES.items()} | {
            "train": limit or most
        }
        folder = cache_folder(cache) / f"nbody-{system}-v{CACHE_VERSION}-k{strength:g}-seed{seed}"
        wanted = {
            folder / f"{name}-{start:06d}.npz": np.arange(start, start + CHUNK)
            for name, size in sizes.items()
            for start in range(0, size, CHUNK)
        }
        missing = {path: rows for path, rows in wanted.items() if not path.exists()}
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            _run(system, strength, seed, missing, progress)
        parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in sizes}
        for path, rows in wanted.items():
            parts[path.name.partition("-")[0]].append(chunks.load_chunk(path, rows, "simulations"))
        self.train, self.val, self.test = (_joined(parts[name], size) for name, size in sizes.items())
        self.scale = float(self.train.arrays["y"].square().mean().sqrt())


def _run(system: str, strength: float, seed: int, missing: dict[Path, np.ndarray], progress: bool) -> None:
    tqdm, total = load_extra("tqdm"), sum(len(rows) for rows in missing.values())
    log.info("%s, strength %g: %d simulations", system, strength, total)
    with tqdm.tqdm(total=total, desc=system, unit="simulation", disable=not progress) as bar:
        for path, rows in missing.items():
            split = path.name.partition("-")[0]
            rng = np.random.default_rng((seed, list(SIZES).index(split), rows[0]))
            before = simulate(system, strength, draw(system, rng, len(rows)), INPUT * FRAME)
            after = simulate(system, strength, before, (TARGET - INPUT) * FRAME)
            chunks.save_chunk(path, {"row": rows, **observed(system, before, after)})
            bar.update(len(rows))


def observed(system: str, before: State, after: State) -> dict[str, np.ndarray]:
    """What a network sees of ``before``, and the displacement until ``after``, as a :class:`ParticleSet` holds it."""
    number = np.zeros((PARTICLES, PARTICLES), dtype=int)  # of a pair
    number[tuple(PAIRS)] = number[tuple(PAIRS[::-1])] = range(PAIRS.shape[1])
    scalar = before.pos[:, 2] - before.single if system == "springs" else before.single
    features = {
        "pos": before.pos - before.pos.mean(0),
        "vel": before.vel,
        "scalar": scalar[:, None],
        "pair": before.pair[number[tuple(ParticleSet.EDGES)]][:, None],
        "y": after.pos - before.pos,
    }
    return {name: np.moveaxis(array, -1, 0) for name, array in features.items()}


def _joined(chunks: list[dict[str, np.ndarray]], count: int) -> ParticleSet:
    """The first ``count`` simulations of the chunks."""
    names = ("pos", "vel", "scalar", "pair", "y")
    return ParticleSet(**{name: np.concatenate([chunk[name] for chunk in chunks])[:count] for name in names})
