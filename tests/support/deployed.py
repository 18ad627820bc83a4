"""``write FOLDER``, where escnn is: models, inputs, results. ``check FOLDER``, where it is not: the same numbers.

``make test-wheel`` runs the second in an environment of the wheel and NumPy 2; ``check FOLDER --block`` runs in an
environment that has escnn, and makes importing it fail.
"""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import torch

ABSENT = {"escnn", "lie_learn", "py3nj"}
CASES = ("o3", "so2-r3", "d4", "o3-vector-attr")
# Of results to another processor's, if the folder was carried to one; here they are the same bits.
BOUND = 1e-5


class Blocked:
    """A finder that has no escnn."""

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=top)


def molecules(dtype):
    """A batch of two made-up molecules."""
    from implicit_steer.experiments.data import Batch

    generator = torch.Generator().manual_seed(0)

    def edges(count, first, last):
        return torch.randint(first, last, (2, count), generator=generator)

    return Batch(
        x=torch.eye(5)[torch.randint(0, 5, (11,), generator=generator)].to(dtype),
        pos=torch.randn(11, 3, generator=generator).to(dtype),
        edge_index=torch.cat([edges(20, 0, 6), edges(20, 6, 11)], 1),
        edge_attr=torch.rand(40, 4, generator=generator).to(dtype),
        batch=torch.tensor([0] * 6 + [1] * 5),
        y=torch.zeros(2),
        num_graphs=2,
    )


def particles(dtype):
    """A batch of three made-up systems of five particles."""
    from implicit_steer.experiments.data.nbody import ParticleSet

    shapes = {"pos": (5, 3), "vel": (5, 3), "scalar": (5, 1), "pair": (20, 1), "y": (5, 3)}
    generator = torch.Generator().manual_seed(0)
    arrays = {name: torch.randn(3, *shape, generator=generator).double().numpy() for name, shape in shapes.items()}
    batch = ParticleSet(**arrays).__getitems__([0, 1, 2])
    return replace(batch, **{name: getattr(batch, name).to(dtype) for name in shapes if name != "y"})


def convolution(conv, x, edges, delta, attributes):
    """Output and gradients of a convolution."""
    from implicit_steer import Graph
    from implicit_steer.layers import values

    x, width = x.clone().requires_grad_(), conv.implicit_kernel.shell_width
    out = values(
        conv(conv.in_type(x, delta.new_zeros(len(x), delta.shape[1])), Graph(edges, len(x)), delta, attributes)
    )
    return out.detach(), *torch.autograd.grad(out.square().sum(), [x, width])


def write(folder):
    """Files NAME.safetensors, and results.pt with the inputs and results of each."""
    from helpers import layer

    import implicit_steer as ist
    from implicit_steer.experiments.models import QM9Net
    from implicit_steer.testing.cases import SMALL

    results = {}
    for name in CASES:
        conv = layer(SMALL[name], "eval", torch.float32)
        ist.save(conv, folder / f"{name}.safetensors")
        problem = SMALL[name].inputs(conv)
        inputs = problem.x, problem.graph.edge_index, problem.delta, problem.attributes
        results[name] = inputs, convolution(conv, *inputs)
    torch.manual_seed(0)
    net, batch = QM9Net(edge_attr="bonds", blocks=1).eval(), molecules(torch.float32)
    ist.save(net, folder / "net.safetensors")
    results["net"] = net(batch).detach()
    torch.save(results, folder / "results.pt")


def check(folder):
    """Load the files, compare the numbers, save again, compare the bytes."""
    import numpy

    import implicit_steer as ist

    torch.set_num_threads(2)
    results = torch.load(folder / "results.pt", weights_only=True)
    net = ist.load(folder / "net.safetensors")
    pairs = [(net(molecules(torch.float32)).detach(), results.pop("net"))]
    for name, (inputs, expected) in results.items():
        conv = ist.load(folder / f"{name}.safetensors")
        pairs += zip(convolution(conv, *inputs), expected, strict=True)
        print(conv.explain().splitlines()[-1])
    deviation = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    print(f"implicit_steer {ist.__file__}, NumPy {numpy.__version__}, torch {torch.__version__}: {deviation:.1e}")
    assert deviation <= BOUND
    ist.save(net, folder / "again.safetensors")
    assert (folder / "again.safetensors").read_bytes() == (folder / "net.safetensors").read_bytes()
    assert not ABSENT & set(sys.modules)
    with contextlib.suppress(RuntimeError):
        import implicit_steer.nn

        raise SystemExit(f"escnn was there, for {implicit_steer.nn}")


if __name__ == "__main__":
    command, where, *block = sys.argv[1:]
    if block == ["--block"]:
        sys.meta_path.insert(0, Blocked())
    Path(where).mkdir(parents=True, exist_ok=True)
    {"write": write, "check": check}[command](Path(where))
