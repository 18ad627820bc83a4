"""Backend `triton` where there is no GPU: its kernels interpreted (in processes of their own, as triton decides at its
import), its refusals, and that nobody imports triton by accident."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import arguments_of, function_of, layer, outcome
from torch._subclasses.fake_tensor import FakeTensorMode

import implicit_steer as ist
from implicit_steer.ops.triton import backend as triton
from implicit_steer.ops.triton import configuration
from implicit_steer.ops.triton.tables import MOST_COEFFICIENTS, tables, unsupported
from implicit_steer.testing.cases import SMALL, Case

_ROOT = Path(__file__).parents[2]
_FILES = (
    "test_against_reference.py",
    "test_derivatives.py",
    "test_tables.py test_operators.py",
    "test_interpreter.py",
)  # of each process


@pytest.fixture(scope="module")
def checks():
    """A process for each entry of files in tests/gpu, all started at once."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    options = {"cwd": _ROOT, "env": environment, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    paths = {files: [f"tests/gpu/{name}" for name in files.split()] for files in _FILES}
    running = {files: subprocess.Popen([*command, *paths[files]], **options, **pipes) for files in _FILES}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.timeout(3600)  # hundreds of seconds where cores are shared; tests of the file have a limit of their own
@pytest.mark.parametrize("files", _FILES)
def test_interpreted(checks, files):
    """Their output is shown where they fail."""
    output, _ = checks[files].communicate()
    assert checks[files].returncode == 0, output[-5000:]


def test_cpu_tensors_are_refused_without_the_interpreter():
    conv = layer(SMALL["c4"])
    with pytest.raises(RuntimeError, match="runs on cuda tensors, these are on cpu; TRITON_INTERPRET=1"):
        outcome(conv, SMALL["c4"].inputs(conv), "triton")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="runs on cuda tensors, these are on cpu; TRITON_INTERPRET=1"):
            layer(SMALL["c4"], backend="triton")
    ok, reason = ist.info().backends["triton"]
    assert ok == torch.cuda.is_available()
    assert ok or "no CUDA device" in reason


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    ok, reason = triton.Triton().available()
    assert not ok
    assert "pip install implicit_steer[triton]" in reason


