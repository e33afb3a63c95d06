from __future__ import annotations

import itertools
import json
import logging
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import PrepareBatchExtraInput, SupervisedEvaluator
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from passion_monai.evaluation.case_scores import score_case, surface_distances
from passion_monai.evaluation.dice import CombinationDiceMetric, dice, region_masks
from passion_monai.evaluation.kept_maps import read_kept_case
from passion_monai.evaluation.metrics import (
    CombinationScores,
)
from passion_monai.evaluation.tables import EMPTY_DISTANCE, SCORE_COLUMNS, read_scores
from passion_monai.presence import combinations
from passion_monai.transforms import FULL_CONFIDENCE

REGIONS = {"all": (1, 2), "core": (2,)}


def mask(shape: tuple[int, ...], *points: tuple[int, ...]) -> torch.Tensor:
    result = torch.zeros(shape, dtype=torch.bool)
    for point in points:
        result[point] = True
    return result


def surface(points: set[tuple[int, ...]]) -> np.ndarray:
    """Points with a neighbour along an axis that is not in the set."""
    steps = [tuple(sign * (i == j) for j in range(3)) for i in range(3) for sign in (-1, 1)]
    return np.array([p for p in sorted(points) if any(tuple(np.add(p, step).tolist()) not in points for step in steps)])


def brute_force_distances(
    prediction: torch.Tensor, label: torch.Tensor, spacing: tuple[float, ...]
) -> tuple[float, float, float]:
    """HD95 of the challenge, HD95 of MedPy (the percentile of both directions at once), average distance."""
    surfaces = [surface({tuple(p) for p in m.nonzero().tolist()}) * spacing for m in (prediction, label)]
    distances = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=-1)
    nearest = [distances.min(axis=axis) for axis in (0, 1)]
    both = np.concatenate(nearest)
    larger = max(float(np.percentile(one_way, 95)) for one_way in nearest)
    return larger, float(np.percentile(both, 95)), float(both.mean())


def test_region_masks_are_unions_of_classes() -> None:
    masks = region_masks(torch.tensor([[0, 1], [2, 3]]), {"a": (1, 3), "b": (2,), "none": (7,)})
    assert masks.dtype == torch.bool
    assert masks.int().tolist() == [[[0, 1], [0, 1]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]]


def test_region_masks_of_a_metatensor_are_plain() -> None:
    masks = region_masks(MetaTensor(torch.tensor([[0.0, 1.0]])), {"a": (1,)})
    assert type(masks) is torch.Tensor
    assert masks.int().tolist() == [[[0, 1]]]


@pytest.mark.parametrize(
    ("prediction", "label", "expected"),
    [
        ([1, 1, 0, 0], [0, 1, 1, 1], 2 / 5),
        ([1, 1, 0, 0], [1, 1, 0, 0], 1.0),
        ([1, 0, 0, 0], [0, 1, 0, 0], 0.0),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1.0),
        ([1, 0, 0, 0], [0, 0, 0, 0], 0.0),
        ([0, 0, 0, 0], [0, 0, 1, 0], 0.0),
    ],
)
def test_dice(prediction: list[int], label: list[int], expected: float) -> None:
    assert dice(torch.tensor(prediction).bool(), torch.tensor(label).bool()) == expected


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.25, 3.0)])
@pytest.mark.parametrize("seed", range(4))
def test_surface_distances_are_the_slow_ones(seed: int, spacing: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2, 9, 8, 7, dtype=torch.bool)
    masks[0, 1:6, 2:7, 1:5] = True
    masks[1, 2:9, 0:5, 2:7] = True  # touches the border of the image
    masks &= torch.rand(masks.shape, generator=generator) < 0.9
    expected = brute_force_distances(masks[0], masks[1], spacing)
    assert surface_distances(masks[0], masks[1], spacing) == pytest.approx(expected, rel=1e-6)
    assert surface_distances(masks[1], masks[0], spacing) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_surface_distances_are_those_of_monai() -> None:
    masks = torch.rand(2, 12, 9, 10, generator=torch.Generator().manual_seed(0)) < 0.05
    settings = {"include_background": True, "spacing": [0.5, 1.25, 3.0]}
    pair = [mask[None, None] for mask in masks]
    distances = surface_distances(*masks, settings["spacing"])
    expected = compute_hausdorff_distance(*pair, percentile=95, **settings).item()
    assert distances.hausdorff95 == pytest.approx(expected, rel=1e-6)
    expected = compute_average_surface_distance(*pair, symmetric=True, **settings).item()
    assert distances.average == pytest.approx(expected, rel=1e-6)


