# %% [markdown]
# # Moving from other code
#
# You will see what to change in code that was written for the authors' implementation, for escnn's `R3PointConv`, for
# e3nn, NequIP and MACE, for PyG, or with other rows and signs of edges.

# %%
import escnn
import torch
from e3nn import nn as enn
from e3nn import o3
from e3nn.math import soft_one_hot_linspace

import implicit_steer as ist
from implicit_steer import irreps
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
# ## From e3nn
#
# `implicit_steer.irreps` takes features as they are in e3nn: the same strings (or `o3.Irreps`), the same order of
# components, the same basis.
#
# | e3nn | here |
# |---|---|
# | `FullyConnectedTensorProduct`, `FullyConnectedNet`, `scatter` | `ImplicitPointConv(irreps_in, irreps_out)` |
# | a `TensorProduct` with paths `"uvu"`, `o3.Linear` after `scatter` | `ImplicitPointConv(..., depthwise=True)` |
# | `o3.spherical_harmonics(...)`, `lmax` | nothing: the kernel has all degrees that the irreps can connect |
# | `soft_one_hot_linspace(r, 0, cutoff, n)` | `cutoff=`; `width=`, about the length of an edge |
# | `o3.Linear(a, b)`, `biases=True` | `Linear(a, b, bias=False)`, `Linear(a, b)` |
# | `Gate(scalars, [silu], gates, [sigmoid], gated)` | `Gate(irreps_out)`; layers before it map to `gate.irreps_in` |
# | `BatchNorm(irreps)` | `Norm(irreps)`, a layer norm |
#
# The usual program, a product with the edge's harmonics whose weights are a network of its length:

# %%
harmonics, scalar_basis, cutoff = o3.Irreps.spherical_harmonics(2), 10, 2.0


def of_the_edge(edge_vec):
    """Spherical harmonics of the edges' directions (E, 9), and functions of their lengths (E, 10) that end at 2."""
    y = o3.spherical_harmonics(harmonics, edge_vec, normalize=True, normalization="component")
    length = edge_vec.norm(dim=1)
    return y, soft_one_hot_linspace(length, 0.0, cutoff, scalar_basis, basis="bessel", cutoff=True)


class InE3nn(torch.nn.Module):
    """out_i = Σ_j f_j ⊗ Y(x_ij), with the weights MLP(|x_ij|)."""

    def __init__(self, irreps_in, irreps_out):
        super().__init__()
        self.product = o3.FullyConnectedTensorProduct(irreps_in, harmonics, irreps_out, shared_weights=False)
        self.weights = enn.FullyConnectedNet([scalar_basis, 16, self.product.weight_numel], torch.nn.functional.silu)

    def forward(self, x, edge_index, edge_vec):
        source, target = edge_index
        y, basis = of_the_edge(edge_vec)
        messages = self.product(x[source], y, self.weights(basis))
        return messages.new_zeros(len(x), messages.shape[1]).index_add(0, target, messages)


in_e3nn = InE3nn("8x0e + 8x1o", "8x0e + 8x1o")

# %% [markdown]
# And here, where a network gives the whole kernel, angles included, and no matrix or weight is formed for any edge:

# %%
here = irreps.ImplicitPointConv("8x0e + 8x1o", "8x0e + 8x1o", cutoff=cutoff, width=1.0)

x = torch.randn(50, 32)
rotation = o3.rand_matrix()
on_features = o3.Irreps("8x0e + 8x1o").D_from_matrix(rotation)
for name, layer in (("e3nn", in_e3nn), ("here", here)):
    with torch.no_grad():
        before, after = layer(x, edge_index, delta), layer(x @ on_features.T, edge_index, delta @ rotation.T)
    error = float((after - before @ on_features.T).norm() / before.norm())
    print(f"{name}: {sum(p.numel() for p in layer.parameters()):6} parameters, equivariant to {error:.0e}")

