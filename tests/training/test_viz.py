"""The pictures hold the data that they are given."""

import numpy as np
import pytest
import torch

from implicit_steer.nn import ImplicitKernel
from implicit_steer.testing import cases
from implicit_steer.training import viz


def make_kernel(space="O(3)", attributes="1 scalar"):
    torch.manual_seed(0)
    gspace = cases.SPACES[space]()
    kind = cases.fields(gspace, "2 scalar+vector")
    return ImplicitKernel(kind, kind, cases.fields(gspace, attributes), n_layers=2, n_channels=3)


def heat_maps(figure):
    return {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}


def png_size(figure, path):
    figure.savefig(path)
    return path.stat().st_size


@pytest.mark.parametrize("plane", ["xy", "zx"])
def test_a_slice_shows_the_kernel_on_that_plane(plane, tmp_path):
    kernel = make_kernel()
    kernel.train()
    figure = viz.kernel_slice(
        kernel, plane=plane, extent=1.2, resolution=5, attributes=torch.tensor([0.3]), entries={"one": (5, 1)}
    )
    shown = heat_maps(figure)["one"]
    first, second = ("xyz".index(axis) for axis in plane)
    pos = torch.zeros(5, 5, 3)
    for row, b in enumerate(np.linspace(-1.2, 1.2, 5)):
        for column, a in enumerate(np.linspace(-1.2, 1.2, 5)):
            pos[row, column, first], pos[row, column, second] = a, b
    expected = kernel(pos.view(-1, 3), torch.full((25, 1), 0.3), batch_statistics=False)[:, 5, 1].view(5, 5)
    np.testing.assert_allclose(shown, expected.detach().numpy(), atol=1e-6)
    assert np.abs(shown).max() > 1e-3
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == tuple(plane)
    assert kernel.training
    assert png_size(figure, tmp_path / "slice.png") > 5000


def test_a_vector_field_is_drawn_as_arrows_over_its_length():
    gspace = cases.SPACES["SO(2) on R2"]()
    scalar, vector = cases.fields(gspace, "1 scalar"), cases.fields(gspace, "1 vector")
    torch.manual_seed(0)
    kernel = ImplicitKernel(scalar, vector, n_layers=2, n_channels=3)
    figure = viz.kernel_slice(kernel, resolution=11, entries={"field": ((0, 1), 0)})
    arrows = figure.axes[0].collections[0]
    length = np.hypot(arrows.U, arrows.V).reshape(11, 11)
    np.testing.assert_allclose(length, heat_maps(figure)["field"], atol=1e-6)
    pos = torch.tensor(arrows.XY, dtype=torch.float32)
    values = kernel(pos, batch_statistics=False)[:, :, 0].detach().numpy()
    np.testing.assert_allclose(np.stack([arrows.U, arrows.V], 1), values, atol=1e-6)


def test_entries_default_to_the_first_ones_in_one_colour_scale():
    figure = viz.kernel_slice(make_kernel(attributes=None), resolution=7)
    shown = heat_maps(figure)
    assert len(shown) == 12
    assert {"K[0, 0]", "K[3, 2]"} <= set(shown)
    limits = {axes.images[0].get_clim() for axes in figure.axes if axes.images}
    assert len(limits) == 1
    low, high = limits.pop()
    assert high == -low == pytest.approx(max(np.abs(values).max() for values in shown.values()))


@pytest.mark.parametrize(("space", "plane"), [("O(3)", "xx"), ("O(3)", "x"), ("O(3)", "xw"), ("SO(2) on R2", "xz")])
def test_a_plane_is_two_axes_of_the_space(space, plane):
    with pytest.raises(ValueError, match=f"plane.*{plane}"):
        viz.kernel_slice(make_kernel(space, None), plane=plane)
    with pytest.raises(ValueError, match=f"plane.*{plane}"):
        viz.graph(torch.zeros(4, 3 if space == "O(3)" else 2), torch.zeros(2, 0, dtype=torch.int64), plane=plane)


def test_nothing_to_draw_is_named():
    with pytest.raises(ValueError, match="entries: expected at least one panel, got none"):
        viz.kernel_slice(make_kernel(attributes=None), entries={})
    with pytest.raises(ValueError, match="rows: expected at least one row of images, got none"):
        viz.images({})


