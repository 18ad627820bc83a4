# %% [markdown]
# # Irreps and PyG
#
# You will train a network on plain tensors and PyG's data, without escnn, measure its equivariance, and save it.
#
# `implicit_steer.irreps` holds layers between plain tensors. A string says what a row of such a tensor consists of:
# `"16x0e + 8x1o"` is 16 scalars and 8 vectors, in this order, 40 components per point.

# %%
import tempfile

import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import global_add_pool

import implicit_steer as ist
from implicit_steer.irreps import ImplicitPointConv, InteractionBlock, Irreps, Linear
from implicit_steer.training import viz

torch.manual_seed(0)
print(Irreps.of("16x0e + 8x1o").size, "components")

conv = ImplicitPointConv("16x0e + 8x1o", "4x0e + 2x2e", width=1.0)
pos, x = torch.randn(50, 3), torch.randn(50, 40)
edges = ist.knn_graph(pos, k=8)
y = conv(x, edges, pos[edges[1]] - pos[edges[0]])
print(tuple(y.shape), "from", tuple(x.shape))

# %% [markdown]
# A term is `MULTIPLICITYxDEGREEPARITY`. The degree l says how rotations act on the 2 l + 1 components; the parity says
# what the inversion x → −x does: even (`e`) stays, odd (`o`) changes its sign.
#
# | term | is | components | examples |
# |---|---|---|---|
# | `0e` | a scalar | 1 | mass, charge, energy |
# | `1o` | a vector | x, y, z | velocity, force, dipole |
# | `1e` | an axial vector | x, y, z | angular momentum, magnetic field |
# | `0o` | a scalar that a mirror turns over | 1 | volume spanned by three vectors |
# | `2e` | a symmetric matrix without trace | 5 | quadrupole, anisotropic part of a stress |
#
# Layout and basis are e3nn's. Without letters, `"16x0 + 8x1"`, the group is that of rotations alone, and all layers may
# tell left from right.
#
# ## Data
#
# The data are clouds of points with a mass and a velocity each. The network has to find the angular momentum about the
# centre of mass, `Σ m (x − x̄) × (v − v̄)`: an axial vector, `1e`. Clouds are PyG's `Data`, and a `DataLoader` joins
# them.

# %%
POINTS = 8


def cloud():
    """Mass and velocity of every point as ``1x0e + 1x1o``, positions, all edges, the angular momentum."""
    pos, mass, velocity = 0.5 * torch.randn(POINTS, 3), 0.5 + torch.rand(POINTS, 1), torch.randn(POINTS, 3)
    about, relative = (t - (mass * t).sum(0) / mass.sum() for t in (pos, velocity))
    momentum = (mass * torch.linalg.cross(about, relative)).sum(0, keepdim=True)
    x = torch.cat([mass, velocity], 1)
    return Data(x=x, pos=pos, edge_index=ist.knn_graph(pos, k=POINTS - 1), y=momentum)


training = DataLoader([cloud() for _ in range(768)], batch_size=64, shuffle=True)
test = next(iter(DataLoader([cloud() for _ in range(200)], batch_size=200)))
print(test)

# %% [markdown]
# ## A network
#
# An `InteractionBlock` is a convolution over the neighbours, a linear map of the point itself, and a `Gate`. Its
# weights are drawn so that features keep their size from block to block: `degree` is the mean number of neighbours.
# `width`, the σ of the kernel's shell `exp(−½ (r / σ)²)`, is usually about the length of an edge, here twice as much,
# because far points count no less than near ones. The gate multiplies vectors with functions of scalars; SiLU finds
# the products of mass and velocity sooner than the default, a sigmoid. What PyG does to invariant features it may do
# to irreps, as long as all components of a vector are treated alike: sums and means over the points of a cloud do so.


