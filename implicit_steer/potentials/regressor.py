"""The PyTorch Lightning side of :mod:`implicit_steer.potentials.train`; importing it needs the extra ``train``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, l1_loss
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..graph.structures import Structures
from ..training import processes
from ..training.lightning import SHOW_EVERY, RunningMean, Task
from .potential import Potential

MAX_NORM = 10.0  # of the gradient: a few configurations have very large forces
PLATEAU = {"factor": 0.5, "patience": 9, "threshold": 0.0}  # of "plateau": the tenth epoch in vain halves the rate


class Differences(NamedTuple):
    """Predicted and labelled quantities, in eV and eV/Å: energies per atom (B,), forces (N, 3), and V σ per atom of the
    structures with a known stress (B', 3, 3); the volumes per atom (B',), in Å³, of these."""

    energy: tuple[Tensor, Tensor]
    forces: tuple[Tensor, Tensor]
    stress: tuple[Tensor, Tensor] | None
    volumes: Tensor | None


class ForceRegressor(Task):
    """Regression of energies per atom, forces and stress: loss = w ℓ(ΔE / N) + ℓ(ΔF · 1 Å) + w' ℓ(V Δσ / N), each a
    mean, all in units of ``scale``.

    ``scale`` is a typical force (eV/Å). ℓ(x) = |x|, or with ``huber`` = δ Huber's function over δ, which is x²/2δ where
    |x| < δ. Structures whose stress is not known have no third term, and nobody has without a ``stress_weight`` w'.

    ``schedule``: from ``lr`` the learning rate falls to 0 along a cosine over ``epochs`` ("cosine"), is halved when
    ``val_mae`` has had no new minimum for ten epochs ("plateau"), or stays ("constant").

    With ``ema`` = d a second potential w̄ ← d w̄ + (1 − d) w follows the weights w from step to step, beginning with
    those after the first step; it is what is validated, tested and saved (:attr:`evaluated`).
    """

    monitor = "val_mae"  # the weighted sum of all errors, in eV/Å

    def __init__(
        self,
        potential: Potential,
        *,
        scale: float,
        energy_weight: float,
        lr: float,
        epochs: int,
        options: dict[str, Any],
        stress_weight: float = 0.0,
        huber: float | None = None,
        schedule: str = "cosine",
        ema: float | None = None,
    ):
        super().__init__(options)
        self.potential = potential
        self.scale, self.energy_weight, self.lr, self.epochs = scale, energy_weight, lr, epochs
        self.stress_weight, self.huber, self.schedule = stress_weight, huber, schedule
        self.average: AveragedModel | None = None
        if ema is not None:
            self.average = AveragedModel(potential, multi_avg_fn=get_ema_multi_avg_fn(ema)).requires_grad_(False)
        self.train_loss, self.energy_error, self.forces_error = RunningMean(), RunningMean(), RunningMean()
        self.stress_error, self.virial_error = RunningMean(), RunningMean()

    @property
    def evaluated(self) -> Potential:
        """The potential with averaged weights, if there is one."""
        return self.potential if self.average is None else self.average.module

    def differences(self, batch: Structures, create_graph: bool) -> Differences:
        """What the loss and the errors compare, of :attr:`evaluated` unless a graph is kept, as in a training step."""
        known = None
        if self.stress_weight > 0 and batch.stress is not None:
            known = batch.stress.isfinite().all(-1).all(-1)
        with_stress = known is not None and bool(known.any())
        if with_stress:  # molecules beside crystals: no edge of theirs has a shift
            volumes = torch.linalg.det(batch.cell.double()).abs()
            cells = torch.where((volumes == 0)[:, None, None], torch.eye(3).to(batch.cell), batch.cell)
            batch = replace(batch, cell=cells)
        potential = self.potential if create_graph else self.evaluated
        predicted = potential.predict(batch, stress=with_stress, create_graph=create_graph)
        atoms = torch.bincount(batch.batch, minlength=batch.num_graphs)
        energy = predicted.energy / atoms, batch.energy.double() / atoms  # float64, as predicted.energy
        forces = predicted.forces, batch.forces
        if not with_stress:
            return Differences(energy, forces, None, None)
        per_atom = (volumes / atoms)[known].to(predicted.stress.dtype)
        found, wanted = predicted.stress[known], batch.stress[known].to(predicted.stress.dtype)
        return Differences(
            energy, forces, (per_atom[:, None, None] * found, per_atom[:, None, None] * wanted), per_atom
        )

    def errors(self, batch: Structures, create_graph: bool) -> tuple[Tensor, Tensor]:
        """Mean |ΔE| / N (eV per atom) and mean |ΔF| over components (eV/Å)."""
        found = self.differences(batch, create_graph)
        return l1_loss(*found.energy), l1_loss(*found.forces)

    def _mean(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """The mean of ℓ in units of ``scale``."""
        found, wanted = (x / self.scale for x in pair)
        return (
            l1_loss(found, wanted) if self.huber is None else huber_loss(found, wanted, delta=self.huber) / self.huber
        )

    def on_train_epoch_start(self) -> None:
        """Start a fresh average."""
        self.train_loss.reset()

    def training_step(self, batch: Structures, step: int) -> Tensor:
        """The loss, which also enters the epoch's mean; its terms are means over this process's share."""
        found = self.differences(batch, create_graph=True)
        of_graphs, of_atoms = (processes.share(n, self.device) for n in (batch.num_graphs, len(batch.pos)))
        loss = self.energy_weight * self._mean(found.energy) * of_graphs + self._mean(found.forces) * of_atoms
        if self.stress_weight > 0:
            count = 0 if found.volumes is None else len(found.volumes)
            of_stress = processes.share(count, self.device)
            if found.stress is not None:
                loss = loss + self.stress_weight * self._mean(found.stress) * of_stress
        self.train_loss.add(loss, batch.num_graphs / of_graphs)
        if step % SHOW_EVERY == 0:
            self.log("loss", loss.detach(), prog_bar=True, batch_size=batch.num_graphs)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Let the averaged weights follow."""
        if self.average is not None:
            self.average.update_parameters(self.potential)

    def on_validation_epoch_start(self) -> None:
        """Start fresh averages."""
        for error in (self.energy_error, self.forces_error, self.stress_error, self.virial_error):
            error.reset()

    def validation_step(self, batch: Structures, step: int) -> None:
        """Collect the errors of a batch."""
        found = self.differences(batch, create_graph=False)
        self.energy_error.add(l1_loss(*found.energy), batch.num_graphs)
        self.forces_error.add(l1_loss(*found.forces), len(batch.pos))
        if found.stress is not None:
            stress = [virial / found.volumes[:, None, None] for virial in found.stress]
            self.stress_error.add(l1_loss(*stress), len(found.volumes))
            self.virial_error.add(l1_loss(*found.stress), len(found.volumes))

    def on_validation_epoch_end(self) -> None:
        """Log ``val_energy_mae``, ``val_forces_mae`` and their weighted sum ``val_mae``, which chooses an epoch."""
        self._log_errors("val")
        value = self.energy_weight * self.energy_error.value() + self.forces_error.value()
        if self.stress_weight > 0:
            value = value + self.stress_weight * self.virial_error.value()
        self.log("val_mae", value)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """Log ``test_energy_mae``, ``test_forces_mae`` and, where stress is learned, ``test_stress_mae``."""
        self._log_errors("test")

    def _log_errors(self, split: str) -> None:
        self.log(f"{split}_energy_mae", self.energy_error.value())
        self.log(f"{split}_forces_mae", self.forces_error.value(), prog_bar=True)
        if self.stress_weight > 0:
            self.log(f"{split}_stress_mae", self.stress_error.value())

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and the schedule."""
        optimizer = torch.optim.AdamW(self.potential.parameters(), lr=self.lr, weight_decay=0.0, fused=True)
        if self.schedule == "constant":
            return {"optimizer": optimizer}
        if self.schedule == "cosine":
            return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)}
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, **PLATEAU)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": self.monitor}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip the gradient's norm to :data:`MAX_NORM`."""
        torch.nn.utils.clip_grad_norm_(self.potential.parameters(), MAX_NORM)

    def epoch_errors(self, logged: dict[str, Tensor]) -> dict[str, float]:
        """What a row of the log holds beside epoch, step, learning rate and time."""
        names = ["val_energy_mae", "val_forces_mae", "val_mae", *["val_stress_mae"] * (self.stress_weight > 0)]
        return {"train_loss": self.train_loss.value(), **{name: float(logged[name]) for name in names}}
