from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from passion_monai.evaluation.statistics import overall
from passion_monai.evaluation.tables import (
    SCORE_COLUMNS,
    combination_table,
    overall_table,
    read_scores,
    report,
    summary,
)

MODALITIES, REGIONS = ("x", "y"), ("whole", "core")


def row(case: str, combination: str, region: str, dice: float, distance: float, **volumes: float) -> dict[str, Any]:
    brats, released = (373.13, 1.0) if math.isnan(distance) else (distance, distance)
    volumes = {"prediction_ml": 2.0, "label_ml": 3.0} | volumes
    values = (case, combination, region, dice, distance, brats, released, distance / 2, *volumes.values())
    return dict(zip(SCORE_COLUMNS, values, strict=True))


@pytest.fixture
def scores() -> pd.DataFrame:
    """Case 1 has both modalities, case 2 only x; of y there is nothing."""
    return pd.DataFrame(
        [
            row("1", "x", "whole", 0.5, 4.0),
            row("1", "x", "core", 0.0, math.nan, prediction_ml=0.0),
            row("1", "x+y", "whole", 0.9, 2.0),
            row("1", "x+y", "core", 0.7, 6.0),
            row("2", "x", "whole", 0.75, 5.0),
            row("2", "x", "core", 1.0, 0.0, prediction_ml=0.0, label_ml=0.0),
        ]
    )


def test_summary_means_and_numbers_of_cases(scores: pd.DataFrame) -> None:
    result = summary(scores)
    assert list(result) == [
        "combination",
        "region",
        "dice",
        "hd95_mm",
        "hd95_brats",
        "hd95_released",
        "assd_mm",
        "cases",
        "distance_cases",
    ]
    assert result.to_numpy().tolist() == [
        ["x", "whole", 0.625, 4.5, 4.5, 4.5, 2.25, 2, 2],
        ["x", "core", 0.5, 0.0, 373.13 / 2, 0.5, 0.0, 2, 1],
        ["x+y", "whole", 0.9, 2.0, 2.0, 2.0, 1.0, 1, 1],
        ["x+y", "core", 0.7, 6.0, 6.0, 6.0, 3.0, 1, 1],
    ]


def test_summary_without_the_cases_whose_label_lacks_a_region(scores: pd.DataFrame) -> None:
    core = summary(scores, exclude_empty=True).set_index(["combination", "region"]).loc[("x", "core")]
    assert core[["dice", "hd95_brats", "cases", "distance_cases"]].tolist() == [0.0, 373.13, 1, 0]
    assert core[["hd95_mm", "assd_mm"]].isna().all()
    assert len(summary(scores[scores["label_ml"] == 0], exclude_empty=True)) == 0


def test_dice_table_text(scores: pd.DataFrame) -> None:
    expected = """\
| x | ● | ○ | ● | Avg. |
| --- | :-: | :-: | :-: | --: |
| y | ○ | ● | ● |  |
| whole | 62.50 | - | 90.00 | 76.25 |
| core | 50.00 | - | 70.00 | 60.00 |
| mean | 56.25 | - | 80.00 | 68.12 |
| cases | 2 | 0 | 1 |  |"""
    assert combination_table(scores, modalities=MODALITIES, regions=REGIONS) == expected


@pytest.mark.parametrize(
    ("metric", "core"),
    [
        ("hd95_mm", "| core | 0.00 | - | 6.00 | 3.00 |"),
        ("hd95_brats", "| core | 186.56 | - | 6.00 | 96.28 |"),
        ("hd95_released", "| core | 0.50 | - | 6.00 | 3.25 |"),
    ],
)
def test_distance_table_counts_empty_masks_by_convention(scores: pd.DataFrame, metric: str, core: str) -> None:
    table = combination_table(scores, modalities=MODALITIES, regions=REGIONS, metric=metric)
    assert core in table.splitlines()
    assert "| whole | 4.50 | - | 2.00 | 3.25 |" in table.splitlines()


