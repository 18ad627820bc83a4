"""Backend `cuda` where there is no GPU: how it refuses, which of the GPU backends "auto" takes, the operators' shapes
and devices on stand-ins for CUDA tensors, and its Python side on the native loops, which the operators run on CPU
tensors. The kernels themselves: `make test-gpu-emulated`."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import fake_cuda
import pytest
import torch
from helpers import arguments_of, assert_close, function_of, layer, outcome, random_edges
from operators import operator_arguments
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_steer import _files, _native
from implicit_steer.graph import Graph, graph
from implicit_steer.irreps import ImplicitPointConv
from implicit_steer.ops import gpu_cost, select
from implicit_steer.ops.gpu_cost import instructions_per_edge
from implicit_steer.ops.native import cuda as module
from implicit_steer.plan.moments import RUNNING
from implicit_steer.plan.packing import learned_tensors, parameter_sizes
from implicit_steer.testing.cases import SMALL, Case, Problem

GPU = torch.device("cuda")
reference, cuda, triton = (select.BACKENDS[name] for name in ("reference", "cuda", "triton"))


# ---- without a device


def test_cpu_tensors_are_refused():
    conv = layer(SMALL["c4"])
    with pytest.raises(RuntimeError, match="runs on CUDA tensors, these are on cpu"):
        outcome(conv, SMALL["c4"].inputs(conv), "cuda")


def test_importing_and_asking_opens_no_cuda_library():
    script = (
        "import sys, implicit_steer as ist;"
        "ok, reason = ist.info().backends['cuda']; print(ok, reason);"
        "sys.exit('libimplicit_steer_cuda' in open('/proc/self/maps').read())"
    )
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    ok, _, reason = run.stdout.partition(" ")
    assert ok == str(_native.cuda_available()[0] and torch.cuda.is_available())
    assert reason.strip()


def test_missing_kernels_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "CUDA_LIBRARY", tmp_path / "none.so")
    ok, reason = cuda.available()
    assert not ok
    assert "IMPLICIT_STEER_CUDA=require" in reason
    ok, reason = cuda.supports(SMALL["c4"].layer().implicit_kernel.plan, GPU, torch.float32)
    assert not ok
    assert "no CUDA kernels" in reason


def test_a_missing_device_is_named(monkeypatch, tmp_path):
    (tmp_path / "kernels.so").touch()
    monkeypatch.setattr(_native, "CUDA_LIBRARY", tmp_path / "kernels.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        select.choose("cuda", SMALL["c4"].layer().implicit_kernel.plan, GPU, torch.float32)


def test_a_device_that_cannot_run_the_kernels_is_refused(monkeypatch):
    """Here there is neither driver nor device; what asks them says so, and graphs are sorted by torch."""
    can = _native.cuda_available()[0] and torch.cuda.is_available()
    monkeypatch.setattr(_native, "cuda_available", lambda: (True, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _native._probed.cache_clear()
    ok, reason = cuda.supports(SMALL["c4"].layer().implicit_kernel.plan, torch.device("cuda", 0), torch.float32)
    _native._probed.cache_clear()
    key = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda", 0))
    assert ok == graph._sorts_natively(key) == can
    assert can or reason.startswith("cuda:0 cannot run the CUDA kernels: ")


def test_too_large_a_plan_is_refused(monkeypatch):
    plan = layer(SMALL["o3"]).implicit_kernel.plan
    monkeypatch.setattr(cuda, "available", lambda: (True, ""))
    monkeypatch.setattr(_native, "cuda_usable", lambda device: (True, ""))
    monkeypatch.setattr(module, "shared_bytes", lambda plan, dtype: 300_000)
    properties = SimpleNamespace(shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert cuda.supports(plan, GPU, torch.float32) == (
        False,
        "needs 300000 bytes of shared memory per block, cuda has 232448",
    )
    assert cuda.supports(plan, GPU, torch.float16)[1] == "computes in float32 or float64, not torch.float16"


# ---- which of the two


@pytest.fixture
def both(monkeypatch):
    """Both GPU backends support everything."""
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "supports", lambda plan, device, dtype: (True, "supported"))


def _wide():
    """Hidden layers that tensor cores are for."""
    return layer(Case("", "C4 on R2", "1 scalar", "1 scalar", None, 3, 128), "no norm").implicit_kernel.plan


@pytest.mark.parametrize(("plan", "expected"), [(lambda: layer(SMALL["o3"]).implicit_kernel.plan, "cuda"),
                                                (_wide, "triton")])  # fmt: skip
def test_auto_takes_the_one_with_fewer_instructions(both, plan, expected):
    plan = plan()
    predicted = instructions_per_edge(plan)
    chosen, reason = select.choose("auto", plan, GPU, torch.float32)
    assert chosen is select.BACKENDS[expected]
    assert predicted[expected] == min(predicted.values())
    assert f"{expected}: supported; predicted {predicted[expected]:,.1f} warp instructions per edge" in reason


def test_auto_goes_by_what_was_measured(both, monkeypatch, tmp_path):
    monkeypatch.setenv("IMPLICIT_STEER_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    plan = layer(SMALL["o3"]).implicit_kernel.plan
    predicted, edges = instructions_per_edge(plan), 1000
    assert select.choose("auto", plan, GPU, torch.float32)[0] is cuda

    def times(of_cuda):
        """Nanoseconds per edge: of triton 3."""
        return [(plan, edges, "triton", 3e-6), (plan, edges, "cuda", of_cuda * 1e-6), (plan, edges, "cpu", 1e-9)]

    assert gpu_cost.keep_times("a GPU", times(5)[:1]) == {}
    factors = gpu_cost.keep_times("a GPU", [*times(5), *times(5), *times(0.1)])  # one outlier
    assert factors == pytest.approx({"triton": 3e-9 / predicted["triton"], "cuda": 5e-9 / predicted["cuda"]})
    _files.forget_tuning_cache()  # as in another process
    chosen, reason = select.choose("auto", plan, GPU, torch.float32)
    assert chosen is triton
    assert reason == "triton: supported; predicted 3.0 ns per edge, cuda 5.0, by what was measured on a GPU"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert select.choose("auto", plan, GPU, torch.float32)[0] is cuda


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_measurements_are_named_and_passed_over(both, monkeypatch, tmp_path, content):
    monkeypatch.setenv("IMPLICIT_STEER_CACHE", str(tmp_path))
    (tmp_path / "gpu.json").write_text(content)
    _files.forget_tuning_cache()
    with pytest.warns(UserWarning, match="gpu.json.*delete the file, or measure again"):
        chosen, _ = select.choose("auto", layer(SMALL["o3"]).implicit_kernel.plan, GPU, torch.float32)
    assert chosen is cuda


def test_measurements_of_others_stay(monkeypatch, tmp_path):
    """Two processes with one cache: what the other one has added since this one read is there afterwards."""
    monkeypatch.setenv("IMPLICIT_STEER_CACHE", str(tmp_path))
    _files.forget_tuning_cache()
    assert _files.tuning_cache("of-others") == {}
    (tmp_path / "of-others.json").write_text('{"theirs": 1}')
    _files.add_to_tuning_cache("of-others", {"ours": 2})
    _files.forget_tuning_cache()
    assert _files.tuning_cache("of-others") == {"theirs": 1, "ours": 2}


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_both_can_be_forced(both, name):
    plan = layer(SMALL["o3"]).implicit_kernel.plan
    assert select.choose(name, plan, GPU, torch.float32)[0] is select.BACKENDS[name]


def test_the_other_one_steps_in(both, monkeypatch):
    monkeypatch.setattr(cuda, "supports", lambda plan, device, dtype: (False, "no kernels"))
    chosen, reason = select.choose("auto", layer(SMALL["o3"]).implicit_kernel.plan, GPU, torch.float32)
    assert chosen is triton
    assert reason == "triton: supported; not cuda: no kernels"


@pytest.mark.parametrize("free", [10**6, 10**9])
def test_last_resort(monkeypatch, free):
    """The kernels of all edges where these fit the memory, which are faster than `eager` on a GPU."""
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "supports", lambda plan, device, dtype: (False, "no kernels"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**10))
    plan = layer(SMALL["o3"]).implicit_kernel.plan
    expected = "reference" if free == 10**9 else "eager"
    chosen, reason = select.choose("auto", plan, GPU, torch.float32, edges=1000)
    assert chosen.name == expected
    assert "no kernels" in reason
    assert select.choose("auto", plan, GPU, torch.float32)[0].name == "eager"  # nobody knows how many edges
    tabulated = layer(SMALL["o3"], table=16).implicit_kernel.plan
    assert select.choose("auto", tabulated, GPU, torch.float32, edges=1000)[0].name == "eager"


# ---- its Python side


@pytest.mark.parametrize("configuration", ["train", "eval", "no norm"])
@pytest.mark.parametrize(("name", "options"), [("o3", {}), ("so2-mixed", {"aggr": "mean"}), ("c4", {"cutoff": 1.5})])
def test_on_the_native_loops_it_is_reference(monkeypatch, name, options, configuration):
    """Packing at every call, its gradients composed of operators, batch statistics, mean and bias."""
    monkeypatch.setattr(cuda, "supports", lambda plan, device, dtype: (True, ""))
    conv = layer(SMALL[name], configuration, **options)
    problem = SMALL[name].inputs(conv)
    assert_close(outcome(conv, problem, "cuda"), outcome(conv, problem, "reference"), 1e-12)


def depthwise(**options):
    """A layer whose kernel acts channel by channel."""
    conv = ImplicitPointConv("3x0e + 2x1o", "2x0e + 1x1o", 1, n_layers=2, n_channels=3, depthwise=True, **options)
    return conv.double()


def test_depthwise_kernels_on_the_native_loops(monkeypatch):
    monkeypatch.setattr(cuda, "supports", lambda plan, device, dtype: (True, ""))
    conv, edges = depthwise(norm="batch", width=1.0), random_edges(40, 7, 7)
    x, delta, attributes = (torch.randn(size, dtype=torch.float64) for size in ((7, 9), (40, 3), (40, 1)))
    problem = Problem(x, x, Graph(edges, 7), delta, attributes)

    def run(problem, conv):
        return conv(problem.x, problem.graph, problem.delta, problem.attributes)

    found, known = (outcome(conv, problem, backend, run) for backend in ("cuda", "reference"))
    assert_close(found, known, 1e-12)


def test_kernel_values_on_the_native_loops():
    conv = layer(SMALL["o3"])
    kernel, problem = conv.implicit_kernel, SMALL["o3"].inputs(conv)
    arguments = kernel.plan, kernel.parameters_for_op(), RUNNING, problem.delta, problem.attributes
    assert torch.allclose(cuda.kernel(*arguments)[0], reference.kernel(*arguments)[0], atol=1e-12)


@pytest.mark.parametrize("configuration", ["train", "eval", "no norm"])
def test_compiled_on_the_native_loops(monkeypatch, configuration):
    """Its Python side is traced without a break: values and gradients are those of the calls that are not compiled."""
    monkeypatch.setattr(cuda, "supports", lambda plan, device, dtype: (True, ""))
    monkeypatch.setattr(select, "choose_in_compiled", lambda *_: cuda if torch.compiler.is_compiling() else None)
    torch._dynamo.reset()
    conv = layer(SMALL["o3"], configuration, backend="cuda")
    problem, function = SMALL["o3"].inputs(conv), function_of(conv)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, known = (outcome(conv, problem, run=lambda p, _, f=f: f(*arguments_of(p))) for f in (compiled, function))
    assert_close(found, known, 1e-12)


@pytest.mark.parametrize("triton", [None, "a plan"])
@pytest.mark.parametrize("usable", [True, False])
def test_backend_inside_a_compiled_function(monkeypatch, usable, triton):
    """On a GPU `cuda` or `triton`, or an error that names the remedy."""
    parameters = layer(SMALL["o3"]).implicit_kernel.parameters_for_op()
    parameters.cache.triton = triton
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(_native, "cuda_usable", lambda device: (usable, ""))
    kernels, of_triton = select.BACKENDS["cuda"] if usable else None, triton and select.BACKENDS["triton"]
    for name, expected in {"cuda": kernels, "triton": of_triton, "auto": kernels or of_triton}.items():
        refused = expected is None and name != "cuda"  # which says why it is not there
        message = "backend: expected 'cuda' or 'triton' inside torch.compile, with a plan that it supports, got"
        with pytest.raises(RuntimeError, match=message) if refused else nullcontext():
            assert select.choose_in_compiled(name, parameters, GPU) == expected


def test_tables_inside_a_compiled_function(monkeypatch):
    """`cuda`, also where `triton` is there, whose tables have to be frozen."""
    parameters = layer(SMALL["o3"], table=16).implicit_kernel.parameters_for_op()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(_native, "cuda_usable", lambda device: (True, ""))
    for there in (None, "a plan"):
        parameters.cache.triton = there
        assert select.choose_in_compiled("auto", parameters, GPU) is cuda
    assert select.choose_in_compiled("triton", parameters, GPU) is triton


@pytest.mark.parametrize("configuration", ["no norm", "train"])
def test_tables_on_the_native_loops(monkeypatch, configuration):
    """The MLP at the knots, how much these count among the edges, and the splines."""
    monkeypatch.setattr(cuda, "supports", lambda plan, device, dtype: (True, ""))
    case = replace(SMALL["o3"], attributes=None)
    conv = layer(case, configuration, table=16)
    problem = case.inputs(conv)
    assert_close(outcome(conv, problem, "cuda"), outcome(conv, problem, "eager"), 1e-11)


@pytest.mark.parametrize("name", SMALL)
def test_parameter_sizes_are_those_of_the_layer(name):
    conv = layer(SMALL[name])
    sizes = tuple(t.numel() for t in learned_tensors(conv.implicit_kernel.parameters_for_op()))
    assert parameter_sizes(conv.implicit_kernel.plan) == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shared_memory_is_counted(dtype):
    """By the kernel library, where this build has it."""
    plan = layer(SMALL["o3"]).implicit_kernel.plan
    if _native.cuda_available()[0]:
        assert 0 < module.shared_bytes(plan, dtype) < 227 * 1024
    else:
        with pytest.raises(RuntimeError, match="backend 'cuda': its kernels could not be loaded"):
            module.shared_bytes(plan, dtype)


# ---- stand-ins for CUDA tensors


class _Calls(TorchDispatchMode):
    """Every call of a native operator: itself, its arguments, its results."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "implicit_steer" and func._opname != "conv_move_running":  # of CPU tensors alone
            self.seen.append((func, args, result))
        return result


