"""Files of potentials whose convolutions have escnn's field types. Needs escnn."""

from __future__ import annotations

from ..lowering import _require_escnn  # noqa: F401

# isort: split
from typing import Any

from escnn import gspaces
from escnn.group import directsum
from torch import Tensor

from ..irreps.escnn import from_escnn
from ..nn import ImplicitPointConv


def converted(options: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and weights of the same potential on irreps.

    Raises:
        ValueError: a sampling other than the exact one.
        RuntimeError: weights on another basis of the group.
    """
    options = dict(options)
    sampling, channels, highest = options.pop("sampling"), options["channels"], options["max_frequency"]
    gspace = gspaces.flipRot3dOnR3()
    field = directsum([gspace.irrep(degree % 2, degree) for degree in range(highest + 1)])
    scalars, hidden = gspace.type(*[gspace.trivial_repr] * channels), gspace.type(*[field] * channels)
    attributes = gspace.type(*[gspace.trivial_repr] * (options["radial"] + 2 * len(options["species"])))
    kernel = {"activation": options["activation"], "sampling": sampling, "norm": None, "cutoff": 1.0}
    sizes = options["kernel_layers"], options["kernel_channels"]
    for n in range(options["blocks"]):
        prefix = f"convolutions.{n}."
        conv = ImplicitPointConv(hidden if n else scalars, hidden, attributes, *sizes, **kernel)
        own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        conv.to(own["bias"].dtype).load_state_dict(own)
        state |= {prefix + name: value for name, value in from_escnn(conv).state_dict().items()}
    return options, state
