"""Errors and times of a trained potential through its ASE calculator, as one line of JSON on standard output.

    PYTHON evaluate.py errors KIND MODEL FRAMES
    PYTHON evaluate.py dynamics KIND MODEL FRAME SECONDS

This file runs in the environment of any package of ``LOADERS``: it imports ASE, and only the package that is measured.
``errors``: mean absolute errors of the energy per atom (eV) and of the forces (eV/Å, over components) on all FRAMES.
``dynamics``: seconds per step of velocity Verlet, the median of SECONDS, and the peak memory of this process.
"""

import json
import os
import resource
import sys
import time

import ase.io
import numpy as np
import torch
from ase import units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

WARM_UP = 3  # steps that do not count: the first ones compile and specialise
TIMESTEP, TEMPERATURE = 1.0, 300.0  # fs, K


def _implicit_steer(path):
    from implicit_steer.potentials import load_potential
    from implicit_steer.potentials.ase import Calculator

    potential = load_potential(path)
    return Calculator(potential.freeze_table()), lambda: potential


def _mace(path):
    from mace.calculators import MACECalculator

    calculator = MACECalculator(model_paths=path, device="cpu", default_dtype="float32")
    return calculator, lambda: calculator.models[0]


def _nequip(path):
    from nequip.integrations.ase import NequIPCalculator

    def module():
        from nequip.model.saved_models.load_utils import load_saved_model

        return load_saved_model(path)

    return NequIPCalculator._from_saved_model(path, device="cpu", chemical_species_to_atom_type_map=True), module


# The calculator of a model, and a function that gives the module with its parameters.
LOADERS = {"implicit_steer": _implicit_steer, "mace": _mace, "nequip": _nequip}


def errors(calculator, frames):
    """``energy_mae``, ``forces_mae``, and how many ``frames`` there are."""
    energy, forces = [], []
    for atoms in ase.io.read(frames, ":"):
        atoms.calc = calculator
        energy.append(abs(atoms.get_potential_energy() - atoms.info["REF_energy"]) / len(atoms))
        forces.append(np.abs(atoms.get_forces() - atoms.arrays["REF_forces"]).ravel())
    mean = float(np.concatenate(forces).mean())
    return {"energy_mae": float(np.mean(energy)), "forces_mae": mean, "frames": len(energy)}


def dynamics(calculator, frame, seconds):
    """``atoms``; ``seconds`` per step, the median of so many ``steps``; and the process's ``peak_mb``."""
    atoms = ase.io.read(frame)
    atoms.calc = calculator
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=np.random.default_rng(0))
    verlet = VelocityVerlet(atoms, timestep=TIMESTEP * units.fs)
    verlet.run(WARM_UP)
    times = []
    while sum(times) < seconds:
        started = time.perf_counter()
        verlet.run(1)
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux gives kB
    return {"atoms": len(atoms), "seconds": float(np.median(times)), "steps": len(times), "peak_mb": peak}


def main(measure, kind, model, *rest):
    """One measurement; what the packages print goes to standard error."""
    answer, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    calculator, module = LOADERS[kind](model)
    if measure == "errors":
        found = errors(calculator, *rest)
        found["parameters"] = sum(parameter.numel() for parameter in module().parameters())
    else:
        frame, seconds = rest
        found = dynamics(calculator, frame, float(seconds))
    print(json.dumps(found), file=answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
