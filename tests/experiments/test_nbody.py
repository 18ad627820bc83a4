"""Interacting particles: the simulator against a plain loop and its laws, data, network, training and figure."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from escnn import gspaces

from implicit_steer.__main__ import main
from implicit_steer.experiments.data import NBody, nbody
from implicit_steer.experiments.figures import nbody as figures
from implicit_steer.experiments.models import NBodyNet
from implicit_steer.experiments.models.nbody import SPACES
from implicit_steer.experiments.train import NBodyOptions, train_nbody
from implicit_steer.training import lightning
from implicit_steer.training.lightning import Regressor

N = nbody.PARTICLES
SMALL = {"strength": 2.0, "limit": 100, "epochs": 2, "blocks": 1, "channels": 2, "progress": False, "num_threads": 1}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """Few steps and a cache of its own."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPLICIT_STEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(nbody, "FRAME", 10)
        patch.setattr(nbody, "CHUNK", 50)
        yield
    torch.set_num_threads(threads)


def start(system, n=3, seed=0):
    return nbody.draw(system, np.random.default_rng(seed), n)


# ---- simulation


def by_loop(system, strength, state, steps, dt):
    """One simulation after the other, one pair after the other."""
    pos, vel = state.pos.copy(), state.vel.copy()
    number = {pair: k for k, pair in enumerate(zip(*nbody.PAIRS.tolist(), strict=True))}
    for s in range(pos.shape[2]):
        for _ in range(steps):
            force = np.zeros((N, 3))
            for i in range(N):
                for j in range(N):
                    if i == j:
                        continue
                    r, pair = pos[i, :, s] - pos[j, :, s], state.pair[number[min(i, j), max(i, j)], s]
                    force[i] += -0.1 * pair * r if system == "springs" else pair * r / np.linalg.norm(r) ** 3
                single = state.single[i, s]
                force[i, 2] += -strength * (pos[i, 2, s] - single) if system == "springs" else strength * single
            vel[:, :, s] += dt * np.clip(force, -100, 100)
            pos[:, :, s] += dt * vel[:, :, s]
    return pos, vel


@pytest.mark.parametrize("system", nbody.SYSTEMS)
def test_simulation_is_the_plain_loop(system):
    state = start(system)
    state.pos[1, :, 0] = state.pos[0, :, 0] + 0.01  # charges so close that forces are cut
    found = nbody.simulate(system, 1.5, state, 20, dt=0.01)
    pos, vel = by_loop(system, 1.5, state, 20, 0.01)
    np.testing.assert_allclose(found.pos, pos, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.vel, vel, rtol=0, atol=1e-12)


def energy(state, strength):
    """Of springs, (n,)."""
    distances = np.square(state.pos[nbody.PAIRS[0]] - state.pos[nbody.PAIRS[1]]).sum(1)
    planes = 0.5 * strength * np.square(state.pos[:, 2] - state.single).sum(0)
    return 0.5 * np.square(state.vel).sum((0, 1)) + 0.05 * (state.pair * distances).sum(0) + planes


@pytest.mark.parametrize("strength", [0.0, 5.0])
def test_energy_is_conserved_to_first_order_of_the_step(strength):
    state, errors = start("springs", 20), []
    for dt in (4e-3, 2e-3, 1e-3):
        after = nbody.simulate("springs", strength, state, round(2 / dt), dt)
        errors.append(np.abs(energy(after, strength) - energy(state, strength)).max())
    assert errors[2] < 1e-3 * (1 + strength) * energy(state, strength).mean()
    # Measured: 1.99 to 2.01.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("system", nbody.SYSTEMS)
@pytest.mark.parametrize(("strength", "group"), [(0.0, "o3"), (0.0, "so2"), (3.0, "so2")])
def test_dynamics_is_symmetric(system, strength, group):
    state = start(system)  # 15 steps: later two charges come so close that their forces are cut, axis by axis
    space = SPACES[group]()

    def error(element):
        turn = space.basespace_action(element)
        moved = replace(
            state, pos=np.einsum("ab,ibn->ian", turn, state.pos), vel=np.einsum("ab,ibn->ian", turn, state.vel)
        )
        found = nbody.simulate(system, strength, moved, 15, 0.01).pos
        expected = np.einsum("ab,ibn->ian", turn, nbody.simulate(system, strength, state, 15, 0.01).pos)
        return np.abs(found - expected).max()

    assert max(error(space.fibergroup.sample()) for _ in range(3)) < 1e-10


def test_planes_break_the_symmetry():
    state = start("springs")
    upside_down = replace(state, pos=-state.pos, vel=-state.vel)
    found = nbody.simulate("springs", 3.0, upside_down, 50, 0.01).pos
    assert np.abs(found + nbody.simulate("springs", 3.0, state, 50, 0.01).pos).max() > 0.1


# ---- data


