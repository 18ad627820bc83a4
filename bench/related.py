"""Related operators: the two usual equivariant layers of e3nn, at the widths and on the graph of a case of O(3); and on
a GPU the second of them with the kernels of cuEquivariance and of OpenEquivariance, where these are installed.

They are other functions than ours (their kernel is linear in spherical harmonics, with a radial MLP), so they take part
in no check of correctness. Both compute for every edge: weights = MLP(radial basis ⊕ scalar attributes), then a tensor
product of the neighbour's features with the spherical harmonics of the edge, of degrees up to those that couple in and
out, then a sum per node.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from escnn.nn import FieldType
from torch import Tensor

from implicit_steer import Graph
from implicit_steer.testing.cases import Case, Problem, fields

NAME = "e3nn"
FORMS = ("fully connected", "NequIP form")
_CUE, _OEQ = "NequIP form, cuEquivariance", "NequIP form, OpenEquivariance"
KERNELS = {_CUE: "cuequivariance_torch", _OEQ: "openequivariance"}  # a further form → the package that has the kernels
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


def forms(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The forms that run there, and why others do not."""
    found, skipped = list(FORMS), {}
    for form, package in KERNELS.items():
        if device.type != "cuda":
            skipped[form] = "its kernels are for GPUs"
        elif importlib.util.find_spec(package) is None:
            skipped[form] = f"{package} is not installed"
        else:
            found.append(form)
    return found, skipped


def irreps(field_type: FieldType):
    """``e3nn.o3.Irreps`` of the same content, sorted by irrep; escnn's (parity, degree) → e3nn's degree and e or o."""
    from e3nn import o3

    found = [ident for r in field_type.representations for ident in r.irreps]
    return o3.Irreps([(1, (degree, -1 if parity else 1)) for parity, degree in found]).sort().irreps.simplify()


class Layer(torch.nn.Module):
    """One of ``FORMS`` or ``KERNELS``, on graphs without self-loops, by whose radius its basis divides.

    ``"fully connected"``: out_i = Σ_e TP(f_j, Y(x_e); w_e), a weight for every pair of channels on every path.
    ``"NequIP form"``: out_i = Linear(Σ_e TP_uvu(f_j, Y(x_e); w_e)), a weight for every channel on every path; the
    channels are mixed per node.

    Features (N, C_in) and outputs (N, C_out) have the irreps ``into`` and ``out``, strings or e3nn's.
    """

    def __init__(self, into: Any, out: Any, n_attributes: int, form: str):
        from e3nn import nn, o3

        super().__init__()
        self.into, self.out = o3.Irreps(into), o3.Irreps(out)
        self.harmonics = o3.Irreps.spherical_harmonics(self.into.lmax + self.out.lmax)
        self.mix: torch.nn.Module = torch.nn.Identity()
        if form == FORMS[0]:
            self.product = o3.FullyConnectedTensorProduct(self.into, self.harmonics, self.out, shared_weights=False)
        else:
            self.product = _CuEquivariance(self.into, self.harmonics, self.out) if form == _CUE else self._depthwise()
            self.mix = o3.Linear(str(self.product.irreps_out), self.out)
        if form == _CUE:
            self.sums = self.product
        else:
            self.sums = _OpenEquivariance(self.product) if form == _OEQ else _Sums(self.product)
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
        return self.mix(self.sums(problem.x, y, self.weights(basis), problem.graph))


class _Sums(torch.nn.Module):
    """Σ_e TP(f_j, y_e; w_e) (N, …) by a tensor product of e3nn and a sum."""

    def __init__(self, product: torch.nn.Module):
        super().__init__()
        self.product = product

    def forward(self, x: Tensor, y: Tensor, weights: Tensor, graph: Graph) -> Tensor:
        messages = self.product(x.index_select(0, graph.src), y, weights)
        return messages.new_zeros(graph.num_dst, messages.shape[1]).index_add(0, graph.dst, messages)


class _CuEquivariance(torch.nn.Module):
    """The same product and sum as one kernel of cuEquivariance, which takes its paths in an order of its own."""

    def __init__(self, into: Any, harmonics: Any, out: Any):
        import cuequivariance as cue
        import cuequivariance_torch as cuet

        super().__init__()
        x, y, wanted = (cue.Irreps("O3", str(given)) for given in (into, harmonics, out))
        options = {"layout": cue.mul_ir, "shared_weights": False}
        self.product = cuet.ChannelWiseTensorProduct(x, y, [irrep for _, irrep in wanted], **options)
        self.irreps_out, self.weight_numel = self.product.irreps_out, self.product.weight_numel

    def forward(self, x: Tensor, y: Tensor, weights: Tensor, graph: Graph) -> Tensor:
        where = {"indices_1": graph.src, "indices_out": graph.dst, "size_out": graph.num_dst}
        return self.product(x, y, weights, **where)


class _OpenEquivariance(torch.nn.Module):
    """The same product and sum as one kernel of OpenEquivariance, with atomic additions as MACE and NequIP call it."""

    def __init__(self, product: Any):
        import openequivariance as oeq

        super().__init__()
        given = product.irreps_in1, product.irreps_in2, product.irreps_out
        paths = [(i.i_in1, i.i_in2, i.i_out, i.connection_mode, i.has_weight) for i in product.instructions]
        problem = oeq.TPProblem(
            *(oeq.Irreps(str(irreps)) for irreps in given), paths, shared_weights=False, internal_weights=False
        )
        self.product = oeq.TensorProductConv(problem, deterministic=False)

    def forward(self, x: Tensor, y: Tensor, weights: Tensor, graph: Graph) -> Tensor:
        return self.product(x, y, weights, graph.dst, graph.src)
