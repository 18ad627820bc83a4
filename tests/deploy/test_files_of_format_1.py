"""Saved models and state_dicts that the library wrote in format 1 (commit 9bcba98) give the same numbers today.

``format1`` holds, in float32: NAME.safetensors of ``implicit_steer.save`` and NAME.pt, a state_dict, of layers of
``testing/cases.py`` after ``helpers.layer``; nbody.safetensors, an NBodyNet; and results.pt, the inputs and results.
"""

from pathlib import Path

import pytest
import torch
from deployed import convolution, particles
from helpers import layer

import implicit_steer as ist
from implicit_steer.testing.cases import SMALL

FOLDER = Path(__file__).with_name("format1")
RESULTS = torch.load(FOLDER / "results.pt", weights_only=True)
BOUND = 2e-6  # float32; the largest deviation was 3e-7


def loaded(name):
    return ist.load(FOLDER / f"{name}.safetensors")


def built(name):
    conv = layer(SMALL[name], "train", torch.float32)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.zero_()
    conv.load_state_dict(torch.load(FOLDER / f"{name}.pt", weights_only=True), strict=True)
    return conv.eval()


def assert_same(found, expected):
    assert float((found - expected).norm() / expected.norm()) < BOUND


@pytest.mark.parametrize("way", [loaded, built])
@pytest.mark.parametrize("name", [name for name in RESULTS if name != "nbody"])
def test_convolutions(name, way):
    inputs, expected = RESULTS[name]
    for found, known in zip(convolution(way(name), *inputs), expected, strict=True):
        assert_same(found, known)


def test_a_network():
    assert_same(loaded("nbody")(particles(torch.float32)).detach(), RESULTS["nbody"])
