"""How much memory it takes to build linear layers and kernels, found from their fields before anything is built."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from escnn.group import O3, SO3, Representation

from .._check import fail, require
from ..lowering.sampling import distinct, hidden_space, max_frequency

_BASIS = 16  # bytes per value of a sampled basis (n_b, o, i): two copies in float32, one in float64
_TENSOR = 56  # per value of the change of basis of a tensor product, while escnn makes it
_WEIGHT = 100  # per weight: itself, its initial deviation, and twice a row of the matrix that packs the parameters
_ORTHONORMAL = 40  # per value of a random orthonormal matrix
_PACKED = 48  # per product θ B of the sparse matrix that makes a dense kernel tensor of the parameters
_LONG = 4e9  # bytes from which on building takes more than about half a minute
_VARIABLE = "IMPLICIT_STEER_BUILD_GB"
_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_linear(in_reprs: list[Representation], out_reprs: list[Representation]) -> None:
    """Raise ``ValueError`` if an equivariant linear layer between these fields takes more memory than there is."""
    needed = {
        _name(into, out): _BASIS * _n_intertwiners(into, out) * out.size * into.size
        for into, out in product(distinct(in_reprs), distinct(out_reprs))
    }
    _check("in_type, out_type", needed)


def check_orthonormal(in_reprs: list[Representation], out_reprs: list[Representation]) -> None:
    """Raise ``ValueError`` if it takes more memory than there is to draw the matrices of ``"deltaorthonormal"`` between
    these fields: for each irrep in both, one after the other, a square matrix with a row for each of its copies."""
    there, here = (_irrep_counts(reprs) for reprs in (in_reprs, out_reprs))
    rows, irrep = max(((max(there[i], here[i]), i) for i in there.keys() & here.keys()), default=(0, None))
    _check("init_scheme", {f"an orthonormal matrix between the copies of the irrep {irrep}": _ORTHONORMAL * rows**2})


def _irrep_counts(reprs: list[Representation]) -> Counter:
    found = Counter()
    for rep, n in Counter(reprs).items():
        for ident in rep.irreps:
            found[ident] += n
    return found


def check_kernel(
    out_reprs: list[Representation], in_reprs: list[Representation], inputs: list[Representation], n_layers: int, n: int
) -> None:
    """Raise ``ValueError`` if a kernel between these fields takes more memory than there is: its last layer, from n
    hidden fields (or, of one layer, from the ``inputs``) to ρ_out ⊗ ρ_in of every pair of fields."""
    group, read = inputs[0].group, Counter(inputs)
    if n_layers > 1:
        highest = max_frequency(out_reprs) + max_frequency(in_reprs) + 1 if group.continuous else 0
        read = Counter({hidden_space(group, highest).rho: n})
    needed, packed = Counter(), Counter()
    sizes = [sum(r.size for r in reprs) for reprs in (out_reprs, in_reprs)]
    hidden_size = 1 + sum(h.size * count for h, count in read.items())
    dense, sparse = (16 + sizes[0]) * sizes[1] * hidden_size, 0
    tensor = cache(group._tensor_product_irreps)
    for (out, n_out), (into, n_in) in product(Counter(out_reprs).items(), Counter(in_reprs).items()):
        pair = _name(into, out)
        needed[pair] += _TENSOR * (out.size * into.size) ** 2
        for h, n_hidden in read.items():
            n_b, nonzeros, products, slots = _count(out, into, h, tensor)
            needed[pair] += _BASIS * n_b * out.size * into.size * h.size + _WEIGHT * n_b * n_out * n_in * n_hidden
            packed[pair] += _PACKED * nonzeros * n_out * n_in * n_hidden
            sparse += 16 * (nonzeros + products * n_hidden) * n_in + slots * n_in * n_hidden * n_out
    if dense < sparse and not isinstance(group, SO3 | O3):  # as Plan.dense_coupling chooses
        needed += packed
    name, total = "conv_in_type, conv_out_type", sum(needed.values())
    _check(name, needed)
    if total > _LONG:
        message = f"{name}: this layer takes about {total / 1e9:.3g} GB to build, and may take minutes."
        warnings.warn(message, stacklevel=3)


def _name(into: Representation, out: Representation) -> str:
    return f"{into.name} -> {out.name} of {out.group}"


def _n_intertwiners(into: Representation, out: Representation) -> int:
    """Dimension of the space of intertwiners."""
    there, here = Counter(into.irreps), Counter(out.irreps)
    return sum(n * here[i] * into.group.irrep(*i).sum_of_squares_constituents for i, n in there.items())


def _count(out: Representation, into: Representation, h: Representation, tensor) -> tuple[int, int, int, int]:
    """How many intertwiners B[b, (o, i), m] from h to out ⊗ into there are, and bounds on how many nonzeros, (b, o, m)
    and (b, o) they have."""
    read, total = Counter(h.irreps), np.zeros(4, dtype=int)
    for ((a, a_rows), n_a), ((b, b_rows), n_b) in product(_copies(out).items(), _copies(into).items()):
        for ident, copies in tensor(a, b):
            irrep = h.group.irrep(*ident)
            number = n_a * n_b * copies * irrep.sum_of_squares_constituents * read[irrep.id]
            total += number * np.array([1, a_rows * b_rows * irrep.size, a_rows * irrep.size, a_rows])
    return tuple(total.tolist())


def _copies(rep: Representation) -> Counter:
    """(irrep, in how many coordinates of the field it appears) of every irrep in it."""
    found, start = Counter(), 0
    for ident in rep.irreps:
        columns = rep.change_of_basis[:, start : start + rep.group.irrep(*ident).size]
        found[ident, int((np.abs(columns) > 1e-9).any(1).sum())] += 1
        start += columns.shape[1]
    return found


def _check(name: str, needed: dict[str, float]) -> None:
    total, limit = sum(needed.values()), _limit()
    if total > limit:
        fail(
            name,
            f"fields whose layer takes at most {limit / 1e9:.3g} GB to build",
            f"about {total / 1e9:.3g} GB, most of it for {max(needed, key=needed.get)}",
            "Take irreps in place of regular fields, smaller or fewer fields, or fewer channels; "
            f"${_VARIABLE} sets another limit than half of the memory.",
        )


def _limit() -> float:
    """Bytes that building may take: half of what the machine, or the container, has."""
    given = os.environ.get(_VARIABLE)
    if given is not None:
        try:
            limit = 1e9 * float(given)
        except ValueError:
            limit = math.nan
        require(limit > 0, f"${_VARIABLE}", "a number of GB > 0", repr(given))
        return limit
    texts = [Path(file).read_text().strip() for file in _CONTAINER if Path(file).exists()]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(int(text) for text in texts if text.isdigit())]) / 2
