from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from passion_monai.evaluation.kept_maps import KeptCase
from passion_monai.report.figures import plot_case, plot_contributions, plot_curves, plot_methods

MODALITIES = ("x", "y")
COMBINATIONS = ["x", "y", "x+y"]


def test_methods_are_bars_of_each_combination_in_order() -> None:
    means = pd.DataFrame({"combination": ["x+y", "y", "x"], "region": "whole", "mean": [0.3, 0.2, 0.1]})
    means = means.assign(low=means["mean"] - 0.05, high=means["mean"] + 0.05)
    figure = plot_methods({"a": means, "b": means[:2]}, modalities=MODALITIES, regions=["whole"])
    bars = [[bar.get_height() for bar in container] for container in figure.axes[0].containers]
    assert bars[0] == pytest.approx([10, 20, 30])
    assert bars[1][1:] == pytest.approx([20, 30])
    assert np.isnan(bars[1][0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    intervals = figure.axes[0].collections[0].get_segments()
    np.testing.assert_allclose([line[:, 1] for line in intervals], [[5, 15], [15, 25], [25, 35]])


def test_contributions_are_written_in_the_map() -> None:
    index = pd.MultiIndex.from_product([["a", "b"], MODALITIES])
    table = pd.DataFrame({"whole": [1.0, -2.0, 3.0, 0.0]}, index=index)
    figure = plot_contributions(table)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["+1.0", "-2.0", "+3.0", "+0.0"]
    assert figure.axes[0].images[0].get_clim() == (-3, 3)


def test_curves_show_each_seed_and_their_mean() -> None:
    log = pd.DataFrame({"epoch": [1, 2], "loss": [4.0, 2.0], "relative_preference_x": [0.1, 0.2]})
    figure = plot_curves({"a": [log, log.assign(loss=[2.0, 1.0])], "b": [log]}, modalities=MODALITIES)
    loss, preference, beta, other = figure.axes[:4]
    assert [list(line.get_ydata()) for line in loss.lines] == [[4, 2], [2, 1], [3, 1.5]]
    assert [list(line.get_ydata()) for line in preference.lines][2] == [0.1, 0.2]
    assert [text.get_text() for text in beta.texts] == ["not logged"]
    assert [list(line.get_ydata()) for line in other.lines] == [[4, 2]]
    assert (loss.get_ylabel(), other.get_ylabel()) == ("a", "b")


def kept() -> KeptCase:
    label = np.zeros((20, 20, 3), np.uint8)
    label[4:8, 5:8, 1] = 1
    images = np.full((2, 20, 20, 3), 100, np.uint8)
    images[1, :4] = 50
    return KeptCase(
        images=images,
        presence=np.ones(2, bool),
        modalities=np.array(MODALITIES),
        label=label,
        predictions=np.stack([label * 0, label, label]),
        combinations=np.array(COMBINATIONS),
        spacing=np.array([1.0, 2.0, 5.0]),
    )


def test_a_case_has_a_row_per_combination_and_a_column_per_method() -> None:
    case = kept()
    figure = plot_case({"a": case, "b": replace(case, predictions=case.predictions[::-1])}, class_names=["-", "scar"])
    axes = np.array(figure.axes).reshape(3, 5)
    assert [ax.get_title() for ax in axes[0]] == ["x", "y", "label", "a", "b"]
    # A grey image, and over it a layer for each class.
    assert [[len(ax.images) - 1 for ax in row[2:]] for row in axes] == [[1, 0, 1], [1, 1, 1], [1, 1, 0]]
    assert axes[0, 0].images[0].get_array().shape == (8, 8)
    assert [int(ax.images[0].get_array().max()) for ax in axes[1, :2]] == [255, 100]  # x is not given
    # The first axis of the voxels is drawn to the right, the second one upwards; the square begins at voxel (2, 2).
    grey = axes[1, 1].images[0]
    assert grey.origin == "lower"
    assert grey.get_array()[0].tolist() == [50] * 2 + [100] * 6
    assert axes[0, 0].get_aspect() == 2
    fill = axes[0, 2].images[1].get_array()
    assert np.argwhere(fill[..., 3]).tolist() == [[row, column] for row in range(3, 6) for column in range(2, 6)]
    assert to_hex(fill[fill[..., 3] > 0][0][:3]) == "#0072b2"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["scar"]


def test_only_the_combinations_that_are_asked_for_are_shown() -> None:
    figure = plot_case({"a": kept()}, class_names=["-", "scar"], names=["y", "x+y"])
    axes = np.array(figure.axes).reshape(2, 4)
    assert [int(ax.images[0].get_array().max()) for ax in axes[:, 0]] == [255, 100]  # x is given in the second


def test_a_case_without_label_is_shown_whole() -> None:
    case = replace(kept(), label=np.zeros((20, 20, 3), np.uint8))
    figure = plot_case({"a": case}, class_names=["-", "scar"])
    assert figure.axes[0].images[0].get_array().shape == (20, 20)


def test_a_label_at_the_border_is_shown_with_what_there_is_around_it() -> None:
    label = np.zeros((20, 20, 3), np.uint8)
    label[0:4, 17:20, 1] = 1
    figure = plot_case({"a": replace(kept(), label=label)}, class_names=["-", "scar"])
    assert figure.axes[0].images[0].get_array().shape == (6, 8)
