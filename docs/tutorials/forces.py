# %% [markdown]
# # Forces
#
# You will train a small potential on energies and forces, and check that its forces are derivatives of its energy.
#
# A potential is an invariant energy per atom; forces are its exact derivatives, and training on them takes
# derivatives of derivatives, which the native operator has. The structures are those of an alloy of copper and gold,
# labelled on this machine with ASE's effective medium theory.

# %%
import tempfile

import numpy as np
import torch

from implicit_steer.graph.structures import Structures
from implicit_steer.potentials import Potential
from implicit_steer.potentials.data import ForceData
from implicit_steer.training import viz

torch.manual_seed(0)
np.random.seed(0)
with tempfile.TemporaryDirectory() as folder:
    data = ForceData("metals", cutoff=4.5, train=40, val=1, test=10, cache=folder, progress=False)
training, test = Structures.join(data.train.structures), Structures.join(data.test.structures)
print(f"{training.num_graphs} cells for training, {test.num_graphs} for testing, 32 atoms each")
print(f"{training.edge_index.shape[1] // len(training.pos)} neighbours per atom")

# %% [markdown]
# ## The potential
#
# `fit` sets the constants of every element and the scale; weights are still random. `predict` gives energies, forces
# and, in a box, stress.

# %%
potential = Potential((29, 79), 4.5, channels=8, blocks=1)
potential.fit(training)
predicted = potential.predict(test)
print(f"energies {tuple(predicted.energy.shape)}, forces {tuple(predicted.forces.shape)}")


def errors(structures):
    """Mean absolute errors: meV per atom, meV/Å."""
    predicted = potential.predict(structures)
    energy = (predicted.energy - structures.energy).abs().mean() / 32
    return 1000 * float(energy), 1000 * float((predicted.forces - structures.forces).abs().mean())


print("untrained: {:.1f} meV per atom, {:.0f} meV/Å".format(*errors(test)))

# %% [markdown]
# ## Training on energies and forces

# %%
optimizer = torch.optim.AdamW(potential.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
generator = torch.Generator().manual_seed(0)
scale = training.forces.square().mean().sqrt()
for _ in range(10):
    for chosen in torch.randperm(40, generator=generator).split(4):
        batch = data.train.__getitems__(chosen.tolist())
        predicted = potential.predict(batch, create_graph=True)
        energy = (predicted.energy - batch.energy).abs().mean() / 32
        loss = (energy + (predicted.forces - batch.forces).abs().mean()) / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
trained = errors(test)
print("trained: {:.1f} meV per atom, {:.0f} meV/Å".format(*trained))
assert trained[1] < 0.5 * 1000 * float(test.forces.abs().mean())
forces = {"potential": potential.predict(test).forces.detach().numpy()}
viz.parity(test.forces.numpy(), forces, label="force (eV/Å)", title="10 cells not seen")

# %% [markdown]
# ## Forces are the derivative of the energy
#
# In float64, against a central difference; and the forces on all atoms add up to nothing.

# %%
potential.double()
cell = data.test.structures[0].to(torch.float64)
step = torch.zeros_like(cell.pos)
step[3, 1] = 1e-4
with torch.no_grad():
    up, down = (potential(cell.moved(cell.pos + sign * step)) for sign in (1, -1))
force = potential.predict(cell).forces
print(f"difference {float(-(up - down) / 2e-4):.8f}, derivative {float(force[3, 1]):.8f} eV/Å")
print(f"net force {float(force.sum(0).norm()):.0e} eV/Å")

# %% [markdown]
# `python -m implicit_steer train forces` does this at length, with validation and checkpoints, `python -m
# implicit_steer md` runs molecular dynamics with the result, and `implicit_steer.potentials.ase.Calculator` hands it to
# ASE.
