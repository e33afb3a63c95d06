"""Figures of a run: training, scores, predictions. `python -m passion_monai.evaluation.figures RUN_DIR` draws all."""

from __future__ import annotations

import argparse
import graphlib
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from monai.data.utils import affine_to_spacing
from monai.transforms import Orientation
from numpy.typing import ArrayLike, NDArray

from passion_monai.evaluation.tables import read_scores
from passion_monai.presence import parse_combination
from passion_monai.transforms import AlignModalitiesd, LoadCased

__all__ = ["main", "plot_combinations", "plot_overlay", "plot_prediction", "plot_training"]

# Okabe and Ito's palette, which colour-blind readers can tell apart. https://jfly.uni-koeln.de/color/
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_OUTLINE = "#F0E442"
GREY, LIGHT_GREY = "0.45", "0.9"
_MARKERS = "os^Dv"
PREFERENCE = "relative_preference_"
_BETA = "beta_"
_BY_MODALITY = (PREFERENCE, "loss_regularisation_")
_NOT_LOGGED = {
    PREFERENCE: "not measured: train with --measure_preference True",
    _BETA: "this objective has no beta",
}
_VOLUME_NDIM = 3
DPI = 150
_FEW_EPOCHS = 30
_FEW_PREDICTIONS = 6


def plot_training(training_csv: str | Path) -> Figure:
    """Loss, relative preference, beta and validation Dice over the epochs.

    Args:
        training_csv: the log that :class:`passion_monai.handlers.TrainingLog` wrote.

    Raises:
        ValueError: when the log is not one, or has no epoch.
    """
    log = pd.read_csv(training_csv)
    found = [
        column.removeprefix(start) for start in _BY_MODALITY for column in map(str, log) if column.startswith(start)
    ]
    modalities = list(dict.fromkeys(found))
    required = ("epoch", "loss", "loss_segmentation")
    if not {*required} <= {*log} or log.empty or not modalities:
        raise ValueError(
            f"{training_csv}: a training log has the columns {required}, {' or '.join(_BY_MODALITY)} with the names of "
            f"modalities, and a row per epoch, got {len(log)} rows of {list(log)}."
        )
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _plot_losses(axes[0, 0], log, modalities)
    _plot_by_modality(axes[0, 1], log, modalities, column=PREFERENCE)
    axes[0, 1].axhline(0, color=GREY, linewidth=1, zorder=1)
    axes[0, 1].set(title="Relative preference", ylabel="relative preference\n(below 0: neglected)")
    _plot_by_modality(axes[1, 0], log, modalities, column=_BETA)
    axes[1, 0].set(title="Beta, the weight of each modality", ylabel="beta")
    _plot_validation(axes[1, 1], log)
    for ax in axes.flat:
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        tidy(ax)
    handles = [Line2D([], [], color=colour(index), label=modality) for index, modality in enumerate(modalities)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, title="modality")
    return figure


def plot_combinations(scores: pd.DataFrame) -> Figure:
    """Dice of each region for each modality combination; filled circles under the axis say which modalities are given.

    Args:
        scores: rows with the columns of :data:`passion_monai.evaluation.tables.SCORE_COLUMNS`.

    Raises:
        ValueError: when there are no scores.
    """
    if scores.empty:
        raise ValueError("scores must have at least one row, got none.")
    modalities = _modality_order(scores["combination"].unique())
    presence = {name: parse_combination(name, modalities) for name in scores["combination"].unique()}
    # As in passion_monai.presence.combinations: fewer modalities first, then in the order of the modalities.
    names = sorted(presence, key=lambda name: (presence[name].sum(), *~presence[name]))
    figure = Figure(figsize=(2.6 + 0.6 * len(names), 4.2 + 0.3 * len(modalities)), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4.2, 0.3 * len(modalities) + 0.15])
    _plot_dice(upper, scores, names)
    plot_circles(lower, np.stack([presence[name] for name in names]), modalities)
    return figure


