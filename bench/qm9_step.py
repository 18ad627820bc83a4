"""``python -m bench.qm9_step``: a training step of the paper's QM9 network, and how long each of its parts takes.

Times are taken where hooks are called: as a module's forward pass begins and ends, and, backwards, as the gradient of
its output arrives, which is where its own backward pass begins.

``--against BACKEND``: the whole step instead, with backend "auto" and with that one, by turns in blocks, on the same
batches; and what an epoch takes at these rates. ``--against materialise``: with the authors' algorithm, as everywhere
in the bench: backend `reference` at their sampling. No timing where, at one sampling, the two have different gradients.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from escnn.nn import GeometricTensor, IIDBatchNorm1d
from tqdm import tqdm

from implicit_steer.experiments.data import QM9
from implicit_steer.experiments.data.qm9 import FULL_TRAIN, MoleculeSet
from implicit_steer.experiments.models.qm9 import QM9Net, TensorProduct
from implicit_steer.experiments.train import QM9Options
from implicit_steer.nn import FourierActivation, ImplicitPointConv
from implicit_steer.ops import select
from implicit_steer.training.lightning import Regressor
from implicit_steer.training.runs import add_numbers

from . import report
from .steps import MATERIALISE, Candidate
from .timing import seconds_of, summary

PARTS = {
    ImplicitPointConv: "convolutions",
    FourierActivation: "node activations",
    IIDBatchNorm1d: "node norms",
    TensorProduct: "tensor product",
    torch.nn.Linear: "embedding and readout",
    torch.nn.Sequential: "embedding and readout",
}
BATCH, REST, OPTIMIZER = "gathering the batch", "graph, pooling, sums, loss", "optimizer"
PHASES = ("forward", "backward", "")
SMALLEST_SET = 1000  # molecules of QM9 that are loaded at least: one file of the cache
WARM_UP = 5  # steps; the first ones build tables and the optimizer's state
BLOCKS = 10  # of steps of one backend, between which the other one has its turn
# Of the relative difference of the first step's float32 gradients, taken as one vector. Measured:
# 1e-6, on 4 made-up molecules 1.2e-5.
TOLERANCE = 1e-4

PAPER = QM9Options()
SIZES = PAPER.named("channels", "max_frequency")

Switch = Callable[[str, str], None]
Sizes = Mapping[str, int]  # arguments of QM9Net


def molecules(count: int) -> tuple[MoleculeSet, str]:
    """``count`` molecules or more, and where they come from: QM9 where qm9pack is installed, else made up."""
    if importlib.util.find_spec("qm9pack") is None:
        return synthetic(count), "made-up molecules"
    return QM9(limit=max(count, SMALLEST_SET)).train, "QM9"


def synthetic(count: int, seed: int = 0) -> MoleculeSet:
    """Random rings with branches of QM9's size: 12 to 24 atoms, 18 on average, and as many bonds."""
    rng = np.random.default_rng(seed)
    atoms = rng.integers(12, 25, count)
    bonds = []  # (2, n) per molecule: each atom with an earlier one, and the last with the first
    for n in atoms:
        atom = np.arange(1, n)
        bonds.append(np.stack([np.append(rng.integers(0, atom), 0), np.append(atom, n - 1)]))
    kinds = [rng.integers(0, 4, n) for n in atoms]
    ptr = np.concatenate([[0], np.cumsum(atoms)])
    return MoleculeSet(
        element=rng.integers(0, 5, ptr[-1]),
        pos=rng.normal(size=(ptr[-1], 3)).astype(np.float32),
        ptr=ptr,
        edge=np.concatenate([directed for pair in bonds for directed in (pair, pair[::-1])], 1),
        bond=np.concatenate([kind for kind in kinds for _ in range(2)]),
        edge_ptr=2 * ptr,
        y=rng.normal(size=count),
    )


