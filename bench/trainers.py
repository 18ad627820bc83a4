"""The commands that train a potential with this package, MACE or NequIP on the same files, each in the environment that
has the package. All models have one cutoff, degree, number of channels and of layers, and the same energies of single
atoms; the rest is what the packages recommend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from implicit_steer._check import load_extra

CUTOFF = 5.0  # Å
CHANNELS, DEGREE, LAYERS = 32, 1, 2  # fields of each degree l = 0 … DEGREE
BATCH = 5  # structures
RATE_LEFT = 0.01  # of the learning rate at the end of MACE's exponential schedule; the others follow a cosine to 0
ROOT = Path(__file__).resolve().parent.parent


class Files(NamedTuple):
    """Extended XYZ for training and validation, absolute paths, and the energy (eV) of each element's single atoms."""

    train: str
    valid: str
    e0: dict[str, float]


def _ours(python: str, files: Files, epochs: int, folder: Path) -> list[str]:
    options = {"data": files.train, "valid": files.valid, "epochs": epochs, "batch-size": BATCH, "cutoff": CUTOFF}
    options |= {"channels": CHANNELS, "max-frequency": DEGREE, "blocks": LAYERS, "out": folder / "run"}
    options |= {"lr": 0.005, "ema": 0.99, "correlation": 2, "energy-weight": 0.1}  # by the molecules' validation files
    options["e0"] = ",".join(f"{symbol}={energy!r}" for symbol, energy in files.e0.items())
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [python, "-m", "implicit_steer", "train", "forces", *flags, "--overwrite", "--no-progress"]


def _mace(python: str, files: Files, epochs: int, folder: Path) -> list[str]:
    numbers = load_extra("ase.data", "ase").atomic_numbers
    options = {"name": "model", "work_dir": folder, "train_file": files.train, "valid_file": files.valid, "seed": 0}
    options |= {"E0s": {numbers[symbol]: energy for symbol, energy in files.e0.items()}, "r_max": CUTOFF}
    options |= {"num_channels": CHANNELS, "max_L": DEGREE, "num_interactions": LAYERS, "model": "MACE"}
    options |= {"batch_size": BATCH, "max_num_epochs": epochs, "default_dtype": "float32", "device": "cpu"}
    options |= {"scheduler": "ExponentialLR", "lr_scheduler_gamma": RATE_LEFT ** (1 / epochs), "ema_decay": 0.99}
    options |= {"plot": False, "error_table": "PerAtomMAE"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [python, "-m", "mace.cli.run_train", *flags, "--ema", "--amsgrad"]


def _nequip(python: str, files: Files, epochs: int, folder: Path) -> list[str]:
    (folder / "config.yaml").write_text(json.dumps(_nequip_config(files, epochs), indent=1))  # JSON is YAML
    train = str(Path(python).with_name("nequip-train"))
    return [train, "--config-dir", str(folder), "--config-name", "config", f"hydra.run.dir={folder / 'run'}"]


def _nequip_config(files: Files, epochs: int) -> dict:
    symbols, nequip = list(files.e0), "nequip.data.transforms"
    loader = {"_target_": "torch.utils.data.DataLoader", "batch_size": BATCH}
    transforms = [
        {"_target_": f"{nequip}.ChemicalSpeciesToAtomTypeMapper", "model_type_names": symbols},
        {"_target_": f"{nequip}.NeighborListTransform", "r_max": CUTOFF},
    ]
    transforms[0]["chemical_species_to_atom_type_map"] = {symbol: symbol for symbol in symbols}
    data = {
        "_target_": "nequip.data.datamodule.ASEDataModule",
        "seed": 0,
        "train_file_path": files.train,
        "val_file_path": files.valid,
        "key_mapping": {"REF_energy": "total_energy", "REF_forces": "forces"},
        "transforms": transforms,
        "train_dataloader": loader | {"shuffle": True},
        "val_dataloader": loader,
        "stats_manager": {"_target_": "nequip.data.CommonDataStatisticsManager", "type_names": symbols},
    }
    best = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "monitor": "val0_epoch/weighted_sum"}
    best |= {"dirpath": "${hydra:runtime.output_dir}", "filename": "best"}
    trainer = {"_target_": "lightning.Trainer", "max_epochs": epochs, "callbacks": [best], "accelerator": "cpu"}
    trainer |= {"enable_progress_bar": False, "logger": False}
    schedule = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": epochs}
    weights = {"coeffs": {"total_energy": 1.0, "forces": 1.0}, "_target_": "nequip.train.EnergyForceLoss"}
    metrics = {"coeffs": {"per_atom_energy_mae": 1.0, "forces_mae": 1.0}}
    module = {
        "_target_": "nequip.train.EMALightningModule",
        "ema_decay": 0.99,
        "loss": weights | {"per_atom_energy": True},
        "val_metrics": metrics | {"_target_": "nequip.train.EnergyForceMetrics"},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01},
        "lr_scheduler": {"scheduler": schedule, "interval": "epoch", "frequency": 1},
        "model": {
            "_target_": "nequip.model.NequIPGNNModel",
            "seed": 0,
            "model_dtype": "float32",
            "type_names": symbols,
            "r_max": CUTOFF,
            "l_max": DEGREE,
            "parity": False,
            "num_layers": LAYERS,
            "num_features": CHANNELS,
            "avg_num_neighbors": "${training_data_stats:num_neighbors_mean}",
            "per_type_energy_shifts": files.e0,
            "per_type_energy_scales": "${training_data_stats:forces_rms}",
        },
    }
    return {"run": ["train"], "data": data, "trainer": trainer, "training_module": module}


