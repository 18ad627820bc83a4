"""Pictures: kernels on a slice, times as bars, learning curves, convergence, lines on logarithmic axes, energies of
molecular dynamics. Each returns a matplotlib ``Figure``.

The figures are made without pyplot: they need no display, and nothing has to be closed. Needs the extra ``train``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch

from .._check import load_extra, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..nn import ImplicitKernel

Entry = tuple[int | tuple[int, int], int]
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#f0e442")
_ARROWS = 15  # arrows along each side of a slice
_INK, _GRID = "#333333", "#dddddd"


def _figure(width: float, height: float) -> Figure:
    return load_extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", dpi=150)


def _plain_axes(axes: Axes, grid: str) -> None:
    """No frame at the top and right, a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, which="major", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _axes_of(plane: str, dim: int) -> list[int]:
    """The indices of the two axes."""
    names = "xyz"[:dim]
    ok = len(plane) == 2 and plane[0] != plane[1] and set(plane) <= set(names)
    require(ok, "plane", f"two different axes among {', '.join(names)}", repr(plane))
    return [names.index(axis) for axis in plane]


def kernel_slice(
    kernel: ImplicitKernel,
    *,
    plane: str = "xy",
    extent: float = 1.5,
    resolution: int = 81,
    attributes: torch.Tensor | None = None,
    entries: Mapping[str, Entry] | None = None,
    title: str = "",
) -> Figure:
    """Entries K[o, i] of a kernel on a plane through the origin, all in one colour scale.

    Args:
        kernel: its value at (P, dim) positions and (P, A) attributes is (P, C_out, C_in).
        plane: the two axes that are shown, ``"xy"`` (the only one in R²), ``"xz"``, ``"yz"``, ...; the other
            coordinate is 0.
        extent: half the side of the square, in the unit of the positions.
        resolution: points along each side.
        attributes: (A,), the same at every point; None for a kernel without attributes.
        entries: a caption for each panel → (o, i), a heat map of K[o, i]; or ((o₁, o₂), i), a vector field with the
            components K[o₁, i] along the first and K[o₂, i] along the second axis, over its length. None: the first
            four rows of the first three columns.
        title: above the panels.

    Raises:
        ValueError: a plane that is not two different axes of the kernel's space.
    """
    dim, n_out, n_in = kernel.plan.frame.dim, kernel.plan.out_size, kernel.plan.in_size
    shown = _axes_of(plane, dim)
    if entries is None:
        entries = {f"K[{o}, {i}]": (o, i) for i in range(min(3, n_in)) for o in range(min(4, n_out))}
    require(len(entries) > 0, "entries", "at least one panel", "none")
    ticks, values = _on_slice(kernel, shown, extent, resolution, attributes)

    columns = min(4, len(entries))
    rows = -(-len(entries) // columns)
    figure = _figure(2.5 * columns + 1.1, 2.5 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    limit = max(np.abs(_component(values, entry)).max() for entry in entries.values()) or 1.0
    image = None
    for panel, (caption, entry) in zip(axes.flat, entries.items(), strict=False):
        image = panel.imshow(
            _component(values, entry),
            origin="lower",
            extent=(-extent, extent, -extent, extent),
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
        )
        if isinstance(entry[0], tuple):
            _arrows(panel, ticks, values, entry)
        panel.set_title(caption, fontsize=9)
    for panel in axes.flat[len(entries) :]:
        panel.set_visible(False)
    axes[0, 0].set(xticks=(-extent, 0, extent), yticks=(-extent, 0, extent))  # shared by all panels
    for panel in axes[-1]:
        panel.set_xlabel(plane[0])
    for panel in axes[:, 0]:
        panel.set_ylabel(plane[1])
    figure.colorbar(image, ax=axes, shrink=0.9, label="K (vector fields: length)")
    figure.suptitle(title, fontsize=11)
    return figure


def _on_slice(kernel, axes: list[int], extent: float, resolution: int, attributes) -> tuple[np.ndarray, np.ndarray]:
    """(R,) ticks, and K (R, R, C_out, C_in): rows along the second axis, columns along the first."""
    width = kernel.shell_width
    ticks = torch.linspace(-extent, extent, resolution, dtype=torch.float64)
    pos = torch.zeros(resolution, resolution, kernel.plan.frame.dim, dtype=torch.float64)
    pos[..., axes[0]], pos[..., axes[1]] = ticks, ticks[:, None]
    pos = pos.flatten(0, 1).to(width)
    if attributes is not None:
        attributes = attributes.to(width).expand(len(pos), -1)
    with torch.no_grad():
        values = kernel(pos, attributes, batch_statistics=False)
    return ticks.numpy(), values.double().cpu().numpy().reshape(resolution, resolution, *values.shape[1:])


def _component(values: np.ndarray, entry: Entry) -> np.ndarray:
    """(R, R): K[o, i], or the length of (K[o₁, i], K[o₂, i])."""
    out, into = entry
    if isinstance(out, tuple):
        return np.linalg.norm(values[:, :, list(out), into], axis=-1)
    return values[:, :, out, into]


def _arrows(panel: Axes, ticks: np.ndarray, values: np.ndarray, entry: Entry) -> None:
    step = max(1, len(ticks) // _ARROWS)
    chosen = np.arange(len(ticks) % step // 2, len(ticks), step)
    (first, second), into = entry
    sparse = values[np.ix_(chosen, chosen)]
    panel.quiver(ticks[chosen], ticks[chosen], sparse[..., first, into], sparse[..., second, into], color=_INK)


def time_bars(times: Mapping[str, Mapping[str, float]], *, unit: str = "ms", title: str = "") -> Figure:
    """Horizontal bars of ``times[group][label]``: a group per measure, a colour per label, values at the ends."""
    labels = list(dict.fromkeys(label for group in times.values() for label in group))
    height = 0.8 / max(1, len(labels))
    figure = _figure(7.5, 1.3 + max(1, len(times)) * (0.3 + 0.24 * len(labels)))
    axes = figure.subplots()
    for n, label in enumerate(labels):
        here = [(row, group[label]) for row, group in enumerate(times.values()) if label in group]
        at = [row + (n - (len(labels) - 1) / 2) * height for row, _ in here]
        bars = axes.barh(at, [t for _, t in here], 0.92 * height, label=label, color=_COLOURS[n % len(_COLOURS)])
        axes.bar_label(
            bars, [f"{t:.3g}" if t < 100 else f"{t:,.0f}" for _, t in here], padding=3, fontsize=8, color=_INK
        )
    axes.set_yticks(range(len(times)), list(times))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"time / {unit}")
    _plain_axes(axes, "x")
    axes.set_title(title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=min(2, len(labels)), frameon=False, fontsize=9)
    return figure


def learning_curve(
    epochs: Sequence[int], errors: Mapping[str, Sequence[float]], *, unit: str, title: str = ""
) -> Figure:
    """``errors[name]``, one value per epoch, for example of the training and of the validation set."""
    locator = load_extra("matplotlib.ticker").MaxNLocator(integer=True)
    figure = _figure(6, 4)
    axes = figure.subplots()
    for (name, values), colour in zip(errors.items(), cycle(_COLOURS), strict=False):
        axes.plot(epochs, values, marker="o", markersize=4, color=colour, label=name)
    axes.xaxis.set_major_locator(locator)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"mean absolute error / {unit}")
    axes.set_ylim(bottom=0)
    _plain_axes(axes, "both")
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False)
    return figure


def _log_lines(curves: Mapping[str, Mapping[float, float]], width: float, height: float) -> tuple[Figure, Axes]:
    figure = _figure(width, height)
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), cycle(_COLOURS), strict=False):
        axes.loglog(list(curve), list(curve.values()), marker="o", markersize=4, color=colour, label=name)
    _plain_axes(axes, "both")
    return figure, axes