def test_data(tmp_path):
    data = NBody("springs", strength=2.0, limit=120, cache=tmp_path, progress=False)
    assert [len(part) for part in (data.train, data.val, data.test)] == [120, 100, 100]
    batch = data.train.__getitems__([60, 3])  # of two chunks
    for n, (first, row) in enumerate([(50, 10), (0, 3)]):
        drawn = nbody.draw("springs", np.random.default_rng((nbody.DATA_SEED, 0, first)), 50)
        before = nbody.simulate("springs", 2.0, drawn, 300)
        after = nbody.simulate("springs", 2.0, before, 100)
        rows, pos = slice(N * n, N * n + N), before.pos[..., row]
        np.testing.assert_allclose(batch.pos[rows], pos - pos.mean(0), rtol=0, atol=1e-6)
        np.testing.assert_allclose(batch.vel[rows], before.vel[..., row], rtol=0, atol=1e-6)
        np.testing.assert_allclose(batch.scalar[rows, 0], pos[:, 2] - before.single[:, row], rtol=0, atol=1e-6)
        np.testing.assert_allclose(batch.y[rows], after.pos[..., row] - pos, rtol=0, atol=1e-6)
        springs = dict(zip(zip(*nbody.PAIRS.tolist(), strict=True), before.pair[:, row], strict=True))
        edges, pairs = batch.edge_index[:, 20 * n : 20 * n + 20] - N * n, batch.pair[20 * n : 20 * n + 20, 0]
        assert {*map(tuple, edges.T.tolist())} == {(j, i) for i in range(N) for j in range(N) if i != j}
        assert torch.equal(edges[1], edges[1].sort().values)
        assert [springs[min(j, i), max(j, i)] for j, i in edges.T.tolist()] == pairs.tolist()
    again = NBody("springs", strength=2.0, limit=30, cache=tmp_path, progress=False)
    assert torch.equal(again.train.arrays["y"], data.train.arrays["y"][:30])
    assert data.scale == pytest.approx(float(data.train.arrays["y"].square().mean().sqrt()))


def test_charges_are_their_own_scalars():
    data = NBody("charged", strength=1.0, limit=50, progress=False)
    batch = data.test.__getitems__(range(10))
    assert set(batch.scalar.unique().tolist()) == {-1.0, 1.0}
    source, target = batch.edge_index
    assert torch.equal(batch.pair, batch.scalar[source] * batch.scalar[target])


def test_strength_and_seed_make_other_data_with_the_same_start():
    kinds = ((0.0, 42), (1.0, 42), (0.0, 1))
    free, tied, other = (NBody(strength=k, seed=s, limit=50, progress=False).train.arrays["vel"] for k, s in kinds)
    torch.testing.assert_close(free[..., :2], tied[..., :2])  # planes act along z only
    assert not torch.allclose(free[..., 2], tied[..., 2])
    assert not torch.allclose(free, other)


# ---- network


# Kernels and node activations alias on the grids of their samples: measured 6e-7 and 3e-3.
@pytest.mark.parametrize(("group", "sampling", "bound"), [("so2", "auto", 1e-5), ("o3", "lebedev-110", 1e-2)])
def test_network_is_equivariant(group, sampling, bound):
    batch = NBody(strength=2.0, limit=50, progress=False).train.__getitems__(range(8))
    batch = replace(
        batch, **{k: v.double() for k, v in vars(batch).items() if getattr(v, "dtype", None) == torch.float32}
    )
    net = NBodyNet(SPACES[group](), blocks=1, channels=2, sampling=sampling).double()
    with torch.no_grad():
        net(batch)  # statistics
        base = net.eval()(batch)

        def error(element):
            turn = torch.tensor(net.in_type.gspace.basespace_action(element))
            moved = replace(batch, pos=batch.pos @ turn.T, vel=batch.vel @ turn.T)
            return float((net(moved) - base @ turn.T).norm() / base.norm())

        assert max(error(net.in_type.fibergroup.sample()) for _ in range(5)) < bound
        if group == "so2":
            upside_down = replace(batch, pos=-batch.pos, vel=-batch.vel)
            assert float((net(upside_down) + base).norm() / base.norm()) > 0.1


def test_network_needs_space():
    with pytest.raises(ValueError, match=r"gspace: expected a GSpace of R³"):
        NBodyNet(gspaces.rot2dOnR2())


# ---- training


