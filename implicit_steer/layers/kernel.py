"""The implicit kernel with a plan: its parameters, its checks, and its values at points."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .._check import fail, require
from .._transforms import is_transformed
from ..graph import EdgeTypes
from ..ops import conv as op
from ..ops import select
from ..ops.autocast import without_autocast
from ..ops.table_error import choose_knots, table_error
from ..plan import Norm, Plan, Table
from ..plan.moments import MEASURED, RUNNING, NormStatistics, Pool, StatisticsSource, move_towards
from ..plan.packing import CallCache, NormParameters, Parameters, is_traced
from . import hooks
from ._modules import Fixed, NoTorchScript
from .exact import ExactBuffers
from .fields import check_tensor

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")  # in the order of NormParameters
_NamedNorm = tuple[torch.nn.Module, tuple[str, ...]]


class KernelBase(NoTorchScript, torch.nn.Module):
    """K(x, a) = γ exp(−½ (|x| / σ)²) · mat(MLP(x ⊕ radial(|x|) ⊕ a)), computed from a plan and parameters.

    A subclass sets the parameter ``shell_width`` σ and calls :meth:`_find_tensors`, then :meth:`_set_plan`.
    """

    plan: Plan
    shell_width: Tensor
    pool: Pool | None = None  # adds other processes' edges to the batch norms' statistics
    _in_convolution = False
    sampling = Fixed(lambda kernel: kernel.plan.sampling)
    norm = Fixed(lambda kernel: "batch" if kernel.plan.norms else None)
    activation = Fixed(lambda kernel: kernel.plan.activations[0].function if kernel.plan.activations else None)
    cutoff = Fixed(lambda kernel: kernel.plan.cutoff)
    aggr = Fixed(lambda kernel: kernel.plan.aggr)
    table = Fixed(lambda kernel: _asked_for(kernel.plan.table))
    radial = Fixed(lambda kernel: kernel.plan.radial)

    def __init__(self) -> None:
        super().__init__()
        self._call_cache, self._values = CallCache(), False
        self._reach_checked = False
        self._rows: Tensor | None = None  # of attributes, as the last call had them
        self._rows_are_all = False  # whether these are the rows of all its edges
        self.register_load_state_dict_post_hook(_choose_knots_again)  # type: ignore[no-untyped-call]

    def _find_tensors(self, linears: Sequence[torch.nn.Module], norms: Sequence[_NamedNorm]) -> None:
        """Say where the parameters are.

        Args:
            linears: modules with ``weights`` and ``bias`` (or None), one per linear layer of the MLP.
            norms: for each batch norm a module with ``num_batches_tracked`` and ``momentum``, and the names of its
                tensors in the order of NORM_TENSORS.
        """
        self._linears, self._norms = linears, norms
        tensors = [(layer, name) for layer in linears for name in ("weights", "bias")]
        tensors += [(norm, name) for norm, names in norms for name in names]
        tensors.append((self, "shell_width"))
        # Each with the dictionary in which torch keeps it, which spares the detour over Module.__getattr__.
        self._tensors = [(m, "_buffers" if name in m._buffers else "_parameters", name) for m, name in tensors]

    def adopt_bias(self, conv: Biased) -> None:
        """Pass the bias of ``conv``, which reads the tensors of this kernel, to the operator as well. Raise
        ``ValueError`` where the kernel has another convolution's."""
        self._in_convolution = True
        if conv.bias is not None:
            remedy = "Give each convolution a kernel of its own."
            free = all(name != "bias_expansion" for *_, name in self._tensors)
            require(free, "implicit_kernel", "one without the bias of another convolution", "a shared one", remedy)
            self._tensors += [(conv, "_parameters", "bias"), (conv, "_buffers", "bias_expansion")]
            self._call_cache.tensors = None

    def _set_plan(self, plan: Plan) -> None:
        self.plan = plan
        # torch.compile would look for these in the plan's arrays.
        self._dim, self.n_attributes = plan.frame.dim, plan.n_attributes
        self._trivial = [norm.full_trivial.tolist() for norm in plan.norms]
        self._columns = torch.tensor(self._trivial, dtype=torch.int64)
        cache = self._call_cache
        cache.native, cache.triton = op.engine_plans(plan, self.parameters_for_op(), values=self._values)

    def choose_knots(self, attributes: Tensor | EdgeTypes) -> None:
        """Where ``table="auto"`` and this has not been done for the present ``state_dict``, choose how many knots the
        table has, by its error for the present weights and the types of these edges."""
        table, of_types = self.plan.table, isinstance(attributes, EdgeTypes)
        unknown = table is not None and table.automatic and table.error is None
        nothing_new = self.n_attributes == 0 and not unknown
        if (not of_types and (table is None or nothing_new)) or is_traced():
            return
        rows = attributes.rows if isinstance(attributes, EdgeTypes) else attributes[:1]
        if len(rows):
            self.remember_rows(rows, of_types)
        per_edge = isinstance(attributes, Tensor) and attributes.shape[1] > 0
        if unknown and len(rows) and not per_edge:
            backend = select.for_comparison(self.plan)
            self._set_plan(choose_knots(backend, self.plan, self.parameters_on_cpu(), rows.detach().cpu()))

    def remember_rows(self, rows: Tensor, are_all: bool = True) -> None:
        """Remember rows (T, A) of attributes for :meth:`table_error` and :attr:`known_rows`; ``are_all``: no edge has
        another row."""
        self._rows, self._rows_are_all = rows.detach(), are_all

    @property
    def known_rows(self) -> Tensor | None:
        """(T, A): the rows of attributes of all edges, as the last call with :class:`~implicit_steer.EdgeTypes` had
        them; None where there was none."""
        return self._rows if self._rows_are_all else None

    def table_error(self) -> float | None:
        """The largest error that the table makes in an entry of K, relative to the largest entry, with the present
        weights, for the attributes of the last call, or zeros before it; None without a table."""
        if self.plan.table is None or self.plan.is_frozen:
            return None if self.plan.table is None else self.plan.table.error
        rows = self.shell_width.new_zeros(1, self.n_attributes) if self._rows is None else self._rows
        return table_error(select.for_comparison(self.plan), self.plan, self.parameters_on_cpu(), rows.cpu())

    def parameters_on_cpu(self) -> Parameters:
        """The parameters there, without a cache and a convolution's bias."""
        return self.parameters_for_op().changed(Tensor.cpu)._replace(cache=None, bias=None)

    def describe(self) -> str:
        error = None if self.plan.is_frozen else self.table_error()  # that of a frozen plan is in its own text
        return f"{self.plan}" if error is None else f"{self.plan}\n  table      error {error:.1e} at present"

    def explain(self) -> str:
        """Group, sampling, frame, costs, the error of a table, and what evaluates K's values and why."""
        dtype = op.compute_dtype(self.parameters_for_op())
        return (
            f"{self.describe()}\n  backend    {select.choose_for_kernel(self.plan, self.shell_width.device, dtype)[1]}"
        )

    def prepare_values(self) -> None:
        """Prepare what evaluating the kernel needs beyond a convolution: torch.compile cannot do so at a first call."""
        self._values = True
        self._set_plan(self.plan)

    def parameters_for_op(self) -> Parameters:
        """The learned tensors as the operator takes them; the same object while the tensors are the same."""
        cache, traced = self._call_cache, is_traced()
        try:
            tensors = [getattr(module, kind)[name] for module, kind, name in self._tensors]
        except KeyError:  # a tensor that a parametrisation or a hook makes is in neither dictionary
            hooks.make_tensors(dict.fromkeys(module for module, _, _ in self._tensors))
            tensors = [getattr(module, name) for module, _, name in self._tensors]
        if not traced and cache.hooks != hooks.registered():
            self._look_for_hooks()
        if not traced and cache.tensors is not None and all(map(operator.is_, tensors, cache.tensors)):
            return cache.parameters
        n, m = 2 * len(self._linears), 4 * len(self._norms)
        linears = tuple(zip(tensors[0:n:2], tensors[1:n:2], strict=True))
        norms = tuple(NormParameters(*tensors[k : k + 4]) for k in range(n, n + m, 4))
        shell_width, *conv = tensors[n + m :]
        bias = (conv[0], conv[1]) if conv and conv[0] is not None else None  # conv.bias = None removes it
        parameters = Parameters(linears, norms, shell_width, cache, bias)
        if not traced and all(t is None or t.is_leaf for t in tensors):  # the graph of others must not be kept alive
            cache.tensors, cache.parameters = tensors, parameters
        return parameters

    def _look_for_hooks(self) -> None:
        """Warn of hooks on modules that are never called, after hooks were registered somewhere."""
        self._call_cache.hooks = hooks.registered()
        inside = [("the kernel", self)] if self._in_convolution else []
        hooks.warn_of_others(inside + [part for part in self.named_modules() if part[1] is not self])

    def statistics_source(self, n_points: int, argument: str = "edge_delta") -> StatisticsSource:
        """Where batch norms take their statistics from: in training mode these points, and the points of other
        processes where :attr:`pool` adds them; else the running statistics.

        Raises:
            ValueError: there is a single point, which has no variance.
        """
        if not (self.training and self.plan.norms):
            return RUNNING
        if self.pool is not None:
            return StatisticsSource(measured=True, pool=self.pool)
        if n_points == 1:
            expected = "at least 2 points in training mode with norm='batch'"
            fail(argument, expected, "1", "Call .eval(), use larger graphs, or norm=None.")
        return MEASURED

    def update_running(self, statistics: Sequence[NormStatistics]) -> None:
        """Move the batch norms' running statistics towards a batch's, as escnn does in its forward pass."""
        buffers: list[dict[str, Any]] = [norm._buffers for norm, _ in self._norms]
        means, variances = ([b[names[k]] for b, (_, names) in zip(buffers, self._norms, strict=True)] for k in (2, 3))
        counts = [b["num_batches_tracked"] for b in buffers]
        together = getattr(statistics, "together", None)
        native = together is not None and together.is_cpu and together.dtype == variances[0].dtype
        if native and all(t.is_contiguous() for t in (*means, *variances)):
            arguments = self._columns, [_factor(norm) for norm, _ in self._norms]
            torch.ops.implicit_steer.conv_move_running(together, means, variances, counts, *arguments)
            return
        for n, batch in enumerate(statistics):
            kept, measured = [variances[n].squeeze(1)], [batch.var.to(variances[n].dtype)]
            for k, column in enumerate(self._trivial[n]):  # the other columns of the mean are 0
                kept.append(means[n].select(1, column))
                measured.append(batch.mean.select(1, k).to(means[n].dtype))
            move_towards(kept, measured, _factor(self._norms[n][0]))
            counts[n].add_(1)

    def check_points(
        self, prefix: str, delta: Tensor, attributes: Tensor | EdgeTypes | None, n: int | None
    ) -> Tensor | EdgeTypes:
        """Check positions and attributes; return the attributes, of shape (n, 0) where there are none."""
        width = self.shell_width
        position, attribute = {"edge": ("edge_delta", "edge_attr"), "kernel": ("pos", "attrs")}[prefix]
        size = self.n_attributes
        check_tensor(position, delta, (n, self._dim), width.dtype, width.device)
        if attributes is None:
            if size:
                remedy = "The layer was built with an attribute type: pass the attributes."
                fail(attribute, f"a tensor of {size} attributes each", None, remedy)
            return delta.new_zeros(delta.shape[0], 0)
        points = delta.shape[0]
        given: Any = attributes.rows if isinstance(attributes, EdgeTypes) else attributes
        if size == 0 and getattr(given, "shape", ())[-1:] != (0,):
            got = f"{type(attributes).__name__} of shape {tuple(getattr(given, 'shape', ()))}"
            remedy = "The layer was built without an attribute type: leave the attributes out, or build it with one."
            fail(attribute, "None", got, remedy)
        if isinstance(attributes, EdgeTypes):
            if attributes.index.shape[0] != points:  # not len(): torch.compile would take the number as a constant
                fail(f"{attribute}.index", f"shape ({points},)", tuple(attributes.index.shape))
            check_tensor(f"{attribute}.rows", given, (None, size), width.dtype, width.device)
        else:
            check_tensor(attribute, given, (points, size), width.dtype, width.device)
        return attributes

    def check_reach(self, delta: Tensor) -> None:
        """Warn, at the first call with edges (E, dim), if the shell s(r) = exp(−½ (r / σ)²) is almost 0 on all of them,
        or almost 1."""
        if torch.compiler.is_compiling() or self._reach_checked:
            return
        if is_transformed() or torch._C._len_torch_dispatch_stack() or delta.is_meta:  # tensors may be stand-ins
            return
        if delta.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        lengths = delta.detach().norm(dim=1)
        lengths = lengths[lengths > 0]  # self-loops say nothing about the unit of the positions
        if not len(lengths):
            return
        self._reach_checked = True
        shell = torch.exp(-0.5 * (lengths / self.shell_width.detach().view(-1)).square())
        low, high = float(shell.min()), float(shell.max())
        if high < 1e-3 or low > 0.999:
            width, shortest, longest = self.shell_width.item(), float(lengths.min()), float(lengths.max())
            what = f"is at most {high:.0e}" if high < 1e-3 else "is 1"
            warnings.warn(
                f"edge_delta: the kernel's shell exp(−½ (r / σ)²), σ = {width:.3g}, {what} on all edges, which are "
                f"{shortest:.3g} to {longest:.3g} long. Build it with width={longest / 2:.2g}, or scale the positions.",
                stacklevel=7,  # the line that called the module
            )

    def forward(
        self, pos: Tensor, attrs: Tensor | EdgeTypes | None = None, *, batch_statistics: bool | None = None
    ) -> Tensor:
        """K at P points.

        Args:
            pos: (P, dim).
            attrs: (P, A), or :class:`~implicit_steer.EdgeTypes`; None without attributes.
            batch_statistics: whether batch norms take their statistics from these points; None: in training mode only.

        Returns:
            (P, C_out, C_in).
        """
        attributes = self.check_points("kernel", pos, attrs, None)
        if batch_statistics is None:
            statistics_from = self.statistics_source(pos.shape[0], "pos")
        else:
            statistics_from = MEASURED if batch_statistics else RUNNING
        with without_autocast(pos):
            self.choose_knots(attributes)
            parameters = self.parameters_for_op()
            k, statistics = op.implicit_kernel(self.plan, parameters, pos, attributes, statistics_from=statistics_from)
        if self.training:
            self.update_running(statistics)
        return k

    def extra_repr(self) -> str:
        """The kernel in one line."""
        p = self.plan
        return f"{p.group}, {p.out_size} x {p.in_size}, sampling={p.sampling!r}, frame={p.frame.kind!r}"


