from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from passion_monai.evaluation.figures import main, plot_combinations, plot_overlay, plot_prediction, plot_training
from passion_monai.evaluation.tables import SCORE_COLUMNS
from passion_monai.presence import combination_name, combinations

MODALITIES = ("x", "y", "z")


@pytest.fixture
def training_csv(tmp_path: Path) -> Path:
    log: dict[str, Any] = {"epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "loss_segmentation": [2.0, 1.5, 0.5]}
    for index, modality in enumerate(MODALITIES):
        log[f"loss_pixel_{modality}"] = [0.3, 0.2, math.nan]
        log[f"relative_preference_{modality}"] = [0.3 - 0.3 * index, 0.1, 0.0]
        log[f"beta_{modality}"] = [1.0 + index, 1.1, 1.2]
    log["val_mean_dice"] = [math.nan, 0.25, 0.5]
    path = tmp_path / "training.csv"
    pd.DataFrame(log).to_csv(path, index=False)
    return path


@pytest.fixture
def scores() -> pd.DataFrame:
    names = [combination_name(row, MODALITIES) for row in combinations(3)]
    rows = [
        (case, name, region, value / 100, 5.0, 5.0, 5.0, 2.0, 1.0, 1.0)
        for value, (name, region, case) in enumerate(itertools.product(names, ("whole", "core"), "abc"))
    ]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS)).sample(frac=1, random_state=0)


def axis(figure: Figure, title: str) -> Axes:
    return next(ax for ax in figure.axes if ax.get_title() == title)


def lines(ax: Axes) -> list[list[float]]:
    return [np.asarray(line.get_ydata()).tolist() for line in ax.lines]


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_training_draws_what_the_log_says(training_csv: Path) -> None:
    figure = plot_training(training_csv)
    loss, preference = axis(figure, "Loss"), axis(figure, "Relative preference")
    beta, validation = axis(figure, "Beta, the weight of each modality"), axis(figure, "Validation")
    assert lines(loss)[:2] == [[3, 2, 1], [2, 1.5, 0.5]]
    assert len([line for line in loss.lines if line.get_linestyle() == "--" and np.size(line.get_xdata())]) == 3
    assert lines(preference) == [[0.3, 0.1, 0], [0, 0.1, 0], [pytest.approx(-0.3), 0.1, 0], [0, 0]]
    assert lines(beta) == [[1, 1.1, 1.2], [2, 1.1, 1.2], [3, 1.1, 1.2]]
    assert lines(validation) == [[25, 50]]
    assert legend_texts(figure) == list(MODALITIES)
    assert all(ax.get_xlabel() == "epoch" and ax.get_ylabel() for ax in figure.axes)
    assert "[%]" in validation.get_ylabel()


def test_no_legend_covers_a_line(training_csv: Path) -> None:
    figure = plot_training(training_csv)
    figure.draw_without_rendering()
    loss = axis(figure, "Loss")
    boxes = [figure.legends[0].get_window_extent(), loss.get_legend().get_window_extent()]
    assert not any(box.overlaps(ax.get_window_extent()) for box in boxes for ax in figure.axes)
    assert not boxes[0].overlaps(boxes[1])


@pytest.mark.parametrize("missing", [["val_mean_dice"], ["beta_x", "beta_y", "beta_z"]])
def test_training_without_some_columns(training_csv: Path, missing: list[str]) -> None:
    log = pd.read_csv(training_csv).drop(columns=missing)
    log.to_csv(training_csv, index=False)
    figure = plot_training(training_csv)
    assert sum(len(ax.lines) > 0 for ax in figure.axes) == 3
    figure.canvas.draw()


def test_training_of_the_baseline_says_what_was_not_measured(tmp_path: Path) -> None:
    terms = {f"loss_regularisation_{name}": [0.3, 0.2] for name in MODALITIES}
    log = pd.DataFrame({"epoch": [1, 2], "loss": [2.0, 1.0], "loss_segmentation": [1.0, 0.5], **terms})
    log.to_csv(tmp_path / "training.csv", index=False)
    figure = plot_training(tmp_path / "training.csv")
    assert legend_texts(figure) == list(MODALITIES)
    said = {ax.get_title(): [text.get_text() for text in ax.texts] for ax in figure.axes}
    assert said["Relative preference"] == ["not measured: train with --measure_preference True"]
    assert said["Beta, the weight of each modality"] == ["this objective has no beta"]
    figure.canvas.draw()


def test_training_of_one_epoch_shows_markers(training_csv: Path) -> None:
    pd.read_csv(training_csv)[:1].to_csv(training_csv, index=False)
    figure = plot_training(training_csv)
    figure.canvas.draw()
    assert {line.get_marker() for line in axis(figure, "Beta, the weight of each modality").lines} == {"o"}
    assert axis(figure, "Validation").texts[0].get_text() == "no validation yet"


@pytest.mark.parametrize("text", ["epoch,loss\n1,2\n", "epoch,loss,loss_segmentation,relative_preference_x\n"])
def test_training_of_another_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "training.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"training\.csv: a training log has the columns .*, got [01] rows of \['epoch'"
    ):
        plot_training(path)


