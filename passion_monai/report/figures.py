"""Figures that show several methods side by side, for the report page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from passion_monai.evaluation.figures import GREY, LIGHT_GREY, PREFERENCE, colour, plot_circles, plot_classes, tidy
from passion_monai.evaluation.kept_maps import KeptCase
from passion_monai.presence import combination_name, combinations

__all__ = ["plot_case", "plot_contributions", "plot_curves", "plot_methods"]

_HATCHES = ("", "///", "...")  # when there are more methods than colours
_PALETTE = 6
_PER_ROW = 3
_TITLE_WIDTH = 15  # letters
_CURVES = (("loss", "loss"), ("relative preference", PREFERENCE), ("beta", "beta_"))
_DARK = 0.6  # from this share of the colour scale on, text is white


def plot_methods(means: Mapping[str, pd.DataFrame], *, modalities: Sequence[str], regions: Sequence[str]) -> Figure:
    """Draw the Dice of each method as bars with intervals, by region and modality combination.

    Args:
        means: the output of :func:`passion_monai.evaluation.statistics.summarise` for ``dice``, by method.
        modalities: names of the M modalities.
        regions: names of the regions, one panel each.
    """
    presence = combinations(len(modalities))
    names = [combination_name(row, modalities) for row in presence]
    figure = Figure(figsize=(10, 1.9 * len(regions) + 0.25 * len(modalities) + 0.6), layout="constrained")
    heights = [1.9] * len(regions) + [0.25 * len(modalities) + 0.1]
    *panels, lower = figure.subplots(len(regions) + 1, 1, sharex=True, height_ratios=heights)
    for ax, region in zip(panels, regions, strict=True):
        for index, table in enumerate(means.values()):
            rows = table[table["region"] == region].set_index("combination").reindex(names)
            _plot_bars(ax, 100 * rows[["mean", "low", "high"]], index, len(means))
        ax.set(ylim=(0, 102), ylabel=f"{region}\nDice [%]")
        ax.tick_params(axis="x", length=0)
        tidy(ax)
    plot_circles(lower, presence, modalities)
    handles = [
        Patch(facecolor=colour(index), hatch=_hatch(index), edgecolor="white", label=method)
        for index, method in enumerate(means)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), _PER_ROW), frameon=False)
    return figure


def plot_contributions(contributions: pd.DataFrame) -> Figure:
    """Draw a heat map per method: how much each modality adds to the Dice of each region.

    Args:
        contributions: percentage points of Dice; one row per method and modality, one column per region.
    """
    methods = list(contributions.index.unique(0))
    across = min(len(methods), _PER_ROW)
    down = -(-len(methods) // across)
    rows, columns = len(contributions.index.unique(1)), contributions.shape[1]
    size = (1.4 + across * (0.8 * columns + 0.7), down * (0.5 * rows + 1.0))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).flat
    limit = max(float(np.nanmax(np.abs(contributions.to_numpy()))), 1.0)
    for ax, method in zip(axes, methods, strict=False):
        _plot_heat_map(ax, contributions.loc[method], limit)
        ax.set_title(method, fontsize="medium")
    for ax in list(axes)[len(methods) :]:
        ax.set_axis_off()
    return figure


def plot_curves(logs: Mapping[str, Sequence[pd.DataFrame]], *, modalities: Sequence[str]) -> Figure:
    """Draw loss, relative preference and beta by epoch: a thick line for the mean over seeds, a thin one per seed.

    Args:
        logs: the training logs of each method, one per seed.
        modalities: names of the M modalities.
    """
    figure = Figure(figsize=(10, 2.3 * len(logs) + 0.5), layout="constrained")
    rows = figure.subplots(len(logs), len(_CURVES), squeeze=False, sharex="row", sharey="col")
    for axes, (method, tables) in zip(rows, logs.items(), strict=True):
        for ax, (title, column) in zip(axes, _CURVES, strict=True):
            of_modalities = {column + name: colour(index) for index, name in enumerate(modalities)}
            columns = {"loss": "black"} if column == "loss" else of_modalities
            _plot_curves(ax, tables, columns)
            ax.set_xlabel("epoch")
            ax.set_title(title)
        axes[0].set_ylabel(method)
        axes[1].axhline(0, color=GREY, linewidth=1, zorder=1)
    handles: list[Artist] = [
        Line2D([], [], color=colour(index), label=modality) for index, modality in enumerate(modalities)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def plot_case(
    cases: Mapping[str, KeptCase], *, class_names: Sequence[str], names: Sequence[str] | None = None
) -> Figure:
    """Draw one slice of a case, one row per combination: input images, label, and the class map of each method.

    The slice is the one with the most labelled voxels.

    Args:
        cases: the same case as kept by each method.
        class_names: name of each class, background first.
        names: names of the combinations to show; None shows those with one modality, all but one, and all.
    """
    case = next(iter(cases.values()))
    modalities = case.modalities.tolist()
    shown = [row for row in combinations(len(modalities)) if row.sum() in (1, len(row) - 1, len(row))]
    names = [
        name for name in names or [combination_name(row, modalities) for row in shown] if name in case.combinations
    ]
    box = _box(case.label)
    columns = [*modalities, "label", *cases]
    figure = Figure(figsize=(1.25 * len(columns), 1.25 * len(names) + 0.6), layout="constrained")
    rows = figure.subplots(len(names), len(columns), squeeze=False)
    for axes, name in zip(rows, names, strict=True):
        maps = [case.label, *(other.predictions[other.combinations.tolist().index(name)] for other in cases.values())]
        _plot_row(axes, case, name.split("+"), [classes[box].T for classes in maps], box)
    for ax, title in zip(rows[0], columns, strict=True):
        ax.set_title(textwrap.fill(title, _TITLE_WIDTH), fontsize="small")
    handles = [Patch(color=colour(k), label=name) for k, name in enumerate(class_names[1:])]
    figure.legend(handles=handles, loc="outside lower center", ncols=_PER_ROW, frameon=False, fontsize="small")
    return figure


def _plot_bars(ax: Axes, rows: pd.DataFrame, index: int, number: int) -> None:
    width = 0.8 / number
    x = np.arange(len(rows)) + width * (index - (number - 1) / 2)
    ax.bar(x, rows["mean"], width, color=colour(index), hatch=_hatch(index), edgecolor="white", linewidth=0.5)
    ax.vlines(x, rows["low"], rows["high"], color="0.15", linewidth=1)


def _hatch(index: int) -> str:
    return _HATCHES[index // _PALETTE % len(_HATCHES)]


def _plot_heat_map(ax: Axes, values: pd.DataFrame, limit: float) -> None:
    ax.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    ax.set(xticks=range(values.shape[1]), xticklabels=values.columns, yticks=range(len(values)))
    ax.set_yticklabels(values.index)
    ax.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        dark = abs(value) > _DARK * limit
        ax.text(column, row, f"{value:+.1f}", ha="center", va="center", color="white" if dark else "black")


def _plot_curves(ax: Axes, tables: Sequence[pd.DataFrame], columns: Mapping[str, str]) -> None:
    """Draw columns of the logs in the given colours."""
    tidy(ax)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for column, line in columns.items():
        there = [table.set_index("epoch")[column] for table in tables if column in table]
        if not there:
            continue
        for values in there if len(there) > 1 else ():
            ax.plot(values.index, values, color=line, linewidth=0.6, alpha=0.5)
        mean = pd.concat(there, axis=1).mean(axis=1)
        ax.plot(mean.index, mean, color=line, linewidth=1.8)
    if not ax.lines:
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", color=GREY)


def _plot_row(
    axes: Sequence[Axes], case: KeptCase, given: Sequence[str], maps: Sequence[NDArray], box: tuple[slice | int, ...]
) -> None:
    """Draw the input images, then the class maps over the first of them."""
    images = {name: image[box].T for name, image in zip(case.modalities.tolist(), case.images, strict=True)}
    for ax in axes:
        ax.set(xticks=[], yticks=[], facecolor=LIGHT_GREY)
        ax.spines[:].set_visible(False)
    aspect = case.spacing[1] / case.spacing[0]
    for ax, (name, image) in zip(axes, images.items(), strict=False):
        _plot_grey(ax, image if name in given else np.full_like(image, 255), aspect)
        if name not in given:
            ax.text(0.5, 0.5, "-", transform=ax.transAxes, ha="center", va="center", color=GREY)
    for ax, classes in zip(axes[len(images) :], maps, strict=True):
        _plot_grey(ax, images[given[0]], aspect)
        plot_classes(ax, classes)


def _plot_grey(ax: Axes, image: NDArray, aspect: float) -> None:
    ax.imshow(image, cmap="gray", vmin=0, vmax=255, origin="lower", aspect=aspect)


def _box(label: NDArray) -> tuple[slice | int, ...]:
    """A square of the slice with the most labelled voxels, twice as large as the labelled area."""
    index = int(np.count_nonzero(label, axis=(0, 1)).argmax())
    points = np.argwhere(label[..., index] > 0)
    if not len(points):
        return slice(None), slice(None), index
    low, high = points.min(axis=0), points.max(axis=0) + 1
    half = int((high - low).max())
    starts = ((low + high) // 2 - half).clip(0)
    return slice(starts[0], starts[0] + 2 * half), slice(starts[1], starts[1] + 2 * half), index
