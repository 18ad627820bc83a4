"""A plan's tables on a device, and the constants of the hidden layers' weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ...plan import Plan
from ...plan.packing import cached
from . import configuration
from .configuration import LaunchConfig
from .launch import Variant
from .sizes import Sizes
from .tables import Tables, tables


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan's tables on a device; ``prepared[name]`` is one of them, or some tensor where the plan has none of that
    name, since kernels that do not read a table are still given a pointer."""

    tables: Tables
    tensors: dict[str, Tensor]
    dtype: torch.dtype
    mixing: tuple[Tensor, ...]  # per coupling (b, s, o)
    position: Tensor  # of every (s, v, w, u, o) of all couplings in the flat Θ
    made: dict[Any, Any] = field(default_factory=dict)  # by their methods below

    @property
    def sizes(self) -> Sizes:
        return self.tables.sizes

    def config(self, kernel: Any) -> LaunchConfig:
        """How to launch a kernel: asked once for each change of what is chosen."""
        key = kernel.__name__, configuration.changes
        if (found := self.made.get(key)) is None:
            found = configuration.choose(kernel.__name__, self.sizes, self.dtype, self.position.device)
            self.made[key] = found
        return found

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name] if name in self.tensors else self.tensors["scalars"]

    def some(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """These tables."""
        if (found := self.made.get(names)) is None:
            self.made[names] = found = tuple(self[name] for name in names)
        return found

    def variant(self, kernel: Any, constants: Callable[..., dict[str, Any]], *flags: Any) -> Variant:
        """The kernel with ``constants(self, *flags)``, as :meth:`config` launches it; made once."""
        config = self.config(kernel)
        key = kernel.__name__, flags, config, torch.get_float32_matmul_precision()
        if (found := self.made.get(key)) is None:
            self.made[key] = found = Variant(kernel, constants(self, *flags), config)
        return found


def _inverse(found: Tables, prepared: Prepared) -> Tensor:
    """Q of all layers as layers.py reads it."""
    s, k = found.sizes, prepared.sizes.widths
    z, parts = s.n_zero // s.channels, []
    for inverse in torch.tensor(found.numbers["inverse"]):  # (c, S)
        # (w, s) x (ρ, w'): block diagonal in the channels
        full = torch.einsum("ks,wv->wskv", inverse, torch.eye(s.channels, dtype=inverse.dtype)).flatten(0, 1)
        for part, width in ((full[:, :z], k["B0"]), (full[:, z:], k["B1"])):
            matrix = part.flatten(1)
            parts.append(torch.nn.functional.pad(matrix, (0, width - matrix.shape[1], 0, k["NU"] - len(matrix))))
            if not s.regular:
                break
    return torch.cat([p.reshape(-1) for p in parts]) if parts else torch.zeros(1)


@cached
def prepare(plan: Plan, device: torch.device, dtype: torch.dtype) -> Prepared:
    """The plan on this device; cached."""
    found = tables(plan)

    def tensor(array: NDArray[Any], kind: torch.dtype) -> Tensor:
        return torch.tensor(array, dtype=kind, device=device).contiguous()

    tensors = {name: tensor(array, dtype) for name, array in found.numbers.items()}
    tensors |= {name: tensor(array, torch.int32) for name, array in found.indices.items()}
    mixing = tuple(tensor(m, dtype) for m in found.mixing)
    prepared = Prepared(found, tensors, dtype, mixing, torch.tensor(found.position, device=device))
    tensors["inverse"] = _inverse(found, prepared).to(device, dtype)
    return prepared
