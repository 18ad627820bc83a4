"""Small runs of every training command, for comparison: in one process, or under torchrun."""

import sys
from pathlib import Path

from meshes import write_archive

from implicit_steer.experiments.train import (
    ModelNetOptions,
    NBodyOptions,
    QM9Options,
    train_modelnet,
    train_nbody,
    train_qm9,
)
from implicit_steer.potentials import train as forces_task
from implicit_steer.potentials.train import ForcesOptions, train_forces
from implicit_steer.training import processes

CLOUDS = {"group": "inv", "points": 32, "neighbours": 6, "levels": 2, "width": 8, "copies": 2, "dropout": 0.0}
SHARED = {"epochs": 2, "num_threads": 1, "progress": False}
# Sizes that leave a last batch of another size, and shares that are not equal.
RUNS = {
    "qm9": (train_qm9, QM9Options(limit=43, batch_size=16, blocks=1, channels=4, **SHARED)),
    "nbody": (train_nbody, NBodyOptions(strength=1.0, limit=45, batch_size=20, blocks=1, channels=2, **SHARED)),
    "forces": (train_forces, ForcesOptions(system="metals", limit=7, batch_size=3, channels=2, cutoff=4.0, **SHARED)),
    "modelnet": (train_modelnet, ModelNetOptions(data="ModelNet10.zip", batch_size=10, **CLOUDS, **SHARED)),
}


def main(folder):
    """Run all, each in a folder of its own."""
    forces_task.EVALUATION = 4
    archive = Path(folder).parent / "ModelNet10.zip"
    if not archive.exists():
        write_archive(archive)
    for name, (train, options) in RUNS.items():
        own = {"out": str(Path(folder) / name)} | ({"data": str(archive)} if name == "modelnet" else {})
        result = train(type(options)(**{**vars(options), **own}))
        if name == "qm9":
            processes.say(f"test MAE homo {result['test_mae']}")


if __name__ == "__main__":
    main(sys.argv[1])
