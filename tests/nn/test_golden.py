"""Against outputs and gradients of the authors' implementation: see golden/README.md for the format and the bounds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from escnn import gspaces
from escnn.group import directsum

from implicit_steer.nn import FourierActivation, ImplicitConv, ImplicitPointConv

FOLDER = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
SPACES = {
    "O3": gspaces.flipRot3dOnR3,
    "SO3": gspaces.rot3dOnR3,
    "O2": lambda: gspaces.flipRot2dOnR2(axis=0.0),
    "SO2": gspaces.rot2dOnR2,
}
BOUND = 2e-5  # float32; measured: at most 7e-6


def _field(group, text):
    parts = []
    for name in text.split("+"):
        if name == "scalar":
            parts.append(group.trivial_representation)
        elif name == "vector":
            parts.append(group.standard_representation())
        elif name == "pseudo":
            parts.append(group.irrep(1, 0) if group.name.startswith("O") else group.trivial_representation)
        else:
            parts += FourierActivation(gspaces.no_base_space(group), 1, int(name[6:])).in_type.representations
    return parts[0] if len(parts) == 1 else directsum(parts)


def _types(case):
    gspace = SPACES[case["space"]]()
    group, restriction = gspace.fibergroup, case.get("restrict")
    if restriction is not None:
        gspace = gspace.restrict(tuple(restriction))[0]
    for key in ("in", "out", "attr"):
        reprs = [_field(group, text) for text in case.get(key, [])]
        if restriction is not None:
            reprs = [r.restrict(tuple(restriction)) for r in reprs]
        yield gspace.type(*reprs) if reprs else None


def _module(case, backend):
    mlp = (case["n_layers"], case["n_channels"], case.get("init", "he"))
    if case["kind"] == "grid":
        return ImplicitConv(*_types(case), case["kernel_size"], *mlp, padding=case["padding"], sampling="escnn")
    return ImplicitPointConv(*_types(case), *mlp, sampling="escnn", backend=backend)


def _combinations():
    for name in NAMES:
        kind = json.loads((FOLDER / f"{name}.json").read_text())["kind"]
        for backend in ("reference", "eager", "cpu") if kind == "point" else ("reference",):
            yield name, backend


def _error(ours, theirs, floor=0.0):
    theirs = torch.as_tensor(theirs)
    return ((ours.detach() - theirs).norm() / max(theirs.norm().item(), floor)).item()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("name", "backend"), list(_combinations()))
def test_authors_numbers(name, backend, mode):
    case = json.loads((FOLDER / f"{name}.json").read_text())
    data = np.load(FOLDER / f"{name}.npz")
    module = _module(case, backend)
    state = {key[6:]: torch.tensor(data[key]) for key in data.files if key.startswith("state.")}
    module.load_state_dict(state, strict=True)
    module.train(mode == "train")

    leaves = {key: torch.tensor(data[f"in.{key}"]) for key in ("x", "delta", "attr") if f"in.{key}" in data.files}
    for leaf in leaves.values():
        leaf.requires_grad_()
    if case["kind"] == "grid":
        out = module(module.in_type(leaves["x"]), leaves.get("attr")).tensor
    else:
        x = module.in_type(leaves["x"], torch.zeros(len(leaves["x"]), leaves["delta"].shape[1]))
        out = module(x, torch.tensor(data["in.edge_index"]), leaves["delta"], leaves.get("attr")).tensor
    assert _error(out, data[f"{mode}.out"]) <= BOUND

    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    parameters = dict(module.named_parameters())
    prefix = f"{mode}.grad."
    norms = [np.linalg.norm(data[key]) for key in data.files if key.startswith("train.grad.param.")]
    for key in data.files:
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if name.startswith("param."):
            parameter = name.removeprefix("param.")
            assert _error(parameters[parameter].grad, data[key], 1e-3 * max(norms)) <= BOUND, name
        else:
            assert _error(leaves[name].grad, data[key]) <= BOUND, name


@pytest.mark.parametrize("name", NAMES)
def test_cases_hold_what_is_compared(name):
    keys = np.load(FOLDER / f"{name}.npz").files
    for prefix in ("state.", "in.x", "train.out", "eval.out", "train.grad.x", "train.grad.param."):
        assert any(key.startswith(prefix) for key in keys), prefix
