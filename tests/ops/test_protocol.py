"""Every registered backend is what the protocol says, and the registry knows each by its name."""

import inspect

import pytest
import torch
from helpers import BACKENDS, layer

from implicit_steer.ops import select
from implicit_steer.ops.backend import Backend
from implicit_steer.plan.moments import MEASURED, RUNNING
from implicit_steer.testing.cases import SMALL

METHODS = [name for name, _ in inspect.getmembers(Backend, inspect.isfunction) if not name.startswith("_")]
DEVICES = [torch.device("cpu"), torch.device("meta"), torch.device("cuda")]


def test_methods_of_the_protocol():
    assert METHODS == ["available", "forward", "hidden", "kernel", "supports", "table_sums"]


@pytest.mark.parametrize("name", select.BACKENDS)
def test_registered_backends_satisfy_the_protocol(name):
    backend = select.BACKENDS[name]
    assert isinstance(backend, Backend)
    assert backend.name == name
    assert not getattr(backend, "__abstractmethods__", None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", select.BACKENDS)
def test_signatures_are_those_of_the_protocol(name, method):
    def arguments(owner):
        return [(p.name, p.kind, p.default, p.annotation) for p in inspect.signature(owner).parameters.values()]

    assert arguments(getattr(type(select.BACKENDS[name]), method)) == arguments(getattr(Backend, method))


def test_other_objects_do_not_satisfy_it():
    class WithoutKernel:
        name = "nothing"

        def available(self): ...
        def supports(self, plan, device, dtype): ...
        def forward(self, plan, parameters, statistics_from, graph, x, delta, attributes): ...

    class WithoutForward(Backend):
        name = "nothing"

        def available(self): ...
        def supports(self, plan, device, dtype): ...

    assert not isinstance(WithoutKernel(), Backend)
    with pytest.raises(TypeError, match="abstract"):
        WithoutForward()


@pytest.mark.parametrize("name", select.BACKENDS)
def test_answers_come_with_reasons(name):
    """Also on devices that are not there and in dtypes that nobody computes in."""
    backend, plan = select.BACKENDS[name], layer(SMALL["o3"]).implicit_kernel.plan
    answers = [backend.supports(plan, device, dtype) for device in DEVICES for dtype in (torch.float32, torch.int8)]
    for ok, reason in [backend.available(), *answers]:
        assert isinstance(ok, bool)
        assert isinstance(reason, str)
        assert reason
    assert select.availability()[name] == backend.available()


def test_auto_ends_with_a_backend_that_runs_everything():
    assert set(select._PREFERENCE) | set(select._OF_KERNEL) <= set(select.BACKENDS)
    assert ("auto", *select.BACKENDS) == select.NAMES
    plan = layer(SMALL["o3"]).implicit_kernel.plan
    for device in DEVICES:
        assert select.BACKENDS[select._PREFERENCE[-1]].supports(plan, device, torch.float64)[0]


@pytest.mark.parametrize("statistics_from", [RUNNING, MEASURED], ids=["running", "measured"])
@pytest.mark.parametrize("name", BACKENDS)
def test_statistics_come_with_results(name, statistics_from):
    """One entry per norm if they are measured; from :meth:`Backend.forward` and from :meth:`Backend.kernel`."""
    backend, conv = select.BACKENDS[name], layer(SMALL["o3"])
    kernel, problem = conv.implicit_kernel, SMALL["o3"].inputs(conv)
    arguments = kernel.plan, kernel.parameters_for_op(), statistics_from
    out, of_forward = backend.forward(*arguments, problem.graph, problem.x, problem.delta, problem.attributes)
    k, of_kernel = backend.kernel(*arguments, problem.delta, problem.attributes)
    assert out.shape == (problem.graph.num_dst, kernel.plan.out_size)
    assert k.shape == (problem.graph.num_edges, kernel.plan.out_size, kernel.plan.in_size)
    assert len(of_forward) == len(of_kernel) == (len(kernel.plan.norms) if statistics_from.measured else 0)
    for norm, *found in zip(kernel.plan.norms, of_forward, of_kernel, strict=False):
        for statistics in found:
            assert statistics.mean.shape == (norm.channels, len(norm.trivial))
            assert statistics.var.shape == (norm.channels,)
