# %% [markdown]
# # Kernels and what they look like
#
# You will build kernels for several groups, draw them, and measure how equivariant they are.
#
# A steerable convolution needs a kernel `K(x)`, a matrix at every relative position `x`, with `K(g x) = ρ_out(g) K(x)
# ρ_in(g)⁻¹` for every symmetry `g`. Classical steerable networks solve this equation and parametrise its solutions.
# Here the kernel is the value of a network that is equivariant itself: `vec K(x) = MLP(x)`, a map from the
# representation of positions to `ρ_out ⊗ ρ_in`. Any group works for which such a network can be built.

# %%
import escnn
import torch

from implicit_steer.nn import ImplicitKernel
from implicit_steer.training import viz

torch.manual_seed(1)
gspace = escnn.gspaces.flipRot3dOnR3()  # O(3): all rotations and reflections of space
scalar, vector = gspace.type(gspace.trivial_repr), gspace.type(gspace.irrep(1, 1))
kernel = ImplicitKernel(scalar, vector, n_layers=3, n_channels=8)
print(kernel(torch.randn(5, 3)).shape)  # five points, a matrix from one scalar to the three components of a vector

# %% [markdown]
# From a scalar to a vector with all rotations, there is only one kind of kernel: `K(x)` points along `x`, with a
# length that depends on `|x|` alone. In escnn's basis of the irrep `l = 1` of O(3) the components are `y, z, x`.

# %%
entries = {"vector field": ((2, 0), 0), "component along x": (2, 0)}
viz.kernel_slice(kernel, entries=entries, title="O(3): scalar to vector")

# %% [markdown]
# ## Fewer symmetries, more kernels
#
# With rotations in the plane alone, SO(2), the field may also swirl: no reflection forbids it. The function is still
# fixed everywhere by its values along one ray.

# %%
plane = escnn.gspaces.rot2dOnR2()
swirl = ImplicitKernel(plane.type(plane.trivial_repr), plane.type(plane.irrep(1)), n_layers=3, n_channels=8)
entries = {"vector field": ((0, 1), 0), "component along x": (0, 0), "component along y": (1, 0)}
viz.kernel_slice(swirl, entries=entries, title="SO(2): scalar to vector")

# %% [markdown]
# ## Attributes
#
# The network may see more than the position: properties of an edge, scalars or tensors, each with its own way to
# transform. Below, a kernel between scalars with a vector attribute along x: it is equivariant if position *and*
# attribute are rotated together, so its picture need not be round.

# %%
dot, arrow = plane.type(plane.trivial_repr), plane.type(plane.irrep(1))
along = ImplicitKernel(dot, dot, arrow, n_layers=3, n_channels=8)
entries = {"attribute (2, 0)": (0, 0)}
viz.kernel_slice(along, attributes=torch.tensor([2.0, 0.0]), entries=entries, title="SO(2): vector attribute")

# %% [markdown]
# ## How equivariant?
#
# The nonlinearities act on samples of functions on the group or the sphere. `sampling="exact"`, the default where it
# exists, evaluates every edge in a frame of its own and is equivariant to rounding. `sampling="escnn"` takes the grid
# of escnn and of the paper's authors: their function, and as equivariant as that grid is fine.


# %%
def errors(kernel, count=30):
    """|K(g x) − ρ_out(g) K(x) ρ_in(g)⁻¹| / |K(x)| for random elements of the group."""
    space, found = kernel.mlp.in_type.fibergroup, []
    pos = torch.randn(50, 3)
    before = kernel(pos, batch_statistics=False)
    for _ in range(count):
        g = space.sample()
        turned = kernel(pos @ torch.tensor(gspace.basespace_action(g), dtype=pos.dtype).T, batch_statistics=False)
        expected = torch.einsum("ab,pbc->pac", torch.tensor(gspace.irrep(1, 1)(g), dtype=pos.dtype), before)
        found.append(float((turned - expected).norm() / before.norm()))
    return found


found = {}
with torch.no_grad():
    for sampling in ("exact", "escnn", "lebedev-50"):
        torch.manual_seed(0)
        found[sampling] = errors(ImplicitKernel(scalar, vector, n_layers=3, n_channels=8, sampling=sampling))
assert max(found["exact"]) < 1e-5
viz.equivariance_errors(found, title="O(3), scalar to vector, float32, 30 random elements")
