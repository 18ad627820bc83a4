"""The operators of the Triton kernels as citizens of torch, their host code, and the guard that watches the tests."""

from dataclasses import replace

import fake_cuda
import interpreter
import pytest
import torch
import triton
import triton.language as tl
from check_triton import small
from helpers import layer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from triton.runtime.errors import InterpreterError

from bench import device, report
from implicit_steer.cases import SMALL, Case
from implicit_steer.packing import pack
from implicit_steer.triton_kernels import configuration, dense, launch, operators

TINY = Case("", "SO(2) on R2", "1 vector", "1 scalar", "1 scalar", 2, 2, nodes=2, degree=2)


def arguments_of(case, leaves=True):
    """Name → arguments of every operator, with gradients where it has them."""
    conv = layer(case, "no norm", activation="silu")
    problem, kernel = case.inputs(conv), conv.implicit_kernel
    plan, graph = kernel.plan, problem.graph
    key, prepared = operators.known(plan), launch.prepare(plan, torch.device("cpu"), torch.float64)

    def leaf(t):
        return t.detach().clone().requires_grad_(leaves)

    ops = torch.ops.implicit_steer
    with torch.no_grad():
        weights = pack(plan, kernel.parameters_for_op(), fold=True)
        frame = problem.delta, problem.attributes, graph.order, weights.shell_width
        inputs, radius, factor, q = ops.triton_frame(key, *frame)
        packed, theta = dense.pack_layers(prepared, weights.linears), dense.pack_theta(prepared, weights.theta)
        r = ops.triton_layers(key, inputs, radius, factor, packed)
    delta, attr, order, shell = frame
    frame = leaf(delta), leaf(attr), order, leaf(shell)
    hidden = tuple(map(leaf, (inputs, radius, factor, packed)))
    edges = graph.src[graph.order], graph.rowptr, graph.order, graph.order_by_source, graph.colptr
    sums = *map(leaf, (problem.x, q, r, theta)), *edges, True
    gradients = [leaf(torch.randn_like(t)) for t in (inputs, radius, factor, q)]
    output = torch.randn(graph.num_dst, plan.out_size, dtype=torch.float64)
    return {
        "triton_frame": (key, *frame),
        "triton_frame_backward": (key, *frame, *gradients),
        "triton_layers": (key, *hidden),
        "triton_layers_backward": (key, *hidden, leaf(torch.randn_like(r)), True, True),
        "triton_contract": (key, *sums),
        "triton_contract_backward": (key, *sums, leaf(output), [True] * 4),
        "triton_hidden": (key, inputs, radius, factor, packed, 1),
    }


@pytest.mark.parametrize("name", operators._KERNELS)
def test_opcheck(name):
    """torch.compile has no derivatives of gradients: of gradient operators those are not traced."""
    known = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    differentiated = "backward" not in name or "contract" in name
    operator, arguments = getattr(torch.ops.implicit_steer, name).default, arguments_of(TINY)[name]
    opcheck(operator, arguments, test_utils=known if differentiated else known[:3])
    fake_cuda.check(operator, arguments, differentiated)


@pytest.mark.parametrize("case", ["so2", "o3"])
def test_host_code_never_waits_for_the_device(case):
    """With tensors that have no values, whatever asks for one fails."""
    found = arguments_of(small(case), leaves=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(entry):  # as tensors on a GPU would be: without values
        if isinstance(entry, (list, tuple)):
            return [fake(e) for e in entry]
        return mode.from_tensor(entry.detach()) if isinstance(entry, torch.Tensor) else entry

    with mode, launch.recording() as launches:
        for name, arguments in found.items():
            key, *rest = fake(list(arguments))
            operators._KERNELS[name][0](key, *rest)
    assert len({entry.kernel.__name__ for entry in launches}) == 9


def test_unknown_plan():
    with pytest.raises(ValueError, match="plan: expected the digest"):
        torch.ops.implicit_steer.triton_frame("?", torch.ones(1, 3), torch.ones(1, 1), torch.zeros(1), torch.ones(1))


# ---- the guard


@triton.jit
def _copy(x, out, n, SHIFT: tl.constexpr, STEP: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, 8)
    tl.store(out + at, tl.load(x + at + SHIFT, at < n, 0.0), at < n)


@pytest.mark.parametrize(
    ("shift", "step", "size", "message"),
    [(0, 8, 16, None), (1, 8, 16, "load: 1 addresses outside"), (0, 4, 16, "several programs store to 8 elements")],
)
def test_guard(shift, step, size, message):
    x, out = torch.arange(16.0), torch.zeros(16)

    def run():
        with interpreter.Guard([x, out]).on():
            _copy[(3 if step == 4 else 2,)](x, out, size, shift, step)

    if message is None:
        run()
        assert torch.equal(x, out)
    else:
        with pytest.raises((RuntimeError, InterpreterError), match=message):
            run()


def test_exact_products_and_rounded_ones():
    a = torch.full((16, 16), 1 + 2.0**-12)

    @triton.jit
    def product(a, out, PREC: tl.constexpr):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(out + at, tl.dot(tl.load(a + at), tl.load(a + at), input_precision=PREC))

    results = {}
    for precision in ("ieee", "tf32x3", "tf32"):
        results[precision] = torch.empty(16, 16)
        product[(1,)](a, results[precision], precision)
    assert torch.equal(results["ieee"], a @ a)
    assert torch.equal(results["tf32x3"], a @ a)
    assert torch.equal(results["tf32"], torch.full((16, 16), 16.0))


# ---- the benchmark of a device


def test_bench(monkeypatch, tmp_path, capsys):
    """All of ``python -m bench --device cuda`` but the ceilings, with the interpreter as device."""
    case = replace(SMALL["c4"], nodes=4, degree=2)
    ceilings, choice = {"copy, GB/s": 1.0, "float32, TFLOP/s": 1.0}, configuration.Choice(16, 4)
    monkeypatch.setattr(device, "ceilings", lambda device: ceilings)
    monkeypatch.setattr(configuration, "tune", lambda run, *_: run() and {"contract_forward": choice})
    results = {"environment": report.environment(), "device": "the interpreter"}
    arguments = ["reference", "triton"], (), (1, 0.0), tmp_path, True, torch.device("cpu"), results
    assert device.measure([case], *arguments) == 0
    printed = capsys.readouterr().out
    assert "Gate: green" in printed
    assert "ms on the interpreter" in printed
    candidates = {(r["backend"], r["measure"]) for r in results["times"]}
    assert {("triton", m) for m in ("forward", "train", "train-batch")} <= candidates
    found = results["configurations"]["c4"].values()
    assert list(found) == [{"contract_forward": choice._asdict()}] * len(found)
    assert (tmp_path / "gpu.json").exists()
