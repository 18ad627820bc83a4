"""Loops, executed instructions, budgets and predicted times of CUDA kernels, of made-up machine code and counts."""

from collections import Counter
from dataclasses import replace

import pytest

from bench import budgets, cuda_times
from bench.cuda import Kernel, occupancy
from bench.executed import Launch, by_loop, executions, launches_of
from bench.predict import DEVICES
from bench.sass import parse

SOURCE = """void kernel() {
  for (int node = 0; node < n;
       ++node) {  // loop: nodes
    if (near) y[node] = 0;
    for (int e = 0; e < m; ++e)  // loop: edges
      sum += x[e];
    y[node] = sum;
  }
}
"""
# Of the loop over edges two trips at a time and one; behind EXIT what lanes do that do not run together.
SASS = """.text.kernel:
  {line 1}
        /*0000*/  S2R R0, SR_TID.X ;
.L_x_0:
  {line 4}
        /*0010*/  @!P0 BRA `(.L_x_1) ;
        /*0020*/  STG.E desc[UR4][R2.64], RZ ;
        /*0030*/  FADD R1, R1, R1 ;
.L_x_1:
  {line 5}
        /*0040*/  ISETP.GE.AND P1, PT, R3, 0x2, PT ;
        /*0050*/  @!P1 BRA `(.L_x_3) ;
.L_x_2:
  {line 6}
        /*0060*/  LDG.E R4, desc[UR4][R2.64] ;
        /*0070*/  LDG.E R5, desc[UR4][R2.64+0x4] ;
        /*0080*/  FADD R1, R1, R4 ;
        /*0090*/  FADD R1, R1, R5 ;
  {line 5}
        /*00a0*/  @P1 BRA `(.L_x_2) ;
.L_x_3:
  {line 6}
        /*00b0*/  LDG.E R4, desc[UR4][R2.64] ;
        /*00c0*/  FADD R1, R1, R4 ;
  {line 5}
        /*00d0*/  @P2 BRA `(.L_x_3) ;
        /*00e0*/  BRA.DIV UR8, `(.L_x_5) ;
.L_x_4:
  {line 7}
        /*00f0*/  STG.E desc[UR4][R2.64], R1 ;
  {line 3}
        /*0100*/  @P3 BRA `(.L_x_0) ;
        /*0110*/  EXIT ;
.L_x_5:
        /*0120*/  NOP ;
        /*0130*/  BRA `(.L_x_4) ;
.text.other:
        /*0000*/  EXIT ;
"""


@pytest.fixture
def source(tmp_path):
    """The file that SASS is of."""
    file = tmp_path / "kernel.cuh"
    file.write_text(SOURCE)
    return str(file)


@pytest.fixture
def code(source):
    """The kernel's code, with the lines of `source`."""
    text = SASS
    for n in range(1, 9):
        text = text.replace(f"  {{line {n}}}", f'\t//## File "{source}", line {n}')
    codes = parse(text.splitlines())
    assert list(codes) == ["kernel", "other"]
    return codes["kernel"]


def test_a_call_with_a_guard_is_a_branch():
    lines = ["@P0 CALL.REL.NOINC `(.L_x_1) ;", "EXIT ;", "CALL.REL.NOINC `(.L_x_2) ;", "EXIT ;", "RET.REL.NODEC R2 ;"]
    text = [f"        /*{16 * n:04x}*/  {line}" for n, line in enumerate(lines)]
    code = parse([".text.kernel:", *text[:2], ".L_x_1:", *text[2:4], ".L_x_2:", text[4]])["kernel"]
    assert code.successors == [[2, 1], [], [], []]  # the call without one goes on behind itself
    assert list(code.dominators) == [0, 1, 2]


def test_a_switch_leads_to_all_its_cases():
    lines = ['BRX R2 -0x10  (*"BRANCH_TARGETS .L_x_1,.L_x_2,.L_x_1"*);', "EXIT ;", "EXIT ;", "EXIT ;"]
    text = [f"        /*{16 * n:04x}*/  {line}" for n, line in enumerate(lines)]
    code = parse([".text.kernel:", *text[:2], ".L_x_1:", text[2], ".L_x_2:", text[3]])["kernel"]
    assert code.successors == [[2, 3], [], [], []]
    assert sorted(code.dominators) == [0, 2, 3]


def test_loops_have_the_names_of_their_source(code):
    sizes = {name: [] for name in ("nodes", "edges")}
    for loop in code.loops:
        sizes[loop.name].append(sum(code.counts(block).total() for block in loop.blocks))
    assert sizes == {"nodes": [16], "edges": [5, 3]}


def test_a_block_is_executed_as_often_as_its_memory_instructions(code, source):
    lines = {n: ((source, n),) for n in (4, 6, 7)}
    launch = Launch("kernel", 60, 20, 2, 32, 0, {6: (60, 4), 7: (20, 4)})
    executed = executions(code, launch, lines)
    # The store near the origin never runs; three copies of the body share 60 trips; EXIT comes behind all loops.
    assert [executed[block] for block in sorted(executed)] == [2, 20, 0, 20, 20, 20, 20, 20, 2]
    loops = by_loop(code, executed)
    assert loops["edges"] == Counter(LDG=60, FADD=60, BRA=40)
    assert loops["nodes"]["STG"] == 20