def test_combinations_are_in_order_with_their_means(scores: pd.DataFrame) -> None:
    upper, lower = plot_combinations(scores).axes
    means = {line.get_label(): np.asarray(line.get_ydata()) for line in upper.lines}
    assert means["whole"] == pytest.approx(np.arange(1, 42, 6))
    assert means["core"] == pytest.approx(np.arange(4, 42, 6))
    middle_half = np.asarray(upper.collections[0].get_paths()[0].vertices)[:, 1]
    first_region = scores["region"].iloc[0]
    start = 1 if first_region == "whole" else 4
    assert middle_half.tolist() == pytest.approx([start - 0.5, start + 0.5])
    filled, empty = (np.asarray(circles.get_offsets()).astype(int).tolist() for circles in lower.collections)
    assert sorted(filled) == np.argwhere(combinations(3)).tolist()
    assert sorted(empty) == np.argwhere(~combinations(3)).tolist()
    assert [label.get_text() for label in lower.get_yticklabels()] == list(MODALITIES)
    assert upper.get_ylabel() == "Dice [%]: mean, middle half of the cases"


def test_combinations_that_no_case_has_are_left_out(scores: pd.DataFrame) -> None:
    few = scores[scores["combination"].isin(["z", "y+z"])]
    upper, lower = plot_combinations(few).axes
    assert [label.get_text() for label in lower.get_yticklabels()] == ["y", "z"]
    assert {np.size(line.get_xdata()) for line in upper.lines} == {2}


def test_combinations_of_nothing(scores: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="scores must have at least one row"):
        plot_combinations(scores[:0])


@pytest.fixture
def overlay() -> dict[str, Any]:
    label = np.zeros((6, 8, 4), dtype=int)
    label[1, 1, 1] = 1
    label[2:4, 3:5, 2] = 3
    prediction = np.zeros_like(label)
    prediction[..., 3] = 1
    prediction[2, 3, 2] = 2
    images = {"x": np.arange(192.0).reshape(6, 8, 4), "y": None, "z": np.zeros((6, 8, 4))}
    return {
        "images": images,
        "presence": [True, False, True],
        "label": label,
        "prediction": prediction,
        "spacing": (1.0, 2.0, 5.0),
    }


def test_overlay_panels_and_legend(overlay: dict[str, Any]) -> None:
    figure = plot_overlay(**overlay, class_names=("background", "one", "two", "three"))
    figure.canvas.draw()
    assert [ax.get_title() for ax in figure.axes] == ["x", "y", "z", "label", "prediction"]
    assert legend_texts(figure) == ["two", "three", "outline of the label"]
    texts = {ax.get_title(): [text.get_text() for text in ax.texts] for ax in figure.axes}
    assert texts == {"x": [], "y": ["not given"], "z": [], "label": [], "prediction": []}
    assert {ax.get_aspect() for ax in figure.axes} == {2.0}


def test_overlay_shows_the_slice_with_most_label(overlay: dict[str, Any]) -> None:
    figure = plot_overlay(**overlay)
    shown = np.asarray(axis(figure, "x").images[0].get_array())
    np.testing.assert_array_equal(shown, overlay["images"]["x"][:, :, 2].T)
    label, prediction = (np.asarray(axis(figure, name).images[1].get_array()) for name in ("label", "prediction"))
    np.testing.assert_array_equal(label[..., 3] > 0, (overlay["label"][:, :, 2] == 3).T)
    np.testing.assert_array_equal(prediction[..., 3] > 0, (overlay["prediction"][:, :, 2] == 2).T)
    handles = dict(zip(legend_texts(figure), figure.legends[0].legend_handles, strict=True))
    assert tuple(label[3, 2, :3]) == pytest.approx(to_rgba(handles["class 3"].get_facecolor())[:3])  # type: ignore[union-attr]


def test_overlay_without_label_shows_the_slice_with_most_prediction(overlay: dict[str, Any]) -> None:
    overlay["label"][:] = 0
    figure = plot_overlay(**overlay)
    figure.canvas.draw()
    shown = np.asarray(axis(figure, "x").images[0].get_array())
    np.testing.assert_array_equal(shown, overlay["images"]["x"][:, :, 3].T)


