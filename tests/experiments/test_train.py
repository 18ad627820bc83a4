"""The training command and its network: loss, resumption, reproducibility, messages."""

import csv
import json
import signal
import sys
from dataclasses import replace

import pytest
import torch
from escnn import gspaces
from escnn.nn import IIDBatchNorm1d, QuotientFourierELU
from helpers import relative

from implicit_steer import load
from implicit_steer.__main__ import main
from implicit_steer.experiments.data import QM9
from implicit_steer.experiments.figures import qm9 as figure_qm9
from implicit_steer.experiments.models import QM9Net
from implicit_steer.experiments.train import QM9Options, train_qm9
from implicit_steer.training import lightning
from implicit_steer.training.lightning import AxesRegressor, EpochShuffle, Regressor, cube_rotations, loader

# One result per seed AND number of threads: the number is part of every run.
SMALL = {"limit": 200, "blocks": 1, "epochs": 3, "progress": False, "num_threads": 1}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """A cache of processed molecules of its own, and what training changes in the process put back."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPLICIT_STEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def data():
    """200 molecules."""
    return QM9(limit=SMALL["limit"], progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run whose learning rate is halved after the first and the second epoch: folder, result."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning, "MILESTONES", (1, 2))
        return out, train_qm9(QM9Options(out=str(out), **SMALL))


def rows(out):
    """The log without the clock."""
    with (out / "log.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_loss_falls(run):
    out, result = run
    log = rows(out)
    assert [(row["epoch"], row["step"], row["lr"]) for row in log] == [
        ("0", "7", "0.001"),
        ("1", "14", "0.0005"),
        ("2", "21", "0.00025"),
    ]
    errors = [float(row["train_mae"]) for row in log]
    assert errors[0] > errors[1] > errors[2]
    assert result["val_mae"] == min(float(row["val_mae"]) for row in log)
    assert 0 < result["test_mae"] < 1000
    assert result["unit"] == "meV"
    assert json.loads((out / "result.json").read_text()) == result


@torch.no_grad()
def test_saved_network_has_the_test_error(run, data):
    """That of result.json, without escnn's modules."""
    out, result = run
    network = load(out / "model.safetensors")
    assert not network.training
    batch = data.test.__getitems__(range(len(data.test)))
    predicted = result["mean"] + result["std"] * network(batch).double()
    assert float((predicted - batch.y).abs().mean()) == pytest.approx(result["test_mae"], rel=1e-4)
    assert result["parameters"] == sum(parameter.numel() for parameter in network.parameters())


def test_figure_of_the_ablation(tmp_path, capsys, monkeypatch):
    arguments = f"figure qm9 --edge-attr none bonds --limit 64 --epochs 2 --runs {tmp_path} --out {tmp_path}/qm9.png"
    main(arguments.split())
    printed = capsys.readouterr().out
    for name in ("none", "bonds"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["options"]["edge_attr"] == name
        cells = f"{result['parameters']:,} | {result['test_mae']:.2f} meV | {result['val_mae']:.2f} meV"
        assert f"| {name} | {cells} |" in printed
    assert (tmp_path / "qm9.png").stat().st_size > 10_000
    monkeypatch.setattr(figure_qm9, "train_qm9", None)  # what is there is read
    main(arguments.split())
    assert printed.endswith(capsys.readouterr().out)
    with pytest.raises(ValueError, match="seed: expected 0 as in"):
        main([*arguments.split(), "--seed", "1"])


def test_same_seed_same_result(run, tmp_path, monkeypatch):
    monkeypatch.setattr(lightning, "MILESTONES", (1, 2))
    again = train_qm9(QM9Options(out=str(tmp_path / "a"), **SMALL))
    assert again["test_mae"] == run[1]["test_mae"]
    assert rows(tmp_path / "a") == rows(run[0])
    other = train_qm9(QM9Options(out=str(tmp_path / "b"), seed=1, **SMALL))
    assert other["test_mae"] != run[1]["test_mae"]


@pytest.mark.parametrize(("epoch", "step"), [(0, 2), (2, 3)])
def test_interrupted_and_resumed(run, tmp_path, monkeypatch, capsys, epoch, step):
    monkeypatch.setattr(lightning, "MILESTONES", (1, 2))
    training_step = Regressor.training_step

    def interrupted(self, batch, index):
        if (self.current_epoch, index) == (epoch, step):
            raise KeyboardInterrupt
        return training_step(self, batch, index)

    monkeypatch.setattr(Regressor, "training_step", interrupted)
    with pytest.raises(SystemExit):
        train_qm9(QM9Options(out=str(tmp_path), **SMALL))
    monkeypatch.setattr(Regressor, "training_step", training_step)
    assert f"Interrupted in epoch {epoch}" in capsys.readouterr().out
    assert len(rows(tmp_path)) == epoch
    resumed = train_qm9(QM9Options(out=str(tmp_path), resume=True, **SMALL))
    assert rows(tmp_path) == rows(run[0])
    assert resumed["test_mae"] == run[1]["test_mae"]
    states = [torch.load(out / "last.ckpt", weights_only=True)["state_dict"] for out in (tmp_path, run[0])]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = f"train qm9 --target mu --limit 40 --epochs 1 --blocks 0 --norm none --edge-attr bonds --out {out}"
    main([*arguments.split(), "--num-threads", "1"])
    captured = capsys.readouterr()
    result = json.loads((out / "result.json").read_text())
    assert f"test MAE mu: {result['test_mae']:.4f} D" in captured.out
    assert "deprecated" not in captured.err
    assert "Epoch 0: 100%" in captured.out + captured.err
    with pytest.raises(ValueError, match=r"out: expected a folder without a run, .*--resume.*--overwrite"):
        main(arguments.split())
    (out / "last.ckpt").unlink()
    results = sorted(path.name for path in out.iterdir())
    with pytest.raises(ValueError, match=r"without a run, got best.ckpt, .*out. Use --overwrite to discard it, or"):
        main(arguments.split())
    assert sorted(path.name for path in out.iterdir()) == results
    main([*arguments.split(), "--overwrite", "--no-progress"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, r"seed: expected 0 as in the run to resume, got 3"),
        ({"target": "lumo"}, r"target: expected 'homo' as in the run to resume, got 'lumo'"),
        ({"limit": None}, r"limit: expected 200 as in the run to resume, got None"),
        ({"out": "nowhere"}, r"resume: expected a checkpoint .*nowhere/last.ckpt"),
    ],
)
def test_resume_of_another_run(run, changes, message):
    options = {**SMALL, "out": str(run[0]), **changes}
    with pytest.raises(ValueError, match=message):
        train_qm9(QM9Options(resume=True, **options))