# %% [markdown]
# ## From NequIP
#
# Its layer multiplies channel by channel, mixes channels once per node, adds a self-connection that depends on the
# species, and ends in a gate. In e3nn's terms:


# %%
def depthwise_product(into, out):
    """The product with the harmonics, channel by channel, on all paths that lead to an irrep of ``out``."""
    middle, paths = [], []
    for i, (copies, irrep_in) in enumerate(into):
        for j, (_, irrep_edge) in enumerate(harmonics):
            for irrep in irrep_in * irrep_edge:
                if irrep in out:
                    paths.append((i, j, len(middle), "uvu", True))
                    middle.append((copies, irrep))
    return o3.TensorProduct(into, harmonics, middle, paths, shared_weights=False)


class AsInNequIP(torch.nn.Module):
    """Gate(Linear(Σ_j Linear(f_j) ⊗ Y) / √degree + f_i ⊗ species_i)."""

    def __init__(self, irreps_in, irreps_out, species, degree):
        super().__init__()
        into, out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        scalars = o3.Irreps([(copies, irrep) for copies, irrep in out if irrep.l == 0])
        gated = o3.Irreps([(copies, irrep) for copies, irrep in out if irrep.l > 0])
        gates = o3.Irreps([(gated.num_irreps, "0e")])
        self.gate = enn.Gate(scalars, [torch.nn.functional.silu], gates, [torch.sigmoid], gated)
        self.first = o3.Linear(into, into)
        self.product = depthwise_product(into, self.gate.irreps_in)
        self.weights = enn.FullyConnectedNet([scalar_basis, 16, self.product.weight_numel], torch.nn.functional.silu)
        self.last = o3.Linear(self.product.irreps_out, self.gate.irreps_in)
        self.self_connection = o3.FullyConnectedTensorProduct(into, f"{species}x0e", self.gate.irreps_in)
        self.degree = degree

    def forward(self, x, edge_index, edge_vec, node_attr):
        source, target = edge_index
        y, basis = of_the_edge(edge_vec)
        messages = self.product(self.first(x)[source], y, self.weights(basis))
        sums = messages.new_zeros(len(x), messages.shape[1]).index_add(0, target, messages)
        return self.gate(self.last(sums) / self.degree**0.5 + self.self_connection(x, node_attr))


as_in_nequip = AsInNequIP("16x0e", "16x0e + 16x1o + 16x2e", species=3, degree=8)

# %% [markdown]
# Here that is one module. Where a network of NequIP has `num_layers` of them with `num_features=16`, `l_max=2` and
# `parity=True`, write them one after the other.

# %%
block = irreps.InteractionBlock(
    "16x0e", "16x0e + 16x1o + 16x2e", node_attr=3, degree=8, cutoff=cutoff, width=1.0, depthwise=True
)

species = torch.nn.functional.one_hot(torch.arange(50) % 3, 3).float()
for name, layer in (("NequIP", as_in_nequip), ("here", block)):
    result = layer(torch.randn(50, 16), edge_index, delta, node_attr=species)
    print(f"{name:6} {tuple(result.shape)}, {sum(p.numel() for p in layer.parameters())} parameters")

# %% [markdown]
# ## From MACE
#
# Its layer has two steps. The interaction sums messages of the neighbours, as in NequIP: here it is a depthwise
# convolution. The second step, the symmetric contractions, multiplies the sums of one atom with each other, channel by
# channel, so that one layer sees several neighbours at once. The counterpart of its second order is
# [`irreps.TensorSquare`](../api/irreps.md), the product of a feature with itself; higher orders have none. Keep MACE's
# own for these; or stack `InteractionBlock`s, whose gates and layers bring in more and more neighbours, as in NequIP.