def test_overlay_leaves_out_the_air_around_the_head(overlay: dict[str, Any]) -> None:
    wide = [(9, 20), (7, 11), (0, 0)]
    pad = lambda volume: None if volume is None else np.pad(volume, wide, constant_values=volume.min())  # noqa: E731
    overlay["images"] = {name: pad(volume) for name, volume in overlay["images"].items()}
    figure = plot_overlay(**overlay | {name: pad(overlay[name]) for name in ("label", "prediction")})
    shown = np.asarray(axis(figure, "x").images[0].get_array())
    assert shown.shape == (8 + 2 * 2, 6 + 2 * 2)
    np.testing.assert_array_equal(shown[2:-2, 2:-2], np.arange(192.0).reshape(6, 8, 4)[:, :, 2].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"presence": [False, False, False]}, "presence must be true for at least one modality"),
        ({"presence": [True]}, "shorter"),
        ({"label": np.zeros((6, 8))}, r"one shape \[H, W, D\], got .*'label': \(6, 8\)"),
        ({"spacing": (1.0, 1.0)}, r"spacing must have 3 entries, got \[1\.0, 1\.0\]"),
    ],
)
def test_overlay_errors(overlay: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_overlay(**(overlay | change))


def test_main_draws_what_there_is(
    tmp_path: Path, training_csv: Path, scores: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path)])
    assert capsys.readouterr().out.split() == [str(tmp_path / "figures" / "training.png")]
    (tmp_path / "evaluation").mkdir()
    scores.to_csv(tmp_path / "evaluation" / "scores.csv", index=False)
    output = tmp_path / "elsewhere"
    main([str(tmp_path), "--output", str(output)])
    expected = [output / "training.png", output / "combinations.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in expected]
    assert all(path.stat().st_size > 10_000 for path in expected)


def test_main_without_anything_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "train, evaluate or infer" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()


class TestPredictions:
    def write(self, folder: Path) -> Path:
        """A prediction as inference leaves it: two of three modalities, label values 0, 2 and 4."""
        (folder / "predictions").mkdir(parents=True)
        rng = np.random.default_rng(0)
        classes = np.zeros((10, 12, 8), dtype=np.uint8)
        classes[3:7, 4:8, 2:5] = 4
        classes[4:6, 5:7, 2:5] = 2
        record = {
            "case": "x",
            "files": {"a": str(folder / "a.nii.gz"), "b": None, "c": str(folder / "c.nii.gz")},
            "labels": {"background": 0, "edge": 4, "core": 2},
            "expected_scores": {"regions": {"whole": {"dice": {"mean": 0.754}}, "core": {"dice": {"mean": 0.5}}}},
        }
        images = [path for path in record["files"].values() if path]
        for path in (*images, folder / "predictions" / "x_seg.nii.gz", folder / "label.nii.gz"):
            volume = classes if "seg" in str(path) or "label" in str(path) else rng.normal(size=classes.shape)
            nib.save(nib.Nifti1Image(volume, np.diag([-1.0, -1.0, 2.0, 1.0])), path)
        path = folder / "predictions" / "x_seg.json"
        path.write_text(json.dumps(record))
        return path

    @pytest.mark.parametrize("with_label", [True, False])
    def test_shows_what_the_patient_had(self, tmp_path: Path, with_label: bool):
        label = tmp_path / "label.nii.gz" if with_label else None
        figure = plot_prediction(self.write(tmp_path), label_file=label)
        titles = [ax.get_title() for ax in figure.axes]
        assert figure.get_suptitle().endswith("\nDice to expect: whole 75 %, core 50 %")
        assert titles == ["a", "b", "c", *(["label"] if with_label else []), "prediction"]
        assert [text.get_text() for text in figure.axes[1].texts] == ["not given"]
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend == ["edge", "core", *(["outline of the label"] if with_label else [])]

    def test_images_of_another_format_and_grid_are_drawn_on_that_of_the_prediction(self, tmp_path: Path):
        itk = pytest.importorskip("itk")
        path = self.write(tmp_path)
        record = json.loads(path.read_text())
        image = itk.image_from_array(np.random.default_rng(1).normal(size=(8, 12, 10)).astype(np.float32))
        image.SetSpacing([1, 1, 2])  # ITK's axes are those of the NIfTI file, which points left and back
        itk.imwrite(image, tmp_path / "a.nrrd")
        fine = np.random.default_rng(2).normal(size=(20, 24, 8))
        nib.save(nib.Nifti1Image(fine, np.diag([-0.5, -0.5, 2.0, 1.0])), tmp_path / "c.nii.gz")
        path.write_text(json.dumps(record | {"files": record["files"] | {"a": str(tmp_path / "a.nrrd")}}))
        figure = plot_prediction(path, label_file=tmp_path / "label.nii.gz")
        shapes = {ax.get_title(): ax.images[0].get_array().shape for ax in figure.axes}
        assert set(shapes.values()) == {(12, 10)}

    def test_a_file_that_is_gone_leaves_the_other_figures(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        first = self.write(tmp_path)
        for path in (first, first.with_suffix(".nii.gz")):
            path.with_name(path.name.replace("x_", "y_")).write_bytes(path.read_bytes())
        record = json.loads(first.read_text())
        first.write_text(json.dumps(record | {"files": record["files"] | {"a": str(tmp_path / "gone.nii.gz")}}))
        main([str(tmp_path)])
        said = capsys.readouterr()
        assert said.out.split() == [str(tmp_path / "figures" / "y_seg.png")]
        assert said.err.startswith(f"x_seg.png is left out: Case x: a file {tmp_path / 'gone.nii.gz'} cannot be read")

    def test_the_command_finds_predictions_and_their_labels(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        self.write(tmp_path)
        datalist = {"modalities": ["a"], "root": str(tmp_path), "test": [{"case": "x", "label": "label.nii.gz"}]}
        (tmp_path / "datalist.json").write_text(json.dumps(datalist))
        main([str(tmp_path)])
        assert (tmp_path / "figures" / "x_seg.png").is_file()
        assert "x_seg.png" in capsys.readouterr().out
