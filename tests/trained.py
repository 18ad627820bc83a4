"""Small runs of every training command, for comparison: in one process, or under torchrun."""

import sys
from pathlib import Path

from implicit_steer import processes
from implicit_steer.train import ForcesOptions, NBodyOptions, QM9Options, train_forces, train_nbody, train_qm9
from implicit_steer.train import forces as forces_task

SHARED = {"epochs": 2, "num_threads": 1, "progress": False}
# Sizes that leave a last batch of another size, and shares that are not equal.
RUNS = {
    "qm9": (train_qm9, QM9Options(limit=43, batch_size=16, blocks=1, channels=4, **SHARED)),
    "nbody": (train_nbody, NBodyOptions(strength=1.0, limit=45, batch_size=20, blocks=1, channels=2, **SHARED)),
    "forces": (train_forces, ForcesOptions(system="metals", limit=7, batch_size=3, channels=2, cutoff=4.0, **SHARED)),
}


def main(folder):
    """Run all, each in a folder of its own."""
    forces_task.EVALUATION = 4
    for name, (train, options) in RUNS.items():
        result = train(type(options)(**{**vars(options), "out": str(Path(folder) / name)}))
        if name == "qm9":
            processes.say(f"test MAE homo {result['test_mae']}")


if __name__ == "__main__":
    main(sys.argv[1])