def plot_overlay(
    images: Mapping[str, ArrayLike | None],
    presence: Sequence[bool],
    label: ArrayLike | None,
    *,
    prediction: ArrayLike,
    spacing: Sequence[float],
    class_names: Sequence[str] | None = None,
) -> Figure:
    """One slice of a case: what the network was given, the label and the prediction.

    Label and prediction lie over the first modality present. The slice is the one along the last axis with the most
    label (with the most prediction, if there is no label or it is empty), without the empty border of the images.

    Args:
        images: volume [H, W, D] of each of the M modalities by name; that of an absent modality is not looked at.
        presence: M booleans in the order of `images`.
        label: class map [H, W, D], if there is one.
        prediction: class map [H, W, D].
        spacing: size of a voxel along each axis, in mm.
        class_names: name of each class for the legend, background first; by default "class 1" and so on.

    Raises:
        ValueError: when no modality is present, or shapes or the number of entries do not fit.
    """
    maps = {"label": np.asarray(label)} if label is not None else {}
    maps["prediction"] = np.asarray(prediction)
    volumes = {name: np.asarray(images[name]) for name, there in zip(images, presence, strict=True) if there}
    _check_overlay(volumes, maps, spacing)
    counted = maps["label"] if label is not None and maps["label"].any() else maps["prediction"]
    index = int(np.count_nonzero(counted, axis=(0, 1)).argmax())
    slices = _without_border({name: volume[:, :, index].T for name, volume in (volumes | maps).items()})

    columns = [*images, *maps]
    figure = Figure(figsize=(2.2 * len(columns), 3.2), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(columns)), columns, strict=True):
        ax.set(title=name, xticks=[], yticks=[])
        background = slices.get(next(iter(volumes)) if name in maps else name)
        _plot_image(ax, background, slices["prediction"].shape, aspect=spacing[1] / spacing[0])
        if name in maps:
            plot_classes(ax, slices[name])
        if name == "prediction" and label is not None:
            _plot_outline(ax, slices["label"])
    classes = [int(k) for k in np.unique([slices[name] for name in maps]) if k > 0]
    names = {k: class_names[k] if class_names else f"class {k}" for k in classes}
    handles: list[Artist] = [Patch(color=colour(k - 1), label=name) for k, name in names.items()]
    if label is not None:
        handles.append(Line2D([], [], color=_OUTLINE, label="outline of the label"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def plot_prediction(record_file: str | Path, *, label_file: str | Path | None = None) -> Figure:
    """What one patient had, and what was predicted from it.

    Args:
        record_file: the ``<case>_seg.json`` beside a prediction that
            :class:`passion_monai.transforms.SaveSegmentationd` wrote.
        label_file: the patient's label file, if there is one.

    Raises:
        ValueError: when a file cannot be read; the message names it.
    """
    record_file = Path(record_file)
    record = json.loads(record_file.read_text(encoding="utf-8"))
    values = list(record["labels"].values())
    files = {"prediction": record_file.with_suffix(".nii.gz"), **record["files"], "label": label_file}
    volumes, spacing = _read_volumes(record["case"], {name: path for name, path in files.items() if path is not None})
    figure = plot_overlay(
        {name: volumes.get(name) for name in record["files"]},
        [name in volumes for name in record["files"]],
        _classes(volumes["label"], values) if "label" in volumes else None,
        prediction=_classes(volumes["prediction"], values),
        spacing=spacing,
        class_names=list(record["labels"]),
    )
    figure.suptitle("\n".join([f"{record['case']} (right in the image is the patient's right)", *_expected(record)]))
    return figure


def _expected(record: Mapping[str, Any]) -> list[str]:
    """The scores to expect of a prediction, in words, if they are known."""
    regions = (record.get("expected_scores") or {}).get("regions", {})
    scores = [f"{name} {100 * metrics['dice']['mean']:.0f} %" for name, metrics in regions.items()]
    return [f"Dice to expect: {', '.join(scores)}"] if scores else []


def _without_border(slices: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Slices without the rows and columns at their border in which none has more than one value."""
    first, last = [0, 0], list(next(iter(slices.values())).shape)
    for axis in range(2):
        others = tuple(a for a in range(2) if a != axis)
        used = np.any([values.max(axis=others) != values.min(axis=others) for values in slices.values()], axis=0)
        if used.any():
            indices = np.flatnonzero(used)
            first[axis], last[axis] = max(indices[0] - 2, 0), indices[-1] + 3
    return {name: values[first[0] : last[0], first[1] : last[1]] for name, values in slices.items()}


def _classes(volume: NDArray, values: Sequence[int]) -> NDArray:
    """Class indices of a volume of label values."""
    return np.select([volume == value for value in values], range(len(values)))


def _read_volumes(case: str, files: Mapping[str, str | Path]) -> tuple[dict[str, NDArray], list[float]]:
    """Volumes on the grid of the first, with axes to the right, to the front and up; and the size of their voxels."""
    load, turn = LoadCased([*files]), Orientation(axcodes="RAS", labels=None)
    data: dict[Any, Any] = {"case": case, **files}
    data |= {name: load.read(data, name) for name in files}
    align = AlignModalitiesd([name for name in files if name != "label"], label_key="label", on_mismatch="resample")
    aligned = align(data)
    turned: dict[str, Any] = {name: turn(aligned[name]) for name in files}
    spacing = affine_to_spacing(turned[next(iter(files))].affine)
    return {name: image[0].numpy() for name, image in turned.items()}, [float(size) for size in spacing]


def _plot_losses(ax: Axes, log: pd.DataFrame, modalities: Sequence[str]) -> None:
    ax.plot(log["epoch"], log["loss"], color="black", label="total", **_style(log))
    ax.plot(log["epoch"], log["loss_segmentation"], color=GREY, label="segmentation", **_style(log))
    _plot_by_modality(ax, log, modalities, column="loss_pixel_", linestyle="--")
    ax.set_yscale("log", nonpositive="mask")
    ax.set(title="Loss", ylabel="loss, mean of the epoch")
    ax.plot([], [], "--", color=GREY, label="pixel distillation of a modality")
    # Below the axes, where it covers no line.
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def _plot_by_modality(
    ax: Axes, log: pd.DataFrame, modalities: Sequence[str], *, column: str, linestyle: str = "-"
) -> None:
    known = [modality for modality in modalities if column + modality in log]
    if not known and column in _NOT_LOGGED:
        ax.text(0.5, 0.6, _NOT_LOGGED[column], transform=ax.transAxes, ha="center", color=GREY)
    for index, modality in enumerate(modalities):
        if modality in known:
            ax.plot(log["epoch"], log[column + modality], linestyle, color=colour(index), **_style(log))


def _style(log: pd.DataFrame) -> dict[str, Any]:
    """Markers in a short log: a line through one epoch would not be seen."""
    return {"marker": "o", "markersize": 4} if len(log) <= _FEW_EPOCHS else {}


def _plot_validation(ax: Axes, log: pd.DataFrame) -> None:
    ax.set(title="Validation", ylabel="mean Dice of all combinations [%]")
    validated = log.dropna(subset="val_mean_dice") if "val_mean_dice" in log else log[:0]
    if validated.empty:
        ax.text(0.5, 0.5, "no validation yet", transform=ax.transAxes, ha="center", color=GREY)
        return
    ax.plot(validated["epoch"], 100 * validated["val_mean_dice"], "o-", color="black", markersize=4)
    ax.set_ylim(0, 100)


def _plot_dice(ax: Axes, scores: pd.DataFrame, names: Sequence[str]) -> None:
    regions = list(dict.fromkeys(scores["region"]))
    for index, region in enumerate(regions):
        groups = (100 * scores["dice"][scores["region"] == region]).groupby(scores["combination"])
        middle, low, high = (
            values.reindex(names) for values in (groups.mean(), groups.quantile(0.25), groups.quantile(0.75))
        )
        x = np.arange(len(names)) + 0.2 * (index - (len(regions) - 1) / 2)
        marker = _MARKERS[index % len(_MARKERS)]
        ax.vlines(x, low, high, color=colour(index), alpha=0.5, linewidth=2)
        ax.plot(x, middle, marker, color=colour(index), markersize=6, label=region)
    ax.set(ylim=(-3, 103), ylabel="Dice [%]: mean, middle half of the cases", title="Dice per combination")
    ax.legend(title="region", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    ax.tick_params(axis="x", length=0)
    tidy(ax)


def plot_circles(ax: Axes, presence: NDArray[np.bool_], modalities: Sequence[str]) -> None:
    """Columns of circles for combinations [P, M]; filled is given."""
    for mask, face in ((presence, "0.15"), (~presence, "white")):
        x, y = np.nonzero(mask)
        ax.scatter(x, y, s=70, facecolor=face, edgecolor="0.15", linewidth=1)
    ax.set(xticks=[], yticks=range(len(modalities)), yticklabels=modalities, ylim=(len(modalities) - 0.4, -0.6))
    ax.set_xlabel("modalities given to the network (filled)")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _modality_order(names: Iterable[str]) -> list[str]:
    """Modalities in the one order that agrees with all names of combinations."""
    parts = [name.split("+") for name in names]
    order: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter({part: () for row in parts for part in row})
    for earlier, later in itertools.chain.from_iterable(map(itertools.pairwise, parts)):
        order.add(later, earlier)
    return list(order.static_order())


def _check_overlay(volumes: dict[str, NDArray], maps: dict[str, NDArray], spacing: Sequence[float]) -> None:
    if not volumes:
        raise ValueError("presence must be true for at least one modality, got none.")
    shapes = {name: volume.shape for name, volume in (volumes | maps).items()}
    if len(set(shapes.values())) > 1 or maps["prediction"].ndim != _VOLUME_NDIM:
        raise ValueError(f"images, label and prediction must have one shape [H, W, D], got {shapes}.")
    if len(spacing) != _VOLUME_NDIM:
        raise ValueError(f"spacing must have {_VOLUME_NDIM} entries, got {list(spacing)}.")


def _plot_image(ax: Axes, image: NDArray | None, shape: tuple[int, ...], *, aspect: float) -> None:
    """A grey image, or an empty panel of its size."""
    if image is None:
        ax.imshow(np.zeros(shape), cmap=ListedColormap([LIGHT_GREY]), origin="lower", aspect=aspect)
        ax.text(0.5, 0.5, "not given", transform=ax.transAxes, ha="center", va="center", color="0.25")
        return
    low, high = np.percentile(image, (1, 99.5))
    ax.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=aspect)


def plot_classes(ax: Axes, classes: NDArray) -> None:
    """Fill each class of a map but the background with its colour."""
    for k in np.unique(classes[classes > 0]):
        fill = np.zeros((*classes.shape, 4))
        fill[classes == k] = to_rgba(colour(int(k) - 1), alpha=0.7)
        ax.imshow(fill, origin="lower", aspect=ax.get_aspect(), interpolation="nearest")


def _plot_outline(ax: Axes, classes: NDArray) -> None:
    if classes.any():
        ax.contour(classes > 0, levels=[0.5], colors=_OUTLINE, linewidths=1.2)


def colour(index: int) -> str:
    """The colour of a class, modality or method, the same in all figures."""
    return _COLOURS[index % len(_COLOURS)]


def tidy(ax: Axes) -> None:
    """Lines along the values instead of a frame."""
    ax.grid(axis="y", color=LIGHT_GREY)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _prediction_figures(run_dir: Path) -> dict[str, Figure]:
    """An overlay of the first few predictions of a run, with the label where the run's datalist knows it."""
    labels = {}
    if (run_dir / "datalist.json").is_file():
        content = json.loads((run_dir / "datalist.json").read_text(encoding="utf-8"))
        cases = [case for section in content.values() if isinstance(section, list) for case in section]
        labels = {
            case["case"]: Path(content["root"], case["label"])
            for case in cases
            if isinstance(case, dict) and "label" in case
        }
    figures = {}
    for path in sorted((run_dir / "predictions").glob("*_seg.json"))[:_FEW_PREDICTIONS]:
        try:
            figures[f"{path.stem}.png"] = plot_prediction(path, label_file=labels.get(path.stem.removesuffix("_seg")))
        except ValueError as error:  # of files that were moved since, for example
            print(f"{path.stem}.png is left out: {error}", file=sys.stderr)  # noqa: T201
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figures of a run folder from the files in it, and print where they are."""
    parser = argparse.ArgumentParser(prog="python -m passion_monai.evaluation.figures", description=main.__doc__)
    parser.add_argument("run_dir", type=Path, help="a run's folder: training.csv, evaluation/scores.csv, predictions/")
    parser.add_argument("--output", type=Path, help="folder for the figures (default: RUN_DIR/figures)")
    arguments = parser.parse_args(argv)
    training, scores = arguments.run_dir / "training.csv", arguments.run_dir / "evaluation" / "scores.csv"
    figures = _prediction_figures(arguments.run_dir)
    if training.is_file():
        figures["training.png"] = plot_training(training)
    if scores.is_file():
        figures["combinations.png"] = plot_combinations(read_scores(scores))
    if not figures:
        parser.error(
            f"there is no {training}, no {scores} and no prediction; train, evaluate or infer with this folder as "
            "output_dir first."
        )
    output = arguments.output or arguments.run_dir / "figures"
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / name, dpi=DPI)
        print(output / name)  # noqa: T201 (a command line reports by printing)


if __name__ == "__main__":
    main()