# NequIP's as it is trained: compiled by nequip-compile it was slower for 32, 108 and 500 atoms on a processor, and a
# model of molecules, which have no cell, does not pass that command's check of the stress.
MODELS = {"implicit_steer": "run/potential.pt", "mace": "model.model", "nequip": "run/best.ckpt"}
_TRAIN: dict[str, Callable[[str, Files, int, Path], list[str]]] = {
    "implicit_steer": _ours,
    "mace": _mace,
    "nequip": _nequip,
}
_DISTRIBUTIONS = {"implicit_steer": "implicit_steer", "mace": "mace-torch", "nequip": "nequip"}


@dataclass(frozen=True)
class Trainer:
    """A package, and the interpreter ``python`` that has it, on so many ``threads``."""

    kind: str
    python: str
    threads: int

    def training(self, files: Files, epochs: int, folder: Path) -> list[str]:
        """The command that trains for ``epochs`` in ``folder``, an absolute path."""
        return _TRAIN[self.kind](self.python, files, epochs, folder)

    def model(self, folder: Path) -> Path:
        """Where the trained model is, as ``standalone/evaluate.py`` reads it."""
        return folder / MODELS[self.kind]

    def version(self) -> str | None:
        """Of the package in this environment; None where it, or the interpreter, is missing."""
        if shutil.which(self.python) is None:
            return None
        if self.kind == "implicit_steer":
            from implicit_steer import __version__

            return __version__
        asked = f"import importlib.metadata as m; print(m.version({_DISTRIBUTIONS[self.kind]!r}))"
        done = subprocess.run([self.python, "-c", asked], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    def run(self, command: list[str], folder: Path) -> str:
        """The standard output of ``command``, run in ``folder``; its messages are added to ``folder``'s ``log.txt``.

        Raises ``RuntimeError`` with the log's last line where it fails."""
        threads = {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "passive"}
        # e3nn's files of constants, which MACE and NequIP read, are pickles.
        theirs = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONPATH": ""}
        own = {"PYTHONPATH": str(ROOT)} if self.kind == "implicit_steer" else theirs
        log = folder / "log.txt"
        with log.open("a") as errors:
            done = subprocess.run(
                command, cwd=folder, env=os.environ | threads | own, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        if done.returncode != 0:
            lines = [line for line in (done.stdout + log.read_text()).splitlines() if line.strip()]
            raise RuntimeError(f"{Path(command[0]).name} failed: {lines[-1] if lines else 'no message'}; see {log}")
        return done.stdout


def trainers(mace: str, nequip: str, threads: int) -> list[Trainer]:
    """This package in this interpreter, and the two others in theirs."""
    given = {"implicit_steer": sys.executable, "mace": mace, "nequip": nequip}
    # Trainings run in folders of their own; the links of a virtual environment have to stay what they are.
    return [Trainer(kind, os.path.abspath(shutil.which(python) or python), threads) for kind, python in given.items()]