def test_cosine_schedule(tmp_path):
    options = {**SMALL, "limit": 64, "blocks": 0, "schedule": "cosine"}
    train_qm9(QM9Options(out=str(tmp_path), **options))
    rates = [float(row["lr"]) for row in rows(tmp_path)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 2.5e-4])  # (1 + cos(π epoch / 3)) / 2
    for name, other in (("epochs", 4), ("schedule", "steps")):
        with pytest.raises(ValueError, match=rf"{name}: expected .* as in the run to resume, got {other!r}"):
            train_qm9(QM9Options(out=str(tmp_path), resume=True, **{**options, name: other}))


def test_onecycle_clip_and_frozen_norms(tmp_path, monkeypatch):
    steps = []  # of every step: epoch, norm of the gradient, learning rate, running statistics

    class Watched(Regressor):
        def on_train_batch_end(self, *_):
            norm = torch.cat([p.grad.reshape(-1) for p in self.parameters()]).norm().item()
            rate = self.optimizers().param_groups[0]["lr"]
            running = [t.clone() for name, t in self.model.named_buffers() if "running" in name]
            steps.append((self.current_epoch, norm, rate, running))

    monkeypatch.setattr(lightning, "Regressor", Watched)
    options = {"schedule": "onecycle", "lr": 4e-3, "clip": 0.1, "freeze_norms": 1, "epochs": 3, "batch_size": 4}
    train_qm9(QM9Options(out=str(tmp_path), **{**SMALL, "limit": 160, **options}))
    epochs, norms, rates, running = zip(*steps, strict=True)
    assert len(steps) == 3 * 40
    assert max(norms) == pytest.approx(options["clip"], rel=1e-4)  # measured: 1e-5, by which torch stays below
    assert rates.index(max(rates)) in (2, 3)  # 3 % of 120 steps
    assert max(rates) == pytest.approx(options["lr"], rel=0.05)
    assert rates[-1] < 1e-6
    last = [r for epoch, r in zip(epochs, running, strict=True) if epoch == 0][-1]
    for epoch, found in zip(epochs, running, strict=True):
        kept = all(map(torch.equal, found, last))
        assert kept == (epoch > 0 or found is last)


