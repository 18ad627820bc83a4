"""Training runs: ``python -m implicit_steer train qm9 --target homo``, or :func:`train_qm9` from Python."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ._check import fail, require
from ._extras import load_extra
from .backends import NAMES as BACKEND_NAMES
from .data.qm9 import EDGE_ATTRIBUTES, QM9
from .data.qm9 import TARGETS as QM9_TARGETS

log = logging.getLogger(__name__)

RESULTS = ("last.ckpt", "best.ckpt", "log.csv", "result.json", "potential.pt")  # of a run, in its folder
SAMPLINGS = "auto, exact, exact-N, escnn or lebedev-N"


@dataclass(frozen=True)
class QM9Options:
    """A run on QM9. The command line has the same names; its help explains them.

    The defaults are the paper's: AdamW, learning rate 1e-3 halved at epochs 25, 50, 75, 100 and 125, weight decay 1e-8,
    batches of 32, L1 loss on the standardised target. ``norm`` is "batch" or "none".
    """

    target: str = "homo"
    epochs: int = 100
    batch_size: int = 32
    limit: int | None = None
    seed: int = 0
    lr: float = 1e-3
    edge_attr: str = "bonds+atoms"
    sampling: str = "auto"
    norm: str = "batch"
    blocks: int = 4
    channels: int = 8
    backend: str = "auto"
    device: str = "auto"
    num_threads: int | None = None
    data: str | None = None
    cache: str | None = None
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self):
        choices = {
            "edge_attr": EDGE_ATTRIBUTES,
            "norm": ("batch", "none"),
            "backend": BACKEND_NAMES,
            "target": QM9_TARGETS,
        }
        for name, allowed in choices.items():
            require(getattr(self, name) in allowed, name, f"one of {list(allowed)}", repr(getattr(self, name)))
        least_values = {"epochs": 1, "batch_size": 2, "limit": 2, "blocks": 0, "channels": 1, "num_threads": 1}
        for name, least in least_values.items():
            value = getattr(self, name)
            require(value is None or value >= least, name, f"at least {least}", value)

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the interrupted one."""
        names = ["target", "batch_size", "limit", "seed", "lr", "edge_attr", "sampling", "norm", "blocks", "channels"]
        return {name: getattr(self, name) for name in names}


