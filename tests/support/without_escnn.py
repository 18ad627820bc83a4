"""``python tests/support/without_escnn.py FOLDER``: what people without escnn and e3nn do, with NumPy 2: build, train,
save and load a network on irreps and a potential. Ends with an AssertionError where something is wrong."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

import implicit_steer as ist
from implicit_steer.irreps import InteractionBlock, Linear
from implicit_steer.potentials import Potential, Structures


class Dipole(torch.nn.Module):
    """Charges (N, 1) → a vector for the whole cloud."""

    def __init__(self) -> None:
        super().__init__()
        settings = {"cutoff": 3.0, "width": 1.0, "degree": 6}
        self.first = InteractionBlock("1x0e", "8x0e + 4x1o", depthwise=True, **settings)
        self.second = InteractionBlock("8x0e + 4x1o", "8x0e + 4x1o", **settings)
        self.last = Linear("8x0e + 4x1o", "1x1o")

    def forward(self, charges: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """(3,)."""
        edges = ist.knn_graph(pos, 6)
        vectors = pos[edges[1]] - pos[edges[0]]
        return self.last(self.second(self.first(charges, edges, vectors), edges, vectors)).sum(0)


def train_network(folder: Path) -> None:
    """It learns, stays equivariant, and is what is loaded again."""
    torch.manual_seed(0)
    network = Dipole()
    clouds = [(torch.randn(12, 1), torch.randn(12, 3)) for _ in range(8)]
    targets = [((q - q.mean()) * x).sum(0) for q, x in clouds]
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=1e-2), []
    for _ in range(40):
        loss = sum((network(q, x) - y).square().sum() for (q, x), y in zip(clouds, targets, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses
    turn, (charges, pos) = torch.linalg.qr(torch.randn(3, 3))[0], clouds[0]
    with torch.no_grad():
        before = network(charges, pos)
        assert (network(charges, pos @ turn.T) - before @ turn.T).norm() < 1e-4 * before.norm()
        for name in ("first", "second", "last"):
            ist.save(getattr(network, name), folder / f"{name}.safetensors")
            setattr(network, name, ist.load(folder / f"{name}.safetensors"))
        assert torch.equal(network(charges, pos), before)


def train_potential(folder: Path) -> None:
    """Its forces are the energy's derivative, it learns forces, and is what is loaded again."""
    torch.manual_seed(0)
    potential = Potential([1, 8], cutoff=3.0, channels=8).double()
    pos = torch.tensor([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]], dtype=torch.float64)
    water = Structures.single(torch.tensor([8, 1, 1]), pos, 3.0)
    step = torch.zeros_like(pos)
    step[1, 0] = 1e-4
    with torch.no_grad():
        up, down = (potential(water.moved(pos + sign * step)) for sign in (1, -1))
    force = float(potential.predict(water).forces[1, 0])
    assert abs(force + float(up - down) / 2e-4) < 1e-6 * (1 + abs(force))
    free = pos.clone().requires_grad_()
    springs = (torch.pdist(free) - 1.2).square().sum()
    target = -torch.autograd.grad(springs, free)[0]
    optimizer, losses = torch.optim.Adam(potential.parameters(), lr=1e-2), []
    for _ in range(40):
        loss = (potential.predict(water, create_graph=True).forces - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0], losses
    ist.save(potential, folder / "potential.safetensors")
    again = ist.load(folder / "potential.safetensors")
    assert torch.equal(again.predict(water).forces, potential.predict(water).forces)


def main(folder: Path) -> None:
    """Everything, after a look at the environment."""
    assert not any(map(importlib.util.find_spec, ("escnn", "e3nn"))), "escnn or e3nn is installed"
    assert int(np.__version__.split(".")[0]) >= 2, f"NumPy {np.__version__}"
    train_network(folder)
    train_potential(folder)
    facts = str(ist.info())
    assert "escnn" in facts, facts
    print(facts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
