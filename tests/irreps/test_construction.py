"""What building a wide layer takes: in a process of its own, as memory is counted from its start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURE = """
import json, sys, time
import torch
from implicit_steer.irreps import ImplicitPointConv

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1e3 for line in status if line.startswith("VmHWM"))

before, start = peak(), time.process_time()
conv = ImplicitPointConv(sys.argv[1], sys.argv[1], depthwise=sys.argv[2] == "depthwise")
seconds, built = time.process_time() - start, peak() - before
edges, x = torch.tensor([[0, 1, 2], [1, 2, 2]]), torch.randn(3, conv.irreps_in.size)
y = conv(x, edges, torch.randn(3, 3))
y.square().sum().backward()
print(json.dumps({"seconds": seconds, "megabytes": built, "finite": bool(y.isfinite().all()),
                  "gradients": all(p.grad is not None for p in conv.parameters())}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell peak memory")
@pytest.mark.parametrize("form", ["full", "depthwise"])
@pytest.mark.parametrize(
    ("irreps", "seconds", "megabytes"),
    # Measured: 0.1 s and 62 MB; 1.7 s and 391 MB; depthwise less.
    [("128x0e+128x1o", 1, 500), ("256x0e+256x1o+128x2e", 5, 1500)],
)
def test_building_takes_little(irreps, form, seconds, megabytes):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, irreps, form]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["finite"]
    assert found["gradients"]
    assert found["seconds"] < seconds, found
    assert found["megabytes"] < megabytes, found
