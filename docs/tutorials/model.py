# %% [markdown]
# # A model
#
# You will build a network from the layers, train it, and save one of its layers. It takes points with charges and gives
# one vector: the dipole moment of a cloud about its centre, `Σ q_i (x_i − x̄)`. The true answer rotates with the cloud,
# and so does that of the network, even before training.

# %%
import tempfile
from pathlib import Path

import escnn
import torch

import implicit_steer as ist
from implicit_steer.layers import values
from implicit_steer.nn import FourierActivation, IIDBatchNorm1d, ImplicitPointConv
from implicit_steer.training import viz

torch.manual_seed(0)
gspace = escnn.gspaces.flipRot3dOnR3()  # O(3)
POINTS, NEIGHBOURS = 12, 11


def clouds(count):
    """Positions (count, P, 3), charges (count, P, 1), dipoles (count, 3)."""
    pos, charge = 0.3 * torch.randn(count, POINTS, 3), torch.randn(count, POINTS, 1)
    return pos, charge, (charge * (pos - pos.mean(1, keepdim=True))).sum(1)


# %% [markdown]
# ## Layers and fields
#
# A hidden field is a function on the sphere up to frequency 1, a scalar and a vector; `FourierActivation` applies ELU
# to samples of it. The first layer takes one scalar, the charge, the last gives one vector. escnn orders the
# components of its irrep `l = 1` as `y, z, x`: `ORDER` brings them back.

# %%
ORDER = [2, 0, 1]


class Dipole(torch.nn.Module):
    """Charges on points → one vector per cloud."""

    def __init__(self, channels=8):
        super().__init__()
        self.activation = FourierActivation(gspace, channels, 1, sampling="lebedev-50")
        hidden = self.activation.in_type
        self.charge, vector = gspace.type(gspace.trivial_repr), gspace.type(gspace.irrep(1, 1))
        self.first = ImplicitPointConv(self.charge, hidden, None, n_layers=3, n_channels=8, aggr="mean")
        self.norm = IIDBatchNorm1d(hidden)
        self.last = ImplicitPointConv(hidden, vector, None, n_layers=3, n_channels=8, aggr="mean")

    def forward(self, pos, charge):
        clouds, points = pos.shape[:2]
        flat = pos.flatten(0, 1)
        graph = ist.Graph(ist.knn_graph(flat, NEIGHBOURS, torch.arange(clouds).repeat_interleave(points)), len(flat))
        delta = flat[graph.dst] - flat[graph.src]
        x = self.charge(charge.flatten(0, 1), flat)
        x = self.activation(self.norm(self.first(x, graph, delta)))
        vector = values(self.last(x, graph, delta))[:, ORDER]
        return vector.view(clouds, points, 3).sum(1)


net = Dipole()
print(f"{sum(p.numel() for p in net.parameters())} parameters")

# %% [markdown]
# ## Training

# %%
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
for step in range(400):
    pos, charge, dipole = clouds(32)
    loss = (net(pos, charge) - dipole).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 80 == 0:
        print(f"step {step}: {float(loss.detach()):.4f}")
net.eval()
pos, charge, dipole = clouds(200)
with torch.no_grad():
    predicted = net(pos, charge)
error = float((predicted - dipole).square().mean())
print(f"test: {error:.4f}, of 0: {float(dipole.square().mean()):.4f}")
assert error < 0.5 * float(dipole.square().mean())
viz.parity(dipole.numpy(), {"network": predicted.numpy()}, label="component of the dipole", title="200 clouds not seen")

# %% [markdown]
# ## Rotated clouds, rotated answers

# %%
g = gspace.fibergroup.sample()
matrix = torch.tensor(gspace.basespace_action(g), dtype=torch.float32)
with torch.no_grad():
    difference = net(pos @ matrix.T, charge) - predicted @ matrix.T
print(f"relative equivariance error: {float(difference.norm() / predicted.norm()):.0e}")

# %% [markdown]
# The convolutions are equivariant to rounding. What is left comes from `FourierActivation`, which takes 50 samples of
# the node features: more samples leave less.
#
# ## Saving
#
# Layers are saved as what they compute, in a file that loads without escnn: plain tensors in, plain tensors out, the
# same results. The text of `implicit_steer/deploy/__init__.py` says how to make a whole network saveable.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "first.safetensors"
    ist.save(net.first, path)
    loaded = ist.load(path)
flat = pos[0]
graph = ist.Graph(ist.knn_graph(flat, NEIGHBOURS), POINTS)
delta = flat[graph.dst] - flat[graph.src]
with torch.no_grad():
    original = net.first(net.charge(charge[0], flat), graph, delta).tensor
    print(f"largest difference: {float((loaded(charge[0], graph, delta) - original).abs().max())}")
