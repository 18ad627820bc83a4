"""Related operators: the two usual equivariant layers of e3nn, at the widths and on the graph of a case of O(3).

They are other functions than ours (their kernel is linear in spherical harmonics, with a radial MLP), so they take part
in no check of correctness. Both compute for every edge: weights = MLP(radial basis ⊕ scalar attributes), then a tensor
product of the neighbour's features with the spherical harmonics of the edge, of degrees up to those that couple in and
out, then a sum per node.
"""

from __future__ import annotations

import importlib.util

import torch
from escnn.nn import FieldType
from torch import Tensor

from implicit_steer.testing.cases import Case, Problem, fields

NAME = "e3nn"
FORMS = ("fully connected", "NequIP form")
_BASIS, _HIDDEN = 8, 64  # radial basis functions; width of the radial MLP's hidden layer
_RADIUS = 3.0  # beyond which the radial basis is 0, in the unit of the positions


def why_not(case: Case) -> str | None:
    """Why e3nn has no counterpart of ``case`` here, or None."""
    if importlib.util.find_spec(NAME) is None:
        return "e3nn is not installed"
    if case.space != "O(3)":
        return "only for O(3)"
    attributes = fields(case.gspace, case.attributes)
    if attributes is not None and not all(r.is_trivial() for r in attributes.representations):
        return "only for scalar attributes"
    return None


def irreps(field_type: FieldType):
    """``e3nn.o3.Irreps`` of the same content, sorted by irrep; escnn's (parity, degree) → e3nn's degree and e or o."""
    from e3nn import o3

    found = [ident for r in field_type.representations for ident in r.irreps]
    return o3.Irreps([(1, (degree, -1 if parity else 1)) for parity, degree in found]).sort().irreps.simplify()


class Layer(torch.nn.Module):
    """One of ``FORMS``, on graphs without self-loops, by whose radius its basis divides.

    ``"fully connected"``: out_i = Σ_e TP(f_j, Y(x_e); w_e), a weight for every pair of channels on every path.
    ``"NequIP form"``: out_i = Linear(Σ_e TP_uvu(f_j, Y(x_e); w_e)), a weight for every channel on every path; the
    channels are mixed per node.

    Features (N, C_in) and outputs (N, C_out) are in e3nn's order of irreps.
    """

    def __init__(self, into: FieldType, out: FieldType, n_attributes: int, form: str):
        from e3nn import nn, o3

        super().__init__()
        self.into, self.out = irreps(into), irreps(out)
        self.harmonics = o3.Irreps.spherical_harmonics(self.into.lmax + self.out.lmax)
        if form == FORMS[0]:
            self.product = o3.FullyConnectedTensorProduct(self.into, self.harmonics, self.out, shared_weights=False)
            self.mix = torch.nn.Identity()
        else:
            self.product = self._depthwise()
            self.mix = o3.Linear(self.product.irreps_out, self.out)
        widths = [_BASIS + n_attributes, _HIDDEN, self.product.weight_numel]
        self.weights = nn.FullyConnectedNet(widths, torch.nn.functional.silu)

    def _depthwise(self):
        from e3nn import o3

        middle, paths = [], []
        for i, (mul, ir_in) in enumerate(self.into):
            for j, (_, ir_edge) in enumerate(self.harmonics):
                for ir in ir_in * ir_edge:
                    if ir in self.out:
                        paths.append((i, j, len(middle), "uvu", True))
                        middle.append((mul, ir))
        order = o3.Irreps(middle).sort()
        paths = [(i, j, order.p[k], mode, train) for i, j, k, mode, train in paths]
        return o3.TensorProduct(self.into, self.harmonics, order.irreps, paths, shared_weights=False)

    def forward(self, problem: Problem) -> Tensor:
        """(N, C_out)."""
        from e3nn import math, o3

        radius = problem.delta.norm(dim=1)
        basis = math.soft_one_hot_linspace(radius, 0.0, _RADIUS, _BASIS, basis="bessel", cutoff=True)
        if problem.attributes is not None:
            basis = torch.cat([basis, problem.attributes], 1)
        y = o3.spherical_harmonics(self.harmonics, problem.delta, normalize=True, normalization="component")
        source = problem.x.index_select(0, problem.graph.src)
        messages = self.product(source, y, self.weights(basis))
        sums = messages.new_zeros(problem.graph.num_dst, messages.shape[1])
        return self.mix(sums.index_add(0, problem.graph.dst, messages))
