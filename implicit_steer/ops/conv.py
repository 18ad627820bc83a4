"""The one operator: out_i = bias + Σ_{e: j→i} γ s(|x_e|) K(x_e, a_e) f_j, and the kernel K alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._check import fail
from ..graph import Graph
from ..plan import Plan
from ..plan.moments import Pool
from ..plan.packing import Parameters
from . import select
from .kernel_mlp import Statistics
from .native import cpu, cuda
from .reference import reference


def compute_dtype(parameters: Parameters) -> torch.dtype:
    """float64 with float64 parameters, else float32."""
    return torch.float64 if parameters.shell_width.dtype == torch.float64 else torch.float32


def prepared(plan: Plan, parameters: Parameters, *, values: bool) -> cpu.NativePlan | None:
    """The plan for the native code, which torch.compile finds ready in ``parameters.cache``; None where that cannot run
    it. ``values``: also for the kernel's values."""
    supported, _ = cpu.supports(plan, torch.device("cpu"), torch.float32)
    if not supported:
        return None
    native = cpu.native_plan(plan, parameters)
    return native.with_kernel() if values else native


def _compiled_engine(parameters: Parameters, backend: str, device: torch.device):
    """Under torch.compile, which cannot follow how a backend is chosen, `cpu` or `cuda` if it can run; else None."""
    if not torch.compiler.is_compiling() or parameters.cache is None or parameters.cache.native is None:
        return None
    if device.type == "cuda":
        if backend in ("auto", "cuda") and _native.cuda_usable(device)[0]:
            return cuda
        remedy = (
            "Build the CUDA kernels (IMPLICIT_STEER_CUDA=require), or call the layer outside of compiled functions."
        )
        if backend in ("auto", "triton"):
            fail("backend", "'cuda' inside torch.compile, on a GPU", repr(backend), remedy, RuntimeError)
    return cpu if backend in ("auto", "cpu") and device.type == "cpu" else None


def _cast(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    if parameters.shell_width.dtype == dtype:
        return parameters
    return Parameters(
        tuple((w.to(dtype), None if b is None else b.to(dtype)) for w, b in parameters.linears),
        tuple(type(n)(*(t.to(dtype) for t in n)) for n in parameters.norms),
        parameters.shell_width.to(dtype),
        parameters.cache,
        None if parameters.bias is None else tuple(t.to(dtype) for t in parameters.bias),
    )


def _live(plan: Plan, batch_statistics: bool | Pool, edges: int) -> bool | Pool:
    """``batch_statistics`` where there is something to take them from."""
    return bool(plan.norms) and (edges > 0 or callable(batch_statistics)) and batch_statistics


def implicit_conv(
    plan: Plan,
    parameters: Parameters,
    graph: Graph,
    x: Tensor,
    edge_delta: Tensor,
    edge_attr: Tensor,
    *,
    batch_statistics: bool | Pool,
    backend: str = "auto",
) -> tuple[Tensor, list[Statistics]]:
    """Convolve node features with the implicit kernel; arguments are taken as valid (``nn`` checks them).

    Args:
        plan: what to compute.
        parameters: what was learned.
        graph: N_src, N_dst nodes and E edges.
        x: (N_src, C_in) features, any floating dtype; the arithmetic is the parameters' (at least float32).
        edge_delta: (E, dim).
        edge_attr: (E, A), A = 0 without attributes.
        batch_statistics: take the batch norms' statistics from these edges (training) instead of the running ones; a
            function adds the edges of other processes.
        backend: name, or "auto".

    Returns:
        (N_dst, C_out) in the arithmetic's dtype, and one :class:`Statistics` per batch norm (empty unless
        ``batch_statistics``).
    """
    dtype = compute_dtype(parameters)
    engine = _compiled_engine(parameters, backend, x.device) or select.choose(backend, plan, x.device, dtype)[0]
    parameters = _cast(parameters, dtype)
    live = _live(plan, batch_statistics, graph.num_edges)
    tensors = [t if t.dtype == dtype else t.to(dtype) for t in (x, edge_delta, edge_attr)]
    return engine.forward(plan, parameters, live, graph, *tensors)


def kernel_engine(plan: Plan, device: torch.device, dtype: torch.dtype):
    """What evaluates the kernel's values there: native code where it can, else `reference`; and why."""
    if device.type == "cpu":
        _native.found()
    refused = []
    for name, engine in (("cpu", cpu), ("cuda", cuda)):
        supported, reason = engine.supports(plan, device, dtype)
        if supported:
            return engine, f"{name}: {reason}"
        refused.append(f"not {name}: {reason}")
    return reference, "; ".join(["reference: plain PyTorch", *refused])


def implicit_kernel(
    plan: Plan, parameters: Parameters, delta: Tensor, attributes: Tensor, *, batch_statistics: bool | Pool
) -> tuple[Tensor, list[Statistics]]:
    """K (P, C_out, C_in) at P points: delta (P, dim), attributes (P, A). Native on CPU tensors, `cuda` on CUDA
    tensors where it can, else `reference`."""
    dtype = compute_dtype(parameters)
    parameters = _cast(parameters, dtype)
    live = _live(plan, batch_statistics, delta.shape[0])
    engine = _compiled_engine(parameters, "cpu", delta.device) or kernel_engine(plan, delta.device, dtype)[0]
    k, statistics = engine.kernel(plan, parameters, live, delta.to(dtype), attributes.to(dtype))
    return k.to(delta.dtype), statistics