def add_qm9_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`QM9Options`."""
    default = QM9Options()
    task = parser.add_argument_group("task")
    task.add_argument("--target", choices=QM9_TARGETS, default=default.target, help="the property (%(default)s)")
    task.add_argument("--limit", type=int, metavar="N", help="use N training molecules (all: 100,000)")
    task.add_argument(
        "--edge-attr",
        choices=EDGE_ATTRIBUTES,
        default=default.edge_attr,
        help="bond types, or with the elements of both ends (%(default)s)",
    )
    task.add_argument("--data", metavar="DIR", help="PyG's raw files or qm9pack's CSV files (the installed qm9pack)")
    cache = "processed molecules ($IMPLICIT_STEER_CACHE, ~/.cache/implicit_steer)"
    task.add_argument("--cache", metavar="DIR", help=cache)
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=int, metavar="N", default=default.epochs, help="passes over the training set (%(default)s)"
    )
    training.add_argument(
        "--batch-size", type=int, metavar="N", default=default.batch_size, help="molecules per step (%(default)s)"
    )
    training.add_argument("--lr", type=float, default=default.lr, help="learning rate (%(default)s)")
    training.add_argument("--seed", type=int, default=default.seed, help="of weights and shuffling (%(default)s)")
    model = parser.add_argument_group("model")
    model.add_argument("--sampling", default=default.sampling, help=f"{SAMPLINGS} (%(default)s)")
    model.add_argument("--norm", choices=("batch", "none"), default=default.norm, help="of kernel MLPs (%(default)s)")
    model.add_argument("--blocks", type=int, metavar="N", default=default.blocks, help="residual blocks (%(default)s)")
    channels = "fields per hidden layer (%(default)s)"
    model.add_argument("--channels", type=int, metavar="N", default=default.channels, help=channels)
    add_machine_arguments(parser, default, "runs/qm9-TARGET-seedSEED")


def add_machine_arguments(parser: argparse.ArgumentParser, default: Any, out: str) -> None:
    """The options that every run has: backend, device, threads, and the folder, ``out`` unless it is given."""
    machine = parser.add_argument_group("machine and output")
    machine.add_argument(
        "--backend", choices=BACKEND_NAMES, default=default.backend, help="of the convolutions (%(default)s)"
    )
    machine.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default=default.device,
        help="gpu: the first one; auto: gpu where there is one (%(default)s)",
    )
    machine.add_argument("--num-threads", type=int, metavar="N", help="CPU threads (torch's default)")
    machine.add_argument("--out", metavar="DIR", help=f"checkpoints, log.csv, result.json ({out})")
    machine.add_argument("--resume", action="store_true", help="continue the interrupted run in --out")
    machine.add_argument("--overwrite", action="store_true", help="discard the run in --out")
    machine.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")


def train_qm9(options: QM9Options) -> dict[str, Any]:
    """Train the paper's network on QM9, test the best epoch, and write and return ``result.json``'s content.

    In ``options.out``: ``last.ckpt`` (the state after the last complete epoch, there from the first step on),
    ``best.ckpt`` (the epoch of the lowest validation error), ``log.csv`` (a row per epoch), ``result.json``
    (``test_mae``, ``val_mae`` in ``unit``, and the options). With ``resume`` the run continues after the last complete
    epoch and gives what it would have given without the interruption. One seed and one number of threads give one
    result, to the last digit, on a CPU.

    Raises ``RuntimeError`` where a package is missing, ``ValueError`` for a wrong option, a damaged file, or a folder
    that holds another run.
    """
    lightning = load_extra("lightning.pytorch")
    load_extra("escnn", "escnn")
    # Only now: these import the packages checked above.
    from ._lightning import Regressor, loader, trainer_for
    from .models import QM9Net

    started = time.time()
    out = Path(options.out or f"runs/qm9-{options.target}-seed{options.seed}")
    checkpoint = prepare_folder(out, options)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    data = QM9(
        options.data,
        target=options.target,
        limit=options.limit,
        edge_attr=options.edge_attr,
        cache=options.cache,
        progress=options.progress,
    )
    lightning.seed_everything(options.seed, verbose=False)
    model = QM9Net(
        edge_attr=options.edge_attr,
        blocks=options.blocks,
        channels=options.channels,
        sampling=options.sampling,
        norm=None if options.norm == "none" else options.norm,
        backend=options.backend,
    )
    module = Regressor(model, data.mean, data.std, options.lr, options.identity())
    log.info(
        "QM9 %s: %d training, %d validation, %d test molecules; %d parameters",
        *(options.target, len(data.train), len(data.val), len(data.test)),
        sum(parameter.numel() for parameter in module.parameters()),
    )
    trainer = trainer_for(out, options.epochs, options.device, options.progress)
    train, val = loader(data.train, options.batch_size, options.seed), loader(data.val, 4 * options.batch_size)
    trainer.fit(module, train, val, ckpt_path=checkpoint)
    best, test = str(out / "best.ckpt"), loader(data.test, 4 * options.batch_size)
    metrics = trainer.test(module, test, ckpt_path=best, verbose=False)[0]
    result = {
        "target": options.target,
        "unit": data.unit,
        "test_mae": metrics["test_mae"],
        "val_mae": float(trainer.checkpoint_callback.best_model_score),
        "molecules": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "seconds": round(time.time() - started, 1),
        "threads": torch.get_num_threads(),
        "options": asdict(options),
    }
    write_json(out / "result.json", result)
    return result


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer train qm9``: train, and print the test error."""
    values = {name: getattr(args, name) for name in QM9Options.__dataclass_fields__}
    result = train_qm9(QM9Options(**values))
    print(f"test MAE {result['target']}: {result['test_mae']:.4f} {result['unit']} ({result['seconds']} s)")


def prepare_folder(out: Path, options: Any) -> str | None:
    """The checkpoint to continue from, or None for a fresh run in a folder without one.

    ``options`` has ``resume``, ``overwrite``, and an ``identity`` that a resumed run must share.
    """
    last = out / "last.ckpt"
    if not options.resume:
        remedy = "Use --resume to continue it, --overwrite to discard it, or another folder."
        require(options.overwrite or not last.exists(), "out", "a folder without a run", f"{last}", remedy)
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        return None
    require(last.exists(), "resume", "a checkpoint of an interrupted run", f"no file {last}", "Start without --resume.")
    remedy = "The checkpoint is damaged: start again with --overwrite."
    try:
        saved = torch.load(last, map_location="cpu", weights_only=True)["options"]
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        fail(str(last), "a checkpoint of a training run", error, remedy)
    for name, value in options.identity().items():
        require(saved.get(name) == value, name, f"{saved.get(name)!r} as in the run to resume", repr(value))
    return str(last)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content``; ``path`` appears complete or not at all."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
