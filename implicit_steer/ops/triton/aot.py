"""Compilation ahead of time, without a GPU: what the kernels of a layer need on an architecture.

:func:`launches_of` runs a layer's operators on CPU tensors while launches are written down instead of being made, so
what is compiled is what would be launched. The numbers come from the compiled code itself, read by the tools in
triton's package."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...plan import Plan
from ...plan.packing import parameter_sizes
from . import operators  # noqa: F401, which registers them
from .handle import handle_of
from .launch import Launch, recording
from .tables import tables

ARCHITECTURES = {80: "A100", 90: "H100", 100: "B200"}
# Shared memory of a block in bytes, threads, blocks, registers and shared memory of a multiprocessor (CUDA programming
# guide, compute capabilities)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_TENSOR_OPS = ("HMMA", "HGMMA", "UTCHMMA", "DMMA")
_TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture: registers and bytes of stack per thread, bytes of shared memory, and
    how often each instruction stands in the code."""

    kernel: str
    architecture: int
    warps: int
    registers: int
    stack: int
    shared: int
    instructions: Counter[str]
    in_loops: int  # instructions in innermost loops, and tensor-core instructions among them
    tensor_in_loops: int

    @property
    def size(self) -> int:
        return sum(self.instructions.values())

    @property
    def tensor_instructions(self) -> int:
        return sum(self.instructions[name] for name in _TENSOR_OPS)

    @property
    def blocks(self) -> int:
        """Blocks of a multiprocessor that its registers, shared memory and threads allow."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65536 // (per_warp * self.warps)
        total = {80: 164, 90: 228, 100: 228}[self.architecture] << 10
        by_shared = total // (-(-(self.shared + 1024) // 128) * 128)
        return min(by_registers, by_shared, 2048 // (32 * self.warps), 32)

    @property
    def occupancy(self) -> float:
        """Resident warps, as a share of what a multiprocessor can hold."""
        return self.blocks * self.warps / 64

    def failures(self, meant_for_tensor_cores: bool) -> list[str]:
        """What a gate holds against it."""
        found, ops = [], self.instructions
        if self.stack or ops["LDL"] or ops["STL"]:
            found.append(f"spills: stack {self.stack} bytes, {ops['LDL']} loads, {ops['STL']} stores")
        if self.shared > SHARED_LIMIT[self.architecture]:
            found.append(f"{self.shared} bytes of shared memory, there are {SHARED_LIMIT[self.architecture]}")
        if ops["BPT"]:
            found.append("a trap")
        if ops["LD"] or ops["ST"]:
            found.append("generic loads or stores")
        if meant_for_tensor_cores and not self.tensor_instructions:
            found.append("no tensor-core instruction")
        return [f"{self.kernel}, sm_{self.architecture}: {text}" for text in found]


def launches_of(plan: Plan, dtype: torch.dtype = torch.float32, nodes: int = 64, degree: int = 32) -> list[Launch]:
    """One launch of every kernel and set of constants that a forward and backward pass makes."""
    ops, key, s = torch.ops.implicit_steer, handle_of(plan).key, tables(plan).sizes
    edges = nodes * degree

    def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.zeros(*shape, dtype=kind)

    source, order = zeros(edges, kind=torch.int64), zeros(edges, kind=torch.int64)
    offsets = zeros(nodes + 1, kind=torch.int64)
    points = zeros(nodes, s.in_size), zeros(edges, s.dim), zeros(edges, s.n_attributes)
    learned = [zeros(n) for n in parameter_sizes(plan)]
    running = [t for norm in plan.norms for t in (zeros(norm.channels, plan.field_size), zeros(norm.channels))]
    call = key, *points, learned, running, False, source, order, offsets, order, offsets
    with recording() as found, torch.no_grad():
        total, *saved = ops.triton_conv(*call)
        ops.triton_conv_backward(*call, *saved, total, [True] * 4)
    unique = {(entry.kernel.__name__, tuple(sorted(entry.constants.items()))): entry for entry in found}
    return list(unique.values())


def _signature(entry: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types of the arguments, constants, and which pointers are multiples of 16 bytes, as the just-in-time compiler
    has them."""
    types, constants, attributes = {}, dict(entry.constants), {}
    for n, name in enumerate(entry.kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        value = entry.arguments[name]
        types[name] = _TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor):
            attributes[(n,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_for(entry: Launch, architecture: int) -> Any:
    """The compiled kernel of a launch, by triton."""
    types, constants, attributes = _signature(entry)
    source = ASTSource(fn=entry.kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(entry.options))


def _output(tool: str, *arguments: str) -> str:
    """What one of the CUDA tools that triton ships prints."""
    command = [str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read(cubin: bytes) -> tuple[int, int, list[tuple[int, str, int | None]]]:
    """Registers, bytes of stack, and (address, instruction, target of a branch) of the one kernel in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
        code = _output("cuobjdump", "-sass", file.name)
    facts = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    found = []
    for at, name, rest in _INSTRUCTION.findall(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        found.append((int(at, 16), name, int(target[1], 16) if target else None))
    return int(facts["REG"]), int(facts["STACK"]), found


def _innermost(code: list[tuple[int, str, int | None]]) -> list[str]:
    """The instructions in loops that hold no other loop."""
    loops = [(target, at) for at, _, target in code if target is not None and target < at]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in loops)]
    return [name for at, name, _ in code if any(a <= at <= b for a, b in inner)]


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", re.MULTILINE)


def resources(entry: Launch, architecture: int) -> Resources:
    """Compile a launch and read the result."""
    compiled = compile_for(entry, architecture)
    registers, stack, code = _read(compiled.asm["cubin"])
    constants, inner = entry.constants, Counter(_innermost(code))
    kinds = {"FIRST": "_first", "STORE_Y": "_kept", "BACKWARD": "_backward"}
    kind = next((kind for name, kind in kinds.items() if constants.get(name)), "")
    return Resources(
        kernel=entry.kernel.__name__ + kind,
        architecture=architecture,
        warps=entry.options["num_warps"],
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        instructions=Counter(name for _, name, _ in code),
        in_loops=sum(inner.values()),
        tensor_in_loops=sum(inner[name] for name in _TENSOR_OPS),
    )


def report(plan: Plan, architectures: Sequence[int], dtype: torch.dtype = torch.float32) -> Iterator[Resources]:
    """Every kernel of a plan's forward and backward pass, on every architecture."""
    for entry in launches_of(plan, dtype):
        for architecture in architectures:
            yield resources(entry, architecture)