def test_pieces_of_one_load_count_as_one(code, source):
    # Two of the three loads at line 6 lie in one piece of 8 bytes.
    launch = Launch("kernel", 60, 20, 2, 32, 0, {6: (40, 8), 7: (20, 4)})
    executed = executions(code, launch, {n: ((source, n),) for n in (6, 7)})
    assert by_loop(code, executed)["edges"] == Counter(LDG=60, FADD=60, BRA=40)


def test_a_store_of_several_counts_as_so_many(code, source):
    # The emulator stores by 4 bytes what one instruction stores by 8: half of the executions at line 7 are of either.
    wide = code.blocks[7][0]
    code.blocks[7][0] = replace(wide, access=replace(wide.access, width=8))
    launch = Launch("kernel", 60, 20, 2, 32, 0, {6: (60, 4), 7: (20, 4), 8: (20, 4)})
    executed = executions(code, launch, {6: ((source, 6),), 7: ((source, 7),), 8: ((source, 7),)})
    assert by_loop(code, executed)["nodes"]["STG"] == 20


def test_a_block_runs_no_more_often_than_what_follows(code, source):
    # The store in front of the loop over edges runs 20 times, but either copy of the loop's body 5 times alone.
    launch = Launch("kernel", 60, 20, 2, 32, 0, {4: (20, 4), 6: (15, 4), 7: (5, 4)})
    executed = executions(code, launch, {n: ((source, n),) for n in (4, 6, 7)})
    assert executed[1] == executed[2] == 20
    assert executed[3] == 10


def test_counts_are_read_by_kernel(tmp_path):
    file = tmp_path / "counts.txt"
    first = "kernel first 512 16 4 128 4096\n0x1f 12 4\nx 2048\nweights 100\n"
    file.write_text(f"{first}kernel second 512 16 8 128 0\nkernel third 512 16 8 128 0\nx 2048\ngrad_weights 100\n")
    launches = launches_of(file)
    assert launches[0] == Launch("first", 512, 16, 4, 128, 4096, {31: (12, 4)}, {"x": 2048, "weights": 100})
    assert [launch.bytes_per_edge for launch in launches] == [4, 0, 4]
    assert [launch.is_proportional for launch in launches] == [True, False, False]


def test_budgets_that_do_not_hold_say_so(monkeypatch):
    kernel = {
        "edges": budgets.Budget(10, "edge"),
        "nodes": budgets.Budget(60, "node"),
        budgets.WHOLE: budgets.Budget(20, "edge"),
    }
    monkeypatch.setattr(budgets, "BUDGETS", {"kernel": kernel})
    sizes = {"edge": 10, "node": 2}
    loops = {"edges": Counter(FFMA=60, LDS=40), "nodes": Counter(HMMA=100), None: Counter()}
    assert budgets.failures("kernel", loops, sizes) == []
    loops["edges"]["LDS"] += 10
    over, whole = budgets.failures("kernel", loops, sizes)
    assert over == "sm_90 kernel: 11 instructions per edge in 'edges', expected at most 10"
    assert whole == "sm_90 kernel: 21 instructions per edge in 'whole kernel', expected at most 20"
    (missing,) = budgets.failures("kernel", {"edges": Counter(), None: Counter()}, sizes)
    assert "no loop 'nodes'" in missing


@pytest.mark.parametrize(
    ("architecture", "shared", "warps"),
    [("sm_90", 50 << 10, 4 * 4), ("sm_90", 200 << 10, 4), ("sm_80", 200 << 10, 3), ("sm_120", 200 << 10, 2)],
)
def test_blocks_have_fewer_warps_where_their_memory_does_not_fit(architecture, shared, warps):
    kernel = Kernel("kernel", "kernel", architecture, registers=64, stack=0, shared=0)
    assert 64 * occupancy(kernel, Launch("kernel", 512, 16, 4, 128, shared)) == warps


def test_the_measured_kernel_takes_the_measured_time():
    # docs/gpu-h100.md: 657 instructions per edge, 16 resident warps, 831,002 cycles, 518 µs at 1.6 GHz.
    prediction = cuda_times.predict({"FFMA": 657}, 40, 16, DEVICES["H100-SXM"])
    assert prediction.bound == "issue"
    assert prediction.cycles[1] == pytest.approx(831_002)
    assert prediction.cycles[1] / 1.6e3 == pytest.approx(518, rel=5e-3)


@pytest.mark.parametrize(
    ("opcode", "traffic", "bound"), [("HMMA", 0, "tensor"), ("MUFU", 0, "MUFU"), ("FFMA", 4e4, "DRAM")]
)
def test_each_throughput_can_be_the_bound(opcode, traffic, bound):
    prediction = cuda_times.predict({opcode: 100}, traffic, 64, DEVICES["H100-SXM"])
    assert prediction.bound == bound
    assert prediction.cycles[0] < prediction.cycles[1]
