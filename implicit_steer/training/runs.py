"""What the runs of all tasks share: options, the folder of a run, its result."""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch

from .._check import fail, load_extra, parse_sampling, require
from .._files import CHMOD, replacing
from ..ops.select import NAMES as BACKEND_NAMES
from . import processes

# The files of a run, in its folder.
RESULTS = (
    *("last.ckpt", "best.ckpt", "log.csv", "result.json", "potential.pt", "model.safetensors"),
    *("parity-forces.png", "parity-energy.png"),
)
SAMPLINGS = "auto, exact, exact-N, escnn or lebedev-N"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of every task; a task's own class adds to them, or changes defaults.

    ``choices``: option → allowed values. ``least``: option → smallest value; None is allowed. ``identity_names``: the
    options that a resumed run must share with the interrupted one.
    """

    epochs: int = 100
    batch_size: int = 32
    seed: int = 0
    lr: float = 1e-3
    backend: str = "auto"
    device: str = "auto"
    num_threads: int | None = None
    cache: str | None = None
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    choices: ClassVar[dict[str, tuple[Any, ...]]] = {}
    least: ClassVar[dict[str, int]] = {}
    identity_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        for name, allowed in {**self.choices, "backend": BACKEND_NAMES}.items():
            require(getattr(self, name) in allowed, name, f"one of {list(allowed)}", repr(getattr(self, name)))
        for name, least in {"epochs": 1, "batch_size": 2, "num_threads": 1, **self.least}.items():
            value = getattr(self, name)
            require(value is None or value >= least, name, f"at least {least}", value)
        if hasattr(self, "sampling"):
            parse_sampling(self.sampling)

    @classmethod
    def parsed(cls, args: argparse.Namespace) -> RunOptions:
        """The options of a command line that :func:`add_run_arguments` and a task's own arguments have read."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def named(self, *names: str) -> dict[str, Any]:
        """The options of these names, as keywords."""
        return {name: getattr(self, name) for name in names}

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the interrupted one."""
        return self.named(*self.identity_names)


@dataclass(frozen=True, kw_only=True)
class RegressionOptions(RunOptions):
    """The options of a network of residual blocks that :class:`~implicit_steer.training.lightning.Regressor` trains.

    ``limit`` is the number of training samples, None: all. ``norm`` is "batch" or "none". ``clip`` bounds the norm of
    the gradient; from epoch ``freeze_norms`` on batch norms keep their statistics.
    """

    limit: int | None = None
    clip: float | None = None
    freeze_norms: int | None = None
    sampling: str = "auto"
    norm: str = "batch"
    blocks: int = 4
    channels: int = 8
    kernel_channels: int = 8

    choices: ClassVar = {"norm": ("batch", "none")}
    least: ClassVar = {"limit": 2, "freeze_norms": 0, "channels": 1, "kernel_channels": 1}
    identity_names: ClassVar = (
        *("limit", "batch_size", "seed", "lr", "clip", "freeze_norms"),
        *("sampling", "norm", "blocks", "channels", "kernel_channels"),
    )

    def __post_init__(self):
        super().__post_init__()
        require(self.clip is None or self.clip > 0, "clip", "a positive number, or None", self.clip)

    def network(self) -> dict[str, Any]:
        """What the options say about the network, as its constructor takes it."""
        norm = None if self.norm == "none" else self.norm
        return {**self.named("blocks", "channels", "kernel_channels", "sampling", "backend"), "norm": norm}


def add_numbers(group: Any, default: RunOptions, texts: dict[str, str]) -> None:
    """Add ``--NAME N`` for every option of ``texts``, with the type of its default."""
    for name, text in texts.items():
        value = getattr(default, name)
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=type(value), metavar="N", default=value, help=f"{text} (%(default)s)")


def add_training_arguments(parser: argparse.ArgumentParser, default: RunOptions, entries: str, **more: str) -> Any:
    """Add epochs, batch size (of ``entries``), learning rate, seed, and the options whose help is in ``more``; return
    their group."""
    texts = {
        "epochs": "passes over the training set",
        "batch_size": f"{entries} per step",
        "lr": "highest learning rate",
        "seed": "of weights and shuffling",
    }
    training = parser.add_argument_group("training")
    add_numbers(training, default, {**texts, **more})
    return training


def add_gradient_arguments(training: Any) -> None:
    """Add ``--clip`` and ``--freeze-norms``."""
    training.add_argument("--clip", type=float, metavar="NORM", help="largest norm of the gradient (none)")
    frozen = "epoch from which batch norms keep their statistics (none)"
    training.add_argument("--freeze-norms", type=int, metavar="N", help=frozen)


def add_model_arguments(parser: argparse.ArgumentParser, default: RegressionOptions) -> Any:
    """Add the options that :meth:`RegressionOptions.network` reads; return their group."""
    model = parser.add_argument_group("model")
    model.add_argument("--sampling", default=default.sampling, help=f"{SAMPLINGS} (%(default)s)")
    model.add_argument("--norm", choices=("batch", "none"), default=default.norm, help="of kernel MLPs (%(default)s)")
    sizes = {
        "blocks": "residual blocks",
        "channels": "fields per hidden layer",
        "kernel_channels": "channels of the kernel MLPs",
    }
    add_numbers(model, default, sizes)
    return model


def add_run_arguments(parser: argparse.ArgumentParser, default: RunOptions, out: str) -> None:
    """Add the options that every run has: backend, device, threads, and the folder, ``out`` unless it is given."""
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
    cache = "prepared data ($IMPLICIT_STEER_CACHE, ~/.cache/implicit_steer)"
    machine.add_argument("--cache", metavar="DIR", help=cache)
    machine.add_argument("--out", metavar="DIR", help=f"checkpoints, log.csv, result.json ({out})")
    machine.add_argument("--resume", action="store_true", help="continue the interrupted run in --out")
    machine.add_argument("--overwrite", action="store_true", help="discard the run in --out")
    machine.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")


class Run:
    """A run that has begun: its folder ``out``, and the ``checkpoint`` to continue from, None for a fresh run.
    Where ``torchrun`` has started several processes, they train together.

    ``default_out`` is the folder where ``options.out`` is None; ``with_escnn``: the network has escnn's types. Sets the
    number of threads; raises ``RuntimeError`` where lightning or a needed escnn is missing, ``ValueError`` where the
    folder holds another run.
    """

    def __init__(self, options: RunOptions, default_out: str, *, with_escnn: bool = True):
        load_extra("lightning.pytorch")
        if with_escnn:
            load_extra("escnn", "escnn")
        self.options, self.started = options, time.time()
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        processes.begin(options.device)
        if processes.rank() > 0:
            logging.getLogger("implicit_steer").setLevel(logging.WARNING)
        self.out = Path(options.out or default_out)
        if processes.rank() == 0:
            check_folder(self.out, options)
        self.checkpoint = str(self.out / "last.ckpt") if options.resume else None

    def prepare_folder(self) -> None:
        """Make the folder, and for a fresh run discard an earlier run in it. This comes last before training, when no
        option can be wrong any more."""
        if processes.rank() > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint is None:
            for name in RESULTS:
                (self.out / name).unlink(missing_ok=True)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """``result`` with the time, threads and options of the run, which is also what ``result.json`` then holds."""
        result = {
            **result,
            "seconds": round(time.time() - self.started, 1),
            "threads": torch.get_num_threads(),
            "processes": processes.count(),
            "options": asdict(self.options),
        }
        if processes.rank() == 0:
            write_json(self.out / "result.json", result)
        return result


def check_folder(out: Path, options: RunOptions) -> None:
    """Check the checkpoint to continue from; for a fresh run, that the folder holds none or may be overwritten."""
    last = out / "last.ckpt"
    if not options.resume:
        found = [name for name in RESULTS if (out / name).exists()]
        ways = ["--resume to continue it"] if last.exists() else []
        remedy = f"Use {', '.join([*ways, '--overwrite to discard it'])}, or another folder."
        require(options.overwrite or not found, "out", "a folder without a run", f"{', '.join(found)} in {out}", remedy)
        return
    require(last.exists(), "resume", "a checkpoint of an interrupted run", f"no file {last}", "Start without --resume.")
    remedy = "The checkpoint is damaged: start again with --overwrite."
    try:
        saved = torch.load(last, map_location="cpu", weights_only=True)["options"]
    except PermissionError as error:
        fail(str(last), "a checkpoint that may be read", error.strerror, f"{CHMOD}.", PermissionError)
    except (RuntimeError, EOFError, OSError, KeyError, UnpicklingError) as error:
        fail(str(last), "a checkpoint of a training run", error, remedy)
    defaults = {field.name: field.default for field in fields(options)}  # of options that are newer than the run
    for name, value in options.identity().items():
        before = saved.get(name, defaults[name])
        require(before == value, name, f"{before!r} as in the run to resume", repr(value))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content``; ``path`` appears complete or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