@pytest.mark.parametrize(
    ("metric", "core", "mean", "cases"),
    [
        ("dice", "0.00 | - | 70.00 | 35.00", "31.25 | - | 80.00 | 55.62", "1 | 0 | 1"),
        ("assd_mm", "- | - | 3.00 | 3.00", "- | - | 2.00 | 2.31", "0 | 0 | 1"),
    ],
)
def test_excluded_table_counts_the_cases_of_each_region(
    scores: pd.DataFrame, metric: str, core: str, mean: str, cases: str
) -> None:
    arguments = {"modalities": MODALITIES, "regions": REGIONS, "metric": metric}
    lines = combination_table(scores, exclude_empty=True, **arguments).splitlines()
    expected = [f"| core | {core} |", f"| mean | {mean} |", "| cases, whole | 2 | 0 | 1 |  |"]
    assert lines[-4:] == [*expected, f"| cases, core | {cases} |  |"]


def test_overall_table_has_means_and_intervals(scores: pd.DataFrame) -> None:
    lines = overall_table(scores).splitlines()
    assert lines[0] == "|  | whole | core | all |"
    mean, low, high = (100 * overall(scores, "dice")[name] for name in ("mean", "low", "high"))
    assert mean.tolist() == pytest.approx([76.25, 60.0, 68.125])
    cells = [f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in zip(mean, low, high, strict=True)]
    assert lines[2] == f"| Dice [%] | {' | '.join(cells)} |"
    assert lines[-1].split(" | ")[0] == "| ASSD [mm], convention 'excluded'"
    assert "| 3.00 |" in lines[-1]  # of one case, without an interval


def test_table_has_a_column_for_each_of_15_combinations(scores: pd.DataFrame) -> None:
    table = combination_table(scores, modalities=("x", "y", "z", "w"), regions=REGIONS)
    assert {line.count("|") for line in table.splitlines()} == {18}
    assert table.count("●") == 32


def test_table_of_nothing_is_dashes(scores: pd.DataFrame) -> None:
    table = combination_table(scores[:0], modalities=MODALITIES, regions=REGIONS)
    assert table.splitlines()[-2:] == ["| mean | - | - | - | - |", "| cases | 0 | 0 | 0 |  |"]


def test_unknown_metric(scores: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"metric must be one of \['dice', 'hd95_mm', .*\], got 'iou'"):
        combination_table(scores, modalities=MODALITIES, regions=REGIONS, metric="iou")


def test_report_has_all_tables_and_says_how_empties_count(scores: pd.DataFrame) -> None:
    text = report(scores, modalities=MODALITIES, regions=iter(REGIONS))
    arguments = {"modalities": MODALITIES, "regions": REGIONS}
    for metric in ("dice", "hd95_brats", "hd95_released"):
        assert combination_table(scores, metric=metric, **arguments) in text
    for metric in ("dice", "hd95_mm", "assd_mm"):
        assert combination_table(scores, metric=metric, exclude_empty=True, **arguments) in text
    assert overall_table(scores) in text
    assert "2 cases." in text
    assert "- Both masks are empty in 1 of 6 pairs: Dice 100 %, distance 0 mm.\n- Exactly one is empty in 1:" in text
    assert "373.13 mm where exactly one mask is empty" in text
    assert "1 mm where exactly one mask is empty" in text


def test_read_scores_keeps_names_as_text(tmp_path: Path) -> None:
    frame = pd.DataFrame([row("001", "NA", "whole", 0.5, math.nan)])
    frame.to_csv(tmp_path / "scores.csv", index=False)
    pd.testing.assert_frame_equal(read_scores(tmp_path / "scores.csv"), frame)


def test_read_scores_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No scores at .*scores\.csv; run the evaluate workflow first"):
        read_scores(tmp_path / "scores.csv")
    (tmp_path / "scores.csv").write_text("case,combination,region,dice\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"scores\.csv: columns \['hd95_mm', .*\] are missing"):
        read_scores(tmp_path / "scores.csv")
