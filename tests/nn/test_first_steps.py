"""What a new user writes: a network of one's own, on positions in Å, checked, saved, and run where escnn is not."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NETWORK = """
import torch
import implicit_steer as ist

@ist.register
class Network(torch.nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        from escnn import gspaces, nn
        from implicit_steer.nn import Gate, ImplicitPointConv, Linear
        gs = gspaces.flipRot3dOnR3()
        scalars = gs.type(*[gs.trivial_repr] * channels)
        gate = Gate(gs.type(*[gs.trivial_repr] * channels, *[gs.irrep(1, 1)] * channels))
        self.conv = ImplicitPointConv(scalars, gate.in_type, width=width, norm=None)
        self.rest = nn.SequentialModule(gate, Linear(gate.out_type, scalars))

    def forward(self, x, pos, edges):
        y = self.conv(self.conv.in_type(x, pos), edges, pos[edges[1]] - pos[edges[0]])
        return ist.layers.values(self.rest(y))
"""
BUILD = """
import warnings, torch, implicit_steer as ist
from network import Network
torch.manual_seed(0)
pos = 2.5 * torch.rand(40, 3) * 40 ** (1 / 3)  # Å
x, edges = torch.randn(40, 4), ist.radius_graph(pos, 4.0, max_num_neighbors=12)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        Network(4, width=0.1)(x, pos, edges)
    network = Network(4, width=2.0)
    y = network(x, pos, edges)
assert len([w for w in caught if "width=" in str(w.message)]) == 2, [str(w.message) for w in caught]
for part in (network.conv, *network.rest):
    assert max(error for _, error in part.check_equivariance()) < 1e-5
ist.save(network, "network.safetensors")
torch.save((x, pos, edges, y.detach()), "expected.pt")
"""
RUN = """
import sys, torch
sys.modules["escnn"] = None
import implicit_steer as ist
import network
loaded = ist.load("network.safetensors")
x, pos, edges, y = torch.load("expected.pt")
assert type(loaded) is network.Network
assert (loaded(x, pos, edges) - y).abs().max() <= 2e-7 * y.abs().max()
"""


def test_a_network_of_ones_own(tmp_path):
    (tmp_path / "network.py").write_text(NETWORK)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    for code in (BUILD, RUN):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
