"""Teaches ``copy`` and ``pickle`` escnn's groups, spaces and representations, which hold closures: modules that carry
field types can then be copied, pickled and sent to other processes. Each is rebuilt from what identifies it."""

from __future__ import annotations

from ..lowering import _require_escnn  # noqa: F401

# isort: split
import copyreg

import numpy as np
from escnn.group import Group, IrreducibleRepresentation, Representation, groups_dict
from escnn.gspaces import GSpace0D, GSpace2D, GSpace3D


def _group(name: str, keys: dict) -> Group:
    return groups_dict[name]._generator(**keys)


def _irrep(group: Group, ident: tuple) -> IrreducibleRepresentation:
    return group.irrep(*ident)


def _representation(group: Group, name: str, irreps: list, change_of_basis: np.ndarray, nonlinearities: list):
    known = group.representations.get(name)
    if known is not None and known.irreps == irreps and np.allclose(known.change_of_basis, change_of_basis):
        return known
    return Representation(group, name, irreps, change_of_basis, nonlinearities)


def _reduce_group(group: Group):
    return _group, (type(group).__name__, group._keys)


def _reduce_irrep(irrep: IrreducibleRepresentation):
    return _irrep, (irrep.group, irrep.id)


def _reduce_representation(rep: Representation):
    nonlinearities = sorted(rep.supported_nonlinearities)
    return _representation, (rep.group, rep.name, rep.irreps, rep.change_of_basis, nonlinearities)


def _reduce_space(space):
    return type(space), (space.fibergroup if isinstance(space, GSpace0D) else space._sg_id,)


def register() -> None:
    """Register the reducers; they apply to these classes of escnn in the whole process."""
    for group in groups_dict.values():
        copyreg.pickle(group, _reduce_group)
    copyreg.pickle(IrreducibleRepresentation, _reduce_irrep)
    copyreg.pickle(Representation, _reduce_representation)
    for space in (GSpace0D, GSpace2D, GSpace3D):
        copyreg.pickle(space, _reduce_space)