def _asked_for(table: Table | None) -> int | str | None:
    """The argument ``table`` that this is the answer to."""
    if table is None:
        return None
    return "auto" if table.automatic else table.knots


def _choose_knots_again(kernel: KernelBase, _: Any) -> None:
    """After a checkpoint."""
    table = kernel.plan.table
    if table is not None and table.automatic and table.error is not None:
        kernel._set_plan(replace(kernel.plan, table=replace(table, error=None)))


def _factor(norm: torch.nn.Module) -> float:
    """How far running statistics move towards a batch's; momentum None: they become the average over all batches."""
    momentum: Any = norm.momentum
    return 1 / (int(norm.get_buffer("num_batches_tracked")) + 1) if momentum is None else momentum


class BasisFingerprint(torch.nn.Module):
    """A Module whose weights have a meaning on one basis only: it refuses a ``state_dict`` of weights on another."""

    fingerprint: Tensor

    def _stamp(self, fingerprint: NDArray[Any]) -> None:
        self._own_fingerprint = fingerprint  # the buffer may be on "meta"
        self.register_buffer("fingerprint", torch.tensor(fingerprint))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own, theirs = torch.tensor(self._own_fingerprint), state_dict.get(f"{prefix}fingerprint")
        if theirs is not None and not theirs.is_meta:
            same = theirs.shape == own.shape and not bool(((theirs.to(own) - own).abs() > 1).any())
            remedy = "These weights mean another function here: load the module itself, from its own file."
            require(same, f"{prefix}fingerprint", "this module's basis", "another basis", remedy, RuntimeError)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LinearParameters(NoTorchScript, torch.nn.Module):
    """What an equivariant linear map learns: ``weights`` (n_weights,) and ``bias`` (n_bias,) or None."""

    bias: torch.nn.Parameter | None

    def __init__(self, n_weights: int, n_bias: int) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(n_weights))
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(n_bias)) if n_bias else None)