# %%
@ist.register  # so that ist.save and ist.load know it
class AngularMomentum(torch.nn.Module):
    """Masses and velocities of points → one axial vector per cloud."""

    def __init__(self, hidden="16x0e + 16x1o + 16x1e"):
        super().__init__()
        options = {"degree": POINTS - 1, "width": 2.0, "gate": "silu"}
        self.first = InteractionBlock("1x0e + 1x1o", hidden, **options)
        self.second = InteractionBlock(hidden, hidden, **options)
        self.last = Linear(hidden, "1x1e")

    def forward(self, x, pos, edge_index, batch):
        source, target = edge_index
        edge_vec = pos[target] - pos[source]
        graph = ist.Graph(edge_index, num_nodes=len(pos))  # sorted once, for both blocks
        x = self.first(x, graph, edge_vec)
        return global_add_pool(self.last(self.second(x, graph, edge_vec)), batch)


net = AngularMomentum()
print(f"{sum(p.numel() for p in net.parameters())} parameters")

# %% [markdown]
# ## Training

# %%
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8 * len(training))
for epoch in range(8):
    total = 0.0
    for batch in training:
        loss = (net(batch.x, batch.pos, batch.edge_index, batch.batch) - batch.y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach()) / len(training)
    if epoch % 2:
        print(f"epoch {epoch + 1}: {total:.4f}")
net.eval()
with torch.no_grad():
    predicted = net(test.x, test.pos, test.edge_index, test.batch)
error, scale = float((predicted - test.y).square().mean()), float(test.y.square().mean())
print(f"test: {error:.4f}, of 0: {scale:.4f}")
assert error < 0.1 * scale
viz.parity(test.y.numpy(), {"network": predicted.numpy()}, label="component of L", title="200 clouds not seen")

# %% [markdown]
# ## Rotated and mirrored clouds
#
# The network is equivariant whatever its weights are. Positions and velocities rotate with a matrix of O(3); an axial
# vector rotates, too, but an inversion leaves it as it is: it takes the determinant as a factor.

# %%
errors = {"rotations": [], "rotations and inversion": []}
with torch.no_grad():
    for n in range(40):
        matrix = torch.linalg.qr(torch.randn(3, 3))[0]
        matrix = matrix * matrix.det().sign() * (-1) ** n
        turned = torch.cat([test.x[:, :1], test.x[:, 1:] @ matrix.T], 1)
        found = net(turned, test.pos @ matrix.T, test.edge_index, test.batch)
        expected = predicted @ matrix.T * matrix.det()
        errors[list(errors)[n % 2]].append(float((found - expected).norm() / expected.norm()))
assert max(map(max, errors.values())) < 1e-5
viz.equivariance_errors(errors, title="two blocks, float32")

# %% [markdown]
# ## Saved and loaded
#
# The file holds what the network computes, and no code: `ist.load` finds the class by its name, where it is registered.

# %%
with tempfile.TemporaryDirectory() as folder:
    ist.save(net, f"{folder}/momentum.safetensors")
    loaded = ist.load(f"{folder}/momentum.safetensors")
with torch.no_grad():
    again = loaded(test.x, test.pos, test.edge_index, test.batch)
print(f"largest difference: {float((again - predicted).abs().max())}")

# %% [markdown]
# ## Further
#
# - In PyG's `Sequential` a block is called as any layer with edges:
#   `Sequential("x, edge_index, edge_vec", [(block, "x, edge_index, edge_vec -> x"), linear])`.
# - `edge_index` may be PyG's `EdgeIndex`, sorted or not; `(x_src, x_dst)` is a pair for a graph between two sets.
# - `edge_attr` and `node_attr` are invariant attributes of edges and points, such as charges and one-hot species.
# - Integer edge types, PyG's `data.edge_type`, are `edge_attr=ist.EdgeTypes(data.edge_type, torch.eye(n))`: one-hot
#   attributes, or in place of `torch.eye(n)` a learned row for each type.
# - [Choosing sampling and sizes](../choosing.md) says when to take `depthwise=True`, and when escnn's types instead of
#   irreps; `from_escnn` and `to_escnn` of `implicit_steer.irreps` go between the two.