def rows(out):
    """The log without the clock."""
    with (out / "log.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_training_is_reproducible_and_resumed(tmp_path, monkeypatch):
    result = train_nbody(NBodyOptions(out=str(tmp_path / "a"), **SMALL))
    assert json.loads((tmp_path / "a" / "result.json").read_text()) == result
    errors = [float(row["train_mse"]) for row in rows(tmp_path / "a")]
    assert errors[0] > errors[1] > 0
    assert result["val_mse"] == pytest.approx(min(float(row["val_mse"]) for row in rows(tmp_path / "a")))
    step = Regressor.training_step

    def interrupted(self, batch, index):
        if (self.current_epoch, index) == (1, 1):
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(Regressor, "training_step", interrupted)
    with pytest.raises(SystemExit):
        train_nbody(NBodyOptions(out=str(tmp_path / "b"), **SMALL))
    monkeypatch.setattr(Regressor, "training_step", step)
    resumed = train_nbody(NBodyOptions(out=str(tmp_path / "b"), resume=True, **SMALL))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert resumed["test_mse"] == result["test_mse"]
    with pytest.raises(ValueError, match=r"group: expected 'o3' as in the run to resume, got 'so2'"):
        train_nbody(NBodyOptions(out=str(tmp_path / "a"), resume=True, group="so2", **SMALL))


def test_clip_and_frozen_norms(tmp_path, monkeypatch):
    steps = []  # of every step: epoch, norm of the gradient, whether norms take the batch's statistics

    class Watched(Regressor):
        def on_train_batch_end(self, *_):
            norm = torch.cat([p.grad.reshape(-1) for p in self.parameters()]).norm().item()
            steps.append((self.current_epoch, norm, self.model.training))

    monkeypatch.setattr(lightning, "Regressor", Watched)
    train_nbody(NBodyOptions(out=str(tmp_path), clip=0.1, freeze_norms=1, kernel_channels=3, **SMALL))
    assert max(norm for _, norm, _ in steps) == pytest.approx(0.1, rel=1e-4)  # measured: 1e-5, as in test_train.py
    assert [(epoch, training) for epoch, _, training in steps] == [(0, True)] * 2 + [(1, False)] * 2


def test_command_line(tmp_path, capsys):
    arguments = (
        f"train nbody --system charged --strength 1 --group so2 --limit 64 --epochs 1 --blocks 1 --out {tmp_path}"
    )
    main([*arguments.split(), "--num-threads", "1"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert f"test MSE charged, strength 1, so2: {result['test_mse']:.3e}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("system", "x", "system: expected one of"),
        ("group", "x", "group: expected one of"),
        ("strength", -1.0, "strength: expected a number >= 0"),
        ("limit", 1, "limit: expected at least 2, got 1"),
        ("clip", -1.0, "clip: expected a positive number, or None, got -1.0"),
        ("blocks", 0, "blocks: expected at least 1, got 0"),
    ],
)
def test_wrong_option(option, value, message):
    with pytest.raises(ValueError, match=message):
        NBodyOptions(**{option: value})


# ---- figure


def test_figure_trains_what_is_missing(tmp_path, capsys, monkeypatch):
    trained = []

    def train(options):
        trained.append((options.strength, options.group, options.seed, options.resume))
        out = Path(options.out)
        out.mkdir(parents=True)
        error = (1 + options.strength) * (2 if options.group == "o3" else 1) * (1 + options.seed)
        result = {"test_mse": error, "options": asdict(options)}
        (out / "result.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(figures, "train_nbody", train)
    picture = tmp_path / "nbody.png"
    arguments = f"figure nbody --strengths 0 3 --seeds 2 --runs {tmp_path / 'runs'} --out {picture}".split()
    main(arguments)
    assert sorted(trained) == [(k, g, s, False) for k in (0.0, 3.0) for g in ("o3", "so2") for s in (0, 1)]
    printed = capsys.readouterr().out
    # Of 2 and 4, of 1 and 2, ...: mean and standard deviation; t = 1.5 / √1.25 = 1.342 with 1.47 degrees of freedom.
    assert "| 0 | 3.00e+00 ± 1.4e+00 | 1.50e+00 ± 7.1e-01 | 0.35 |" in printed
    assert "| 3 | 1.20e+01 ± 5.7e+00 | 6.00e+00 ± 2.8e+00 | 0.35 |" in printed
    assert picture.stat().st_size > 5000
    main(arguments)
    assert len(trained) == 8
    with pytest.raises(ValueError, match=r"epochs: expected 12 as in .*result.json, got 3"):
        main([*arguments, "--epochs", "3"])


def test_networks_of_the_figure_have_one_width():
    """Hidden numbers of a particle, and of a kernel MLP."""
    nets = [NBodyNet(SPACES[group](), blocks=1, **figures.WIDTHS[group]) for group in figures.NAMES]
    sizes = [(net.readout.in_type.size, net.blocks[0].conv1.implicit_kernel.mlp.mlp[-1].in_type.size) for net in nets]
    assert sizes == [(32, 128), (33, 126)]


def test_figure_resumes_what_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "train_nbody", lambda options: {"test_mse": float(options.resume)})
    interrupted = tmp_path / "k1-so2-seed0"
    interrupted.mkdir()
    (interrupted / "last.ckpt").write_text("")
    errors = figures.nbody_errors(figures.DEFAULT, tmp_path, [1.0], 1)
    assert errors == {"o3": {1.0: [0.0]}, "so2": {1.0: [1.0]}}
