"""Lesion-wise scores: what panoptica says, what is made of it, and where it goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from passion_monai.evaluation import case_scores, metrics
from passion_monai.evaluation.case_scores import surface_distances
from passion_monai.evaluation.dice import dice
from passion_monai.evaluation.lesions import check_panoptica, lesion_scores
from passion_monai.evaluation.metrics import CombinationScores
from passion_monai.evaluation.tables import EMPTY_DISTANCE, LESION_COLUMNS, SCORE_COLUMNS, combination_table

SPACING = (1.0, 1.0, 2.0)
LOST = EMPTY_DISTANCE["brats"]


def boxes(*corners: tuple[int, int, int]) -> torch.Tensor:
    """Boxes of 4 x 3 x 3 voxels."""
    mask = torch.zeros(30, 24, 20, dtype=torch.bool)
    for x, y, z in corners:
        mask[x : x + 4, y : y + 3, z : z + 3] = True
    return mask


def one(mask: torch.Tensor, corner: tuple[int, int, int]) -> torch.Tensor:
    """What of a mask is near a corner."""
    part = torch.zeros_like(mask)
    region = tuple(slice(max(c - 3, 0), c + 7) for c in corner)
    part[region] = mask[region]
    return part


class TestPanoptica:
    """Of the package itself; with it, these run."""

    @pytest.fixture(autouse=True)
    def panoptica(self) -> Any:
        return pytest.importorskip("panoptica")

    def test_means_over_lesions_that_are_matched_missed_and_false(self):
        label, prediction = boxes((2, 2, 2), (15, 2, 2), (24, 18, 14)), boxes((3, 2, 2), (15, 3, 3), (2, 18, 14))
        pairs = [(one(prediction, corner), one(label, corner)) for corner in ((2, 2, 2), (15, 2, 2))]
        scores = lesion_scores(prediction, label, SPACING)
        assert scores["lesion_dice"] == pytest.approx(sum(dice(*pair) for pair in pairs) / 4)
        distances = [surface_distances(*pair, SPACING) for pair in pairs]
        # One box lies as far from the other in both directions, by whichever way the percentile is taken.
        expected = [distance.pooled_hausdorff95 for distance in distances]
        assert expected == [distance.hausdorff95 for distance in distances]
        assert scores["lesion_hd95"] == pytest.approx((sum(expected) + 2 * LOST) / 4)
        counts = [scores[name] for name in ("lesions_matched", "lesions_missed", "lesions_false")]
        assert counts == [2, 1, 1]

    @pytest.mark.parametrize("seed", range(3))
    def test_they_are_made_of_what_the_package_says(self, panoptica: Any, seed: int):
        generator = torch.Generator().manual_seed(seed)
        label = torch.rand(20, 18, 12, generator=generator) < 0.02
        prediction = label.roll(1, 0) | (torch.rand(label.shape, generator=generator) < 0.01)
        evaluator = panoptica.Panoptica_Evaluator(
            expected_input=panoptica.InputType.SEMANTIC,
            instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),
            instance_matcher=panoptica.MaxBipartiteMatching(panoptica.Metric.DSC, 1e-6),
            instance_metrics=[panoptica.Metric.DSC, panoptica.Metric.HD95],
            global_metrics=[],
        )
        arrays = (mask.numpy().astype("uint8") for mask in (prediction, label))
        (result,) = evaluator.evaluate(*arrays, voxelspacing=SPACING).values()
        lesions = result.tp + result.fp + result.fn
        assert min(result.tp, result.fp, result.fn) > 0
        expected = [result.tp * result.sq_dsc / lesions]
        expected += [(result.tp * result.sq_hd95 + LOST * (result.fp + result.fn)) / lesions]
        expected += [result.tp, result.fn, result.fp]
        assert list(lesion_scores(prediction, label, SPACING).values()) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("prediction", "label", "expected"),
        [
            (boxes(), boxes(), [1, 0, 0, 0, 0]),
            (boxes((2, 2, 2), (15, 2, 2)), boxes(), [0, LOST, 0, 0, 2]),
            (boxes(), boxes((2, 2, 2)), [0, LOST, 0, 1, 0]),
            (boxes((15, 2, 2)), boxes((2, 2, 2)), [0, LOST, 0, 1, 1]),
        ],
    )
    def test_where_no_lesion_is_matched(self, prediction: torch.Tensor, label: torch.Tensor, expected: list[float]):
        assert list(lesion_scores(prediction, label, SPACING).values()) == expected

    def test_voxels_that_touch_at_a_corner_are_one_lesion(self):
        mask = torch.zeros(6, 6, 6, dtype=torch.bool)
        mask[1, 1, 1] = mask[2, 2, 2] = True
        assert lesion_scores(mask, mask, SPACING)["lesions_matched"] == 1

    def test_nothing_is_printed(self, capsys: pytest.CaptureFixture[str]):
        lesion_scores(boxes((2, 2, 2)), boxes((2, 2, 2)), SPACING)
        assert capsys.readouterr().out == ""

    def test_workers_score_lesions_too(self, tmp_path: Path):
        for number in (0, 1):
            run(tmp_path / str(number), num_workers=number, lesionwise=True)
        texts = [(tmp_path / str(number) / "scores.csv").read_text() for number in (0, 1)]
        assert texts[0] == texts[1]


def run(folder: Path, **settings: Any) -> pd.DataFrame:
    """Scores of one case with a label of two lesions, of which "x" finds one, "y" none and both together two."""
    label = boxes((2, 2, 2), (15, 2, 2))
    maps = torch.stack([boxes((2, 2, 2)), boxes(), label]).long()
    affine = torch.diag(torch.tensor([*SPACING, 1.0]))
    item = {"case": "c", "presence": [True, True], "pred": maps, "label": MetaTensor(label[None].long(), affine=affine)}
    engine = Engine(lambda _, batch: batch)
    CombinationScores(folder, modalities=("x", "y"), regions={"tumour": (1,)}, **settings).attach(engine)
    engine.run([[item]])
    return pd.read_csv(folder / "scores.csv")


def test_without_it_there_is_no_column_more(tmp_path: Path):
    assert tuple(run(tmp_path)) == SCORE_COLUMNS
    assert "esion" not in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_columns_and_tables_of_what_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fake(prediction: torch.Tensor, label: torch.Tensor, spacing: list[float]) -> dict[str, float]:
        assert list(spacing) == list(SPACING)
        found = float(prediction.sum() / label.sum())
        return dict(zip(LESION_COLUMNS, (found, 100 * (1 - found), 2 * found, 2 - 2 * found, 0), strict=True))

    monkeypatch.setattr(metrics, "check_panoptica", lambda: None)
    monkeypatch.setattr(case_scores, "lesion_scores", fake)
    scores = run(tmp_path, lesionwise=True)
    assert tuple(scores) == (*SCORE_COLUMNS, *LESION_COLUMNS)
    assert scores["lesion_dice"].tolist() == [0.5, 0, 1]
    assert scores["lesions_missed"].tolist() == [1, 2, 0]
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "## Lesion-wise Dice [%]: mean over lesions, 0 for one that is missed or false" in text
    assert "## Lesion-wise HD95 [mm]: mean over lesions, 373.13 mm" in text
    assert "| tumour | 50.00 | 0.00 | 100.00 | 50.00 |" in text
    assert "| Lesion-wise Dice [%] | 50.00 | 50.00 |" in text


def test_a_table_of_what_was_not_scored_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"metric must be one of .* got 'lesion_dice'"):
        combination_table(run(tmp_path), modalities=("x", "y"), regions=("tumour",), metric="lesion_dice")


def test_without_the_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "panoptica", None)
    with pytest.raises(ImportError, match=r'pip install "passion-monai\[lesionwise\]"'):
        check_panoptica()
    with pytest.raises(ImportError, match="lesionwise needs panoptica"):
        CombinationScores(tmp_path, modalities=("x", "y"), regions={"tumour": (1,)}, lesionwise=True)
