"""The PyTorch Lightning side of ``train/modelnet.py``; importing it needs the extra ``train``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...training import processes
from ...training.lightning import MILESTONES, SHOW_EVERY, RunningMean, Task
from ..data.modelnet import Clouds

SMOOTHING = 0.2  # of the labels, in training


class Classifier(Task):
    """Cross entropy with smoothed labels; AdamW, the learning rate halved at each of ``MILESTONES``.

    Dropout draws from ``seed`` and the step, so that a resumed run draws the same.

    ``model(positions)`` gives one logit per cloud and class. The test set has ``copies`` samples of ``meshes`` meshes;
    the prediction for a mesh is the class of the largest probability, averaged over its samples.
    """

    monitor = "val_loss"

    def __init__(self, model: torch.nn.Module, meshes: int, copies: int, lr: float, seed: int, options: dict[str, Any]):
        super().__init__(options)
        self.model, self.lr, self.seed = model, lr, seed
        self.meshes, self.copies = meshes, copies
        self.train_loss, self.train_hits, self.loss, self.hits = (RunningMean() for _ in range(4))

    def on_train_epoch_start(self) -> None:
        """Start fresh averages."""
        self.train_loss.reset()
        self.train_hits.reset()

    def training_step(self, batch: Clouds, step: int) -> Tensor:
        """The loss, times this process's :func:`~implicit_steer.training.processes.share`; it enters the epoch's
        mean."""
        torch.manual_seed(int(np.random.SeedSequence((self.seed, self.global_step)).generate_state(1)[0]))
        logits = self.model(batch.pos)
        loss = cross_entropy(logits, batch.y, label_smoothing=SMOOTHING)
        self.train_loss.add(loss, len(batch.y))
        self.train_hits.add((logits.argmax(1) == batch.y).float().mean(), len(batch.y))
        if step % SHOW_EVERY == 0:
            self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch.y))
        return loss * processes.share(len(batch.y), self.device)

    def on_validation_epoch_start(self) -> None:
        """Start fresh averages."""
        self.loss.reset()
        self.hits.reset()

    def validation_step(self, batch: Clouds, step: int) -> Tensor:
        """Collect the loss and accuracy of a batch; return its logits."""
        logits = self.model(batch.pos)
        self.loss.add(cross_entropy(logits, batch.y), len(batch.y))
        self.hits.add((logits.argmax(1) == batch.y).float().mean(), len(batch.y))
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` and ``val_accuracy``."""
        self.log("val_loss", self.loss.value(), prog_bar=True)
        self.log("val_accuracy", self.hits.value(), prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Forget all samples."""
        self.on_validation_epoch_start()
        self.probability, self.truth = None, torch.zeros(self.meshes, dtype=torch.long, device=self.device)

    def test_step(self, batch: Clouds, step: int) -> None:
        """Add the probabilities of a batch to those of its meshes."""
        probability = self.validation_step(batch, step).softmax(1)
        if self.probability is None:
            self.probability = probability.new_zeros(self.meshes, probability.shape[1])
        self.probability.index_add_(0, batch.mesh, probability)
        self.truth.index_add_(0, batch.mesh, batch.y)

    def on_test_epoch_end(self) -> None:
        """Log ``test_accuracy`` of the averages and ``sample_accuracy`` of single samples."""
        probability, truth = processes.total(self.probability), processes.total(self.truth)
        self.log("test_accuracy", (probability.argmax(1) == truth // self.copies).float().mean())
        self.log("sample_accuracy", self.hits.value())

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW; the learning rate is halved at each of ``MILESTONES``."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, fused=True)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, MILESTONES, gamma=0.5),
        }

    def epoch_errors(self, logged: dict[str, Tensor]) -> dict[str, float]:
        """What an epoch's row of the log holds beside step, learning rate and time."""
        training = {"train_loss": self.train_loss.value(), "train_accuracy": self.train_hits.value()}
        return {**training, **{name: float(logged[name]) for name in ("val_loss", "val_accuracy")}}
