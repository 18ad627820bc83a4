"""The classifier of clouds: invariance of its logits for each of the eight groups, deployment; its training command.

Tolerances of invariance, relative, float64, measured over six networks: 2e-16 where the groups are finite, 2e-8 with
rotations about an axis and 8e-5 (4e-6 with lebedev-110) with all rotations, both due to the samples of the node
activations. Changes that are not in the group move the logits by 1e-3 or more.
"""

import csv
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import implicit_steer as ist
from implicit_steer.__main__ import main
from implicit_steer.experiments.data import ModelNet
from implicit_steer.experiments.figures.groups import NAMES
from implicit_steer.experiments.models.modelnet import SPACES, ModelNetNet
from implicit_steer.experiments.train import ModelNetOptions, train_modelnet
from implicit_steer.experiments.train.classifier import SMOOTHING, Classifier
from implicit_steer.experiments.train.modelnet import GROUPS
from implicit_steer.layers.clouds import reach
from implicit_steer.lowering import clebsch_gordan
from implicit_steer.testing.cases import SPACES as CASE_SPACES

SIZES = {"points": 32, "neighbours": 8, "levels": 2, "width": 12}
BOUNDS = {"m": 1e-14, "inv": 1e-14, "so3": 1e-3, "o3": 1e-3}


def network(group, **options):
    """Weights moved off their initial values, running statistics of one batch; evaluation mode; and that batch."""
    net = ModelNetNet(5, SPACES[group](), kernel_channels=4, invariants=16, **SIZES, **options).double()
    pos = torch.randn(3, 32, 3, dtype=torch.float64)
    pos /= 1.1 * pos.norm(dim=2, keepdim=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        net(pos)
    return net.eval(), pos


def change(net, pos, matrix):
    """Relative change of the logits."""
    with torch.no_grad():
        before, after = net(pos), net(pos @ torch.as_tensor(matrix).T)
    return float((after - before).norm() / before.norm())


def test_the_groups_have_one_order():
    assert tuple(SPACES) == GROUPS == tuple(NAMES)


@pytest.mark.parametrize("group", GROUPS)
def test_logits_are_invariant(group):
    net, pos = network(group)
    gspace = SPACES[group]()
    for _ in range(6):
        assert change(net, pos, gspace.basespace_action(gspace.fibergroup.sample())) < BOUNDS.get(group, 2e-7)
    outside = np.diag([1, 1, -1.0]) if group == "so3" else np.diag([1, 1, 1.2])
    if group not in ("so3", "o3"):
        outside = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
        outside[:, 0] *= np.linalg.det(outside)  # a rotation about some other axis
    assert change(net, pos, outside) > 1e-3


def test_more_samples_are_more_invariant():
    net, pos = network("so3", node_sampling="lebedev-110")
    element = SPACES["so3"]().fibergroup.sample()
    assert change(net, pos, SPACES["so3"]().basespace_action(element)) < 5e-5


def test_logits_depend_on_every_point_but_not_on_the_rest_of_the_batch():
    net, pos = network("so2")
    pos.requires_grad_()
    logits = net(pos)
    (gradient,) = torch.autograd.grad(logits[1].sum(), pos)
    assert (gradient[1, :8].norm(dim=1) > 0).all()  # those that every level keeps; others may have no edge
    assert not gradient[[0, 2]].any()
    torch.testing.assert_close(net(pos[1:2]), logits[1:2], rtol=1e-12, atol=1e-12)


def test_levels_keep_the_first_points():
    net, pos = network("inv")
    seen = []
    for conv in net.convolutions:
        conv.register_forward_hook(lambda module, given, y: seen.append((given, y.tensor.shape[0])))
    net(pos)
    assert [rows for _, rows in seen] == [3 * 16, 3 * 8]
    (x, graph, edge_delta), _ = seen[1]
    assert (graph.num_src, graph.num_dst, graph.num_edges) == (3 * 16, 3 * 8, 3 * 8 * 8)
    chosen = torch.arange(48).view(3, 16)[:, :8].flatten()
    delta = x.coords[chosen[graph.dst]] - x.coords[graph.src]
    torch.testing.assert_close(edge_delta, delta / reach(16, 8))
    torch.testing.assert_close(x.coords, pos[:, :16].flatten(0, 1))


@pytest.mark.parametrize("group", ["so2-m", "o3"])
def test_saved_and_loaded(group, tmp_path):
    net, pos = network(group)
    ist.save(net, tmp_path / "net.safetensors")
    loaded = ist.load(tmp_path / "net.safetensors")
    torch.testing.assert_close(loaded(pos), net(pos), rtol=1e-12, atol=1e-12)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"points: expected at least 16 for 3 levels, got 15"):
        ModelNetNet(5, SPACES["so2"](), points=15)
    with pytest.raises(ValueError, match=r"gspace: expected a GSpace of R³"):
        ModelNetNet(5, CASE_SPACES["C4 on R2"]())
    net, pos = network("inv")
    with pytest.raises(ValueError, match=r"pos: expected shape \(B, 32, 3\), got \(3, 31, 3\)"):
        net(pos[:, :31])


# ---- products of irreps


