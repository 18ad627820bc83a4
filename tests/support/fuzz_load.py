"""``python tests/support/fuzz_load.py --count 2000``: damaged and forged files, each of which loads, or says what it
is.

Files of several kinds are changed: their bytes, their manifest, their tensors, in most cases with a digest that is
right again. A worker process loads each, one after the other, and calls what it loaded. Wrong is: an exception that is
no RuntimeError with the path, memory beyond twice the file and 64 MB, a crash, and a call that hangs.
"""

import argparse
import copy
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

import implicit_steer as ist
from implicit_steer.deploy.file import KEY, _digest

ROOM = 64 * 2**20  # bytes that a load may take beyond twice its file
RESERVED = 256 * 2**20  # of address space, without being touched: what libraries map at their first use
PATIENCE = 120  # seconds without a finished case
NUMBERS = (10**12, 10**9, 2**31, 2**63, 10**20, 100_000, -1, -(10**12), 0, 1, 2, 0.5, -0.5, 1e300)
OTHERS = (
    "",
    "os.system",
    None,
    True,
    [],
    {},
    [1, 2],
    {"object": 0},
    {"array": "array.0"},
    {"list": [1]},
    "@nan",
    "@deep",
)


@ist.register(name="network of fuzz_load")
class Network(nn.Module):
    """A network of a user."""

    def __init__(self, conv, width):
        super().__init__()
        self.conv, self.head, self.scale = conv, nn.Linear(width, 2), nn.Parameter(torch.ones(()))
        self.in_type, self.sizes, self.table = conv.in_type, {"width": [width, 2.5]}, np.arange(3.0)
        self.register_buffer("shift", torch.zeros(2), persistent=False)

    def forward(self, x, *geometry):
        x = self.in_type(x, geometry[-1].new_zeros(len(x), 3))
        return self.scale * self.head(ist.layers.values(self.conv(x, *geometry))) + self.shift


# ---- files to change, and how each is called


def write_originals(folder):
    """One file per kind, and calls.pt: what each takes."""
    import escnn.nn as enn
    from escnn import gspaces
    from helpers import layer

    from implicit_steer.experiments.models.qm9 import QM9Net, TensorProduct
    from implicit_steer.potentials import Potential
    from implicit_steer.testing.cases import SMALL, SPACES, fields

    o3, calls = SPACES["O(3)"](), {}
    kinds = fields(o3, "2 scalar+vector"), fields(o3, "1 scalar, 2 vector, 1 scalar, 1 l2")

    def add(name, module, *arguments):
        ist.save(module, folder / f"{name}.safetensors")
        calls[name] = arguments

    for name in ("o3", "so2-r3", "d4", "o3-linear", "cone-r3"):
        conv, problem = layer(SMALL[name], "train", torch.float32), SMALL[name].inputs(SMALL[name].layer())
        geometry = problem.graph.edge_index, problem.delta.float()
        attributes = () if problem.attributes is None else (problem.attributes.float(),)
        add(name, conv, problem.x.float(), *geometry, *attributes)
        if name == "o3-linear":
            add("registered", Network(conv, conv.out_type.size), problem.x.float(), *geometry)
    conv = ist.irreps.ImplicitPointConv("2x0e + 1x1o", "1x0e + 1x1o", 2, table=8)
    geometry = torch.randint(9, (2, 20)), torch.randn(20, 3), torch.eye(2).repeat(10, 1)
    add("table", conv, torch.randn(9, 5), *geometry)
    add("frozen", conv.freeze_table(torch.eye(2)), torch.randn(9, 5), *geometry)
    grid = ist.nn.ImplicitConv(fields(o3, "2 scalar+vector"), kinds[1], None, 3, 2, 3, padding=1)
    add("grid", grid, torch.randn(1, 8, 4, 4, 4))
    add("kernel", grid.implicit_kernel, torch.randn(5, 3))
    alone = [gspaces.no_base_space(o3.fibergroup).type(*kind.representations) for kind in kinds]
    add("linear", enn.Linear(*alone), torch.randn(5, 8))
    add("product", TensorProduct(kinds[0], fields(o3, "2 scalar+l1+l2")), torch.randn(5, 8))
    add("activation", ist.nn.FourierActivation(o3, 3, 2), torch.randn(5, 27))
    add("norm", ist.nn.IIDBatchNorm1d(kinds[1]), torch.randn(5, kinds[1].size))
    add("network", QM9Net(edge_attr="bonds", blocks=1, channels=2, tensors=2).eval())
    add("potential", Potential([1, 8], 2.5, channels=2))
    plane = SPACES["D4 on R2"]()
    regular = plane.type(*[plane.regular_repr] * 2, plane.trivial_repr)
    pools = [enn.NormMaxPool(regular, 2), enn.PointwiseAvgPoolAntialiased2D(regular, 0.5, 1), enn.GroupPooling(regular)]
    add("pooling", nn.Sequential(*pools), torch.randn(1, 17, 6, 6))
    numbers = [nn.Embedding(7, 4, padding_idx=2), nn.LayerNorm([4]), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)]
    add("torch", nn.Sequential(*numbers, nn.Softplus(), nn.GELU(), nn.Dropout(), nn.Flatten()), torch.tensor([0, 2, 6]))
    torch.save(calls, folder / "calls.pt")


