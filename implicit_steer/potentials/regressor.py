"""The PyTorch Lightning side of :mod:`implicit_steer.potentials.train`; importing it needs the extra ``train``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from ..graph.structures import Structures
from ..training import processes
from ..training.lightning import SHOW_EVERY, RunningMean, Task
from .potential import Potential

MAX_NORM = 10.0  # of the gradient: a few configurations have very large forces


class ForceRegressor(Task):
    """L1 regression of energies per atom and forces: loss = w |ΔE| / N + mean |ΔF| · 1 Å, both in units of ``scale``.

    ``scale`` is a typical force (eV/Å); the learning rate falls to 0 over ``epochs`` along a cosine.
    """

    monitor = "val_mae"  # the weighted sum of both errors, in eV/Å

    def __init__(
        self,
        potential: Potential,
        *,
        scale: float,
        energy_weight: float,
        lr: float,
        epochs: int,
        options: dict[str, Any],
    ):
        super().__init__(options)
        self.potential = potential
        self.scale, self.energy_weight, self.lr, self.epochs = scale, energy_weight, lr, epochs
        self.train_loss, self.energy_error, self.forces_error = RunningMean(), RunningMean(), RunningMean()

    def errors(self, batch: Structures, create_graph: bool) -> tuple[Tensor, Tensor]:
        """Mean |ΔE| / N (eV per atom) and mean |ΔF| over components (eV/Å)."""
        predicted = self.potential.predict(batch, create_graph=create_graph)
        atoms = torch.bincount(batch.batch, minlength=batch.num_graphs)
        energy = l1_loss(predicted.energy / atoms, batch.energy.double() / atoms)  # float64, as predicted.energy
        return energy, l1_loss(predicted.forces, batch.forces)

    def on_train_epoch_start(self) -> None:
        """Start a fresh average."""
        self.train_loss.reset()

    def training_step(self, batch: Structures, step: int) -> Tensor:
        """The loss, which also enters the epoch's mean; its terms are means over this process's share."""
        energy, forces = self.errors(batch, create_graph=True)
        of_graphs, of_atoms = (processes.share(n, self.device) for n in (batch.num_graphs, len(batch.pos)))
        loss = (self.energy_weight * energy * of_graphs + forces * of_atoms) / self.scale
        self.train_loss.add(loss, batch.num_graphs / of_graphs)
        if step % SHOW_EVERY == 0:
            self.log("loss", loss.detach(), prog_bar=True, batch_size=batch.num_graphs)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start fresh averages."""
        self.energy_error.reset()
        self.forces_error.reset()

    def validation_step(self, batch: Structures, step: int) -> None:
        """Collect the errors of a batch."""
        energy, forces = self.errors(batch, create_graph=False)
        self.energy_error.add(energy, batch.num_graphs)
        self.forces_error.add(forces, len(batch.pos))

    def on_validation_epoch_end(self) -> None:
        """Log ``val_energy_mae``, ``val_forces_mae`` and their weighted sum ``val_mae``, which chooses an epoch."""
        self._log_errors("val")
        value = self.energy_weight * self.energy_error.value() + self.forces_error.value()
        self.log("val_mae", value)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """Log ``test_energy_mae`` and ``test_forces_mae``."""
        self._log_errors("test")

    def _log_errors(self, split: str) -> None:
        self.log(f"{split}_energy_mae", self.energy_error.value())
        self.log(f"{split}_forces_mae", self.forces_error.value(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW; the learning rate falls to 0 along a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip the gradient's norm to :data:`MAX_NORM`."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)

    def epoch_errors(self, logged: dict[str, Tensor]) -> dict[str, float]:
        """What a row of the log holds beside epoch, step, learning rate and time."""
        names = ("val_energy_mae", "val_forces_mae", "val_mae")
        return {"train_loss": self.train_loss.value(), **{name: float(logged[name]) for name in names}}
