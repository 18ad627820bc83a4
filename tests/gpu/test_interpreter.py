"""Without a GPU: host code that waits for nothing, the guard that watches the checks, the benchmark."""

from dataclasses import replace

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from helpers import arguments_of, assert_close, function_of
from problems import layer, outcome, small, triton_arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.errors import InterpreterError

from bench import device, report
from implicit_steer.ops.triton import configuration, launch, operators
from implicit_steer.testing.cases import SMALL

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("case", "kernels"), [("so2", 11), ("o3", 8)])
def test_host_code_never_waits_for_the_device(case, kernels):
    """With tensors that have no values, whatever asks for one fails."""
    found = triton_arguments(small(case), leaves=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(entry):  # as tensors on a GPU would be: without values
        if isinstance(entry, (list, tuple)):
            return [fake(e) for e in entry]
        return mode.from_tensor(entry.detach()) if isinstance(entry, torch.Tensor) else entry

    with mode, launch.recording() as launches:
        for name, arguments in found.items():
            key, *rest = fake(list(arguments))
            operators.KERNELS[name](key, *rest)
    assert len({entry.kernel.__name__ for entry in launches}) == kernels


@pytest.mark.parametrize(("case", "configuration"), [("o3-vector-attr", "eval"), ("so2", "train")])
def test_compiled(case, configuration):
    """Traced without a break: values and gradients are those of the calls that are not compiled."""
    torch._dynamo.reset()
    conv = layer(small(case), configuration, backend="triton")
    problem, function = small(case).inputs(conv), function_of(conv)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, known = (
        outcome(conv, problem, "triton", run=lambda p, _, f=f: f(*arguments_of(p))) for f in (compiled, function)
    )
    assert_close(found, known, 1e-12)


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
    case = replace(SMALL["c4"], n_layers=2, n_channels=1, nodes=4, degree=2)
    ceilings, config = {"copy, GB/s": 1.0, "float32, TFLOP/s": 1.0}, configuration.LaunchConfig(16, 4)
    monkeypatch.setattr(device, "ceilings", lambda device: ceilings)
    monkeypatch.setattr(configuration, "tune", lambda run, *_: run() and {"contract_forward": config})
    results = {"environment": report.environment(), "device": "the interpreter"}
    arguments = ["reference", "triton"], (), (1, 0.0), tmp_path, True, torch.device("cpu"), results
    assert device.measure([case], *arguments) == 0
    printed = capsys.readouterr().out
    assert "Gate: green" in printed
    assert "ms on the interpreter" in printed
    candidates = {(r["backend"], r["measure"]) for r in results["times"]}
    assert {("triton", m) for m in ("forward", "train", "train-batch")} <= candidates
    found = results["configurations"]["c4"].values()
    assert list(found) == [{"contract_forward": config._asdict()}] * len(found)
    assert (tmp_path / "gpu.json").exists()
