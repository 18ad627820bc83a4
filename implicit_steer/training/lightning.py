"""The PyTorch Lightning side of training runs; importing it needs the extra ``train``."""

from __future__ import annotations

import csv
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from scipy.spatial.transform import Rotation

from .._check import require
from . import processes
from .runs import Run

MILESTONES = (25, 50, 75, 100, 125)  # epochs after which the learning rate is halved
WARM_UP = 0.03  # of the steps of "onecycle", in which the learning rate rises
WEIGHT_DECAY = 1e-8
SHOW_EVERY = 20  # steps between updates of the progress bar


class RunningMean:
    """Mean of per-batch means, weighted by the batches' sizes; no synchronisation with the device, or with other
    processes, until it is asked."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums: list[torch.Tensor] = []
        self._count = 0

    def add(self, mean: torch.Tensor, count: float) -> None:
        """A batch of ``count`` values."""
        self._sums.append(mean.detach() * count)
        self._count += count

    def value(self) -> float:
        """The mean so far, over all processes, each of which has to ask; NaN of nothing."""
        sums = torch.stack(self._sums).double().sum() if self._sums else torch.zeros((), dtype=torch.float64)
        total = processes.total(torch.stack([sums, sums.new_tensor(self._count)]))
        return float(total[0] / total[1])


class Task(pl.LightningModule):
    """What a run trains; ``options`` is stored in every checkpoint, for a resumed run to be compared with."""

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the options."""
        checkpoint["options"] = self.options


ERRORS = {"mae": torch.nn.functional.l1_loss, "mse": torch.nn.functional.mse_loss}