# ---- changes


def nodes(value, path=()):
    """Paths of all values inside JSON."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += nodes(child, (*path, key))
    return found


def change_manifest(rng, manifest, tensors):
    """Another value, a key that is gone or has another name, an entry more or less."""
    path = _pick(rng, [path for path in nodes(manifest) if path[0] not in ("format", "sha256", "library")])
    *way, last = path
    owner = manifest
    for key in way:
        owner = owner[key]
    kind = rng.integers(8)
    if kind == 0 and isinstance(owner, dict):
        del owner[last]
    elif kind == 1 and isinstance(owner, dict):
        owner[_pick(rng, ["weight", "size", "device", "__class__", "forward"])] = owner.pop(last)
    elif kind == 2 and isinstance(owner, list):
        owner.insert(int(last), copy.deepcopy(owner[last]))
    elif kind == 3 and isinstance(owner, list):
        del owner[last]
    else:
        owner[last] = copy.deepcopy(_pick(rng, OTHERS if rng.integers(3) == 0 else NUMBERS))


def change_tensor(rng, manifest, tensors):
    """Another shape, dtype, value or name; one more or less."""
    if not tensors:
        return
    name = _pick(rng, sorted(tensors))
    tensor = tensors[name]
    kind = rng.integers(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[_pick(rng, ["state.more", "array.999", "array.0", "state.bias"])] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = tensor.reshape(-1)
    elif kind == 3:
        dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.uint8]
        tensors[name] = tensor.to(_pick(rng, dtypes))
    elif kind == 4:
        tensors[name] = torch.cat([tensor.reshape(-1)] * 2)[: int(rng.integers(2 * tensor.numel() + 1))]
    elif kind == 5:
        tensors[name] = torch.zeros(
            _pick(rng, [(0,), (10**12, 0), (0, 10**9), (1, 1, 1, 1, 1), ()]), dtype=tensor.dtype
        )
    elif tensor.numel():
        changed = tensor.clone().reshape(-1)
        values = [float("nan"), float("inf"), -1.0, 1e30] if tensor.is_floating_point() else [-1, 10**6, 2**40, 1, 0]
        changed[int(rng.integers(len(changed)))] = torch.tensor(_pick(rng, values)).to(tensor.dtype)
        tensors[name] = changed.view(tensor.shape)


def change_bytes(rng, data):
    """Some flipped, some gone, some more, another length of the header."""
    kind, place = rng.integers(5), int(rng.integers(len(data)))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data + bytes(int(rng.integers(1, 100)))
    if kind == 2:
        return _pick(rng, [2**63, 2**64 - 1, 2**40, 0, 1]).to_bytes(8, "little") + data[8:]
    changed = bytearray(data)
    for place in rng.integers(len(data) if kind == 3 else min(len(data), 4096), size=int(rng.integers(1, 5))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _pick(rng, values):
    return values[int(rng.integers(len(values)))]


def forged(seed, originals):
    """(name of the original, bytes) of case ``seed``."""
    rng = np.random.default_rng(seed)
    path = _pick(rng, originals)
    data = path.read_bytes()
    if rng.integers(8) == 0:
        return path.stem, change_bytes(rng, data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    manifest, tensors = json.loads(header["__metadata__"][KEY]), safetensors.torch.load(data)
    for _ in range(_pick(rng, [1, 1, 1, 2, 3])):
        (change_manifest if rng.integers(3) else change_tensor)(rng, manifest, tensors)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    if rng.integers(10) and '"@' not in text:
        manifest["sha256"] = _digest(manifest, tensors)
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    if rng.integers(20) == 0:
        text = '{"format":1,"format":1e400,' + text[1:]  # a key twice
    text = text.replace('"@nan"', "NaN").replace('"@deep"', "[" * 200_000 + "]" * 200_000)
    return path.stem, safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}, {KEY: text})


# ---- the worker


def _memory(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def _limit(size):
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def load_one(path, size):
    """What became of it, and the module or None."""
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    _limit(_memory("VmSize") + 2 * size + ROOM + RESERVED)
    module, outcome = None, "loaded"
    try:
        module = ist.load(path)
    except RuntimeError as error:
        text = str(error)
        outcome = "refused" if type(error) is RuntimeError and str(path) in text else f"WRONG: {error!r}"
        if "MemoryError" in text or "memory" in text.lower().replace(str(path).lower(), ""):
            outcome = f"WRONG: asked for too much: {text[:300]}"
    except Exception as error:  # noqa: BLE001 - every other one is what is looked for
        outcome = f"WRONG: {error!r}"
    finally:
        _limit(resource.RLIM_INFINITY)
    grown = _memory("VmHWM") - before
    if grown > 2 * size + ROOM:
        outcome = f"WRONG: {grown / 2**20:.0f} MB for a file of {size / 2**20:.2f} MB ({outcome})"
    return outcome, module


def work(folder, first, count):
    """Cases ``first`` to ``count``: one line each, its number, the original's name, and what became of it."""
    originals = sorted(folder.glob("*.safetensors"))
    calls = torch.load(folder / "calls.pt", weights_only=True)
    for path in originals:  # libraries are loaded, tables made
        ist.load(path)
    path = folder / f"case{first}"
    for seed in range(first, count):
        print(seed, flush=True, end=" ")
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        name, data = forged(seed, originals)
        path.write_bytes(data)
        outcome, module = load_one(path, len(data))
        if module is not None and calls[name]:
            _limit(_memory("VmSize") + 4 * 2**30)
            try:
                module(*calls[name])
                repr(module)
                outcome = "loaded, runs"
            except Exception as error:  # noqa: BLE001 - a call may say no, but must come back
                outcome = f"loaded, call raises {type(error).__name__}"
            finally:
                _limit(resource.RLIM_INFINITY)
        print(name, outcome.replace("\n", " "), flush=True)


# ---- the parent


def run(count, folder, report=print):
    """Outcome → how many; whatever begins with WRONG is a fault."""
    write_originals(folder)
    found, first = Counter(), 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while first < count:
        command = [sys.executable, __file__, "--work", str(folder), str(first), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        for line in done.stdout.splitlines():
            number, name, outcome = (*line.split(" ", 2), "", "")[:3]
            first = int(number) + 1
            if not outcome:  # the case that the process did not survive
                outcome = f"WRONG: the process ended with {done.returncode}: {done.stderr[-3000:]}"
            found["WRONG" if outcome.startswith("WRONG") else outcome] += 1
            if outcome.startswith("WRONG"):
                report(number, name, outcome)
        if done.returncode and not done.stdout:
            raise RuntimeError(done.stderr)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--work", nargs=3, metavar=("FOLDER", "FIRST", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        torch.set_num_threads(1)
        work(Path(options.work[0]), int(options.work[1]), int(options.work[2]))
        return
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        found = run(options.count, Path(folder))
    for outcome, number in found.most_common():
        print(f"{number:6} {outcome}")
    print(f"{sum(found.values())} cases in {time.time() - started:.0f} s")
    sys.exit(found["WRONG"] > 0)


if __name__ == "__main__":
    main()