def test_a_cpu_machine_never_imports_triton():
    script = (
        "import sys, torch, escnn; before = 'triton' in sys.modules; import implicit_steer as ist;"
        "from implicit_steer.testing.cases import SMALL;"
        "conv = SMALL['c4'].layer(); SMALL['c4'].inputs(conv).run(conv).sum().backward(); ist.info(); conv.explain();"
        "sys.exit('triton' in sys.modules and not before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "triton was imported"


def test_compiled_calls_on_a_gpu_are_one_operator(monkeypatch):
    """ "auto" without the CUDA kernels, traced with tensors that are on a GPU but have no values."""
    with monkeypatch.context() as machine:
        machine.setattr(torch.cuda, "is_available", lambda: True)
        conv, traced = layer(SMALL["o3"], "eval"), []
    problem = SMALL["o3"].inputs(conv)

    def compiler(module, _):
        traced.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def on_gpu(t):
            return torch.empty_like(mode.from_tensor(t.detach()), device="cuda")

        for module in conv.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(on_gpu(parameter), requires_grad=False)
            module._buffers |= {name: on_gpu(t) for name, t in module._buffers.items() if t is not None}
        x, pos, graph, delta, attributes = arguments_of(problem)
        state = graph.__getstate__()
        graph.__setstate__(state | {name: on_gpu(state[name]) for name in ("edge_index", "order", "rowptr")})
        arguments = on_gpu(x), on_gpu(pos), graph, on_gpu(delta), on_gpu(attributes)
        out = torch.compile(function_of(conv), fullgraph=True, backend=compiler)(*arguments)
    assert out.device.type == "cuda"
    assert out.shape == (graph.num_dst, conv.out_type.size)
    assert sum("implicit_steer.triton_conv" in target for target in traced) == 1


@pytest.mark.parametrize("name", SMALL)
def test_every_plan_is_supported(name):
    assert unsupported(layer(SMALL[name]).implicit_kernel.plan) is None


def test_too_wide_a_layer_is_refused():
    plan = layer(Case("", "C4 on R2", "1 scalar", "1 scalar", None, 2, 129)).implicit_kernel.plan
    assert unsupported(plan) == f"at most {MOST_COEFFICIENTS} coefficients in a hidden layer, not 516"


def test_narrow_zonal_layers_run_edge_by_edge():
    wide, scalars = (
        Case("", "O(3)", "1 vector", "1 vector", None, 1, 13),
        Case("", "O(3)", "1 scalar", "1 scalar", None, 1, 2),
    )
    for case, expected in ((SMALL["o3"], True), (wide, False), (scalars, False), (SMALL["so2"], False)):
        assert tables(layer(case, "no norm").implicit_kernel.plan).sizes.edge_by_edge == expected


def test_configurations_for_a_while_can_be_nested():
    sizes, outer, inner = tables(layer(SMALL["c4"]).implicit_kernel.plan).sizes, *configuration.CANDIDATES[:2]

    def chosen():
        return configuration.choose("pack", sizes, torch.float64, torch.device("cpu"))

    usual = chosen()
    with configuration.using("pack", outer):
        with configuration.using("pack", inner):
            assert chosen() == inner
        assert chosen() == outer
    assert chosen() == usual


def test_accumulators_hold_every_entry_of_t_once():
    for name in ("o3", "o3-mixed", "so2-mixed", "d4"):
        found = tables(layer(SMALL[name]).implicit_kernel.plan)
        positions = found.position
        assert (positions >= 0).all()
        assert len(set(positions.tolist())) == len(positions)
        assert found.sizes.n_t == found.indices["acc_extent"][:, :3].prod(1).sum()


def test_worked_example():
    """That of contract_tables: 2 vectors into 1 scalar under SO(2), 2 vectors as hidden features."""
    found = tables(layer(Case("", "SO(2) on R2", "2 vector", "1 scalar", "1 vector", 1, 1)).implicit_kernel.plan)
    expected = {
        "acc_term_begin": [0, 2],
        "acc_start": [[0, 2]],
        "acc_extent": [[2, 2, 2, 2]],
        "acc_offset": [0],
        "term_acc": [0, 0],
        "term_column": [[0, 2], [1, 3]],
        "term_chunks": [[0, 1], [0, 1]],
        "slice_term_begin": [0, 2],
        "slice_term": [0, 1],
        "slice_chunk": [0],
        "slice_start": [[0, 2]],
        "slice_components": [2],
        "window_term_begin": [0, 2],
        "window_term": [0, 1],
        "window_place": [[0, -1, 1, -1], [-1, 0, -1, 1]],
    }
    filled = {"term_column": 2, "window_place": 4}  # entries of a row that are not only filled up with −1
    for name, entries in expected.items():
        table = found.indices[name]
        kept, rest = np.split(table, [filled.get(name, table.shape[-1])], -1)
        assert kept.tolist() == entries, name
        assert (rest == -1).all()
    constant = found.numbers["constant"]  # (t, i, s)
    assert constant[..., :2].tolist() == [[[1, 0], [0, 1]], [[0, -1], [1, 0]]]
    assert not constant[..., 2:].any()
    assert found.sizes.n_t == 8


def test_uniform_fields_take_the_slots_of_the_intertwiners():
    """8 fields l <= 1 into 8, as the design counts them: 11 slots of the weights, 4 of the biases, for 8 x 8 and 8 x 1
    channels."""
    case = Case("", "O(3)", "8 scalar+vector", "8 scalar+vector", "1 scalar", 3, 8)
    assert tables(layer(case).implicit_kernel.plan).sizes.n_t == 11 * 64 + 4 * 8