def test_start_with_the_network_of_another_run(run, tmp_path):
    """Steps that change nothing: the first epoch's errors are those with which the other run ended."""
    start = tmp_path / "start.safetensors"
    start.write_bytes((run[0] / "model.safetensors").read_bytes())
    options = {**SMALL, "start": str(start), "lr": 1e-12, "freeze_norms": 0, "epochs": 1, "out": str(tmp_path / "a")}
    result = train_qm9(QM9Options(**options))
    # Measured: equal; 1e-12 is below half a unit in the last place of most weights.
    for error in ("val_mae", "test_mae"):
        assert result[error] == pytest.approx(run[1][error], rel=1e-6)
    earlier = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match=r"blocks.0.conv1.bias: expected shape \(4,\), got \(8,\). Build the module"):
        train_qm9(QM9Options(**{**options, "channels": 4}, overwrite=True))
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == earlier  # not discarded
    start.unlink()
    with pytest.raises(ValueError, match=r"start: expected the model.safetensors of a run, got no file .*start"):
        QM9Options(**options)
    resumed = train_qm9(QM9Options(**options, resume=True))  # its checkpoint holds the weights
    assert resumed["test_mae"] == result["test_mae"]
    with pytest.raises(ValueError, match=r"start: expected '.*start.safetensors' as in the run to resume, got None"):
        train_qm9(QM9Options(**{**options, "start": None}, resume=True))


def test_damaged_checkpoint(run, tmp_path):
    (tmp_path / "last.ckpt").write_bytes((run[0] / "last.ckpt").read_bytes()[:10_000])
    with pytest.raises(ValueError, match=r"last.ckpt: expected a checkpoint of a training run.*--overwrite"):
        train_qm9(QM9Options(out=str(tmp_path), resume=True, **SMALL))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("epochs", 0, "epochs: expected at least 1, got 0"),
        ("batch_size", 1, "batch_size: expected at least 2, got 1"),
        ("limit", 1, "limit: expected at least 2, got 1"),
        ("target", "x", "target: expected one of"),
        ("edge_attr", "x", "edge_attr: expected one of"),
        ("norm", "x", "norm: expected one of"),
        ("backend", "x", "backend: expected one of"),
        ("schedule", "x", "schedule: expected one of"),
        ("clip", 0.0, "clip: expected a positive number, or None, got 0.0"),
        ("freeze_norms", -1, "freeze_norms: expected at least 0, got -1"),
        ("kernel_channels", 0, "kernel_channels: expected at least 1, got 0"),
    ],
)
def test_wrong_option(option, value, message):
    with pytest.raises(ValueError, match=message):
        QM9Options(**{option: value})