def test_hausdorff95_leaves_out_the_farthest_five_percent() -> None:
    label = torch.zeros(40, 12, dtype=torch.bool)
    label[:10, :4] = True  # 24 voxels on the surface
    prediction = label.clone()
    prediction[39, 11] = True
    distances = surface_distances(prediction, label, (1.0, 1.0))
    assert distances.hausdorff95 == 0.0
    assert distances.average == pytest.approx(
        math.hypot(30, 8) / 49
    )  # 24 + 24 voxels that agree, and one that does not
    prediction[30, 11] = True
    prediction[35, 11] = True
    assert surface_distances(prediction, label, (1.0, 1.0)).hausdorff95 > 20


def test_surface_distances_of_two_voxels_in_2d_use_the_spacing() -> None:
    distances = surface_distances(mask((6, 6), (1, 1)), mask((6, 6), (3, 4)), (2.0, 1.0))
    assert distances == pytest.approx((5.0, 5.0, 5.0))


def test_surface_distances_of_empty_masks() -> None:
    empty, filled = mask((3, 3, 3)), mask((3, 3, 3), (1, 1, 1))
    assert surface_distances(empty, empty, (1, 1, 1)) == (0.0, 0.0, 0.0)
    for pair in ((empty, filled), (filled, empty)):
        assert [math.isnan(distance) for distance in surface_distances(*pair, (1, 1, 1))] == [True] * 3


def test_masks_must_be_boolean_and_of_one_shape() -> None:
    with pytest.raises(TypeError, match=r"boolean masks, got torch\.int64 and torch\.bool"):
        dice(torch.zeros(3, dtype=torch.long), mask((3,)))
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(4,\)"):
        dice(mask((3,)), mask((4,)))
    with pytest.raises(ValueError, match=r"spacing must have one entry for each of 2 axes, got \[1\.0\]"):
        surface_distances(mask((3, 3)), mask((3, 3)), [1.0])


def test_score_case_rows() -> None:
    label = torch.zeros(6, 6, 6, dtype=torch.long)
    label[1:4, 1:4, 1:4] = 1  # 27 voxels, no core
    wrong = torch.zeros_like(label)
    wrong[1:4, 1:4, 1:4] = 2
    rows = score_case(
        torch.stack([label, wrong]), label, case="p1", names=("a", "a+b"), regions=REGIONS, spacing=(1.0, 2.0, 5.0)
    )
    assert [tuple(row) for row in rows] == [SCORE_COLUMNS] * 4
    assert [(row["case"], row["combination"], row["region"]) for row in rows] == [
        ("p1", "a", "all"),
        ("p1", "a", "core"),
        ("p1", "a+b", "all"),
        ("p1", "a+b", "core"),
    ]
    assert [row["dice"] for row in rows] == [1, 1, 1, 0]
    assert [row["hd95_brats"] for row in rows] == [0, 0, 0, 373.13]
    assert [row["hd95_released"] for row in rows] == [0, 0, 0, 1.0]
    for column in ("hd95_mm", "assd_mm"):
        assert [math.isnan(row[column]) for row in rows] == [False, False, False, True]
    assert [row["prediction_ml"] for row in rows] == pytest.approx([0.27, 0, 0.27, 0.27])
    assert [row["label_ml"] for row in rows] == pytest.approx([0.27, 0, 0.27, 0])


def test_each_convention_has_its_percentile() -> None:
    label = mask((30, 30), *((row, column) for row in range(20) for column in range(20)))
    prediction = mask((30, 30), *((row, column) for row in range(10) for column in range(12)))
    settings = {"case": "p1", "names": ("a",), "regions": {"all": (1,)}, "spacing": (1.0, 2.0)}
    (row,) = score_case(prediction[None].long(), label.long(), **settings)
    distances = surface_distances(prediction, label, (1.0, 2.0))
    assert distances.hausdorff95 > distances.pooled_hausdorff95 > 1
    assert row["hd95_mm"] == row["hd95_brats"] == distances.hausdorff95
    assert row["hd95_released"] == distances.pooled_hausdorff95


def test_score_case_says_what_does_not_fit() -> None:
    maps = torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Case p1: predictions must be \[1, \.\.\.\], .* \(4, 4\), got \(2, 4, 4\)"):
        score_case(maps, maps[0], case="p1", names=("a",), regions=REGIONS, spacing=(1, 1))