def test_time_bars_are_as_long_as_the_times_and_say_them():
    times = {"forward": {"a": 3.0, "b": 1.5}, "backward": {"a": 1234.5}}
    figure = viz.time_bars(times, unit="s", title="a title")
    axes = figure.axes[0]
    drawn = {
        bars.get_label(): [(round(bar.get_y() + bar.get_height() / 2), bar.get_width()) for bar in bars]
        for bars in axes.containers
    }
    assert drawn == {"a": [(0, 3.0), (1, 1234.5)], "b": [(0, 1.5)]}
    assert [text.get_text() for text in axes.texts] == ["3", "1,234", "1.5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["forward", "backward"]
    assert axes.get_xlabel() == "time / s"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_learning_curve_draws_all_of_many():
    figure = viz.learning_curve([1, 2], {str(n): [n, n] for n in range(10)}, unit="meV")
    assert len(figure.axes[0].lines) == 10


def test_learning_curve_plots_every_epoch_from_zero():
    figure = viz.learning_curve([1, 2, 3], {"training": [5, 4, 3], "validation": [6, 5, 5]}, unit="meV")
    axes = figure.axes[0]
    assert lines(axes) == {"training": ([1, 2, 3], [5, 4, 3]), "validation": ([1, 2, 3], [6, 5, 5])}
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylabel() == "mean absolute error / meV"


def test_convergence_is_logarithmic_and_marks_counts():
    figure = viz.convergence([6, 10, 64], {"elu": [1e-2, 1e-3, 1e-5]}, marks={"default": 10})
    axes = figure.axes[0]
    drawn = lines(axes)
    assert drawn["elu"] == ([6, 10, 64], [1e-2, 1e-3, 1e-5])
    assert drawn["default"][0] == [10, 10]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["6", "10", "64"]


def test_log_lines_end_with_their_notes(tmp_path):
    curves = {"ours": {10: 1.0, 100: 3.0}, "theirs": {10: 5.0}}
    figure = viz.log_lines(curves, xlabel="edges", ylabel="time / s", notes={"theirs": "needs ~2 GB"})
    axes = figure.axes[0]
    assert lines(axes) == {"ours": ([10, 100], [1.0, 3.0]), "theirs": ([10], [5.0])}
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    (note,) = axes.texts
    assert (note.get_text(), note.xy) == ("needs ~2 GB", (10, 5.0))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("edges", "time / s")
    assert png_size(figure, tmp_path / "lines.png") > 5000


def test_error_bars(tmp_path):
    curves = {"one": {0.0: [1.0, 3.0], 5.0: [2.0, 2.0]}, "other": {0.0: [4.0]}}
    figure = viz.error_bars(curves, xlabel="k", ylabel="error")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "5"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("k", "error", "log")
    one, other = axes.containers
    assert [bars.get_label() for bars in axes.containers] == ["one", "other"]
    assert one.lines[0].get_ydata().tolist() == [2.0, 2.0]
    lengths = [float(bar[1, 1] - bar[0, 1]) for bar in one.lines[2][0].get_segments()]
    assert lengths == pytest.approx([2 * 2**0.5, 0.0])
    assert other.lines[0].get_xdata()[0] > one.lines[0].get_xdata()[0]
    assert png_size(figure, tmp_path / "bars.png") > 5000


def test_energy_conservation():
    energies = np.array([[-3.0, 0.5, -2.5], [-2.9, 0.4, -2.5], [-2.8, 0.3, -2.4999]])
    figure = viz.energy_conservation(np.array([0.0, 0.1, 0.2]), energies)
    both, alone = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in both.get_lines()}
    assert list(drawn) == ["potential", "kinetic", "total"]
    np.testing.assert_allclose(drawn["kinetic"], [0, -100, -200])
    np.testing.assert_allclose(alone.get_lines()[0].get_ydata(), [0, 0, 100], atol=1e-9)
    assert (both.get_ylabel(), alone.get_ylabel()) == ("change (meV per atom)", "total (µeV per atom)")


def test_equivariance_errors_are_drawn_row_by_row():
    figure = viz.equivariance_errors({"a": [1e-7, 2e-7], "b": [0.0, 1e-3, 1e-2]})
    axes = figure.axes[0]
    rows = [collection.get_offsets() for collection in axes.collections]
    np.testing.assert_allclose(rows[0][:, 0], [1e-7, 2e-7])
    np.testing.assert_allclose(rows[1][:, 0], [1e-17, 1e-3, 1e-2])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "relative equivariance error"


def test_a_graph_shows_points_and_edges_in_a_plane(tmp_path):
    pos, edges = torch.randn(5, 3), torch.tensor([[0, 1, 2], [1, 2, 4]])
    figure = viz.graph(pos, edges, plane="xz", values=torch.arange(5.0))
    axes = figure.axes[0]
    lines, dots = axes.collections
    np.testing.assert_allclose(dots.get_offsets(), pos[:, [0, 2]])
    np.testing.assert_allclose(dots.get_array(), np.arange(5))
    np.testing.assert_allclose(np.array(lines.get_segments()), pos[:, [0, 2]].numpy()[edges.T.numpy()])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "z")
    assert png_size(figure, tmp_path / "graph.png") > 5000


def test_parity_and_images_hold_their_data():
    true, predicted = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[0.1, 0.9], [2.0, 3.5]])
    axes = viz.parity(true, {"fit": predicted}, label="y").axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), np.stack([true.ravel(), predicted.ravel()], 1))
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 0], [3, 3]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("y, true", "y, predicted")
    pictures = np.random.default_rng(0).random((3, 4, 4))
    figure = viz.images({"one": pictures, "two": pictures[:2]})
    shown = [panel.images[0].get_array() for panel in figure.axes if panel.images]
    assert len(shown) == 5
    np.testing.assert_array_equal(shown[3], pictures[0])
    assert figure.axes[0].get_ylabel() == "one"
