"""``python -m implicit_steer demo``: the paper's network on real molecules, in a few minutes.

Do the backends agree? How equivariant is each sampling? How fast is each? What does the network learn in three epochs?
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .._check import load_extra
from ..graph import Graph
from ..ops import select
from ..training import viz
from .data.qm9 import QM9, Batch
from .train import QM9Options, train_qm9

MOLECULES, EPOCHS, BATCH = 2000, 3, 32
ROTATIONS, ROUNDS = 20, 7
_BONDS = {
    "C-C single bond": (0, 1, 1),
    "O=C double bond": (1, 3, 1),
}  # bond, source and target element: see MoleculeSet


def main(args: argparse.Namespace) -> None:
    """Run the whole tour; pictures and the training run go to the folder ``args.out``."""
    for module, extra in (("escnn", "escnn"), ("lightning.pytorch", "train"), ("matplotlib.figure", "train")):
        load_extra(module, extra)
    started, out = time.perf_counter(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data = QM9(limit=MOLECULES)
    batch = data.train.__getitems__(range(BATCH))
    networks = _networks()
    size = sum(p.numel() for p in next(iter(networks.values())).parameters())
    print(
        f"\nThe paper's QM9 network, {size:,} parameters, on {batch.num_graphs} molecules with {len(batch.pos)} atoms "
        f"and {batch.edge_index.shape[1]} directed bonds; {torch.get_num_threads()} threads.\n"
    )
    _compare(networks, batch, out)
    _equivariance(networks, batch)
    result = _train(out)
    error = result["test_mae"]
    always_mean = float(np.abs(data.test.y - data.mean).mean())
    print(f"\nTest error of {result['target']} after {EPOCHS} epochs on {MOLECULES:,} molecules: {error:.0f} meV")
    print(f"(always answering with the mean of the training set: {always_mean:.0f} meV)")
    print(f"\nPictures in {out}: {', '.join(sorted(path.name for path in out.glob('*.png')))}")
    print(f"{time.perf_counter() - started:.0f} s")


def _networks() -> dict[tuple[str, str], torch.nn.Module]:
    """(backend, sampling) → the network with the same weights, for everything that runs here; reference first."""
    from ..nn import ImplicitPointConv
    from .models import QM9Net

    torch.manual_seed(0)
    weights = QM9Net().state_dict()
    others = [name for name, (ok, _) in select.availability().items() if ok and name != "reference"]
    networks = {}
    for sampling in ("escnn", "auto"):
        networks["reference", sampling] = network = QM9Net(backend="reference", sampling=sampling)
        plans = [m.implicit_kernel.plan for m in network.modules() if isinstance(m, ImplicitPointConv)]
        for name in others:
            supports = select.BACKENDS[name].supports
            if all(supports(plan, torch.device("cpu"), torch.float32)[0] for plan in plans):
                networks[name, sampling] = QM9Net(backend=name, sampling=sampling)
    for network in networks.values():
        network.load_state_dict(weights)
    return networks


def _compare(networks: Mapping[tuple[str, str], torch.nn.Module], batch: Batch, out: Path) -> None:
    """Print how predictions and gradients deviate from `reference`, and times; draw the times."""

    def predict(network) -> torch.Tensor:
        network.eval()
        with torch.no_grad():
            return network(batch)

    def gradients(network) -> torch.Tensor:
        network.train()
        loss = network(batch).square().sum()
        found = torch.autograd.grad(loss, list(network.parameters()), materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    values = {key: (predict(network), gradients(network)) for key, network in networks.items()}
    times = {
        "forward": _medians({key: lambda n=n: predict(n) for key, n in networks.items()}),
        "training step": _medians({key: lambda n=n: gradients(n) for key, n in networks.items()}),
    }
    rows = []
    for key in networks:
        expected = values["reference", key[1]]
        rows.append([*key, *(f"{_relative(*pair):.0e}" for pair in zip(values[key], expected, strict=True))])
        rows[-1] += [f"{group[key]:.0f} ms" for group in times.values()]
    print("Deviation from `reference` at the same sampling, and median times:\n")
    _print_table(["backend", "sampling", "output", "gradients", *times], rows)
    named = {group: {f"{b}, {s}": t for (b, s), t in found.items()} for group, found in times.items()}
    viz.time_bars(named, title=f"QM9 network, {BATCH} molecules").savefig(out / "times.png")


def _medians(runs: Mapping[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], float]:
    """Median milliseconds of every run; the runs are interleaved."""
    times = {key: [] for key in runs}
    for _ in range(ROUNDS):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            times[key].append(1e3 * (time.perf_counter() - start))
    return {key: statistics.median(values) for key, values in times.items()}


def _equivariance(networks: Mapping[tuple[str, str], torch.nn.Module], batch: Batch) -> None:
    """Print how much random rotations and reflections of the molecules change the results."""
    group = next(iter(networks.values())).scalar_type.fibergroup
    np.random.seed(0)  # escnn samples from numpy's global generator
    elements = [group.sample() for _ in range(ROTATIONS)]
    rows = []
    for sampling in ("escnn", "auto"):
        network = networks["eager", sampling].eval()
        with torch.no_grad():
            whole = network(batch)
            turned = [
                network(replace(batch, pos=_turn(batch.pos, group.standard_representation(), g))) for g in elements
            ]
            change = max(float((t - whole).abs().max() / whole.std()) for t in turned)
            one = _convolution_error(network.blocks[0].conv1, batch, elements)
        name = network.blocks[0].conv1.implicit_kernel.plan.sampling
        rows.append([name, f"{one:.0e}", f"{change:.0e}"])
        network.train()  # escnn shares basis modules between networks: the next one must not find them in eval mode
    print(
        f"\nLargest error under {ROTATIONS} random rotations and reflections (float32), relative to the largest output"
    )
    print("of the convolution, and to the standard deviation of the network's predictions:\n")
    _print_table(["sampling of the kernels", "one convolution", "whole network"], rows)
    print("(The activations between the convolutions keep the authors' sample grid in both.)\n")


def _convolution_error(conv, batch: Batch, elements: Sequence) -> float:
    """max |conv(g x) − g conv(x)| / max |conv(x)| on the molecules' bonds, with random features."""
    source, target = batch.edge_index
    delta = batch.pos[target] - batch.pos[source]
    graph = Graph(batch.edge_index, len(batch.pos))
    features = torch.randn(len(batch.pos), conv.in_type.size, generator=torch.Generator().manual_seed(0))
    action, into, out = conv.in_type.gspace.basespace_action, conv.in_type.representation, conv.out_type.representation

    def run(x: torch.Tensor, edge_delta: torch.Tensor) -> torch.Tensor:
        return conv(conv.in_type(x, batch.pos), graph, edge_delta, batch.edge_attr).tensor

    y = run(features, delta)
    errors = [_relative(run(_turn(features, into, g), _turn(delta, action, g)), _turn(y, out, g)) for g in elements]
    return max(errors)