class NormState(torch.nn.Module):
    """What one batch norm of a kernel learns and keeps, in the shapes of
    :class:`~implicit_steer.plan.packing.NormParameters`, but the running means have only the columns up to the last
    trivial one."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.momentum = norm.momentum
        self.weight = torch.nn.Parameter(torch.ones(norm.channels, 1))
        self.bias = torch.nn.Parameter(torch.zeros(norm.channels, len(norm.trivial)))
        self.register_buffer("running_mean", torch.zeros(norm.channels, norm.n_mean))
        self.register_buffer("running_var", torch.ones(norm.channels, 1))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


class ImplicitKernel(BasisFingerprint, KernelBase):
    """K(x, a) = γ exp(−½ (|x| / σ)²) · mat(MLP(x ⊕ radial(|x|) ⊕ a)), computed from a plan, without escnn.

    Args:
        plan: what to compute. Until values are loaded, the parameters are 0, the norms new, and σ = 0.5.

    Called on positions (P, dim) and attributes (P, A) or None it returns (P, C_out, C_in).
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        require(not plan.is_frozen, "plan", "one with an MLP", "one with splines, which a FrozenKernel takes")
        sizes = [(layer.n_weights, layer.bias.shape[1]) for layer in plan.linears]
        self.linears = torch.nn.ModuleList(LinearParameters(*n) for n in (*sizes, plan.n_last))
        self.norms = torch.nn.ModuleList(NormState(norm) for norm in plan.norms)
        self.shell_width = torch.nn.Parameter(torch.full((1, 1, 1), 0.5))
        self._stamp(plan.fingerprint)
        self._find_tensors(list(self.linears), [(norm, NORM_TENSORS) for norm in self.norms])
        self._set_plan(plan)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"plan": self.plan}


