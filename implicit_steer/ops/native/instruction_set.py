"""The instruction set that the native loops on CPU tensors run."""

from __future__ import annotations

import os
from functools import cache

from ..._check import require

INSTRUCTION_SETS = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3}


def instruction_set() -> int:
    """Number of the instruction set to run, from the environment variable ``IMPLICIT_STEER_ISA`` as it is at the first
    call; 0: the widest."""
    return _instruction_set()


# torch.compiler.assume_constant_result does just this, but imports the compiler first, and that triton.
vars(instruction_set)["_dynamo_marked_constant"] = True


@cache
def _instruction_set() -> int:
    name = os.environ.get("IMPLICIT_STEER_ISA", "auto")
    require(name in INSTRUCTION_SETS, "IMPLICIT_STEER_ISA", f"one of {tuple(INSTRUCTION_SETS)}", repr(name))
    return INSTRUCTION_SETS[name]