def test_empty_distance_is_the_diagonal_of_a_brats_image() -> None:
    assert EMPTY_DISTANCE["brats"] == pytest.approx(math.hypot(240, 240, 155), abs=0.005)


def maps_of_two_cases() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Three combinations; the second case has no modality for the third."""
    label = torch.tensor([[0, 1, 2, 2]])
    half, none = torch.tensor([0, 1, 0, 2]), torch.full((4,), -1)
    return [torch.stack([label[0], half, half]), torch.stack([half, half, none])], [label, label]


def test_combination_dice_metric_averages_cases_before_combinations() -> None:
    metric = CombinationDiceMetric(REGIONS)
    scores = metric(*maps_of_two_cases())
    full, half = [1.0, 1.0], [4 / 5, 2 / 3]
    expected = torch.tensor([[*full, *half, *half], [*half, *half, math.nan, math.nan]])
    torch.testing.assert_close(scores, expected, equal_nan=True)
    per_combination = [(1 + 4 / 5) / 2, (1 + 2 / 3) / 2, *half, *half]
    assert metric.aggregate().item() == pytest.approx(np.mean(per_combination))


def test_combination_dice_metric_takes_batches_and_metatensors() -> None:
    predictions, labels = maps_of_two_cases()
    metric = CombinationDiceMetric(REGIONS)
    metric(MetaTensor(torch.stack(predictions)), MetaTensor(torch.stack(labels)))
    other = CombinationDiceMetric(REGIONS)
    other(predictions, labels)
    assert type(metric.get_buffer()) is torch.Tensor
    torch.testing.assert_close(metric.get_buffer(), other.get_buffer(), equal_nan=True)


def test_combination_dice_metric_in_an_engine() -> None:
    predictions, labels = maps_of_two_cases()
    items = [[{"pred": p, "label": y}] for p, y in zip(predictions, labels, strict=True)]
    engine = Engine(lambda _, batch: batch)
    handler = IgniteMetricHandler(
        metric_fn=CombinationDiceMetric(REGIONS), output_transform=from_engine(["pred", "label"])
    )
    handler.attach(engine, "mean_dice")
    engine.run(items)
    first = engine.state.metrics["mean_dice"]
    expected = CombinationDiceMetric(REGIONS)
    expected(predictions, labels)
    assert first == pytest.approx(expected.aggregate().item())
    assert vars(engine.state)["metric_details"]["mean_dice"].shape == (2, 6)
    engine.run(items[:1])  # an engine that validates again starts from nothing
    assert engine.state.metrics["mean_dice"] > first


def test_combination_dice_metric_errors() -> None:
    metric = CombinationDiceMetric(REGIONS)
    with pytest.raises(ValueError, match="nothing to aggregate"):
        metric.aggregate()
    with pytest.raises(ValueError, match=r"y must be \[1, 1, \.\.\.\] .*, got \(1, 2, 4\)"):
        metric([torch.zeros(3, 4)], [torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="regions must name at least one region"):
        CombinationDiceMetric({})


MODALITIES = ("x", "y")
AFFINE = torch.diag(torch.tensor([-2.0, 1.0, 4.0, 1.0]))


class ThreeMaps(torch.nn.Module):
    """Class maps of the combinations x, y, x+y: right, empty, right; -1 where the modalities are not there."""

    def forward(self, image: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
        right = image[:, :1].round()
        maps = torch.cat([right, torch.zeros_like(right), right], dim=1)
        for item, row in zip(maps, presence, strict=True):
            for index, combination in enumerate(combinations(2)):
                if (torch.from_numpy(combination) & ~row).any():
                    item[index] = -1
        return maps


def make_items(*presence: tuple[bool, bool]) -> list[dict[str, Any]]:
    label = torch.zeros(1, 5, 6, 7)
    label[0, 1:3, 2:4, 3:5] = 2
    image = MetaTensor(label.expand(2, -1, -1, -1).clone(), affine=AFFINE)
    return [
        {
            "case": f"00{n}",
            "image": image,
            "label": MetaTensor(label.long(), affine=AFFINE),
            "presence": torch.tensor(row),
        }
        for n, row in enumerate(presence)
    ]


def make_evaluator(
    items: list[dict[str, Any]],
    output_dir: Path,
    *,
    num_workers: int = 0,
    scores: CombinationScores | None = None,
    **arguments: Any,
) -> SupervisedEvaluator:
    if scores is None:
        scores = CombinationScores(output_dir, modalities=MODALITIES, regions=REGIONS, num_workers=num_workers)
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=2, num_workers=0),
        network=ThreeMaps(),
        prepare_batch=PrepareBatchExtraInput({"presence": "presence"}),
        val_handlers=[scores],
        **arguments,
    )


def test_combination_scores_writes_what_score_case_says(tmp_path: Path) -> None:
    output_dir = tmp_path / "new" / "evaluation"
    make_evaluator(make_items((True, True), (False, True), (True, True)), output_dir).run()
    scores = read_scores(output_dir / "scores.csv")
    assert tuple(scores) == SCORE_COLUMNS
    found = list(zip(scores["case"], scores["combination"], scores["region"], strict=True))
    names = {"000": ("x", "y", "x+y"), "001": ("y",), "002": ("x", "y", "x+y")}
    assert found == [(case, *pair) for case in names for pair in itertools.product(names[case], REGIONS)]
    right = scores["combination"].str.contains("x")
    assert (scores["dice"] == right.astype(float)).all()
    assert (scores["hd95_mm"].isna() == ~right).all()
    assert scores["label_ml"].to_numpy() == pytest.approx(8 * 8 / 1000)  # 8 voxels of 2 x 1 x 4 mm
    assert "| cases | 2 | 3 | 2 |" in (output_dir / "table.md").read_text(encoding="utf-8")


def test_combination_scores_starts_anew_with_each_run(tmp_path: Path) -> None:
    evaluator = make_evaluator(make_items((True, True)), tmp_path)
    evaluator.run()
    first = (tmp_path / "scores.csv").read_text(encoding="utf-8")
    evaluator.run()
    assert (tmp_path / "scores.csv").read_text(encoding="utf-8") == first


def test_combination_scores_are_the_same_from_other_processes(tmp_path: Path) -> None:
    items = make_items((True, True), (False, True), (True, False), (True, True), (True, True))
    for number, item in enumerate(items):
        item["confidence"] = torch.full((3, 5, 6, 7), 30_000 + number, dtype=torch.int16)

    def evaluator_of(folder: Path, num_workers: int) -> SupervisedEvaluator:
        scores = CombinationScores(
            folder, modalities=MODALITIES, regions=REGIONS, num_workers=num_workers, calibration=True
        )
        return make_evaluator(items, folder, scores=scores)

    evaluator_of(tmp_path / "here", 0).run()
    evaluator = evaluator_of(tmp_path / "workers", 1)
    for _ in range(2):  # a second run starts workers anew
        evaluator.run()
        for file in ("scores.csv", "calibration.csv", "scores.json", "table.md"):
            assert (tmp_path / "workers" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_combination_scores_keeps_the_cases_before_an_error(tmp_path: Path, num_workers: int) -> None:
    items = make_items((True, True), (True, True), (True, True), (True, True))
    for item in items[2:]:
        item["label"] = MetaTensor(torch.zeros(1, 5, 6, 3).long(), affine=AFFINE)
    with pytest.raises(ValueError, match="Case 002: predictions must be"):
        make_evaluator(items, tmp_path, num_workers=num_workers).run()
    assert read_scores(tmp_path / "scores.csv")["case"].unique().tolist() == ["000", "001"]
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"presence": None}, r"Case c: \['presence'\] is missing"),
        ({"label": None}, r"Case c: \['label'\] is missing"),
        ({"confidence": None}, r"Case c: \['confidence'\] is missing"),
        ({"pred": torch.zeros(1, 4, 4)}, r"Case c: pred must be \[3, \.\.\.\], .* got \(1, 4, 4\)"),
        ({"label": torch.zeros(2, 4, 4)}, r"Case c: pred must be .* and \(2, 4, 4\)"),
        ({}, r"Case c: neither pred nor label is a MetaTensor"),
    ],
)
def test_combination_scores_names_case_and_fault(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    maps = {"pred": torch.zeros(3, 4, 4), "confidence": torch.ones(3, 4, 4), "label": torch.zeros(1, 4, 4)}
    item = {"case": "c", "presence": [True, True]} | maps | change
    engine = Engine(lambda _, batch: batch)
    CombinationScores(tmp_path, modalities=MODALITIES, regions=REGIONS, calibration=True).attach(engine)
    with pytest.raises(ValueError, match=message):
        engine.run([[item]])


def test_combination_scores_takes_the_spacing_of_a_2d_label(tmp_path: Path) -> None:
    label = MetaTensor(torch.ones(1, 4, 5).long(), affine=torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0])))
    item = {"case": "c", "presence": [True, False], "pred": torch.ones(3, 4, 5).long(), "label": label}
    engine = Engine(lambda _, batch: batch)
    CombinationScores(tmp_path, modalities=MODALITIES, regions=REGIONS).attach(engine)
    engine.run([[item]])
    scores = read_scores(tmp_path / "scores.csv")
    assert scores["combination"].tolist() == ["x", "x"]
    assert scores["label_ml"].tolist() == pytest.approx([20 * 6 / 1000, 0])


def test_combination_scores_needs_decollated_output(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decollate=True"):
        make_evaluator(make_items((True, True)), tmp_path, decollate=False).run()


def test_combination_scores_refuses_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    handler = CombinationScores(tmp_path, modalities=MODALITIES, regions=REGIONS)
    with pytest.raises(RuntimeError, match="one process"):
        handler.attach(Engine(lambda _, batch: batch))


def test_combination_scores_names_combinations_in_order(tmp_path: Path) -> None:
    handler = CombinationScores(tmp_path, modalities=("p", "q", "r"), regions=REGIONS)
    assert handler.names == ["p", "q", "r", "p+q", "p+r", "q+r", "p+q+r"]


def test_combination_scores_writes_calibration_of_the_combinations_that_there_are(tmp_path: Path) -> None:
    items = make_items((True, True), (False, True))
    for item in items:
        item["confidence"] = torch.full((3, 5, 6, 7), FULL_CONFIDENCE, dtype=torch.int16)
        item["confidence"][:, 2:] = 0  # half of the object was not seen
    scores = CombinationScores(tmp_path, modalities=MODALITIES, regions=REGIONS, calibration=True)
    make_evaluator(items, tmp_path, scores=scores).run()
    table = pd.read_csv(tmp_path / "calibration.csv")
    assert list(table) == ["case", "combination", "ece"]
    assert table["combination"].tolist() == ["x", "y", "x+y", "y"]
    wrong = 4 / (2 * 6 * 7)  # the map of y is empty
    assert table["ece"].tolist() == pytest.approx([0, wrong, 0, wrong])


def test_combination_scores_has_the_calibration_error_before_and_after(tmp_path: Path) -> None:
    items = make_items((True, True), (True, True))
    for item in items:
        item["confidence"] = torch.full((3, 5, 6, 7), FULL_CONFIDENCE, dtype=torch.int16)
        item["calibrated_confidence"] = torch.full((3, 5, 6, 7), FULL_CONFIDENCE // 2, dtype=torch.int16)
        item["calibrated_confidence"][0] = 0  # x has no temperature
    scores = CombinationScores(tmp_path, modalities=MODALITIES, regions=REGIONS, calibration=True, calibrated=True)
    make_evaluator(items, tmp_path, scores=scores).run()
    table = pd.read_csv(tmp_path / "calibration.csv")
    assert list(table) == ["case", "combination", "ece", "ece_calibrated"]
    wrong = 8 / (5 * 6 * 7)  # the map of y is empty
    assert table["ece"].tolist() == pytest.approx([0, wrong, 0] * 2)
    expected = [math.nan, 1 - wrong - 0.5, 0.5] * 2
    assert table["ece_calibrated"].tolist() == pytest.approx(expected, abs=1e-4, nan_ok=True)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| before | 0.00 | 3.81 | 0.00 | 1.27 |" in text
    assert "| after | - | 46.19 | 50.00 | - |" in text


def test_remaining_are_the_cases_that_were_not_scored_with_the_same_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = make_items((True, True), (False, True), (True, True))
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"first")

    def run(cases: list[dict[str, Any]], **settings: Any) -> list[str]:
        scores = CombinationScores(tmp_path, modalities=MODALITIES, regions=REGIONS, weights=weights, settings=settings)
        remaining = scores.remaining(cases)
        if remaining:
            make_evaluator([dict(case) for case in remaining], tmp_path, scores=scores).run()
        return [case["case"] for case in remaining]

    assert run(items[:2]) == ["000", "001"]
    with caplog.at_level(logging.INFO):
        assert run(items) == ["002"]
    assert "2 of 3 cases were scored before, with the same weights and settings" in caplog.text
    assert read_scores(tmp_path / "scores.csv")["case"].unique().tolist() == ["000", "001", "002"]
    (tmp_path / "table.md").unlink()
    assert run(items) == []
    assert "3 cases." in (tmp_path / "table.md").read_text(encoding="utf-8")
    weights.write_bytes(b"second")
    assert run(items) == ["000", "001", "002"]
    assert "['weights_sha256'] have changed" in caplog.text
    assert run(items, section="validation") == ["000", "001", "002"]


def test_the_first_cases_are_kept_to_look_at(tmp_path: Path) -> None:
    items = make_items((True, True), (False, True), (True, True))
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"first")

    def run(keep_cases: int) -> list[str]:
        scores = CombinationScores(
            tmp_path, modalities=MODALITIES, regions=REGIONS, weights=weights, keep_cases=keep_cases
        )
        remaining = scores.remaining(items)
        if remaining:
            make_evaluator([dict(case) for case in remaining], tmp_path, scores=scores).run()
        return [case["case"] for case in remaining]

    run(keep_cases=0)
    assert not list(tmp_path.glob("maps/*"))
    before = read_scores(tmp_path / "scores.csv").sort_values(["case", "combination"], ignore_index=True)
    assert run(keep_cases=2) == ["000", "001"]
    assert run(keep_cases=2) == []
    after = read_scores(tmp_path / "scores.csv").sort_values(["case", "combination"], ignore_index=True)
    pd.testing.assert_frame_equal(before, after)
    cases = {path.stem: read_kept_case(path) for path in sorted(tmp_path.glob("maps/*.npz"))}
    assert [case.combinations.tolist() for case in cases.values()] == [["x", "y", "x+y"], ["y"]]
    assert [case.presence.tolist() for case in cases.values()] == [[True, True], [False, True]]
    label = items[0]["label"][0].numpy()[::-1]  # its first axis runs to the left
    np.testing.assert_array_equal(cases["000"].predictions, [label, 0 * label, label])
    np.testing.assert_array_equal(cases["000"].label, label)
    assert cases["000"].spacing.tolist() == [2, 1, 4]
    weights.write_bytes(b"second")
    run(keep_cases=0)
    assert not list(tmp_path.glob("maps/*"))


def evaluate_some(output_dir: Path, *, sleep_at: int | None = None) -> None:
    """Evaluate five cases, those that are not done yet; at one of them it may sleep for a very long time."""
    items = make_items(*[(True, True)] * 5)
    scores = CombinationScores(output_dir, modalities=MODALITIES, regions=REGIONS)
    evaluator = make_evaluator([dict(item) for item in scores.remaining(items)], output_dir, scores=scores)
    evaluator.add_event_handler(
        Events.ITERATION_STARTED, lambda engine: time.sleep(600) if engine.state.iteration == sleep_at else None
    )
    evaluator.run()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    evaluate_some(tmp_path / "whole")
    process = subprocess.Popen([sys.executable, __file__, str(tmp_path / "killed")])
    record = tmp_path / "killed" / "scores.json"
    deadline = time.monotonic() + 300
    while not record.is_file() or len(json.loads(record.read_text(encoding="utf-8"))["cases"]) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "table.md").exists()
    evaluate_some(tmp_path / "killed")
    for name in ("scores.csv", "scores.json", "table.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


if __name__ == "__main__":
    evaluate_some(Path(sys.argv[1]), sleep_at=2)


def turned(angle: float) -> torch.Tensor:
    cosine, sine = math.cos(angle), math.sin(angle)
    return torch.tensor([[cosine, -sine, 0, 0], [sine, cosine, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


# Columns are the axes of the array: 2, 1 and 4 mm, wherever they point to.
PERMUTED = torch.tensor([[0, 0, -4.0, 7], [2.0, 0, 0, 5], [0, 1.0, 0, 3], [0, 0, 0, 1]])
OBLIQUE = turned(0.5) @ AFFINE


@pytest.mark.parametrize("affine", [AFFINE, PERMUTED, OBLIQUE], ids=["straight", "permuted", "oblique"])
def test_distances_are_along_the_axes_of_the_array_wherever_these_point(affine: torch.Tensor, tmp_path: Path) -> None:
    (item,) = make_items((True, True))
    item["image"].affine = item["label"].affine = affine
    item["image"] = MetaTensor(item["image"].as_tensor().roll(1, dims=3), affine=affine)  # by one voxel of 4 mm
    evaluator = make_evaluator([item], tmp_path)
    evaluator.run()
    scores = pd.read_csv(tmp_path / "scores.csv")
    right = scores[(scores["combination"] == "x") & (scores["region"] == "all")]
    assert right["hd95_mm"].item() == pytest.approx(4.0, rel=1e-5)
    assert right["label_ml"].item() == pytest.approx(8 * 8 / 1000, rel=1e-5)