class Biased(ExactBuffers, NoTorchScript, torch.nn.Module):
    """A convolution's bias on the invariants of its output: ``bias`` (n,), or None where there are no invariants, and
    ``bias_expansion`` (C_out, n)."""

    implicit_kernel: KernelBase
    in_type: Any
    out_type: Any
    bias: torch.nn.Parameter | None
    bias_expansion: Tensor
    sampling = Fixed(lambda conv: conv.implicit_kernel.sampling)
    norm = Fixed(lambda conv: conv.implicit_kernel.norm)
    activation = Fixed(lambda conv: conv.implicit_kernel.activation)
    cutoff = Fixed(lambda conv: conv.implicit_kernel.cutoff)
    aggr = Fixed(lambda conv: conv.implicit_kernel.aggr)
    radial = Fixed(lambda conv: conv.implicit_kernel.radial)

    def _check_sizes(self, kernel_out: Any) -> None:
        """Raise unless the kernel maps from ``in_type`` to features of the type ``kernel_out``."""
        plan, sizes = self.implicit_kernel.plan, (self.in_type.size, kernel_out.size)
        require(
            (plan.in_size, plan.out_size) == sizes, "implicit_kernel", f"sizes {sizes}", (plan.in_size, plan.out_size)
        )

    def _set_bias(self, expansion: Tensor) -> None:
        self.bias = None
        if expansion.shape[1]:
            self.set_exact("bias_expansion", expansion)
            self.bias = torch.nn.Parameter(torch.zeros(expansion.shape[1]))

    def expand_bias(self) -> Tensor | None:
        """The bias of every channel, (C_out,), or None."""
        bias = self.bias
        return None if bias is None else torch.mv(self.bias_expansion, bias)

    @property
    def n_bias(self) -> int:
        """How many learned values the bias has."""
        return 0 if self.bias is None else len(self.bias)