@pytest.mark.parametrize("configuration", ["train", "pooled", "eval"])
@pytest.mark.parametrize("name", ["o3", "so2-mixed", "c4"])
def test_shapes_and_devices_of_operators(monkeypatch, name, configuration):
    """All that the backend calls up to second derivatives, on tensors that have no memory: the results are of the
    shapes that they have on the processor, but on the GPU. The plan's arrays stay CPU tensors."""
    monkeypatch.setattr(cuda, "supports", lambda plan, device, dtype: (True, ""))
    conv = layer(SMALL[name], "eval" if configuration == "eval" else "train")
    conv.backend, problem = "cuda", SMALL[name].inputs(conv)
    expected = {"conv_pack", "conv_forward", "conv_backward", "conv_double_backward", "conv_pack_backward"}
    if configuration == "pooled":
        conv.implicit_kernel.pool = lambda *own: own  # one process
        expected.add("conv_moments")
    with _Calls() as calls:
        inputs = problem.requires_grad()
        (gradient,) = torch.autograd.grad(problem.run(conv).square().sum(), inputs[1], create_graph=True)
        gradient.square().sum().backward()
    assert {func._opname for func, _, _ in calls.seen} >= expected
    for func, arguments, result in calls.seen:
        with FakeTensorMode() as mode, torch.no_grad():
            found = func(*fake_cuda.fakes(mode, func, arguments))
        assert fake_cuda.kinds(found) == fake_cuda.kinds(result, "cuda"), func