def log_lines(
    curves: Mapping[str, Mapping[float, float]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    notes: Mapping[str, str] | None = None,
) -> Figure:
    """``curves[name]``: x → y, both axes logarithmic; ``notes[name]``: written where that curve ends, for example why
    it does."""
    figure, axes = _log_lines(curves, 7, 4.5)
    for line in axes.lines:
        if text := (notes or {}).get(line.get_label()):
            style = {"fontsize": 8, "color": line.get_color(), "va": "center", "textcoords": "offset points"}
            axes.annotate(text, tuple(line.get_xydata()[-1]), (6, 0), **style)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    return figure


def error_bars(
    curves: Mapping[str, Mapping[float, Sequence[float]]], *, xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """``curves[name]``: x → the values found there. Drawn are their mean and standard deviation, at equal
    distances for all x; the y axis is logarithmic."""
    figure = _figure(6.5, 4.2)
    axes = figure.subplots()
    places = sorted({x for curve in curves.values() for x in curve})
    for n, ((name, curve), colour) in enumerate(zip(curves.items(), cycle(_COLOURS), strict=False)):
        shift = 0.12 * (n - (len(curves) - 1) / 2)  # side by side
        at = [places.index(x) + shift for x in curve]
        values = [np.asarray(found) for found in curve.values()]
        spread = [found.std(ddof=1) if len(found) > 1 else 0.0 for found in values]
        style = {"color": colour, "label": name, "marker": "o", "markersize": 5, "capsize": 4, "linewidth": 1}
        axes.errorbar(at, [found.mean() for found in values], yerr=spread, **style)
    axes.set_yscale("log")
    axes.set_xticks(range(len(places)), [f"{x:g}" for x in places])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    _plain_axes(axes, "y")
    axes.legend(frameon=False)
    return figure


def convergence(
    counts: Sequence[int],
    errors: Mapping[str, Sequence[float]],
    *,
    xlabel: str = "samples",
    ylabel: str = "relative error",
    title: str = "",
    marks: Mapping[str, int] | None = None,
) -> Figure:
    """``errors[name]``, one value per entry of ``counts``, both axes logarithmic; ``marks``: vertical lines by name."""
    curves = {name: dict(zip(counts, values, strict=True)) for name, values in errors.items()}
    figure, axes = _log_lines(curves, 6.5, 4.2)
    for name, count in (marks or {}).items():
        axes.axvline(count, color=_INK, linestyle=":", linewidth=1, label=name)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    return figure


def equivariance_errors(errors: Mapping[str, Sequence[float]], *, title: str = "") -> Figure:
    """``errors[name]``: relative errors |f(gx) − g f(x)| / |f(x)| of random group elements; a row per name, a point per
    element, the axis logarithmic. Errors of 0 are drawn at 1e-17."""
    figure = _figure(6.5, 1.3 + 0.4 * len(errors))
    axes = figure.subplots()
    for row, (values, colour) in enumerate(zip(errors.values(), cycle(_COLOURS), strict=False)):
        at = row + np.linspace(-0.2, 0.2, len(values))
        axes.scatter(np.maximum(values, 1e-17), at, s=14, color=colour)
    axes.set_xscale("log")
    axes.set_yticks(range(len(errors)), list(errors))
    axes.set_ylim(len(errors) - 0.5, -0.5)
    axes.set_xlabel("relative equivariance error")
    _plain_axes(axes, "x")
    axes.set_title(title, fontsize=11)
    return figure


def graph(
    pos: torch.Tensor,
    edge_index: torch.Tensor,
    *,
    plane: str = "xy",
    values: torch.Tensor | None = None,
    title: str = "",
) -> Figure:
    """Points (N, 2 or 3) and their edges (2, E), seen along the axis that is not in ``plane``; ``values`` (N,) are the
    points' colours."""
    points, ends = pos.detach().cpu().numpy()[:, _axes_of(plane, pos.shape[1])], edge_index.cpu().numpy()
    segments = points[ends.T]  # (E, 2, 2)
    figure = _figure(5.2 if values is None else 6.0, 4.8)
    axes = figure.subplots()
    axes.add_collection(load_extra("matplotlib.collections").LineCollection(segments, colors="#bbbbbb", linewidths=0.6))
    style = {"color": _COLOURS[0]} if values is None else {"c": values.detach().cpu().numpy(), "cmap": "viridis"}
    dots = axes.scatter(*points.T, s=18, zorder=2, **style)
    if values is not None:
        figure.colorbar(dots, ax=axes, shrink=0.9, label="value")
    axes.set_aspect("equal")
    axes.set_xlabel(plane[0])
    axes.set_ylabel(plane[1])
    axes.set_title(title, fontsize=11)
    return figure


def parity(true: np.ndarray, predicted: Mapping[str, np.ndarray], *, label: str, title: str = "") -> Figure:
    """``predicted[name]`` against ``true``, of the same shape, and the line where they agree."""
    figure = _figure(5, 4.8)
    axes = figure.subplots()
    limits = float(true.min()), float(true.max())
    axes.plot(limits, limits, color=_INK, linewidth=0.8)
    for (name, values), colour in zip(predicted.items(), cycle(_COLOURS), strict=False):
        axes.scatter(true.ravel(), values.ravel(), s=6, alpha=0.5, color=colour, label=name)
    axes.set_xlabel(f"{label}, true")
    axes.set_ylabel(f"{label}, predicted")
    axes.set_title(title, fontsize=11)
    _plain_axes(axes, "both")
    axes.legend(frameon=False)
    return figure


def images(rows: Mapping[str, np.ndarray], *, title: str = "") -> Figure:
    """A row of grey images for every ``rows[name]`` (n, H, W)."""
    require(len(rows) > 0, "rows", "at least one row of images", "none")
    columns = max(len(pictures) for pictures in rows.values())
    figure = _figure(1.1 * columns + 1.2, 1.15 * len(rows) + 0.4)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
        for panel, picture in zip(line, pictures, strict=False):
            panel.imshow(picture, cmap="gray_r")
        for panel in line:
            panel.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=11)
    return figure


def energy_conservation(time_ps: np.ndarray, energies: np.ndarray) -> Figure:
    """Molecular dynamics at constant energy: above, how potential, kinetic and total energy change; below, the total
    alone.

    Args:
        time_ps: (T,).
        energies: (T, 3) potential, kinetic and total energy in eV per atom.
    """
    figure = _figure(6.5, 4.8)
    both, alone = figure.subplots(2, 1, sharex=True)
    change = energies - energies[:1]
    for name, values, colour in zip(("potential", "kinetic", "total"), change.T, _COLOURS, strict=False):
        both.plot(time_ps, 1e3 * values, color=colour, linewidth=0.8, label=name)
    both.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    both.set_ylabel("change (meV per atom)", color=_INK)
    alone.plot(time_ps, 1e6 * change[:, 2], color=_COLOURS[2], linewidth=0.6)
    alone.set_ylabel("total (µeV per atom)", color=_INK)
    alone.set_xlabel("time (ps)", color=_INK)
    for axes in (both, alone):
        _plain_axes(axes, "y")
    return figure
