"""How the parameters of a linear layer become its matrix and its bias, as in escnn, for any number of fields.

escnn lists where every value of the matrix and of the bias lies, which takes gigabytes for the 16,384 fields of a
kernel between 128 and 128 fields. Here each representation, or pair of representations, has one basis, and a list says
where its fields begin.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from escnn.kernels import EmptyBasisException
from escnn.nn import FieldType
from escnn.nn.modules.basismanager import BlocksBasisExpansion
from escnn.nn.modules.basismanager.basisexpansion_singleblock import block_basisexpansion
from torch import Tensor

from .._check import fail, require
from ..lowering.linear import fields_by_name, starts_of
from ..lowering.sampling import invariants

ANOTHER_LAYER = "The checkpoint is of a layer with other types, n_layers or n_channels."


def own_basis(expansion: torch.nn.Module) -> None:
    """Give a new layer's basis expansion copies of its buffers, which escnn shares between layers, so that moving or
    casting one layer moves or casts the buffers of all, later layers included."""
    for name, block in list(expansion.named_children()):
        own = copy.copy(block)
        own._buffers = {"sampled_basis": block.sampled_basis.to("cpu", torch.float32, copy=True)}
        setattr(expansion, name, own)
    for name, index in list(expansion.named_buffers(recurse=False)):  # a checkpoint cannot be loaded into a view
        setattr(expansion, name, index.clone(memory_format=torch.contiguous_format))


def _coordinates(starts: np.ndarray, size: int) -> Tensor:
    """(F, size): the coordinates of fields that begin at ``starts`` (F,)."""
    return torch.from_numpy(starts[:, None] + np.arange(size))


class MatrixExpansion(BlocksBasisExpansion):
    """W = Σ_b weights[b] B_b (C_out, C_in, 1), with the intertwiners B from the fields of ``in_type`` to the fields of
    ``out_type`` and weights in escnn's order. A checkpoint may hold escnn's :meth:`indices`."""

    def __init__(self, in_type: FieldType, out_type: FieldType):
        torch.nn.Module.__init__(self)  # escnn's __init__ makes the indices
        self.S = 1
        self._in_reprs, self._out_reprs = in_type.representations, out_type.representations
        self._input_size, self._output_size = in_type.size, out_type.size
        in_fields, out_fields = fields_by_name(self._in_reprs), fields_by_name(self._out_reprs)
        self._in_count = {name: len(fields) for name, fields in in_fields.items()}
        self._out_count = {name: len(fields) for name, fields in out_fields.items()}
        in_starts, out_starts = starts_of(self._in_reprs), starts_of(self._out_reprs)
        self._weights_ranges, self._starts, self._dim = {}, {}, 0
        for pair in sorted((into, out) for into in in_fields for out in out_fields):
            ins, outs = in_fields[pair[0]], out_fields[pair[1]]
            try:
                basis = in_type.gspace.build_fiber_intertwiner_basis(self._in_reprs[ins[0]], self._out_reprs[outs[0]])
                block = block_basisexpansion(basis, np.zeros((1, 1)))
            except EmptyBasisException:
                continue
            self.add_module(f"block_expansion_{self._escape_pair(pair)}", block)
            end = self._dim + block.dimension() * len(ins) * len(outs)
            self._weights_ranges[pair] = self._dim, end
            self._starts[pair] = out_starts[outs], in_starts[ins]
            self._dim = end
        self._representations_pairs = list(self._weights_ranges)
        own_basis(self)

    __eq__, __hash__ = torch.nn.Module.__eq__, torch.nn.Module.__hash__  # escnn's read the indices

    def _places(self, pair: tuple[str, str]) -> tuple[Tensor, Tensor]:
        """Rows (R,) and columns (C,) of the matrix that belong to the pair's fields."""
        (rows, columns), basis = self._starts[pair], getattr(self, f"block_expansion_{self._escape_pair(pair)}")
        _, o, i, _ = basis.sampled_basis.shape
        return _coordinates(rows, o).reshape(-1), _coordinates(columns, i).reshape(-1)

    def forward(self, weights: Tensor) -> Tensor:
        """W of the weights (n_weights,)."""
        matrix = weights.new_zeros(self._output_size, self._input_size, 1)
        for pair in self._representations_pairs:
            rows, columns = self._places(pair)
            values = self._expand_block(weights, pair).reshape(len(rows), len(columns), 1)
            matrix[rows[:, None], columns] = values.to(matrix.dtype)
        return matrix

    def indices(self) -> dict[str, Tensor]:
        """escnn's buffers: for each pair whose fields do not all lie side by side, the row and the column of every
        value that the pair has in the matrix."""
        found, device = {}, next((b.device for b in self.buffers()), None)
        for pair in self._representations_pairs:
            places = self._places(pair)
            if all(int(index[-1] - index[0]) == len(index) - 1 for index in places):
                continue
            for name, index in zip(("out", "in"), torch.meshgrid(*places, indexing="ij"), strict=True):
                found[f"{name}_indices_{self._escape_pair(pair)}"] = index.reshape(-1).to(device)
        return found

    def _load_from_state_dict(self, state_dict, prefix, *args):
        derived = f"{prefix}in_indices_", f"{prefix}out_indices_"
        super()._load_from_state_dict({k: v for k, v in state_dict.items() if not k.startswith(derived)}, prefix, *args)