class Regressor(Task):
    """Regression of ``(y - mean) / std``; errors are reported in the unit of y, or its square.

    ``model(batch)`` has the shape of ``batch.y``, (rows, ...); ``mean`` and ``std`` are scalars, or tensors that
    broadcast to it. ``error`` is the loss: "mae", the mean of absolute values, or "mse", that of squares.

    ``schedule``: from ``lr`` the learning rate is halved at each of :data:`MILESTONES` ("steps"), or falls to 0 along a
    cosine over ``epochs`` ("cosine"), before which "onecycle" lets it rise for :data:`WARM_UP` of the steps. ``clip``
    bounds the norm of the gradient of all parameters. From epoch ``freeze_norms`` on the model is in evaluation mode,
    where batch norms keep the statistics that they have: what is trained is the very function that is evaluated.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mean: float | torch.Tensor,
        std: float | torch.Tensor,
        lr: float,
        options: dict[str, Any],
        error: str = "mae",
        *,
        schedule: str = "steps",
        epochs: int | None = None,
        clip: float | None = None,
        freeze_norms: int | None = None,
    ):
        super().__init__(options)
        self.model, self.lr, self.error = model, lr, error
        self.schedule, self.epochs, self.clip, self.freeze_norms = schedule, epochs, clip, freeze_norms
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64), persistent=False)
        self.monitor = f"val_{error}"
        self.train_error, self.eval_error = RunningMean(), RunningMean()

    def loss(self, batch: Any) -> torch.Tensor:
        """Mean error of a batch, in standard deviations."""
        return self._measured(self.model(batch), batch, self.train_error)

    def _measured(self, predicted: torch.Tensor, batch: Any, mean: RunningMean) -> torch.Tensor:
        """The loss; the error in the unit of y is added to ``mean``."""
        error = ERRORS[self.error]
        target = self.target(((batch.y - self.mean) / self.std).to(batch.pos.dtype), predicted.detach())
        mean.add(error(predicted.detach() * self.std, target * self.std), len(batch.y))
        return error(predicted, target)

    def target(self, y: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """What ``predicted`` is compared with, from the standardised y."""
        return y

    def on_train_epoch_start(self) -> None:
        """Start a fresh average; freeze the norms from epoch ``freeze_norms`` on."""
        self.train_error.reset()
        if self.freeze_norms is not None and self.current_epoch >= self.freeze_norms:
            self.model.eval()

    def training_step(self, batch: Any, step: int) -> torch.Tensor:
        """The loss, times this process's :func:`~implicit_steer.training.processes.share`; the error enters the
        epoch's mean."""
        loss = self.loss(batch) * processes.share(len(batch.y), self.device)
        if step % SHOW_EVERY == 0:
            self.log("loss", loss.detach(), prog_bar=True, batch_size=batch.num_graphs)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start a fresh average."""
        self.eval_error.reset()

    def validation_step(self, batch: Any, step: int) -> None:
        """Collect the error of a batch."""
        self._measured(self.model(batch), batch, self.eval_error)

    def on_validation_epoch_end(self) -> None:
        """Log ``val_mae`` or ``val_mse``."""
        self.log(self.monitor, self.eval_error.value(), prog_bar=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """Log ``test_mae`` or ``test_mse``."""
        self.log(f"test_{self.error}", self.eval_error.value())

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and the schedule; "onecycle" asks the trainer for the number of steps."""
        # fused: one call for all parameters, of which most are small
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=WEIGHT_DECAY, fused=True)
        schedules = torch.optim.lr_scheduler
        if self.schedule == "steps":
            return {"optimizer": optimizer, "lr_scheduler": schedules.MultiStepLR(optimizer, MILESTONES, gamma=0.5)}
        if self.schedule == "cosine":
            return {"optimizer": optimizer, "lr_scheduler": schedules.CosineAnnealingLR(optimizer, self.epochs)}
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = schedules.OneCycleLR(optimizer, self.lr, steps, pct_start=WARM_UP, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip the gradient's norm to ``clip``."""
        self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")

    def epoch_errors(self, logged: dict[str, torch.Tensor]) -> dict[str, float]:
        """What a row of the log holds beside epoch, step, learning rate and time."""
        return {f"train_{self.error}": self.train_error.value(), self.monitor: float(logged[self.monitor])}


class AxesRegressor(Regressor):
    """Regression of matrices y (rows, 3, 3) whose axes have unknown names and directions: what is predicted is compared
    with the nearest of R y Rᵀ, R the 24 rotations of the cube.

    The test also logs ``test_equivariance_error``: with f the predictions for a batch, and f' those for its positions
    turned by Q, ‖f' − Q f Qᵀ‖ / ‖f‖; the largest of all batches.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register_buffer("rotations", cube_rotations(), persistent=False)
        turn = torch.tensor(Rotation.from_rotvec([1.0, 2.0, 3.0]).as_matrix())  # along no axis of symmetry
        self.register_buffer("turn", turn, persistent=False)

    def test_step(self, batch: Any, step: int) -> None:
        """Collect the errors of a batch."""
        predicted, turn = self.model(batch), self.turn.to(batch.pos.dtype)
        self._measured(predicted, batch, self.eval_error)
        turned = self.model(replace(batch, pos=batch.pos @ turn.T))
        error = (turned - turn @ predicted @ turn.T).norm() / predicted.norm()
        count = batch.num_graphs
        self.log("test_equivariance_error", error, reduce_fx="max", on_epoch=True, sync_dist=True, batch_size=count)

    def target(self, y: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """The one of R y Rᵀ that is nearest to ``predicted``, (rows, 3, 3)."""
        turns = self.rotations.to(y.dtype)
        candidates = turns @ y[:, None] @ turns.mT  # (rows, 24, 3, 3)
        nearest = (candidates - predicted[:, None]).square().sum((2, 3)).argmin(1)
        return candidates[torch.arange(len(y), device=y.device), nearest]


def cube_rotations() -> torch.Tensor:
    """(24, 3, 3): signed permutations of the axes with determinant 1."""
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * 3)
    matrices = [sign[:, None] * torch.eye(3)[list(order)] for order in permutations(range(3)) for sign in signs]
    return torch.stack([matrix for matrix in matrices if torch.linalg.det(matrix) > 0])


class EpochShuffle(torch.utils.data.Sampler):
    """A permutation of 0 .. count-1 that depends on seed and epoch alone, so a resumed run sees the same order.

    With ``fresh`` an epoch gives the next ``count`` entries of a data set without end: epoch · count is added.
    """

    def __init__(self, count: int, seed: int, fresh: bool = False):
        self.count, self.seed, self.fresh, self.epoch = count, seed, fresh, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        return iter((order + self.epoch * self.count * self.fresh).tolist())


class AtomBatches(torch.utils.data.Sampler):
    """Batches of consecutive entries of ``sampler`` that have at most ``most`` atoms together; an entry with more is a
    batch of its own. ``atoms``: how many each entry of the data has.

    There is no length: it depends on the order, which is another one in each epoch.
    """

    def __init__(self, sampler: torch.utils.data.Sampler, atoms: Sequence[int], most: int):
        self.sampler, self.atoms, self.most = sampler, atoms, most

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        atoms = 0
        for index in self.sampler:
            if batch and atoms + self.atoms[index] > self.most:
                yield batch
                batch, atoms = [], 0
            batch.append(index)
            atoms += self.atoms[index]
        if batch:
            yield batch


class Shares(torch.utils.data.Sampler):
    """This process's share of every batch: consecutive entries; shares differ by one entry at most."""

    def __init__(self, batches: torch.utils.data.BatchSampler | AtomBatches):
        self.batches = batches
        self.sampler = batches.sampler  # where Lightning looks for set_epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        rank, count = processes.rank(), processes.count()
        for batch in self.batches:
            yield batch[rank * len(batch) // count : (rank + 1) * len(batch) // count]


def loader(
    data: torch.utils.data.Dataset, batch_size: int, shuffle_seed: int | None = None, batch_atoms: int | None = None
) -> torch.utils.data.DataLoader:
    """Batches of ``data``, in its order, or shuffled anew in each epoch; each of several processes has its share.

    Data that are ``endless`` give fresh entries in each epoch. A last batch of one entry is dropped where it is
    shuffled: batch norm over one molecule is undefined. With ``batch_atoms`` batches are those of :class:`AtomBatches`,
    of data that know the ``atoms`` of their entries; none is dropped.

    Raises ``ValueError`` where a batch has fewer entries than there are processes.
    """
    shuffled, rest = shuffle_seed is not None, len(data) % batch_size
    sampler = torch.utils.data.SequentialSampler(data)
    if shuffled:
        sampler = EpochShuffle(len(data), shuffle_seed, fresh=getattr(data, "endless", False))
    if batch_atoms is not None:
        expected = "None with several processes: a large structure is a batch, which they cannot share"
        require(processes.count() == 1, "batch_atoms", expected, batch_atoms, "Use batch_size.")
        batches = AtomBatches(sampler, data.atoms, batch_atoms)
        return torch.utils.data.DataLoader(data, batch_sampler=Shares(batches), collate_fn=_as_is)
    batches = torch.utils.data.BatchSampler(sampler, batch_size, drop_last=shuffled and rest == 1)
    least = batch_size if batches.drop_last or rest == 0 else rest
    expected = f"batches with an entry for each of {processes.count()} processes"
    require(least >= processes.count(), "batch_size", expected, f"one of {least} among {len(data)} entries")
    return torch.utils.data.DataLoader(data, batch_sampler=Shares(batches), collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    # The data sets give whole batches.
    return batch


class EpochLog(pl.Callback):
    """``log.csv``: a row per epoch. A resumed run drops the rows of epochs that it repeats.

    Also saves ``last.ckpt`` before the first step, so that a run can be resumed whenever it is interrupted.
    """

    def __init__(self, out: Path, fresh: bool):
        self.path, self.first, self.fresh = out / "log.csv", out / "last.ckpt", fresh

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Cut the log to the epochs before this one."""
        if self.fresh:
            trainer.save_checkpoint(self.first)
        if processes.rank() > 0:
            return
        rows = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < trainer.current_epoch]
        self.path.write_text("")
        for row in rows:
            self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock; note the learning rate of the epoch."""
        self._start, self._lr = time.perf_counter(), trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Append the epoch's row."""
        seconds = round(time.perf_counter() - self._start, 2)
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "lr": self._lr}
        row |= module.epoch_errors(trainer.callback_metrics)  # of all processes
        if processes.rank() == 0:
            self._append({**row, "seconds": seconds})

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Say how to go on after Ctrl-C."""
        if isinstance(exception, KeyboardInterrupt):
            print(f"\nInterrupted in epoch {trainer.current_epoch}; {self.first} is complete. Continue with --resume.")


class Patience(EarlyStopping):
    """Ends a run when ``monitor`` has had no new minimum for ``patience`` epochs; a run that has ended so, and is
    resumed, is not trained any further."""

    def __init__(self, monitor: str, patience: int):
        super().__init__(monitor, patience=patience, check_on_train_epoch_end=True)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop at once if the checkpoint is that of a run that had ended."""
        trainer.should_stop = self.wait_count >= self.patience


def trainer_for(run: Run, monitor: str, patience: int | None = None) -> pl.Trainer:
    """A trainer that validates, logs and saves once per epoch; the best epoch has the lowest ``monitor``. ``patience``:
    after how many epochs without a new minimum it stops; None: never."""
    out, options = run.out, run.options
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it announces hardware that is not there
    # These warnings do not apply: batches are gathered faster than a worker process could send them; what is logged is
    # already a mean over all processes; the folder is meant to be used again; Lightning 2.6 calls functions that torch
    # 2.13 deprecates, and the replacement of broadcast_buffers still sends buffers once, in the order of registration.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.* is deprecated.*")
    every_epoch = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    best = ModelCheckpoint(out, filename="best", monitor=monitor, **every_epoch)
    last = ModelCheckpoint(out, filename="last", **every_epoch)  # after best, whose state it holds
    more = [] if patience is None else [Patience(monitor, patience)]
    more += [TQDMProgressBar(refresh_rate=SHOW_EVERY)] if options.progress else []
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes.count() > 1 else 1
    return pl.Trainer(
        accelerator=options.device,
        devices=local,
        num_nodes=processes.count() // local,
        strategy=DDPStrategy(init_sync=False, broadcast_buffers=False) if processes.count() > 1 else "auto",
        use_distributed_sampler=False,  # the loaders give shares
        # Sums over edges and atoms have a fixed order on a CPU; on a GPU torch has to be asked.
        deterministic="warn" if options.device != "cpu" and torch.cuda.is_available() else None,
        max_epochs=options.epochs,
        callbacks=[EpochLog(out, fresh=run.checkpoint is None), best, last, *more],
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        logger=False,
        inference_mode=False,  # forces are derivatives in validation too
        num_sanity_val_steps=0,
    )


def fit_and_test(
    module: Task, data: Any, run: Run, *, patience: int | None = None, batch_atoms: int | None = None
) -> dict[str, float]:
    """Train ``module`` on ``data.train``, choose an epoch by ``data.val``, and test that epoch on ``data.test``.

    ``patience`` is that of :func:`trainer_for`, ``batch_atoms`` that of :func:`loader`; batches for evaluation are four
    times as large.

    Returns what the module logs in the test, and ``val_…``, the error that chose the epoch.
    """
    options = run.options
    processes.take_over(module)
    processes.synchronise(module)
    run.prepare_folder()
    trainer = trainer_for(run, module.monitor, patience)
    train = loader(data.train, options.batch_size, options.seed, batch_atoms)
    larger = 4 * options.batch_size, None, None if batch_atoms is None else 4 * batch_atoms
    if run.checkpoint is not None:  # where batches have no length, Lightning fetches the first before it sets the epoch
        loops = torch.load(run.checkpoint, map_location="cpu", weights_only=True)["loops"]
        train.batch_sampler.sampler.set_epoch(loops["fit_loop"]["epoch_progress"]["current"]["processed"])
    val, test = loader(data.val, *larger), loader(data.test, *larger)
    trainer.fit(module, train, val, ckpt_path=run.checkpoint)
    metrics = trainer.test(module, test, ckpt_path=str(run.out / "best.ckpt"), verbose=False)[0]
    return {**metrics, module.monitor: float(trainer.checkpoint_callback.best_model_score)}