@pytest.mark.parametrize(("module", "extra"), [("lightning.pytorch", "train"), ("escnn", "escnn")])
def test_missing_extra(tmp_path, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    message = rf"{package}: expected an installed package, got none. Run: pip install implicit_steer\[{extra}\]"
    with pytest.raises(RuntimeError, match=message):
        train_qm9(QM9Options(out=str(tmp_path), **SMALL))


def test_shuffling():
    sampler = EpochShuffle(50, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_no_training_batch_of_one_molecule(data):
    assert [batch.num_graphs for batch in loader(data.train, 199, shuffle_seed=0)] == [199]
    assert [batch.num_graphs for batch in loader(data.train, 199)] == [199, 1]


def double(batch):
    """``batch`` in float64."""
    return replace(batch, x=batch.x.double(), pos=batch.pos.double(), edge_attr=batch.edge_attr.to(torch.float64))


@pytest.fixture(scope="module")
def model(data):
    """A float64 model in evaluation, with the statistics of 32 molecules: its predictions differ between them."""
    torch.manual_seed(0)
    model = QM9Net(blocks=1).double()
    batch = double(data.train.__getitems__(range(32)))
    with torch.no_grad():
        for _ in range(30):  # momentum 0.1: the statistics are there to 5 %
            model(batch)
        model.eval()
        assert model(batch).std() > 0.02
    return model


@torch.no_grad()
def test_molecules_of_a_batch_do_not_meet(data, model):
    together = model(double(data.train.__getitems__([0, 1, 2])))
    alone = torch.cat([model(double(data.train[i])) for i in range(3)])
    # float64 rounding of sums in another order
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-11)


@torch.no_grad()
def test_prediction_is_invariant(data, model):
    batch = double(data.train.__getitems__(range(8)))
    base = model(batch)
    group = gspaces.flipRot3dOnR3().fibergroup

    def error(element):
        rotation = torch.tensor(group.standard_representation()(element))
        moved = replace(batch, pos=batch.pos @ rotation.T + 0.3)
        return float((model(moved) - base).detach().norm() / base.detach().norm())

    # The grid of the node activations is closed under the icosahedral group: only float64 rounding remains.
    assert max(error(element) for element in list(group.testing_elements())[::10]) < 1e-12
    # Elsewhere its 30 points leave an error: 1.5e-4 measured.
    assert max(error(group.sample()) for _ in range(5)) < 1e-3


@torch.no_grad()
def test_tensor_prediction_turns_with_the_molecule(data):
    torch.manual_seed(0)
    model = QM9Net(blocks=1, channels=4, tensors=4).double()
    batch = double(data.train.__getitems__(range(8)))
    for _ in range(30):  # momentum 0.1: the statistics are there to 5 %
        model(batch)
    base = model.eval()(batch)
    assert base.shape == (8, 3, 3)
    torch.testing.assert_close(base, base.mT)
    traceless = base - base.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(3, dtype=base.dtype)
    assert traceless.norm() > 1e-2 * base.norm()
    group = gspaces.flipRot3dOnR3().fibergroup

    def error(element):
        turn = torch.tensor(group.standard_representation()(element))
        found = model(replace(batch, pos=batch.pos @ turn.T))
        return float((found - turn @ base @ turn.T).norm() / traceless.norm())

    # As of the energies: the grid of the node activations is closed under the icosahedral group.
    assert max(error(element) for element in list(group.testing_elements())[::10]) < 1e-12
    assert max(error(group.sample()) for _ in range(5)) < 1e-2
    with pytest.raises(ValueError, match=r"gspace: expected one of O\(3\) or SO\(3\), for tensors"):
        QM9Net(gspaces.rot2dOnR3(), tensors=1)


def test_tensors_are_compared_along_the_best_axes():
    rotations = cube_rotations()
    assert rotations.shape == (24, 3, 3)
    assert len({tuple(r.flatten().tolist()) for r in rotations}) == 24
    assert torch.equal(rotations @ rotations.mT, torch.eye(3).expand(24, 3, 3))
    assert bool((torch.linalg.det(rotations) > 0).all())
    module = AxesRegressor(torch.nn.Identity(), torch.eye(3), 2.0, 1e-3, {})
    y = torch.randn(5, 3, 3)
    y = y + y.mT
    predicted = rotations[[0, 5, 9, 13, 20]] @ (y + 0.01 * torch.eye(3)) @ rotations[[0, 5, 9, 13, 20]].mT
    nearest = module.target(y, predicted)
    torch.testing.assert_close(predicted - nearest, 0.01 * torch.eye(3).expand(5, 3, 3), atol=1e-6, rtol=0)


def test_training_on_tensors(tmp_path, capsys):
    arguments = f"train qm9 --target polarizability --limit 64 --epochs 2 --blocks 0 --channels 2 --out {tmp_path}"
    main([*arguments.split(), "--num-threads", "1", "--no-progress"])
    result = json.loads((tmp_path / "result.json").read_text())
    printed = capsys.readouterr().out
    assert f"test MAE polarizability: {result['test_mae']:.4f} bohr^3" in printed
    assert f"turn with them to {result['test_equivariance_error']:.1e}" in printed
    assert 0 < result["test_equivariance_error"] < 1e-5  # measured: 9e-8, in float32; no hidden activation, no grid
    errors = [float(row["train_mae"]) for row in rows(tmp_path)]
    assert errors[1] < errors[0] < 100


@torch.no_grad()
def test_weights_loaded_in_evaluation_mode_count(data, model):
    other = QM9Net(blocks=1).double().eval()
    batch = double(data.train.__getitems__(range(8)))
    assert not torch.equal(other(batch), model(batch))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch), model(batch))


def with_escnns_modules(model):
    """A copy of the network whose node activations and batch norms are escnn's own."""
    other = QM9Net(blocks=len(model.blocks)).double()
    gspace, channels = other.activation.in_type.gspace, len(other.activation.in_type)
    irreps = list(dict.fromkeys(other.activation.in_type.representations[0].irreps))
    activation = QuotientFourierELU(gspace, (False, False, -1), channels, irreps, type="ico", inplace=False).double()
    other.activation = activation
    for block in other.blocks:
        block.activation = activation
        block.norm1, block.norm2 = (IIDBatchNorm1d(activation.in_type).double() for _ in range(2))
    other.load_state_dict(model.state_dict())
    return other


def test_node_modules_are_escnns(data):
    torch.manual_seed(0)
    ours = QM9Net(blocks=2).double()
    theirs = with_escnns_modules(ours)
    for step, training in enumerate((True, True, False)):
        batch = double(data.train.__getitems__(range(8 * step, 8 * step + 8)))
        results = []
        for model in (ours, theirs):
            model.train(training).zero_grad()
            out = model(batch)
            out.square().sum().backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
            results.append((out, gradients, *model.state_dict().values()))
        # escnn keeps A, A⁻ and its projections in float32
        assert all(relative(*pair) <= 1e-6 for pair in zip(*results, strict=True) if bool(pair[1].any()))
    assert list(ours.state_dict()) == list(theirs.state_dict())