class Step:
    """A call makes one training step on the next batch, of a network of ``sizes``. It tells ``switch(part, phase)``
    what begins outside the network."""

    def __init__(self, data: MoleculeSet, batch_size: int, sizes: Sizes, backend: str = "auto", sampling: str = "auto"):
        torch.manual_seed(0)
        np.random.seed(0)  # from which escnn draws the weights of tensor products
        self.data = data
        self.ids = np.arange(len(data) // batch_size * batch_size).reshape(-1, batch_size)
        network = QM9Net(**sizes, backend=backend, sampling=sampling)
        self.regressor = Regressor(network, float(data.y.mean()), float(data.y.std()), 1e-3, {})
        self.optimizer = self.regressor.configure_optimizers()["optimizer"]
        self.count = 0

    def __call__(self, switch: Switch = lambda part, phase: None) -> None:
        switch(BATCH, "")
        batch = self.data.__getitems__(self.ids[self.count % len(self.ids)])
        self.count += 1
        switch(REST, "forward")
        loss = self.regressor.loss(batch)
        switch(OPTIMIZER, "")
        self.optimizer.zero_grad()
        switch(REST, "backward")
        loss.backward()
        switch(OPTIMIZER, "")
        self.optimizer.step()
        switch(REST, "")

    def gradient(self) -> torch.Tensor:
        """The last step's gradient in all parameters, (n,)."""
        return torch.cat([p.grad.reshape(-1) for p in self.regressor.parameters()])


class Stopwatch:
    """Seconds by (part, phase) of one step; its hooks slow the step down, so it is for the parts, not for the sum."""

    def __init__(self, step: Step):
        self._seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._now, self._since, self._outer = (REST, ""), 0.0, []
        self._step = step
        self._handles = []

    def __enter__(self) -> Stopwatch:
        for module in self._step.regressor.model.modules():
            for kind, part in PARTS.items():
                if isinstance(module, kind):
                    self._watch(module, part)
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _switch(self, part: str, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[self._now] += now - self._since
        self._now, self._since = (part, phase), now

    def _watch(self, module: torch.nn.Module, part: str) -> None:
        def enter(module, inputs):
            self._outer.append(self._now)
            self._switch(part, "forward")

        def leave(module, inputs, output):
            out = output.tensor if isinstance(output, GeometricTensor) else output
            out.register_hook(lambda _: self._switch(part, "backward"))
            self._switch(*self._outer.pop())

        self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def run(self) -> dict[tuple[str, str], float]:
        """One step's times."""
        self._since = time.perf_counter()
        self._step(self._switch)
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


def measure(rounds: int, batch_size: int = PAPER.batch_size, sizes: Sizes = SIZES) -> dict[str, Any]:
    """``rounds`` plain steps and as many with the stopwatch, by turns: medians in milliseconds."""
    data, source = molecules(batch_size * 16)
    step = Step(data, batch_size, sizes)
    for _ in range(WARM_UP):
        step()
    whole, processor, parts = [], [], []
    for _ in range(rounds):
        start, cpu = time.perf_counter(), time.process_time()
        step()
        whole.append(time.perf_counter() - start)
        processor.append(time.process_time() - cpu)
        with Stopwatch(step) as watch:
            parts.append(watch.run())
    names = dict.fromkeys(part for part, _ in parts[0])
    medians = {
        part: {phase: 1e3 * statistics.median(p.get((part, phase), 0.0) for p in parts) for phase in PHASES}
        for part in names
    }
    batch = data.__getitems__(step.ids[0])
    return {
        "environment": report.environment(),
        "molecules": {"source": source, "batch": batch_size, "atoms": len(batch.pos)},
        "sizes": dict(sizes),
        "step": summary(whole) | {"processor_ms": 1e3 * statistics.median(processor)},
        "parts": medians,
    }


def described(sizes: Sizes) -> str:
    """The sizes in words."""
    return f"{sizes['channels']} fields l <= {sizes['max_frequency']} per layer"


def text(results: dict[str, Any]) -> str:
    """The step's time, and a table of its parts."""
    step, found = results["step"], results["molecules"]
    rows = [
        [part, *(f"{ms[phase]:.2f}" if ms[phase] else "" for phase in PHASES[:2]), f"{sum(ms.values()):.2f}"]
        for part, ms in sorted(results["parts"].items(), key=lambda item: -sum(item[1].values()))
    ]
    return (
        f"A training step of the QM9 network, {described(results['sizes'])}, {found['batch']} molecules "
        f"({found['source']}; {found['atoms']} atoms), {results['environment']['threads']} threads:\n"
        f"median {step['median_ms']:.1f} ms (quartiles {step['q1_ms']:.1f} to {step['q3_ms']:.1f}, {step['rounds']} "
        f"steps), {step['processor_ms']:.1f} ms of processor time.\n"
        f"\n{report.table(['part', 'forward / ms', 'backward / ms', 'sum / ms'], rows)}"
    )


def by_turns(steps: dict[str, Step], count: int) -> dict[str, list[list[float]]]:
    """Seconds of ``count`` steps each, by name, in BLOCKS blocks (fewer where there are fewer steps)."""
    size, times = -(-count // BLOCKS), {name: [] for name in steps}
    with tqdm(total=len(steps) * count, desc="training", unit="step") as progress:
        for first in range(0, count, size):
            for name, step in steps.items():
                times[name].append([])
                for _ in range(min(size, count - first)):
                    times[name][-1].append(seconds_of(step))
                    progress.update()
    return times


def compare(rival: str, count: int, batch_size: int = PAPER.batch_size, sizes: Sizes = SIZES) -> dict[str, Any]:
    """``count`` steps each with backend "auto" and with ``rival``, a backend or `materialise`.

    ``error`` is the relative difference of the first step's gradients, both at the rival's sampling; where it exceeds
    TOLERANCE nothing is timed. ``times`` are by backend. ``ratio`` holds quartiles, over the blocks, of the rival's
    median step over the median step of "auto".
    """
    data, source = molecules(batch_size * 16)
    theirs = MATERIALISE if rival == MATERIALISE.label else Candidate(rival, "auto")
    network = data, batch_size, sizes
    steps = {"auto": Step(*network), rival: Step(*network, theirs.backend, theirs.sampling)}
    same_sampling = Step(*network, sampling=theirs.sampling)
    for step in (same_sampling, *steps.values()):
        step()
    found, right = same_sampling.gradient(), steps[rival].gradient()
    error = float((found - right).norm() / right.norm())
    results = {
        "environment": report.environment(),
        "molecules": {"source": source, "batch": batch_size},
        "sizes": dict(sizes),
        "error": error,
        "green": error <= TOLERANCE,
    }
    if not results["green"]:
        return results
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times = by_turns(steps, count)
    ratios = [statistics.median(slow) / statistics.median(fast) for fast, slow in zip(*times.values(), strict=True)]
    results["ratio"] = statistics.quantiles(ratios, n=4, method="inclusive")
    results["times"] = {name: summary([t for block in blocks for t in block]) for name, blocks in times.items()}
    return results


def comparison_text(results: dict[str, Any]) -> str:
    """The gate's verdict, the times of a step and an epoch, and their ratio."""
    batch, source = (results["molecules"][key] for key in ("batch", "source"))
    lines = [
        f"Training steps of the QM9 network, {described(results['sizes'])}, {batch} molecules ({source}), "
        f"{results['environment']['threads']} threads",
        f"Gate: {'green' if results['green'] else 'RED: nothing was timed'}. Relative difference of the first step's "
        f"gradients {results['error']:.1e}, tolerance {TOLERANCE:.0e}.",
    ]
    if results["green"]:
        epoch = -(-FULL_TRAIN // batch)
        columns = ["backend", "median / ms", "quartiles / ms", f"epoch of {epoch:,} steps / s"]
        rows = [
            [
                name,
                f"{ms['median_ms']:.1f}",
                f"{ms['q1_ms']:.1f} to {ms['q3_ms']:.1f}",
                f"{ms['median_ms'] * epoch / 1e3:.0f}",
            ]
            for name, ms in results["times"].items()
        ]
        low, middle, high = results["ratio"]
        count = results["times"]["auto"]["rounds"]
        ratio = f"Ratio {middle:.1f} (quartiles over blocks {low:.1f} to {high:.1f}), {count} steps each."
        lines += ["", report.table(columns, rows), "", ratio]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where the gradients differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.qm9_step", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, metavar="N", default=60, help="(%(default)s)")
    texts = {"batch_size": "molecules", "channels": "fields per hidden layer", "max_frequency": "their largest l"}
    add_numbers(parser, PAPER, texts)
    parser.add_argument("--threads", type=int, metavar="N", default=2, help="(%(default)s)")
    rivals = [name for name in select.NAMES if name != "auto"] + [MATERIALISE.label]
    parser.add_argument("--against", choices=rivals, metavar="BACKEND", help="time another backend, too, by turns")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    sizes = {name: getattr(args, name) for name in SIZES}
    if args.against is None:
        print(text(measure(args.steps, args.batch_size, sizes)))
        return 0
    results = compare(args.against, args.steps, args.batch_size, sizes)
    print(comparison_text(results))
    return 0 if results["green"] else 1


if __name__ == "__main__":
    sys.exit(main())