# %%
class InteractionAsInMACE(torch.nn.Module):
    """A_i = Linear(Σ_j Linear(f_j) ⊗ Y) / degree."""

    def __init__(self, irreps_in, irreps_out, degree):
        super().__init__()
        into, out = o3.Irreps(irreps_in), o3.Irreps(irreps_out)
        self.up, self.product = o3.Linear(into, into), depthwise_product(into, out)
        self.weights = enn.FullyConnectedNet([scalar_basis, 64, self.product.weight_numel], torch.nn.functional.silu)
        self.down, self.degree = o3.Linear(self.product.irreps_out, out), degree

    def forward(self, x, edge_index, edge_vec):
        source, target = edge_index
        y, basis = of_the_edge(edge_vec)
        messages = self.product(self.up(x)[source], y, self.weights(basis))
        return self.down(messages.new_zeros(len(x), messages.shape[1]).index_add(0, target, messages)) / self.degree


class Interaction(torch.nn.Module):
    """The same with an implicit kernel."""

    def __init__(self, irreps_in, irreps_out, degree):
        super().__init__()
        self.up = irreps.Linear(irreps_in, irreps_in, bias=False)
        options = {"cutoff": cutoff, "width": 1.0, "depthwise": True, "bias": False}
        self.conv, self.degree = irreps.ImplicitPointConv(irreps_in, irreps_out, **options), degree

    def forward(self, x, edge_index, edge_vec):
        return self.conv(self.up(x), edge_index, edge_vec) / self.degree


hidden, message = "16x0e + 16x1o", "16x0e + 16x1o + 16x2e"
x = torch.randn(50, 64)
for interaction in (InteractionAsInMACE(hidden, message, degree=8), Interaction(hidden, message, degree=8)):
    sums = interaction(x, edge_index, delta)  # (N, 16 + 48 + 80), one irrep after the other
    parts = [part.unflatten(1, (16, -1)) for part in sums.split([16, 48, 80], 1)]
    by_channel = torch.cat(parts, 2)  # (N, 16, 9), as MACE's contractions take them
    print(type(interaction).__name__, tuple(by_channel.shape))

# %% [markdown]
# ## From PyG
#
# `edge_index` (row 0 the sources), `batch` and the pairs of bipartite graphs are PyG's; `knn_graph`, `radius_graph`,
# `knn` and `radius` have its names, arguments and rows. What PyG calls `NNConv`, a network that gives every edge a
# matrix, is this layer for the trivial group, with `(pos_i − pos_j, edge_attr)` as the network's input; every other
# group makes it equivariant. With `implicit_steer.irreps` features are plain tensors as in PyG: see
# [Irreps and PyG](irreps.md). With escnn's types:
#
# | PyG | here |
# |---|---|
# | `data.x`, a tensor | `in_type(data.x, data.pos)`: says how the features transform |
# | the same without positions | `in_type(x, torch.full((len(x), 3), torch.nan))`: only escnn asks for them |
# | `NNConv(16, 32, nn)(x, edge_index, edge_attr)` | `ImplicitPointConv(...)(x, edge_index, edge_delta, edge_attr)` |
# | `RGCNConv(...)(x, edge_index, edge_type)` | `edge_attr=ist.EdgeTypes(edge_type, torch.eye(num_relations))` |
# | `conv((x_src, None), edge_index, size=(n, m))` | `conv((x_src, None), Graph(edge_index, (n, m)), edge_delta)` |
# | `aggr="add"` or `"mean"` | `aggr="sum"` or `"mean"` |
# | `radius_graph(x, r)`: 32 arbitrary ones of more neighbours | all; `max_num_neighbors=32`: the 32 nearest |
# | `knn(x, y, k)`, `radius(x, y, r)`: row 0 counts y, row 1 x | the same; `.flip(0)` is the `edge_index` from x to y |
# | `Batch.from_data_list` | `Graph.join(graphs)` |
# | `global_mean_pool(x, batch)` | the same, on `y.tensor`: every channel of a scalar field is an ordinary scalar |
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
# | MACE | source | target | `pos[1] − pos[0]` | as it is |
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
