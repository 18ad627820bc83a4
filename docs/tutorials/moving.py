# %% [markdown]
# # Moving from other code
#
# From the authors' implementation, from escnn's `R3PointConv`, and from PyG.

# %%
import escnn
import torch

import implicit_steer as ist
from implicit_steer import viz
from implicit_steer.nn import ImplicitKernel, ImplicitPointConv

torch.manual_seed(0)
gspace = escnn.gspaces.flipRot3dOnR3()
scalars, vectors = gspace.type(*4 * [gspace.trivial_repr]), gspace.type(*4 * [gspace.irrep(1, 1)])
pos = torch.randn(50, 3)
edge_index = ist.knn_graph(pos, k=8)
source, target = edge_index

# %% [markdown]
# ## From the authors' code
#
# Constructor, argument order and `state_dict` are theirs, so a checkpoint loads with `strict=True`. Their function is
# `sampling="escnn"`: the same grids, to rounding. `sampling="auto"`, the default, is what that grid approximates, and
# is faster. `edge_delta` is the target's position minus the source's (their notebooks have both signs), and positions
# transform by `gspace.basespace_action`.

# %%
theirs = ImplicitPointConv(scalars, vectors, None, n_layers=3, n_channels=8, sampling="escnn")
print(
    "\n".join(
        f"{name} {tuple(t.shape)}" for name, t in theirs.state_dict().items() if "weights" in name or "shell" in name
    )
)
exact = ImplicitPointConv(scalars, vectors, None, n_layers=3, n_channels=8)
exact.load_state_dict(theirs.state_dict(), strict=True)
x = scalars(torch.randn(50, 4), pos)
delta = pos[target] - pos[source]
with torch.no_grad():
    grid, limit = (conv(x, edge_index, delta).tensor for conv in (theirs, exact))
print(f"the grid is off by {float((grid - limit).norm() / limit.norm()):.0e}")

# %% [markdown]
# ## From escnn's `R3PointConv`
#
# | escnn | here |
# |---|---|
# | `R3PointConv(in_type, out_type, ...)` | `ImplicitPointConv(in_type, out_type, None, n_layers, n_channels)` |
# | `sigma`, `width`, `n_rings`, `frequencies_cutoff`: a band-limited basis | `n_layers`, `n_channels`: a network |
# | `conv(x, edge_index)`, positions from `x.coords` | `conv(x, edge_index, edge_delta)`, also in periodic boxes |
# | `edge_delta = pos[row] − pos[col]`, where row 0 is the source | `pos[edge_index[1]] − pos[edge_index[0]]` |
# | no attributes | `edge_attr_type`: scalars, vectors, tensors |
#
# The field types stay, and both take and give a `GeometricTensor`: networks can mix them (those of pixels with
# `ImplicitConv(..., axes="escnn")`, for coordinates to run along the axes as in `R2Conv`). Both kernels solve the same
# equation. escnn's layer has weights for a basis of solutions, with a choice of rings and frequencies; a network has
# no such choice to make. At a fixed radius every implicit kernel is a combination of escnn's basis: from vectors to
# vectors, of two functions, `1` and `x xᵀ`.

# %%
vector = gspace.irrep(1, 1)
kernel = ImplicitKernel(gspace.type(vector), gspace.type(vector), n_layers=3, n_channels=8)
basis = gspace.build_kernel_basis(vector, vector, sigma=[0.6], rings=[1.0], maximum_frequency=2)
sphere = torch.nn.functional.normalize(torch.randn(200, 3), dim=1)
with torch.no_grad():
    values = kernel(sphere, batch_statistics=False).flatten()[:, None]
functions = basis.sample(sphere).transpose(0, 1).flatten(1).T  # (200 · 9, 2)
rest = functions @ torch.linalg.lstsq(functions, values).solution - values
print(f"{functions.shape[1]} functions, what they miss: {float(rest.norm() / values.norm()):.0e}")
entries = {"from x to x": (2, 2), "from x to y": (0, 2), "from y to y": (0, 0), "from z to z": (1, 1)}
viz.kernel_slice(kernel, entries=entries, title="O(3): vector to vector, components")

# %% [markdown]
# ## From PyG
#
# `edge_index` (row 0 the sources), `batch` and the pairs of bipartite graphs are PyG's; `knn_graph` and
# `radius_graph` have its arguments. What PyG calls `NNConv`, a network that gives every edge a matrix, is this layer
# for the trivial group, with `(pos_i − pos_j, edge_attr)` as the network's input; every other group makes it
# equivariant.
#
# | PyG | here |
# |---|---|
# | `data.x`, a tensor | `in_type(data.x, data.pos)`: says how the features transform |
# | `NNConv(16, 32, nn)(x, edge_index, edge_attr)` | `ImplicitPointConv(...)(x, edge_index, edge_delta, edge_attr)` |
# | `aggr="add"` or `"mean"` | `aggr="sum"` or `"mean"` |
# | `global_mean_pool(x, batch)` | the same, on `y.tensor`: every channel of a scalar field is an ordinary number |
#
# Invariant channels go into any layer of PyG, and any of its outputs comes back as scalars.

# %%
trivial = escnn.gspaces.trivialOnR3()
plain = ImplicitPointConv(
    trivial.type(*3 * [trivial.trivial_repr]), trivial.type(*5 * [trivial.trivial_repr]), None, 2, 8
)
features, batch = torch.randn(50, 3), torch.arange(2).repeat_interleave(25)
edges = ist.knn_graph(pos, k=4, batch=batch)  # no edges between the two graphs of the batch
assert (batch[edges[0]] == batch[edges[1]]).all()
y = plain(plain.in_type(features, pos), edges, pos[edges[1]] - pos[edges[0]]).tensor
pooled = torch.zeros(2, 5).index_add(0, batch, y) / torch.bincount(batch)[:, None]
print(tuple(y.shape), tuple(pooled.shape))