def _operator(name):
    return getattr(torch.ops.implicit_steer, name).default


ON_CUDA = [name for name in operator_arguments() if fake_cuda.has_kernel(_operator(name), "CUDA")]


def test_operators_with_cuda_kernels():
    passes = {f"conv_{what}{passed}" for what in ("", "hidden_") for passed in ("backward", "double_backward")}
    others = {"conv_forward", "conv_hidden", "conv_pack", "conv_pack_backward", "conv_statistics", "conv_moments"}
    assert set(ON_CUDA) == passes | others | {"sort_by_key"}


@pytest.mark.parametrize("name", ON_CUDA)
def test_opcheck(name):
    fake_cuda.check(_operator(name), operator_arguments()[name])


_GOOD = {"fake": torch.empty_like, "gradient": lambda ctx, grad: 3 * grad}
_FAULTS = {
    "none": {},
    "no fake kernel": {"fake": None},
    "shape": {"fake": lambda x: x.new_empty(x.shape[0] + 1)},
    "dtype": {"fake": lambda x: torch.empty_like(x, dtype=torch.float32)},
    "device": {"fake": lambda x: torch.empty_like(x, device="cpu")},
    "no derivative": {"gradient": None},
    "device of the derivative": {"gradient": lambda ctx, grad: torch.full_like(grad, 3, device="cpu")},
}


@pytest.mark.filterwarnings("ignore:faulty..triple. an autograd kernel was not registered")
@pytest.mark.parametrize("fault", _FAULTS)
def test_opcheck_notices(fault):
    """An operator 3 x with one fault."""
    fake, gradient = (_GOOD | _FAULTS[fault]).values()
    with torch.library._scoped_library("faulty", "FRAGMENT") as library:
        library.define("triple(Tensor x) -> Tensor")
        library.impl("triple", lambda x: 3 * x, "CPU")
        if fake:
            torch.library.register_fake("faulty::triple", fake, lib=library)
        if gradient:
            torch.library.register_autograd("faulty::triple", gradient, lib=library)
        arguments = (torch.ones(5, dtype=torch.float64, requires_grad=True),)
        expected = nullcontext() if fault == "none" else pytest.raises((AssertionError, RuntimeError))
        with expected:
            fake_cuda.check(torch.ops.faulty.triple.default, arguments)
