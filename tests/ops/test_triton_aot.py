"""What the Triton kernels need, from code compiled ahead of time for GPUs that are not here."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from bench import gpu, predict
from implicit_steer.ops.triton import aot, configuration, spline
from implicit_steer.ops.triton.tables import tables
from implicit_steer.plan.tabulated import tabulated, with_table
from implicit_steer.testing.cases import LARGE, SMALL


@pytest.fixture(autouse=True, scope="module")
def _scratch(tmp_path_factory):
    """Compiled kernels stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def plan_of(name):
    """Of a case without norms; behind a space, "table": with the splines of a table in place of its hidden layers."""
    case, *table = name.split()
    plan = (SMALL | LARGE)[case].layer(norm=None).implicit_kernel.plan
    return tabulated(with_table(plan, 64, width=1.0), types=2) if table else plan


# Zonal frames on every architecture; a planar frame, no frame, a finite group on one each. All on all:
# python -m bench.gpu resources
@pytest.mark.parametrize(
    ("name", "kernels", "architectures"),
    [("cloud", 8, (80, 90, 100)), ("so2", 14, (80,)), ("o3-vector-attr", 14, (90,)), ("c4", 14, (100,))],
)
def test_no_kernel_spills_traps_or_outgrows_its_device(name, kernels, architectures):
    found = list(aot.report(plan_of(name), architectures))
    assert len({r.kernel for r in found}) == kernels
    tensor_cores = ("layers", "contract") if gpu.meant_for_tensor_cores(plan_of(name)) else ("contract",)
    failures = [text for r in found for text in r.failures(r.kernel.startswith(tensor_cores))]
    assert not failures
    assert all(0 < r.occupancy <= 1 for r in found)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_of_tables(architecture):
    """Those that no other layer has."""
    entries = [e for e in aot.launches_of(plan_of("cloud table")) if e.kernel.__name__ in vars(spline)]
    found = [aot.resources(entry, architecture) for entry in entries]
    assert {r.kernel for r in found} == {"spline_forward", "spline_backward", "knot_sums"}
    assert not [text for r in found for text in r.failures(False)]


def test_gates_see_what_is_wrong():
    good = aot.Resources("k", 90, 4, 100, 0, 1024, Counter(HMMA=1), 0, 0)
    assert good.failures(True) == []
    bad = replace(good, stack=8, shared=300 << 10, instructions=Counter(LDL=2, BPT=1, LD=1))
    found = "; ".join(bad.failures(True))
    for text in ("spills: stack 8 bytes, 2 loads", "307200 bytes of shared memory", "a trap", "generic", "no tensor"):
        assert text in found


def test_occupancy():
    """Registers are given to warps in units of 256: 4 warps of 255 take half of a multiprocessor's 65,536."""
    base = aot.Resources("k", 90, 4, 255, 0, 0, Counter(), 0, 0)
    assert base.blocks == 2
    assert replace(base, registers=32).blocks == 16  # 64 warps
    assert replace(base, registers=32, shared=100 << 10).blocks == 2
    assert replace(base, registers=32, shared=100 << 10, architecture=80).blocks == 1


def test_registers_of_a_known_kernel():
    """The reader of compiled code against what triton itself counts."""
    entry = aot.launches_of(plan_of("c4"))[0]
    compiled = aot.compile_for(entry, 90)
    registers, stack, code = aot._read(compiled.asm["cubin"])
    assert 16 <= registers <= 255
    assert stack == 0
    assert code[-1][0] == 16 * (len(code) - 1)  # 16 bytes per instruction, none overlooked


def test_predictions_are_bounds_of_what_was_counted():
    plan = plan_of("c4")
    entries = [e for e in aot.launches_of(plan) if e.kernel.__name__ == "contract_forward"]
    device = predict.DEVICES["H100-SXM"]
    found = predict.of_launch(entries[0], device, aot.resources(entries[0], 90))
    sizes, nodes, edges = tables(plan).sizes, predict.NODES, predict.NODES * predict.DEGREE
    numbers = nodes * (sizes.in_size + sizes.n_t) + edges * sizes.n_columns
    assert found.megabytes == pytest.approx((4 * numbers + 8 * (2 * edges + nodes)) / 1e6, rel=1e-2)
    low, high = found.microseconds
    assert 1e3 * found.megabytes / device.bandwidth < low < high
    slower = replace(device, bandwidth=device.bandwidth / 100)
    assert predict.of_launch(entries[0], slower, aot.resources(entries[0], 90)).bound == "DRAM"


def test_command_writes_tables(tmp_path, capsys):
    def fake(plan, architectures):
        yield aot.Resources("contract_forward", 90, 4, 100, 0, 1024, Counter(HMMA=4), 0, 0)
        yield aot.Resources("layers_forward", 90, 4, 100, 8, 1024, Counter(HMMA=4), 0, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "report", fake)
        assert gpu.main(["resources", "--cases", "c4", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "gpu-resources.md").read_text()
    assert "| contract_forward |" in text
    assert "- layers_forward, sm_90: spills: stack 8 bytes" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_launches_cover_both_passes(dtype):
    entries = [entry for name in ("o3", "c4", "o3 table") for entry in aot.launches_of(plan_of(name), dtype)]
    names = {entry.kernel.__name__ for entry in entries}
    assert names == set(configuration._TABLE)
