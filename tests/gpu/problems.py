"""Where the checks run, on which backends, and problems of a size for it: on a GPU, or with Triton's interpreter, which
gets through small ones in some seconds."""

import copy
from dataclasses import replace

import helpers
import torch

from implicit_steer.ops.triton import backend as triton
from implicit_steer.testing.cases import SMALL

INTERPRETED = triton.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BACKENDS = ["triton"] if INTERPRETED else ["cuda", "triton"]

_WIDE = ("o3-l2", "o3-mixed", "so3-mixed", "so2-mixed", "octa-r3", "cone-r3", "cylinder-r3", "full-cylinder-r3")


def small(name):
    """The case on a graph of that size."""
    if INTERPRETED:
        return replace(SMALL[name], nodes=2 if name in _WIDE else 4, degree=4)
    return replace(SMALL[name], nodes=67, degree=9)


def layer(*arguments, **options):
    """helpers.layer, on the device."""
    return helpers.layer(*arguments, **options).to(DEVICE)


def outcome(conv, problem, backend, **options):
    """helpers.outcome for the loss |out|² / 2: gradients whose terms do not cancel, on graphs of any size."""
    return helpers.outcome(conv, problem, backend, weight=torch.clone, **options)


def expected(conv, problem, **options):
    """What `reference` has in float64 on the processor, rounded to the problem's dtype."""
    exact = copy.copy(problem)
    for name in ("x", "pos", "delta", "attributes"):
        if getattr(problem, name) is not None:
            setattr(exact, name, getattr(problem, name).cpu().double())
    exact.graph = problem.graph.to("cpu")
    found = outcome(copy.deepcopy(conv).cpu().double(), exact, "reference", **options)
    return {k: v.to(problem.x.dtype) if v.is_floating_point() else v for k, v in found.items()}
