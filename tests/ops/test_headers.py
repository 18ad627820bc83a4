"""What Python and C++ have to say alike about the arrays of a plan: names in their order, numbers of kinds."""

import re
from pathlib import Path

import pytest
import torch

from implicit_steer.ops import kernel_mlp
from implicit_steer.ops.native import headers, terms
from implicit_steer.ops.native.arrays import FRAME_KINDS
from implicit_steer.ops.triton.sizes import FRAME_KINDS as TRITON_FRAME_KINDS
from implicit_steer.plan import FUNCTIONS
from implicit_steer.plan.activations import SMALL

CSRC = Path(__file__).parents[2] / "csrc"
PLAN_H, EDGE_FRAME_H = ((CSRC / name).read_text(encoding="utf-8") for name in ("plan.h", "edge_frame.h"))


def fields(macro):
    """The names in a list ``#define macro(FIELD)``, which ends with the first line without a backslash."""
    (text,) = re.findall(rf"#define {macro}\(FIELD\)((?:.*\\\n)*.*\n)", PLAN_H)
    return re.findall(r"FIELD\((\w+)\)", text)


def members(enum):
    """The names in an enumeration, in lower case and without their k, by number."""
    (text,) = re.findall(rf"enum {enum} : int32_t {{(.*?)}};", PLAN_H)
    return {int(number): name.lower() for name, number in re.findall(r"k(\w+) = (\d+)", text)}


@pytest.mark.parametrize(
    ("macro", "header"),
    [
        ("IST_PLAN_HEADER", headers.PlanHeader),
        ("IST_LAYER_HEADER", headers.LayerHeader),
        ("IST_COUPLING_HEADER", headers.CouplingHeader),
    ],
)
def test_headers_have_the_fields_that_cpp_reads(macro, header):
    assert fields(macro) == list(header._fields)


@pytest.mark.parametrize(("enum", "names"), [("FrameKind", FRAME_KINDS), ("Function", FUNCTIONS)])
def test_kinds_have_the_numbers_of_cpp(enum, names):
    assert members(enum) == dict(enumerate(names))


def test_triton_knows_the_kinds_of_the_plan():
    """A planar frame counts twice there: regular ones have a kind of their own."""
    assert set(TRITON_FRAME_KINDS) == {*FRAME_KINDS, "regular planar"}
    assert sorted(TRITON_FRAME_KINDS.values()) == list(range(len(TRITON_FRAME_KINDS)))


@pytest.mark.parametrize(("kind", "dtype"), [("float", torch.float32), ("double", torch.float64)])
def test_limits_have_the_values_of_cpp(kind, dtype):
    (text,) = re.findall(rf"struct Limits<{kind}> {{\s*static constexpr {kind} (.*?);", EDGE_FRAME_H)
    found = {name: float(value) for name, value in re.findall(r"(\w+) = ([\d.e-]+)", text)}
    limits = {
        "near": kernel_mlp.NEAR,
        "softening": kernel_mlp.SOFTENING,
        "zero": kernel_mlp.ZERO,
        "quotient": SMALL,
    }
    assert found == {name: limit[dtype] for name, limit in limits.items()}


def test_rows_and_panels_have_the_sizes_of_cpp():
    found = dict(re.findall(r"constexpr int(?:64_t)? (kChannels|kPanel) = (\d+);", PLAN_H))
    assert found == {"kChannels": str(terms.ROW_OF_CHANNELS), "kPanel": str(terms.PANEL)}