@pytest.mark.parametrize("space", ["cone O(2) on R3", "cylinder on R3", "full cylinder on R3"])
def test_products_of_irreps(space):
    group = CASE_SPACES[space]().fibergroup
    irreps = clebsch_gordan._irreps(group, 3)
    for m, n in [(irreps[1], irreps[-1]), (irreps[-1], irreps[-1]), (irreps[-2], irreps[2])]:
        product = clebsch_gordan.product(group, m, n)
        assert sum(count * group.irrep(*j).size for j, count in product) == group.irrep(*m).size * group.irrep(*n).size
        for j, count in product:
            c = clebsch_gordan.coefficients(group, m, n, j)
            columns = c.reshape(c.shape[0] * c.shape[1], -1)
            np.testing.assert_allclose(columns.T @ columns, np.eye(columns.shape[1]), atol=1e-12)
            g = group.sample()
            turned = np.kron(group.irrep(*m)(g), group.irrep(*n)(g)) @ columns
            np.testing.assert_allclose(turned, columns @ np.kron(np.eye(count), group.irrep(*j)(g)), atol=1e-12)


def test_a_product_names_each_irrep_once():
    group = CASE_SPACES["cone O(2) on R3"]().fibergroup
    assert clebsch_gordan.product(group, (1, 2), (1, 2)) == [((0, 0), 1), ((1, 0), 1), ((1, 4), 1)]
    assert clebsch_gordan.coefficients(group, (1, 2), (1, 2), (1, 1)).shape == (2, 2, 0, 2)


# ---- training


SMALL = {**SIZES, "copies": 2, "epochs": 3, "batch_size": 8, "group": "inv", "progress": False, "num_threads": 1}


@pytest.fixture
def options(archive, tmp_path):
    """Makes the options of a run on the tiny archive."""
    threads = torch.get_num_threads()
    cache = tmp_path / "cache"
    yield lambda **more: ModelNetOptions(**{"data": str(archive), "cache": str(cache), **SMALL, **more})
    torch.set_num_threads(threads)


def rows(out):
    """The log without the clock."""
    with (out / "log.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_training_interrupted_and_resumed(options, tmp_path, monkeypatch):
    whole = train_modelnet(options(out=str(tmp_path / "whole")))
    assert whole["meshes"] == {"train": 22, "val": 2, "test": 6}
    assert json.loads((tmp_path / "whole" / "result.json").read_text()) == whole
    losses = [float(row["train_loss"]) for row in rows(tmp_path / "whole")]
    assert losses[2] < losses[0]
    training_step = Classifier.training_step

    def interrupted(self, batch, index):
        if (self.current_epoch, index) == (1, 1):
            raise KeyboardInterrupt
        return training_step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", interrupted)
    with pytest.raises(SystemExit):
        train_modelnet(options(out=str(tmp_path / "parts")))
    monkeypatch.setattr(Classifier, "training_step", training_step)
    resumed = train_modelnet(options(out=str(tmp_path / "parts"), resume=True))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert resumed["test_accuracy"] == whole["test_accuracy"]
    with pytest.raises(ValueError, match=r"group: expected 'inv' as in the run to resume, got 'm'"):
        train_modelnet(options(out=str(tmp_path / "parts"), resume=True, group="m"))


def test_metrics(archive, tmp_path):
    data = ModelNet(archive, points=32, copies=2, cache=tmp_path, progress=False)
    net = ModelNetNet(2, SPACES["inv"](), **SIZES)
    module = Classifier(net, 6, 2, 1e-3, 0, {})
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    batch = data.train.__getitems__(range(8))
    net.eval()
    loss = module.training_step(batch, 1)
    torch.testing.assert_close(loss, cross_entropy(net(batch.pos), batch.y, label_smoothing=SMOOTHING))
    with torch.no_grad():
        module.on_test_epoch_start()
        for start in (0, 5, 10):
            module.test_step(data.test.__getitems__(range(start, min(start + 5, 12))), start)
        module.on_test_epoch_end()
        everything = data.test.__getitems__(range(12))
        probability = net(everything.pos).softmax(1)
    hits = (probability.argmax(1) == everything.y).float().mean()
    assert logged["sample_accuracy"] == pytest.approx(float(hits))
    averages = probability.view(2, 6, 2).mean(0)
    assert logged["test_accuracy"] == pytest.approx(float((averages.argmax(1) == everything.y[:6]).float().mean()))
    net.train()
    torch.testing.assert_close(
        cross_entropy(net(batch.pos), batch.y, label_smoothing=SMOOTHING).isfinite(), loss.isfinite()
    )


def test_comparison_of_groups(options, tmp_path, capsys):
    out = tmp_path / "groups"
    arguments = ["figure", "groups", "--data", options().data, "--cache", options().cache, "--runs", str(out)]
    sizes = "--points 32 --neighbours 4 --levels 1 --width 6 --epochs 1 --copies 2 --seeds 2 --circle 8 --batch-size 8"
    arguments += [*sizes.split(), "--groups", "inv", "so2"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "22 meshes for training, 2 for validation, 6 for" in printed
    results = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/result.json")}
    assert results.keys() == {"inv-seed0", "inv-seed1", "so2-seed0", "so2-seed1"}
    assert [results[f"{name}-seed1"]["options"]["sampling"] for name in ("inv", "so2")] == ["auto", "exact-8"]
    values = 100 * np.array([results[f"so2-seed{seed}"]["test_accuracy"] for seed in (0, 1)])
    row = next(line for line in printed.splitlines() if line.startswith("| SO(2) |"))
    assert f"| {values.mean():.1f} ± {values.std(ddof=1):.1f} |" in row
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    main(arguments)  # everything is there
    assert capsys.readouterr().out == printed
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    with pytest.raises(ValueError, match=r"epochs: expected 1 as in .*result\.json, got 2.*--runs"):
        main([*arguments, "--epochs", "2"])
