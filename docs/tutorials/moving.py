# %% [markdown]
# # Moving from other code
#
# From the authors' implementation, from escnn's `R3PointConv`, from PyG, and from codes with other rows and signs.

# %%
import escnn
import torch

import implicit_steer as ist
from implicit_steer.nn import ImplicitKernel, ImplicitPointConv
from implicit_steer.training import viz

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
# is faster. `edge_delta` is the target's position minus the source's (their notebooks have both signs: see below), and
# positions transform by `gspace.basespace_action`.

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
# | `edge_delta = pos[row] − pos[col]`: source minus target | `pos[edge_index[1]] − pos[edge_index[0]]` |
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
# `edge_index` (row 0 the sources), `batch` and the pairs of bipartite graphs are PyG's; `knn_graph`, `radius_graph`,
# `knn` and `radius` have its names, arguments and rows. What PyG calls `NNConv`, a network that gives every edge a
# matrix, is this layer for the trivial group, with `(pos_i − pos_j, edge_attr)` as the network's input; every other
# group makes it equivariant.
#
# | PyG | here |
# |---|---|
# | `data.x`, a tensor | `in_type(data.x, data.pos)`: says how the features transform |
# | the same without positions | `in_type(x, torch.full((len(x), 3), torch.nan))`: only escnn asks for them |
# | `NNConv(16, 32, nn)(x, edge_index, edge_attr)` | `ImplicitPointConv(...)(x, edge_index, edge_delta, edge_attr)` |
# | `conv((x_src, None), edge_index, size=(n, m))` | `conv((x_src, None), Graph(edge_index, (n, m)), edge_delta)` |
# | `aggr="add"` or `"mean"` | `aggr="sum"` or `"mean"` |
# | `radius_graph(x, r)`: 32 arbitrary ones of more neighbours | all; `max_num_neighbors=32`: the 32 nearest |
# | `knn(x, y, k)`, `radius(x, y, r)`: row 0 counts y, row 1 x | the same; `.flip(0)` is the `edge_index` from x to y |
# | `Batch.from_data_list` | `Graph.join(graphs)` |
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

# %% [markdown]
# From one cloud to another, as between atoms and the points of a grid, or from many points to a few:

# %%
few = torch.randn(7, 3)
edges = ist.knn(pos, few, k=5).flip(0)  # from pos to few
y = plain((plain.in_type(features, pos), len(few)), edges, few[edges[1]] - pos[edges[0]]).tensor
print(tuple(y.shape))

# %% [markdown]
# ## Rows and signs
#
# Here row 0 of `edge_index` is the source j, row 1 the target i, the centre into which the layer sums, and
# `edge_delta` is the target's position minus the source's. Others:
#
# | code | row 0 | row 1 | vector | pass here |
# |---|---|---|---|---|
# | `ist.knn_graph`, `radius_graph`, `periodic_radius_graph` | source | target | `pos[1] − pos[0]` | as it is |
# | escnn: `R2PointConv`, `R3PointConv` | source | target | `pos[0] − pos[1]` | `−vector` |
# | PyG: `MessagePassing`, with `PointNetConv`'s vectors | source | target | `pos[0] − pos[1]` | `−vector` |
# | the same, `flow="target_to_source"` | target | source | `pos[1] − pos[0]` | `edge_index.flip(0)`, `−vector` |
# | PyG: `knn(x, y, k)`, `radius(x, y, r)` | target, in y | source, in x | none | `edge_index.flip(0)` |
# | e3nn: the guide to convolutions | source | target | `pos[1] − pos[0]` | as it is |
# | e3nn: `nn.models.v2103` | source | target | `pos[0] − pos[1]` | `−vector` |
# | NequIP; ASE's `neighbor_list("ijD")` | target | source | `pos[1] − pos[0]` | `edge_index.flip(0)`, `−vector` |
# | the authors: `4_model.ipynb`, QM9 | source | target | `pos[1] − pos[0]` | as it is |
# | the authors: `3_point_conv.ipynb` | source | target | `pos[0] − pos[1]` | `−vector` |
#
# `pos[0]` is the position of the node in row 0. Where the vector changes its sign, so do the shifts of a periodic box.
#
# A wrong sign or row raises nothing, and equivariance holds: it is another function, as good as any to train, but not
# the one that trained weights belong to. Two points and one edge show it: only point 0 has features, so that only
# point 1 may receive something, along the line between them.

# %%
pair, edge = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0], [1]])  # 0 → 1
only_first = scalars(torch.tensor([[1.0], [0.0]]).expand(2, 4), pair)
delta = pair[edge[1]] - pair[edge[0]]
exact.eval()
for name, rows, vector in (
    ("as here", edge, delta),
    ("other sign", edge, -delta),
    ("other rows", edge.flip(0), delta),
):
    with torch.no_grad():
        first, second = exact(only_first, rows, vector).tensor[:, 2].tolist()  # of one vector, along x
    print(f"{name:10}  point 0: {first:+.4f}  point 1: {second:+.4f}")

# %% [markdown]
# And this says what your own code does, from each point's nearest neighbour: of three points on a line each is a target
# once, but the middle one is a source twice.


# %%
def convention(edges_of):
    """What to do with the edges and vectors of ``edges_of(pos)``: those of the nearest neighbour of every point."""
    three = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    edge_index, vector = edges_of(three)
    rows_are_ours = sorted(edge_index[1].tolist()) == [0, 1, 2]
    j, i = edge_index if rows_are_ours else edge_index.flip(0)
    sign_is_ours = torch.allclose(vector, three[i] - three[j])
    return ("edge_index" if rows_are_ours else "edge_index.flip(0)") + (", vector" if sign_is_ours else ", -vector")


def as_here(pos):
    """With rows and vectors of this library."""
    j, i = ist.knn_graph(pos, k=1)
    return torch.stack([j, i]), pos[i] - pos[j]


def as_in_escnn(pos):
    """With those of escnn's point convolutions."""
    edge_index, vector = as_here(pos)
    return edge_index, -vector


def as_in_nequip(pos):
    """With those of NequIP."""
    i, j = ist.knn_graph(pos, k=1, flow="target_to_source")
    return torch.stack([i, j]), pos[j] - pos[i]


for edges_of in (as_here, as_in_escnn, as_in_nequip):
    print(f"{edges_of.__name__:13} {convention(edges_of)}")