class BiasExpansion:
    """b = bias_expansion · bias with a block diagonal matrix (C_out, n_bias), which has for every field a block
    (size, n), whose columns are the field's invariant vectors.

    Attributes:
        blocks: name of each representation with invariants → its block, in float32 as escnn has it.
        shape: (C_out, n_bias).
        starts: (n_fields,) where each field's part of the bias begins.
    """

    def __init__(self, out_type: FieldType):
        reprs, fields = out_type.representations, fields_by_name(out_type.representations)
        exact = {name: invariants(reprs[at[0]]) for name, at in fields.items()}
        self.blocks = {name: torch.from_numpy(block).float() for name, block in exact.items() if block.shape[1]}
        counts = np.zeros(len(reprs), dtype=int)
        for name, at in fields.items():
            counts[at] = exact[name].shape[1]
        self.shape, self.starts = (out_type.size, int(counts.sum())), np.cumsum(counts) - counts
        self._fields, self._rows = fields, starts_of(reprs)

    def _places(self, name: str) -> tuple[Tensor, Tensor]:
        """Rows (F, size) and columns (F, n) of the blocks of all fields of a representation."""
        fields, (size, n) = self._fields[name], self.blocks[name].shape
        return _coordinates(self._rows[fields], size), _coordinates(self.starts[fields], n)

    def __call__(self, bias: Tensor) -> Tensor:
        """b (C_out,) of the bias (n_bias,)."""
        shift = bias.new_zeros(self.shape[0])
        for name, block in self.blocks.items():
            rows, columns = self._places(name)
            shift[rows] = (bias[columns] @ block.to(bias).T).to(shift.dtype)
        return shift

    def dense(self, like: Tensor) -> Tensor:
        """The matrix, with the dtype and device of ``like``."""
        matrix = like.new_zeros(self.shape)
        for name, block in self.blocks.items():
            rows, columns = self._places(name)
            matrix[rows[:, :, None], columns[:, None, :]] = block.to(matrix)
        return matrix

    def read(self, name: str, dense: Tensor) -> dict[str, Tensor]:
        """The blocks of the matrix ``dense``, which a checkpoint holds as ``name``. A block that agrees with this
        object's is this object's tensor itself.

        Raises:
            RuntimeError: the matrix has another shape, or is not made of one block for each representation.
        """
        if dense.shape != self.shape:
            fail(name, f"shape {self.shape}", tuple(dense.shape), ANOTHER_LAYER, RuntimeError)
        found, inside = {}, 0
        for rep, own in self.blocks.items():
            rows, columns = self._places(rep)
            theirs = dense[rows[:, :, None], columns[:, None, :]]
            inside += int(theirs.count_nonzero())
            block = theirs[:1]
            same = torch.allclose(theirs, block.expand_as(theirs), rtol=0, atol=1e-4)
            require(same, name, f"one block for all fields {rep}", "several", kind=RuntimeError)
            known = torch.allclose(block[0], own.to(block), rtol=0, atol=1e-4)
            found[rep] = own if known else block[0].detach().cpu().float()
        outside = int(dense.count_nonzero()) - inside
        require(outside == 0, name, "a block diagonal matrix", f"{outside} values elsewhere", kind=RuntimeError)
        return found
