# %% [markdown]
# # Point convolution
#
# You will run one layer on a cloud of points, measure its equivariance, and compare the memory of its backends.
#
# `ImplicitPointConv` maps features on points to features on points, `out_i = bias + Σ_{j→i} γ s(|x|) K(x, a) f_j`,
# with `x` the position of the target minus that of the source. The matrices `K` are never formed: the last layer of
# the kernel's network is applied once per point, not once per edge.

# %%
import escnn
import torch

import implicit_steer as ist
from implicit_steer.nn import ImplicitPointConv
from implicit_steer.training import viz

torch.manual_seed(0)
gspace = escnn.gspaces.flipRot3dOnR3()  # O(3)
fields = gspace.type(*[gspace.trivial_repr] * 4, *[gspace.irrep(1, 1)] * 4)  # 4 scalars, 4 vectors: 16 components
conv = ImplicitPointConv(fields, fields, None, n_layers=3, n_channels=8)
print(conv.explain())

# %% [markdown]
# ## A graph
#
# `knn_graph` and `radius_graph` have PyG's arguments and results: row 0 holds the sources, row 1 the targets. A
# `Graph` is checked and sorted once and then shared by every layer; isolated points, loops and repeated edges are all
# legal.

# %%
angle = 4 * torch.pi * torch.rand(120)
pos = torch.stack([angle.cos(), angle.sin(), angle / 6 - 1], 1) + 0.05 * torch.randn(120, 3)
edges = ist.knn_graph(pos, k=6)
graph = ist.Graph(edges, num_nodes=len(pos))
print(graph)
viz.graph(pos, edges, plane="xz", values=pos[:, 1], title="6 nearest neighbours on a helix, coloured by y")

# %%
x = fields(torch.randn(120, fields.size), pos)  # features and positions, escnn's GeometricTensor
delta = pos[graph.dst] - pos[graph.src]
y = conv(x, graph, delta)
print(tuple(y.tensor.shape), y.type)

# %% [markdown]
# ## Equivariance, measured
#
# Transform the points and the features, then convolve; or convolve, then transform the result. Take random elements
# of the group: escnn's `testing_elements` are those of the icosahedron, under which the sample grids are closed, and
# hide errors.

# %%
conv.eval()


def turned(features, matrix):
    """Features after an element of the group, whose matrix for this field type is given."""
    return fields(features.tensor @ matrix.T, features.coords)


errors = []
with torch.no_grad():
    before = conv(x, graph, delta)
    for _ in range(20):
        g = gspace.fibergroup.sample()
        on_points = torch.tensor(gspace.basespace_action(g), dtype=torch.float32)
        on_fields = torch.tensor(fields.representation(g), dtype=torch.float32)
        after = conv(turned(x, on_fields), graph, delta @ on_points.T)
        expected = turned(before, on_fields)
        errors.append(float((after.tensor - expected.tensor).norm() / expected.tensor.norm()))
print(f"largest relative error of 20 random elements: {max(errors):.0e}")
assert max(errors) < 1e-5

# %% [markdown]
# ## Memory
#
# For a training step autograd keeps the matrices `K` of all edges and what computes them; with the fused operator it
# keeps far less. `saved_tensors_hooks` sees every tensor that is kept, so that its bytes can be counted.


# %%
def saved(layer, points, degree=16):
    """Bytes that a forward pass keeps for the backward pass."""
    there, kinds = torch.randn(points, 3), layer.in_type
    graph = ist.Graph(torch.randint(points, (2, points * degree)), points)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    features = kinds(torch.randn(points, kinds.size), there)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(features, graph, there[graph.dst] - there[graph.src])
    return sum(kept.values())


curves = {}
for backend in ("reference", "eager", "cpu"):
    layer = ImplicitPointConv(fields, fields, None, n_layers=3, n_channels=8, norm=None, backend=backend)
    curves[backend] = {points * 16: saved(layer, points) / 1e6 for points in (50, 200, 800)}
viz.log_lines(curves, xlabel="edges", ylabel="MB kept for the backward pass", title="memory of one layer")
