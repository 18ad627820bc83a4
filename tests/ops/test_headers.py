"""What Python and C++ have to say alike about the arrays of a plan: names in their order, numbers of kinds."""

import re
from pathlib import Path

import pytest

from implicit_steer.ops.native import headers, terms
from implicit_steer.ops.native.arrays import FRAME_KINDS
from implicit_steer.plan import FUNCTIONS

PLAN_H = (Path(__file__).parents[2] / "csrc" / "plan.h").read_text(encoding="utf-8")


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


def test_rows_of_channels_have_the_size_of_cpp():
    (channels,) = re.findall(r"constexpr int64_t kChannels = (\d+);", PLAN_H)
    assert int(channels) == terms.ROW_OF_CHANNELS