def _turn(x: torch.Tensor, representation, element) -> torch.Tensor:
    """ρ(g) applied to the rows of x."""
    return x @ torch.tensor(representation(element), dtype=x.dtype).T


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def _train(out: Path) -> dict:
    """Train; draw the learning curve and slices of a trained kernel."""
    run = out / "run"
    result = train_qm9(QM9Options(limit=MOLECULES, epochs=EPOCHS, out=str(run), overwrite=True))
    with (run / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    errors = {
        name: [float(row[key]) for row in rows] for name, key in (("training", "train_mae"), ("validation", "val_mae"))
    }
    epochs = [int(row["epoch"]) + 1 for row in rows]
    title = f"QM9 {result['target']}, {MOLECULES:,} molecules"
    viz.learning_curve(epochs, errors, unit=result["unit"], title=title).savefig(out / "learning-curve.png")
    _draw_kernels(run / "best.ckpt", out)
    return result


def _draw_kernels(checkpoint: Path, out: Path) -> None:
    """Draw what the first convolution's kernel does with the scalar part of its first input field."""
    from .models import QM9Net

    network = QM9Net()
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    conv = network.blocks[0].conv1
    scalar, x, y = _components(conv.in_type)
    size = conv.in_type.representations[0].size
    entries = {f"scalar → scalar {n + 1}": (n * size + scalar, scalar) for n in range(4)}
    entries |= {f"scalar → vector {n + 1}": ((n * size + x, n * size + y), scalar) for n in range(4)}
    for n, (bond, (kind, source, target)) in enumerate(_BONDS.items()):
        attributes = torch.zeros(14)
        attributes[[kind, 4 + source, 9 + target]] = 1
        figure = viz.kernel_slice(
            conv.implicit_kernel,
            extent=1.0,
            attributes=attributes,
            entries=entries,
            title=f"A trained kernel, {bond}; positions in units of 1.74 Å",
        )
        figure.savefig(out / f"kernel-{n + 1}.png")


def _components(kind) -> tuple[int, int, int]:
    """Where a field of functions on the sphere holds its scalar and the x and y of its vector."""
    field, start = kind.representations[0], {}
    position = 0
    for ident in field.irreps:
        start[ident[-1]] = position  # the last entry of an irrep's name is its degree
        position += field.group.irrep(*ident).size
    order = np.abs(field.group.standard_representation().change_of_basis).argmax(1)  # x, y, z among an l = 1 field
    return start[0], start[1] + int(order[0]), start[1] + int(order[1])


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for cells in (columns, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
